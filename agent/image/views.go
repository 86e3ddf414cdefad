package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

// A Mode is how a layer got its view, and so whether it can be mounted before it was pulled.
type Mode string

// The modes of a layer.
const (
	ModeKept    Mode = "kept"    // its ztoc was here from an earlier time
	ModeIndex   Mode = "index"   // a SOCI index beside the image has its ztoc
	ModeTOC     Mode = "toc"     // eStargz or zstd:chunked: it brings its own table
	ModePulled  Mode = "pulled"  // fetched whole; its ztoc was built on the way
	ModeDerived Mode = "derived" // fetched whole and re-framed, for want of restart points
)

// Lazy reports whether a layer in this mode was mounted without being fetched.
func (m Mode) Lazy() bool { return m == ModeKept || m == ModeIndex || m == ModeTOC }

// A LayerReport says how one layer was opened.
type LayerReport struct {
	Digest    ztoc.Digest `json:"digest"`
	Size      int64       `json:"size"` // of the blob, bytes
	MediaType string      `json:"mediaType"`
	Format    string      `json:"format"`
	Mode      Mode        `json:"mode"`
	Reason    string      `json:"reason,omitempty"` // why it is not lazier
	Index     int64       `json:"indexBytes"`       // fetched for its table
	Spans     int         `json:"spans"`
	Inflated  int64       `json:"inflatedBytes"`
}

// A view is a layer that can be mounted: its table, and the blob the table is about.
type view struct {
	ztoc    *ztoc.Ztoc
	report  LayerReport
	entries func() ([]ztoc.Entry, error) // of ztoc, decoded once
}

// id names what offsets in v count from and which spans they fall into.
func (v *view) id() string {
	return fmt.Sprintf("%s %s %s %d", v.report.Digest.Hex(), v.ztoc.Format, v.ztoc.Blob.Hex(), v.ztoc.NumEntries())
}

// form says what offsets in v count in: the layer's tar archive, or the chunks of a table of its own.
func (v *view) form() string {
	if v.ztoc.Format.Chunked() {
		return "chunks"
	}
	return "tar"
}

// blob is what spans of v are fetched from: the layer itself, or the blob derived from it.
func (v *view) blob() ztoc.BlobRef { return ztoc.BlobRef{Digest: v.ztoc.Blob, Size: v.ztoc.BlobSize} }

// WholeBelow is the size under which a layer is fetched whole instead of being looked for in an
// index: a round trip costs more than its bytes.
const WholeBelow = 4 << 20

