package image

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/ztoc"
)

// IndexOptions say what goes into an index.
type IndexOptions struct {
	// MinLayer leaves out layers smaller than this many bytes; they are fetched whole anyway. 0: 4 MiB.
	MinLayer int64
	// SOCISpan is the span size of the tables in SOCI's form, bytes. Each span carries 32 KiB of window there and all of a
	// table is fetched before a mount, so small spans that are right for packed tables (a fiftieth of that)
	// are wrong for SOCI. 0: 4 MiB, SOCI's own default.
	SOCISpan int64
	// PlainSOCI leaves out what only muster reads (packed tables, profile).
	PlainSOCI bool
}

// An Index is a SOCI version 1 index of an image, ready to be pushed. SOCI reads it; muster finds its packed
// tables beside SOCI's and the start-up profile, if one was recorded.
type Index struct {
	Digest   ztoc.Digest  `json:"digest"`
	Subject  ztoc.Digest  `json:"subject"` // the image's manifest
	Layers   []IndexLayer `json:"layers"`
	Profile  int64        `json:"profileBytes"` // 0: none
	Manifest []byte       `json:"-"`
	blobs    map[ztoc.Digest][]byte
}

// An IndexLayer says what an index has of one layer.
type IndexLayer struct {
	Digest ztoc.Digest `json:"digest"`
	Size   int64       `json:"size"`
	SOCI   int64       `json:"sociBytes"`        // of the ztoc in SOCI's form; 0: not in that form
	Packed int64       `json:"packedBytes"`      // of the ztoc in muster's form; 0: none
	Reason string      `json:"reason,omitempty"` // why the layer is not in the index, or not for SOCI
}

