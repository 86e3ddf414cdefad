package agent

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

// A shelf is the store as the agent sees it: blobs of which one can be told when bytes arrive. Whatever the agent writes goes
// through it.
type shelf struct {
	store *store.Store

	writing, written atomic.Int64 // nanoseconds spent writing, of all writers together, and bytes

	mu     sync.Mutex
	blobs  map[ztoc.Digest]*held     // an entry has at least one user
	proven map[ztoc.Digest]time.Time // when a blob was hashed and matched, and is not known to have lost anything since
}

// provenFor is how long a blob that has matched its digest is not hashed again for the next job. Reads are checked against tables in any case.
const provenFor = 10 * time.Minute

// hasProof notes that all of the blob was hashed and matched.
func (h *held) hasProof() {
	h.shelf.mu.Lock()
	defer h.shelf.mu.Unlock()
	for d, at := range h.shelf.proven {
		if time.Since(at) > provenFor {
			delete(h.shelf.proven, d)
		}
	}
	h.shelf.proven[h.ref.Digest] = time.Now()
}

// lately reports whether the blob is here whole and was proven a short time ago. What arrives for it, because something was dropped or evicted,
// ends that.
func (h *held) lately() bool {
	h.shelf.mu.Lock()
	at, ok := h.shelf.proven[h.ref.Digest]
	h.shelf.mu.Unlock()
	return ok && time.Since(at) < provenFor && h.has(h.whole())
}

// A held is a blob of the store while somebody uses it.
type held struct {
	shelf *shelf
	ref   ztoc.BlobRef
	blob  *store.Blob
	users int // guarded by shelf.mu

	mu       sync.Mutex
	watchers map[*watcher]struct{}
}

// A watcher is told of what arrives.
type watcher struct{ f func(ztoc.Range) }

func newShelf(st *store.Store) *shelf {
	return &shelf{store: st, blobs: map[ztoc.Digest]*held{}, proven: map[ztoc.Digest]time.Time{}}
}

// open gives a blob, which close must be called for.
func (s *shelf) open(ref ztoc.BlobRef) (*held, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.blobs[ref.Digest]
	if h != nil && h.ref.Size != ref.Size {
		return nil, fmt.Errorf("blob %s has %d bytes, not %d: %w", ref.Digest, h.ref.Size, ref.Size, ztoc.ErrMismatch)
	}
	if h == nil {
		b, err := s.store.Blob(ref)
		if err != nil {
			return nil, err
		}
		h = &held{shelf: s, ref: ref, blob: b, watchers: map[*watcher]struct{}{}}
		s.blobs[ref.Digest] = h
	}
	h.users++
	return h, nil
}

// find gives a blob that somebody uses, or that the store has; nil if there is none.
func (s *shelf) find(d ztoc.Digest) *held {
	s.mu.Lock()
	h := s.blobs[d]
	if h != nil {
		h.users++
	}
	s.mu.Unlock()
	if h != nil {
		return h
	}
	ref, ok := s.store.Find(d)
	if !ok {
		return nil
	}
	h, err := s.open(ref)
	if err != nil {
		return nil
	}
	return h
}

// close ends a use.
func (h *held) close() {
	h.shelf.mu.Lock()
	defer h.shelf.mu.Unlock()
	if h.users--; h.users > 0 {
		return
	}
	delete(h.shelf.blobs, h.ref.Digest)
	_ = h.blob.Close()
}

// WriteAt stores bytes, as store.Blob does, and tells who watches.
func (h *held) WriteAt(p []byte, off int64) error {
	h.shelf.mu.Lock()
	delete(h.shelf.proven, h.ref.Digest)
	h.shelf.mu.Unlock()
	began := time.Now()
	err := h.blob.WriteAt(p, off)
	h.shelf.writing.Add(int64(time.Since(began)))
	h.shelf.written.Add(int64(len(p)))
	h.tell(ztoc.Range{Start: off, End: off + int64(len(p))})
	return err
}

// Watch has f called for each range that arrives, or will not come after all, until stop is called.
func (h *held) Watch(f func(ztoc.Range)) (stop func()) {
	w := &watcher{f}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers[w] = struct{}{}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.watchers, w)
	}
}

// tell tells all who watch to look at r again.
func (h *held) tell(r ztoc.Range) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		w.f(r)
	}
}

// whole is the range of the whole blob.
func (h *held) whole() ztoc.Range { return ztoc.Range{End: h.ref.Size} }

// has reports whether all of r is here.
func (h *held) has(r ztoc.Range) bool { return len(h.blob.Missing(r)) == 0 }

// wait waits until all of r is here.
func (h *held) wait(ctx context.Context, r ztoc.Range) error {
	if h.has(r) {
		return nil
	}
	moved := make(chan struct{}, 1)
	stop := h.Watch(func(got ztoc.Range) {
		if got.Start < r.End && r.Start < got.End {
			select {
			case moved <- struct{}{}:
			default:
			}
		}
	})
	defer stop()
	for !h.has(r) {
		select {
		case <-moved:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// read is all of a small blob, which is here.
func (h *held) read() ([]byte, error) {
	b := make([]byte, h.ref.Size)
	return b, h.blob.ReadAt(b, 0)
}

// inOrder reads the blob from its beginning, waiting for what is not here yet.
func (h *held) inOrder(ctx context.Context) io.Reader { return &orderReader{ctx: ctx, h: h} }

type orderReader struct {
	ctx context.Context
	h   *held
	off int64
}

// orderStep is how many bytes an orderReader waits for at once: what arrives as one frame or more.
const orderStep = 256 << 10

func (r *orderReader) Read(p []byte) (int, error) {
	n := min(int64(len(p)), orderStep, r.h.ref.Size-r.off)
	if n <= 0 {
		return 0, io.EOF
	}
	for {
		if err := r.h.wait(r.ctx, ztoc.Range{Start: r.off, End: r.off + n}); err != nil {
			return 0, err
		}
		if r.h.blob.ReadAt(p[:n], r.off) == nil {
			r.off += n
			return int(n), nil
		}
		if err := r.ctx.Err(); err != nil { // evicted between looking and reading: somebody has to bring it again
			return 0, err
		}
	}
}
