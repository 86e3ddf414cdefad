package fetch

import (
	"context"
	"errors"
	"slices"
	"sort"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A class orders flights: lower ones go first.
type class uint8

const (
	demand class = iota
	streaming
	prefetch
	classes
)

func (cl class) String() string { return [...]string{"demand", "stream", "prefetch"}[cl] }

const (
	chunkSize = 256 << 10 // stored at once; a multiple of the block size
	blockSize = 4 << 10

	keepDemand = 3 << 20 // held by a flight whose bytes the store does not keep
	keepOther  = 1 << 20

	// demandAhead is how far ahead of a running prefetch or stream a demand read may be and still wait for
	// it. Further away it gets a request of its own, which costs a round trip.
	demandAhead = 1 << 20

	followUnits = 4 // how many units more a small demand read fetches where it goes on from what is present

	nearlyDone = 512 << 10 // a flight with less than that, and a quarter of it, to come is not cancelled

	prefetchStart = 1 << 20 // bytes of the first requests of a Prefetch call

	// streamStall is how long a stream may wait for its reader before it gives its place among the requests
	// to others. Without that, readers that wait for each other's streams would wait for ever.
	streamStall = 2 * time.Second

	maxStream = 1 << 30 // bytes of one request of a Stream
)

// A flight is one fetch of a range, queued or running. All fields are guarded by Chain.mu, but for what is said.
type flight struct {
	b     *blob
	class class
	force bool  // fetched even if the store says that it is present
	start int64 // where the request began
	pos   int64 // [pos, end) is still to come
	end   int64

	base int64  // buf is the bytes [base, pos): arrived and not in the store
	buf  []byte // appended to by the running goroutine only; others read up to len under the lock

	state    state
	dead     bool // taken off the blob's list; nobody joins it any more
	unstored bool // the store did not keep a chunk: no more is written to it
	rejected []ztoc.Range
	claimed  ztoc.Range    // announced to other processes and not stored yet
	blocker  ztoc.Range    // another process's claim that it waits for
	since    time.Time     // when blocker was first seen like that
	want     *want         // of the Prefetch call that asked for it; nil otherwise
	stream   *stream       // that it runs ahead of; nil otherwise
	moved    chan struct{} // capacity 1: the stream's reader has moved, or somebody waits
	cancel   context.CancelFunc
	ctx      context.Context
}

type state uint8

const (
	queued state = iota
	running
)

// A want is one Prefetch call's, or Stream's, interest in its flights. Guarded by Chain.mu.
type want struct {
	gone    bool
	flights int         // on the list now
	begun   int         // started so far
	stop    func() bool // forgets the context's end, when there are no more flights; may be nil
}

// hold counts one more flight that wants bytes for w, which may be nil; let is its end. The last one lets go of the context.
func (w *want) hold() {
	if w != nil {
		w.flights++
	}
}

func (w *want) let() {
	if w == nil {
		return
	}
	if w.flights--; w.flights == 0 && w.stop != nil {
		w.stop()
	}
}

// A waiter is a reader waiting for bytes. Fields are guarded by Chain.mu until done is closed.
type waiter struct {
	p      []byte
	off    int64        // of p in the blob
	stored bool         // waits until bytes are in the store, and wants none of them itself: p is nil
	need   []ztoc.Range // still to come, in order
	err    error
	done   chan struct{}
}

// errAgain tells a waiter that what it waits for may be in the store by now, or needs another flight.
var errAgain = errors.New("look again")

// take copies what w needs of data, which lies at off of the blob, and says whether w has all.
func (w *waiter) take(off int64, data []byte) bool {
	d := ztoc.Range{Start: off, End: off + int64(len(data))}
	if len(w.need) == 0 || w.need[0].Start >= d.End || w.need[len(w.need)-1].End <= d.Start {
		return len(w.need) == 0
	}
	rest := make([]ztoc.Range, 0, len(w.need)+1)
	for _, r := range w.need {
		got := r.Intersect(d)
		if got.Empty() {
			rest = append(rest, r)
			continue
		}
		if !w.stored {
			copy(w.p[got.Start-w.off:got.End-w.off], data[got.Start-off:got.End-off])
		}
		rest = addRange(rest, ztoc.Range{Start: r.Start, End: got.Start})
		rest = addRange(rest, ztoc.Range{Start: got.End, End: r.End})
	}
	w.need = rest
	return len(rest) == 0
}

// needs reports whether w waits for a byte of r.
func (w *waiter) needs(r ztoc.Range) bool {
	return !r.Empty() && slices.ContainsFunc(w.need, func(n ztoc.Range) bool { return n.Start < r.End && r.Start < n.End })
}

// finish ends the wait of w.
func (b *blob) finish(w *waiter, err error) {
	delete(b.waiters, w)
	w.err = err
	close(w.done)
}

// wake ends the wait of all that need bytes of r.
func (b *blob) wake(r ztoc.Range, err error) {
	for w := range b.waiters {
		if w.needs(r) {
			b.finish(w, err)
		}
	}
}

// awaited reports whether somebody waits for a byte of r.
func (b *blob) awaited(r ztoc.Range) bool {
	for w := range b.waiters {
		if w.needs(r) {
			return true
		}
	}
	return false
}

// toCome is what the flight has still to fetch.
func (f *flight) toCome() ztoc.Range { return ztoc.Range{Start: f.pos, End: f.end} }

// holds reports whether a joiner may take bytes of todo from the flight's buffer.
func (f *flight) holds(todo []ztoc.Range) bool {
	if len(f.buf) == 0 {
		return false
	}
	for _, bad := range f.rejected {
		for _, r := range todo {
			if !bad.Intersect(r).Empty() {
				return false
			}
		}
	}
	return true
}

// far reports whether a demand read at pos should not wait for the flight to get there.
func (f *flight) far(pos int64) bool {
	return f.class != demand && (f.state == queued || pos-f.pos > demandAhead)
}

// waits reports whether nothing has come of a running prefetch.
func (f *flight) waits() bool {
	return f.class == prefetch && f.state == running && f.pos == f.start && f.end > f.pos
}

// at is the index of the first flight with a byte to come at or after pos.
func (b *blob) at(pos int64) int {
	return sort.Search(len(b.flights), func(i int) bool { return b.flights[i].end > pos })
}