// ociManifest is an OCI image manifest with its fields in the order in which SOCI writes them: it
// writes what it has read again and expects the same digest. Hence no artifactType either.
type ociManifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Subject       *descriptor       `json:"subject,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

// emptyConfig is the config blob of every index; its identity is its media type.
const emptyConfig = "{}"

// sociSpan is the span size SOCI's own tool uses.
const sociSpan = 4 << 20

// MakeIndex makes an index of the image. Packed tables are those it was opened with; for SOCI's, layers are read
// once more.
func (im *Image) MakeIndex(ctx context.Context, o IndexOptions) (*Index, error) {
	if o.MinLayer <= 0 {
		o.MinLayer = WholeBelow
	}
	if o.SOCISpan <= 0 {
		o.SOCISpan = sociSpan
	}
	x := &Index{Subject: im.Resolved.Digest, blobs: map[ztoc.Digest][]byte{}}
	m := ociManifest{
		SchemaVersion: 2,
		MediaType:     origin.MediaTypeManifest,
		Config:        x.blob(origin.MediaTypeSOCIv1, []byte(emptyConfig), nil),
		Layers:        []descriptor{},
		Subject:       &descriptor{MediaType: im.Resolved.MediaType, Digest: string(im.Resolved.Digest), Size: int64(len(im.Resolved.Manifest))},
		Annotations:   map[string]string{sociBuildTool: im.o.Tool},
	}
	var packed []descriptor
	for i, l := range im.Resolved.Layers {
		il := IndexLayer{Digest: l.Digest, Size: l.Size}
		z, _ := im.config.Layers[i].Ztoc.(*ztoc.Ztoc)
		switch {
		case duplicateOf(im.Resolved.Layers, i) >= 0:
			il.Reason = "the same blob as a layer below"
		case l.Size < o.MinLayer:
			il.Reason = "small: fetched whole"
		case z.Blob != l.Digest:
			il.Reason = "it has no restart points in the registry's form"
		case z.Format.Chunked():
			il.Reason = z.Format.String() + " brings its own table"
		default:
			soci, err := im.forSOCI(ctx, l, z, o.SOCISpan)
			switch {
			case errors.Is(err, ztoc.ErrUnsupported):
				il.Reason = fmt.Sprintf("not for SOCI: %v", err)
			case err != nil:
				return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
			default:
				il.SOCI = int64(len(soci))
				m.Layers = append(m.Layers, x.blob(origin.MediaTypeZtoc, soci, map[string]string{
					sociLayerDigest: string(l.Digest),
					sociLayerType:   l.MediaType,
					sociSpanSize:    strconv.FormatInt(o.SOCISpan, 10),
				}))
			}
			if o.PlainSOCI {
				break
			}
			b, err := ztoc.Pack(z)
			if err != nil {
				return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
			}
			il.Packed = int64(len(b))
			packed = append(packed, x.blob(packedZtoc, b, map[string]string{packedLayer: string(l.Digest)}))
		}
		x.Layers = append(x.Layers, il)
	}
	m.Layers = append(m.Layers, packed...)
	if !o.PlainSOCI {
		if p := im.keptProfile(); len(p) > 0 {
			m.Layers = append(m.Layers, x.blob(startProfile, p, nil))
			x.Profile = int64(len(p))
		}
	}
	if len(m.Layers) == 0 {
		return nil, fmt.Errorf("image %s: %w: no layer needs an index (%s)", im.Resolved.Ref, ErrNoIndexNeeded, reasons(x.Layers))
	}
	var err error
	if x.Manifest, err = json.Marshal(m); err != nil {
		return nil, err
	}
	x.Digest = ztoc.DigestOf(x.Manifest)
	return x, nil
}

// ErrNoIndexNeeded says that an index of the image would be empty.
var ErrNoIndexNeeded = errors.New("nothing to index")

// forSOCI is the table of a layer in SOCI's form. ErrUnsupported: that form cannot say what the layer is.
func (im *Image) forSOCI(ctx context.Context, l origin.Descriptor, z *ztoc.Ztoc, span int64) ([]byte, error) {
	if z.SpanSize == span || z.Format != ztoc.FormatGzip {
		return ztoc.EncodeSOCI(z)
	}
	opts := im.o.buildOptions(l)
	opts.SpanSize = span
	z, err := im.o.streamed(ctx, l, func(r io.Reader) (*ztoc.Ztoc, error) {
		z, _, err := ztoc.Build(r, opts)
		return z, err
	})
	if err != nil {
		return nil, err
	}
	return ztoc.EncodeSOCI(z)
}

func (x *Index) blob(mediaType string, b []byte, annotations map[string]string) descriptor {
	d := ztoc.DigestOf(b)
	x.blobs[d] = b
	return descriptor{MediaType: mediaType, Digest: string(d), Size: int64(len(b)), Annotations: annotations}
}

// Push uploads the index beside the image: its blobs, then its manifest, entered as a referrer of the
// image (by the registry, or in the fallback tag where it cannot).
func (x *Index) Push(ctx context.Context, repo origin.Repository) error {
	for d, b := range x.blobs {
		err := repo.PushBlob(ctx, ztoc.BlobRef{Digest: d, Size: int64(len(b))}, func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(b)), nil
		})
		if err != nil {
			return err
		}
	}
	_, err := repo.PushManifest(ctx, origin.MediaTypeManifest, x.Manifest, "")
	return err
}

// A ListedIndex is an index found beside an image.
type ListedIndex struct {
	Digest  ztoc.Digest `json:"digest"`
	Version string      `json:"version"` // of SOCI's format: "v1" by referrers, "v2" named by the manifest
	Layers  int         `json:"layers"`  // with a ztoc in either form
	Packed  int         `json:"packed"`  // of them in muster's form
	Bytes   int64       `json:"bytes"`   // what muster would fetch
	Profile bool        `json:"profile"`
	Reason  string      `json:"reason,omitempty"` // why it cannot be used

	// Covers is the bytes of the table that muster would fetch, by layer.
	Covers map[ztoc.Digest]int64 `json:"covers,omitempty"`
}

// ListIndexes looks for the indexes beside the image repo was opened for. None is no error; why then
// says what the registry answered.
func ListIndexes(ctx context.Context, repo origin.Repository, platform string) (list []ListedIndex, why string, err error) {
	img, err := repo.Resolve(ctx, platform)
	if err != nil {
		return nil, "", err
	}
	found, why, err := origin.ListIndexes(ctx, repo, img)
	for _, f := range found {
		l := ListedIndex{Digest: f.Digest, Version: fmt.Sprintf("v%d", f.Version), Reason: f.Reason}
		l.fill(withPacked(f.Index))
		list = append(list, l)
	}
	return list, cmp.Or(why, "the image has no index"), err
}

func (l *ListedIndex) fill(ix *foundIndex) {
	for layer, d := range ix.Ztocs {
		l.Layers++
		if _, ok := ix.packed[layer]; !ok {
			l.Bytes += d.Size
		}
	}
	for layer, d := range ix.packed {
		l.Packed++
		l.Bytes += d.Size
		if _, ok := ix.Ztocs[layer]; !ok {
			l.Layers++
		}
	}
	if ix.profile != nil {
		l.Profile = true
		l.Bytes += ix.profile.Size
	}
}

func reasons(layers []IndexLayer) string {
	if len(layers) == 0 {
		return "it has no layers"
	}
	return layers[0].Reason
}