// findViews gives each layer the cheapest view there is without fetching the layer. Layers without
// one keep a nil ztoc and the reason.
func (o *opener) findViews(ctx context.Context) ([]*view, error) {
	views := make([]*view, len(o.img.Layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * maxPulls)
	index := sync.OnceValues(func() (*foundIndex, string) {
		if o.NoIndex {
			return nil, "an index was not looked for"
		}
		ix, why := findIndex(ctx, o.Repo, o.img)
		o.index = ix
		return ix, why
	})
	for i, l := range o.img.Layers {
		v := &view{report: LayerReport{Digest: l.Digest, Size: l.Size, MediaType: l.MediaType}}
		views[i] = v
		if z := o.keptZtoc(l); z != nil {
			if z.Blob != l.Digest {
				o.derived.enter(z.Blob, l)
			}
			v.use(z, ModeKept, 0)
			continue
		}
		if sameAs := duplicateOf(o.img.Layers, i); sameAs >= 0 {
			continue // filled in when its first occurrence is known
		}
		g.Go(func() error {
			z, bytes, mode, reason := o.findView(ctx, l, index)
			if z == nil {
				v.report.Reason = reason
				if l.Size < WholeBelow && ctx.Err() == nil && !o.surveying {
					// Fetched whole in any case: beside the tables of the others, not after them.
					o.Progress.expect(l.Digest, l.Size)
					return o.pull(ctx, l, v, 1)
				}
				return ctx.Err()
			}
			v.use(o.keepZtoc(l.Digest, z), mode, bytes)
			v.decode()
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, v := range views {
		if v.report.Mode == ModeIndex {
			o.documents += v.report.Index
		}
	}
	if o.index != nil {
		o.documents += o.index.Bytes
	}
	return views, nil
}

func (v *view) use(z *ztoc.Ztoc, mode Mode, indexBytes int64) {
	v.ztoc = z
	v.entries = sync.OnceValues(z.Entries)
	v.report.Mode = mode
	v.report.Index = indexBytes
	v.report.Format = z.Format.String()
	v.report.Spans = z.NumSpans()
	v.report.Inflated = z.InflatedSize
}

// decode decodes the entries of a view that was not here before, so that there is most likely no table kept either
// and they are needed: now, while other layers' tables are on their way. What fails will fail again in openTable.
func (v *view) decode() { _, _ = v.entries() }

// duplicateOf is the first layer with the same blob as layer i, or -1 if i is the first.
func duplicateOf(layers []origin.Descriptor, i int) int {
	for j := range i {
		if layers[j].Digest == layers[i].Digest {
			return j
		}
	}
	return -1
}

// findView looks for a table of l that somebody else made. The reason says why there is none.
func (o *opener) findView(ctx context.Context, l origin.Descriptor, index func() (*foundIndex, string)) (*ztoc.Ztoc, int64, Mode, string) {
	if o.Repo.RangesIgnored() {
		return nil, 0, "", "the origin ignores ranges, so a layer can only be fetched whole"
	}
	z, n, err := o.ownTOC(ctx, l)
	if err == nil {
		return z, n, ModeTOC, ""
	}
	reason := ""
	if !errors.Is(err, errNoTOC) {
		reason = fmt.Sprintf("its own table of contents cannot be used: %v; ", err)
	}
	if l.Size < WholeBelow {
		return nil, 0, "", reason + "small layers are fetched whole"
	}
	ix, why := index()
	if ix == nil {
		return nil, 0, "", reason + why
	}
	z, n, err = ix.ztocOf(ctx, o.Repo, l)
	if err != nil {
		return nil, 0, "", reason + fmt.Sprintf("index %.19s: %v", ix.Digest, err)
	}
	return z, n, ModeIndex, ""
}

// errNoTOC says that a layer does not claim to bring a table of its own.
var errNoTOC = errors.New("no table of contents")

// ownTOC reads the table an eStargz or zstd:chunked layer brings. Only a table whose digest stands in
// the manifest is believed; without it such a layer is gzip or zstd like any other.
func (o *opener) ownTOC(ctx context.Context, l origin.Descriptor) (*ztoc.Ztoc, int64, error) {
	blob := &blobReader{ctx: ctx, chain: o.chain, ref: l.Ref()}
	var z *ztoc.Ztoc
	var err error
	switch digest := l.Annotations[ztoc.EStargzDigestAnnotation]; {
	case strings.HasSuffix(l.MediaType, "zstd"):
		z, err = ztoc.ParseZstdChunked(blob, l.Size, l.Annotations)
		if errors.Is(err, ztoc.ErrUnsupported) && blob.n == 0 {
			return nil, 0, errNoTOC
		}
	case digest != "":
		var d ztoc.Digest
		if d, err = ztoc.ParseDigest(digest); err == nil {
			z, err = ztoc.ParseEStargz(blob, l.Size, d)
		}
	default:
		return nil, 0, errNoTOC
	}
	if err != nil {
		return nil, blob.n, err
	}
	z.Blob = l.Digest
	return z, blob.n, nil
}

// A blobReader reads a blob through the chain as an io.ReaderAt.
type blobReader struct {
	ctx   context.Context
	chain chainReader
	ref   ztoc.BlobRef
	n     int64
}

type chainReader interface {
	ReadAt(ctx context.Context, ref ztoc.BlobRef, p []byte, off int64, pri ztoc.Priority) error
}

func (b *blobReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > b.ref.Size {
		return 0, io.ErrUnexpectedEOF
	}
	if err := b.chain.ReadAt(b.ctx, b.ref, p, off, ztoc.Demand); err != nil {
		return 0, err
	}
	b.n += int64(len(p))
	return len(p), nil
}

// keptZtoc is the ztoc kept for a layer, mapped, or nil. One that does not decode is dropped: it is
// torn, or written by a version that packs differently.
func (o *opener) keptZtoc(l origin.Descriptor) *ztoc.Ztoc {
	z, err := o.mapZtoc(l.Digest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		o.Log.Warn("dropping a kept ztoc", "layer", l.Digest, "cause", err)
		return nil
	}
	if z.Blob != l.Digest {
		// A derived view needs its blob: nobody else has it.
		if !o.hasBlob(ztoc.BlobRef{Digest: z.Blob, Size: z.BlobSize}) {
			return nil
		}
	} else if z.BlobSize != l.Size {
		return nil
	}
	return z
}

func (o *opener) mapZtoc(layer ztoc.Digest) (*ztoc.Ztoc, error) {
	f, err := o.Store.Get(store.KindZtoc, layer.Hex())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := o.maps.add(f)
	if err != nil {
		return nil, err
	}
	return ztoc.Unpack(b)
}

// keepZtoc packs z into the store, so that no later mount on this host has to look for it, and gives the
// kept one, which costs no private memory. Failing to is not an error: this mount has z.
func (o *opener) keepZtoc(layer ztoc.Digest, z *ztoc.Ztoc) *ztoc.Ztoc {
	b, err := ztoc.Pack(z)
	if err == nil {
		err = o.Store.PutBytes(store.KindZtoc, layer.Hex(), b)
	}
	if err == nil {
		var kept *ztoc.Ztoc
		if kept, err = o.mapZtoc(layer); err == nil {
			return kept
		}
	}
	o.notKept("a ztoc is not kept", err, "layer", layer)
	return z
}

// requireLazy is the error for layers that would have to be fetched whole, nil if there is none.
func requireLazy(ref string, views []*view) error {
	var why []string
	for _, v := range views {
		if v.ztoc == nil && v.report.Size >= WholeBelow {
			why = append(why, fmt.Sprintf("%.19s (%.1f MB): %s", v.report.Digest, float64(v.report.Size)/1e6, v.report.Reason))
		}
	}
	if len(why) == 0 {
		return nil
	}
	return fmt.Errorf("image %s: %w: %s; push an index with `muster index push`, or allow a first pull",
		ref, ErrNotLazy, strings.Join(why, "; "))
}
