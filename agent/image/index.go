package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/ztoc"
)

// What SOCI writes beside an image and this package writes too (see package origin for reading it).
const (
	sociLayerDigest = "com.amazon.soci.image-layer-digest"
	sociLayerType   = "com.amazon.soci.image-layer-mediaType"
	sociSpanSize    = "com.amazon.soci.span-size"
	sociBuildTool   = "com.amazon.soci.build-tool-identifier"
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

// A foundIndex is an index beside an image, with what only muster reads in it.
type foundIndex struct {
	origin.Index
	packed  map[ztoc.Digest]origin.Descriptor // by layer
	profile *origin.Descriptor
}

// findIndex looks for an index beside img. There being none, or none that can be used, is no error:
// it returns nil and a reason for the report.
func findIndex(ctx context.Context, repo origin.Repository, img origin.Image) (*foundIndex, string) {
	x, why, err := origin.FindIndex(ctx, repo, img)
	switch {
	case err != nil:
		return nil, fmt.Sprintf("looking for an index: %v", err)
	case x.Empty():
		return nil, cmp.Or(why, "the image has no index")
	}
	return withPacked(x), ""
}

// withPacked sorts out what only muster reads. Types it does not know are passed over, and so is a second
// table for one layer.
func withPacked(x origin.Index) *foundIndex {
	ix := &foundIndex{Index: x, packed: map[ztoc.Digest]origin.Descriptor{}}
	for _, d := range x.Others {
		switch d.MediaType {
		case startProfile:
			ix.profile = &d
		case packedZtoc:
			layer, err := ztoc.ParseDigest(d.Annotations[packedLayer])
			if _, have := ix.packed[layer]; err == nil && !have {
				ix.packed[layer] = d
			}
		}
	}
	return ix
}

// A descriptor is OCI's, as far as an index manifest needs it, in the order in which SOCI writes it.
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
		if d, ok = ix.Ztocs[layer.Digest]; !ok {
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
