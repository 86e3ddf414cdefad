package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

// A derivedOrigin is the origin as the chain sees it: the repository, and for derived blobs, which no
// registry has, the layer they are made from. Re-framing is deterministic, so that what is made
// again is the same blob.
type derivedOrigin struct {
	o  *opener
	mu sync.Mutex
	// from is the layers that derived blobs are made from, by derived blob.
	from map[ztoc.Digest]origin.Descriptor
	// layers reads them. It is not the chain whose flights wait here: a flight that waited for another of the same chain
	// would hold the place that the other needs. Nil until a derived blob has to be made again.
	layers *fetch.Chain
}

func (d *derivedOrigin) enter(blob ztoc.Digest, layer origin.Descriptor) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.from[blob] = layer
}

// Blob opens bytes r of a blob. Those of a derived blob are made by re-framing its layer from the
// beginning, which happens only after it was evicted under a live mount.
func (d *derivedOrigin) Blob(ctx context.Context, blob ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	layer, layers := d.made(blob)
	if layers == nil {
		return d.o.Repo.Blob(ctx, blob, r)
	}
	src, err := layers.Stream(ctx, layer.Ref())
	if err != nil {
		return nil, err
	}
	pr, pw := io.Pipe()
	go func() {
		defer src.Close()
		_, _, err := ztoc.Derive(src, &window{w: pw, skip: r.Start, left: r.Len()}, d.o.buildOptions(layer))
		switch {
		case errors.Is(err, errEnough):
			err = nil
		case err != nil && ctx.Err() == nil:
			_ = layers.Reject(layer.Ref(), ztoc.Range{End: layer.Size}, err) // what is stored of it may have rotted
		}
		pw.CloseWithError(err) // ends the reader; nil is io.EOF
	}()
	return pr, nil
}

// made is the layer that a blob is made from and the chain to read it with; nil when the repository has the blob itself.
func (d *derivedOrigin) made(blob ztoc.Digest) (origin.Descriptor, *fetch.Chain) {
	d.mu.Lock()
	defer d.mu.Unlock()
	layer, ok := d.from[blob]
	if !ok {
		return layer, nil
	}
	if d.layers == nil {
		d.layers = d.o.newChain(repoOrigin{d.o.Repo})
	}
	return layer, d.layers
}

// Close ends what is being made. The chain above must have been closed.
func (d *derivedOrigin) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.layers == nil {
		return nil
	}
	return d.layers.Close()
}

// Reject has a range that was wrong come from elsewhere: another server of the repository, or for a derived blob its layer, fetched
// again, because the rot may be anywhere before it.
func (d *derivedOrigin) Reject(blob ztoc.Digest, r ztoc.Range, cause error) {
	if layer, layers := d.made(blob); layers != nil {
		_ = layers.Reject(layer.Ref(), ztoc.Range{End: layer.Size}, cause) // how often is counted for the derived blob
		return
	}
	repoOrigin{d.o.Repo}.Reject(blob, r, cause)
}

// A repoOrigin is a repository as a chain sees it.
type repoOrigin struct{ origin.Repository }

// Reject tells the repository that a range it gave was wrong, where it can go elsewhere.
func (o repoOrigin) Reject(blob ztoc.Digest, r ztoc.Range, cause error) {
	if repo, ok := o.Repository.(fetch.Rejecter); ok {
		repo.Reject(blob, r, cause)
	}
}

// errEnough ends a re-framing whose rest nobody needs.
var errEnough = errors.New("enough")

// A window passes on left bytes after skipping some.
type window struct {
	w          io.Writer
	skip, left int64
}

func (w *window) Write(p []byte) (int, error) {
	n := len(p)
	k := min(w.skip, int64(len(p)))
	w.skip -= k
	p = p[k:]
	p = p[:min(w.left, int64(len(p)))]
	if len(p) > 0 {
		if _, err := w.w.Write(p); err != nil {
			return 0, err
		}
		w.left -= int64(len(p))
	}
	if w.left == 0 {
		return n, errEnough
	}
	return n, nil
}

// derive re-frames a layer into a derived blob in the store and returns its view.
func (o *opener) derive(r io.Reader, opts ztoc.BuildOptions) (*ztoc.Ztoc, error) {
	// The blob's name is known when its last byte is, so it is written aside first, to a file without a
	// name: nothing is left of it whatever happens.
	fd, err := unix.Open(o.Store.Dir(), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "make a temporary file in", Path: o.Store.Dir(), Err: err}
	}
	tmp := os.NewFile(uintptr(fd), o.Store.Dir()+"/(derived)")
	defer tmp.Close()
	z, _, err := ztoc.Derive(r, tmp, opts)
	if err != nil {
		return nil, err
	}
	return z, o.adopt(tmp, ztoc.BlobRef{Digest: z.Blob, Size: z.BlobSize})
}

// adopt copies a file into the store as blob ref.
func (o *opener) adopt(f *os.File, ref ztoc.BlobRef) error {
	b, err := o.Store.Blob(ref)
	if err != nil {
		return err
	}
	defer b.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < ref.Size; {
		n, err := f.ReadAt(buf[:min(int64(len(buf)), ref.Size-off)], off)
		if n == 0 && err != nil {
			return err
		}
		switch err := b.WriteAt(buf[:n], off); {
		case errors.Is(err, store.ErrNoSpace):
			// Reads of it will be slow, each made from the layer; they will not be wrong.
			o.Log.Warn("a derived blob is not kept: reads of its layer start from the beginning each time",
				"blob", ref.Digest, "bytes", ref.Size, "cause", err)
			return nil
		case err != nil:
			return fmt.Errorf("keeping a derived blob: %w", err)
		}
		off += int64(n)
	}
	return nil
}

func (o *opener) hasBlob(ref ztoc.BlobRef) bool {
	b, err := o.Store.Blob(ref)
	if err != nil {
		return false
	}
	defer b.Close()
	return b.Complete()
}
