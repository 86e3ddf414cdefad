package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/ztoc"
)

// What SOCI writes beside an image (shared by versions 1 and 2; see docs/design.md section 5).
const (
	sociIndexV1       = "application/vnd.amazon.soci.index.v1+json"
	sociIndexV2       = "application/vnd.amazon.soci.index.v2+json"
	sociZtoc          = "application/octet-stream"
	sociLayerDigest   = "com.amazon.soci.image-layer-digest"
	sociLayerType     = "com.amazon.soci.image-layer-mediaType"
	sociSpanSize      = "com.amazon.soci.span-size"
	sociIndexDigest   = "com.amazon.soci.index-digest"
	sociBuildTool     = "com.amazon.soci.build-tool-identifier"
	sociManifestOfImg = "com.amazon.soci.image-manifest-digest"
)

// What muster adds to a SOCI index: the same tables in packed form (ztoc.Pack), a fifth of the size,
// and the start-up profile. They are further layers of the index manifest, under types of their own, which
// SOCI passes over.
const (
	packedZtoc   = "application/vnd.muster.ztoc.v1"
	startProfile = "application/vnd.muster.profile.v1"
	packedLayer  = "hpc.muster.layer-digest"
)

// maxIndexBlob bounds one table of an index: 180,000 files and 3,000 spans need 81 MB.
const maxIndexBlob = 1 << 30

// A foundIndex is an index beside an image: for each layer that it covers, where its table is.
type foundIndex struct {
	Digest  ztoc.Digest
	size    int64                             // of its manifest, bytes
	packed  map[ztoc.Digest]origin.Descriptor // by layer
	soci    map[ztoc.Digest]origin.Descriptor // by layer
	profile *origin.Descriptor
}

// findIndex looks for an index beside img. There being none, or none that can be used, is no error:
// it returns nil and a reason for the report.
func findIndex(ctx context.Context, repo origin.Repository, img origin.Image) (*foundIndex, string) {
	if s := firstNonEmpty(img.Annotations[sociIndexDigest], img.IndexDescriptor.Annotations[sociIndexDigest]); s != "" {
		ix, err := readIndex(ctx, repo, s)
		if err == nil {
			return ix, ""
		}
		// A single-platform copy of an image keeps the annotation and loses the index.
		return nil, fmt.Sprintf("the index the manifest names cannot be used: %v", err)
	}
	refs, err := repo.Referrers(ctx, img.Digest, sociIndexV1)
	if err != nil {
		return nil, fmt.Sprintf("looking for an index: %v", err)
	}
	reason := firstNonEmpty(refs.Reason, "the image has no index")
	// Where there are several, SOCI leaves the choice open. Any is right, so take the first that has
	// our packed tables, else the first that can be read.
	var found *foundIndex
	for _, d := range refs.Manifests {
		ix, err := readIndex(ctx, repo, string(d.Digest))
		if err != nil {
			reason = fmt.Sprintf("index %.19s cannot be used: %v", d.Digest, err)
			continue
		}
		if len(ix.packed) > 0 {
			return ix, ""
		}
		if found == nil {
			found = ix
		}
	}
	if found != nil {
		return found, ""
	}
	return nil, reason
}

// errNotIndex says that a manifest is not a SOCI index.
var errNotIndex = errors.New("not a SOCI index")

func readIndex(ctx context.Context, repo origin.Repository, digest string) (*foundIndex, error) {
	d, err := ztoc.ParseDigest(digest)
	if err != nil {
		return nil, err
	}
	m, err := repo.Manifest(ctx, string(d))
	if err != nil {
		return nil, err
	}
	return parseIndex(m)
}

// parseIndex reads a SOCI index manifest. Blobs it does not know are passed over, entries for a layer
// that has one already too.
func parseIndex(m origin.Manifest) (*foundIndex, error) {
	var doc struct {
		ArtifactType string       `json:"artifactType"`
		Config       descriptor   `json:"config"`
		Layers       []descriptor `json:"layers"`
		Blobs        []descriptor `json:"blobs"` // of the withdrawn OCI artifact manifest, which early SOCI wrote
	}
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotIndex, err)
	}
	kind := firstNonEmpty(doc.ArtifactType, doc.Config.MediaType)
	if kind != sociIndexV1 && kind != sociIndexV2 {
		return nil, fmt.Errorf("%w: its type is %.80q", errNotIndex, kind)
	}
	ix := &foundIndex{Digest: m.Digest, size: int64(len(m.Body)), packed: map[ztoc.Digest]origin.Descriptor{}, soci: map[ztoc.Digest]origin.Descriptor{}}
	for _, b := range append(doc.Layers, doc.Blobs...) {
		digest, err := ztoc.ParseDigest(b.Digest)
		if err != nil || b.Size <= 0 || b.Size > maxIndexBlob {
			return nil, fmt.Errorf("%w: blob %.80q of %d bytes", errNotIndex, b.Digest, b.Size)
		}
		od := origin.Descriptor{MediaType: b.MediaType, Digest: digest, Size: b.Size, Annotations: b.Annotations}
		switch b.MediaType {
		case startProfile:
			ix.profile = &od
		case packedZtoc:
			enter(ix.packed, b.Annotations[packedLayer], od)
		case sociZtoc:
			enter(ix.soci, b.Annotations[sociLayerDigest], od)
		}
	}
	return ix, nil
}

func enter(m map[ztoc.Digest]origin.Descriptor, layer string, d origin.Descriptor) {
	l, err := ztoc.ParseDigest(layer)
	if err != nil {
		return
	}
	if _, ok := m[l]; !ok {
		m[l] = d
	}
}

// A descriptor is OCI's, as far as an index manifest needs it.
type descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	ArtifactType string            `json:"artifactType,omitempty"`
}

// ztocOf fetches the table of one layer, the packed form if there is one. The digests of the chain
// manifest → descriptor → blob are checked; that the table is about this layer is checked by its size
// here, and by each span's digest later.
func (ix *foundIndex) ztocOf(ctx context.Context, repo origin.Repository, layer origin.Descriptor) (*ztoc.Ztoc, int64, error) {
	d, packed := ix.packed[layer.Digest]
	if !packed {
		var ok bool
		if d, ok = ix.soci[layer.Digest]; !ok {
			return nil, 0, errNoEntry
		}
	}
	b, err := origin.ReadBlob(ctx, repo, d, maxIndexBlob)
	if err != nil {
		return nil, 0, err
	}
	decode := ztoc.DecodeSOCI
	if packed {
		decode = ztoc.Unpack
	}
	z, err := decode(b)
	if err != nil {
		return nil, 0, err
	}
	if z.Blob == "" {
		z.Blob = layer.Digest
	}
	if z.Blob != layer.Digest || z.BlobSize != layer.Size {
		return nil, 0, fmt.Errorf("%w: it describes a blob of %d bytes, the layer has %d", ztoc.ErrIndex, z.BlobSize, layer.Size)
	}
	return z, d.Size, nil
}

// errNoEntry says that an index does not cover a layer: indexes are sparse, small layers are left out.
var errNoEntry = errors.New("the index does not cover this layer")

func firstNonEmpty(s ...string) string {
	for _, v := range s {
		if strings.TrimSpace(v) != "" {
			return v
		}
	}
	return ""
}
