package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A Store keeps blobs. See agent/store.
type Store interface {
	// Blob opens the stored part of a blob. An error means that nothing of it is kept.
	Blob(ref ztoc.BlobRef) (Blob, error)
}

// StoreFunc makes a Store of a function, for stores whose Blob method returns a type of its own.
type StoreFunc func(ref ztoc.BlobRef) (Blob, error)

// Blob calls f.
func (f StoreFunc) Blob(ref ztoc.BlobRef) (Blob, error) { return f(ref) }

// A Blob is the stored part of one blob. Its methods may be called at the same time.
type Blob interface {
	// Missing is the ranges of whole blocks (4 KiB, the last one cut at the blob's end) that r touches and that are
	// absent: merged, in order.
	Missing(r ztoc.Range) []ztoc.Range
	// ReadAt fills p from off, or fails when any of it is absent.
	ReadAt(p []byte, off int64) error
	// WriteAt keeps the blocks that p covers wholly. An error means that they were not kept.
	WriteAt(p []byte, off int64) error
	// Drop forgets the blocks that r touches.
	Drop(r ztoc.Range)
	Close() error
}

// A Claimer is a Blob that other processes fetch into as well. Claims are advice: they keep the processes
// of a host from fetching the same range at the same moment.
type Claimer interface {
	// Claim announces that this process fetches r. When another process has announced some of it, nothing
	// is announced, and by is the first such range. A claim ends with its process.
	Claim(r ztoc.Range) (by ztoc.Range, ok bool)
	// Release ends what Claim announced.
	Release(r ztoc.Range)
}

// A Warmer is a Blob that can be told what will be read soon, so that it is in memory by then.
type Warmer interface {
	WillNeed(r ztoc.Range)
}

// An Origin has every byte of every blob.
type Origin interface {
	// Blob is a body of exactly r.Len() bytes; reading it fails if it is cut short. It ends when ctx does.
	Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error)
}

// priorityKey is where the context of Origin.Blob has the flight's priority.
type priorityKey struct{}

// Priority is that of the flight for which Origin.Blob was called.
func Priority(ctx context.Context) ztoc.Priority {
	if p, ok := ctx.Value(priorityKey{}).(ztoc.Priority); ok {
		return p
	}
	return ztoc.Demand
}

// A Rejecter is an Origin that can go elsewhere (another mirror) after wrong bytes.
type Rejecter interface {
	Reject(d ztoc.Digest, r ztoc.Range, cause error)
}

// Errors that callers decide on.
var (
	// ErrWrong says that a range came wrong so often that there is no use in asking again.
	ErrWrong = errors.New("wrong bytes")
	// ErrClosed says that the chain was closed.
	ErrClosed = errors.New("fetch: closed")
)

// Options say what a chain is made of and its limits. Zero values give the defaults.
type Options struct {
	Store  Store  // nil: nothing is kept
	Origin Origin // must be set

	// Requests is the most requests to the origin at once. Too few and latency is not hidden; too many and a slow
	// registry becomes slower. Default 8.
	Requests int
	// Reserved of them serve demand only, so that a reader never waits for a prefetch to end. Default a quarter,
	// at least 1.
	Reserved int
	// Unit is what a smaller read is widened to, aligned. Too small and each read pays a round trip; too large and
	// it waits for, and pays, bytes nobody asked for. A multiple of 4 KiB. Default 256 KiB.
	Unit int64
	// Whole is the size up to which any read fetches the whole blob. Default 1 MiB.
	Whole int64
	// MaxDemand and MaxPrefetch bound one request, in bytes. Default 4 and 8 MiB.
	MaxDemand, MaxPrefetch int64
	// Ahead is how far ahead of its reader a Stream may run, in bytes. It has to fit the store's quota
	// with room to spare. Default 16 MiB.
	Ahead int64

	// Yield is how long a flight waits while another process of the host fetches the same range and nothing
	// of it arrives. Too short and slow registries are asked twice, too long and a stopped process holds up
	// others. Default 10 s.
	Yield time.Duration

	// PatientPrefetch says that the origin may let a prefetch wait, for bytes that are on their way to it: a demand read does not join one of which
	// nothing has come yet.
	PatientPrefetch bool

	// Temporary says whether an error of the origin may go away by itself. Nil: none does.
	Temporary func(error) bool
	// Patience is how long a read goes on asking after temporary errors before it gives up. Too short and
	// an outage becomes EIO in a job, too long and a job hangs on a dead registry. Default 5 minutes.
	Patience time.Duration

	// OnEvent is told of each request to the origin when it starts and when it ends. It is called from several
	// goroutines and must not block. May be nil.
	OnEvent func(Event)
}

func (o Options) withDefaults() Options {
	set := func(v *int64, def int64) {
		if *v <= 0 {
			*v = def
		}
	}
	if o.Requests <= 0 {
		o.Requests = 8
	}
	if o.Reserved <= 0 {
		o.Reserved = max(1, o.Requests/4)
	}
	o.Reserved = min(o.Reserved, o.Requests-1)
	set(&o.Unit, 256<<10)
	set(&o.Whole, 1<<20)
	set(&o.MaxDemand, 4<<20)
	set(&o.MaxPrefetch, 8<<20)
	set(&o.Ahead, 16<<20)
	if o.Yield <= 0 {
		o.Yield = 10 * time.Second
	}
	if o.Patience <= 0 {
		o.Patience = 5 * time.Minute
	}
	return o
}

// A Chain gets ranges of blobs. Its methods may be called at the same time.
type Chain struct {
	o      Options
	ctx    context.Context // of all flights
	cancel context.CancelFunc
	wg     sync.WaitGroup // running flights

	blobs sync.Map // ztoc.BlobRef → *blob

	storeBytes, storeReads atomic.Int64 // of Stats; reads that the store serves take no lock

	mu      sync.Mutex
	queue   [classes][]*flight // queued; an entry that is not queued any more is skipped
	running [classes]int
	parked  [classes]int // queued flights that wait for another process; they are in no queue
	closed  bool
	stats   Stats
}

// A blob is what a chain knows about one blob.
type blob struct {
	ref ztoc.BlobRef

	opening sync.Mutex  // held while the store is asked
	tried   time.Time   // when the store was asked last; guarded by opening
	soon    atomic.Bool // openSoon is at it
	kept    keeper

	// Guarded by Chain.mu.
	flights []*flight // queued and running, by end; [pos, end) never overlap
	waiters map[*waiter]struct{}
	rejects map[ztoc.Range]*reject
}

// New makes a chain. Close must be called.
func New(o Options) *Chain {
	c := &Chain{o: o.withDefaults()}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Close ends all fetching: readers get ErrClosed, requests are cancelled and waited for.
func (c *Chain) Close() error {
	c.mu.Lock()
	c.closed = true
	c.cancel()
	c.blobs.Range(func(_, v any) bool {
		b := v.(*blob)
		for w := range b.waiters {
			b.finish(w, ErrClosed)
		}
		for _, f := range b.flights {
			f.dead = true
		}
		b.flights = nil
		return true
	})
	c.queue = [classes][]*flight{}
	c.mu.Unlock()
	c.wg.Wait()
	var errs []error
	c.blobs.Range(func(_, v any) bool {
		errs = append(errs, v.(*blob).kept.close())
		return true
	})
	return errors.Join(errs...)
}

// ReadAt fills p from off of the blob. It returns when the bytes are there, when ctx ends, or with the
// origin's error. The bytes are not proven.
func (c *Chain) ReadAt(ctx context.Context, ref ztoc.BlobRef, p []byte, off int64, pri ztoc.Priority) error {
	cl := demand
	if pri == ztoc.Prefetch {
		cl = prefetch
	}
	b, err := c.blob(ref, ztoc.Range{Start: off, End: off + int64(len(p))})
	if err != nil || len(p) == 0 {
		return err
	}
	return c.read(ctx, b, reading{p: p, off: off}, []ztoc.Range{{Start: off, End: off + int64(len(p))}}, cl, nil)
}

// ErrNotKept says that bytes came and the store did not keep them.
var ErrNotKept = errors.New("not kept by the store")

// Ensure brings r of the blob into the store. It returns when all of it is there, when ctx ends, or with the origin's
// error; ErrNotKept when the store does not take it. What was asked for with one call goes out in few, long
// requests (Options.MaxPrefetch for a prefetch).
func (c *Chain) Ensure(ctx context.Context, ref ztoc.BlobRef, r ztoc.Range, pri ztoc.Priority) error {
	cl := demand
	if pri == ztoc.Prefetch {
		cl = prefetch
	}
	b, err := c.blob(ref, r)
	if err != nil || r.Empty() {
		return err
	}
	if b.kept.get() == nil {
		return fmt.Errorf("blob %s: %w", ref.Digest, ErrNotKept)
	}
	return c.read(ctx, b, reading{off: r.Start}, []ztoc.Range{r}, cl, nil)
}

// Give stores bytes that came another way, and hands them to whoever waits for them. An error says that the store did
// not keep them.
func (c *Chain) Give(ref ztoc.BlobRef, p []byte, off int64) error {
	b, err := c.blob(ref, ztoc.Range{Start: off, End: off + int64(len(p))})
	if err != nil {
		return err
	}
	kept := error(ErrNotKept)
	if st := b.kept.get(); st != nil {
		kept = st.WriteAt(p, off)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for w := range b.waiters {
		if w.stored && kept != nil {
			continue
		}
		if w.take(off, p) {
			b.finish(w, nil)
		}
	}
	return kept
}

// A reading is where the bytes of a read go: into p, which lies at off of the blob, or, with p nil, only into the store.
type reading struct {
	p   []byte
	off int64
}

// storeTries is how often a read believes the store's presence before it goes past it: presence may say yes
// and reading fail for ever, on a disk that breaks.
const storeTries = 8

// read is ReadAt and Ensure for all classes: store, join a flight, look again, origin.
func (c *Chain) read(ctx context.Context, b *blob, to reading, todo []ztoc.Range, cl class, s *stream) error {
	var failing time.Time // when the first of a row of temporary errors came
	for try := 0; ; try++ {
		trust := try < storeTries
		if trust {
			todo = c.fromStore(b, to, todo)
		}
		if len(todo) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		before := size(todo)
		w, err := c.join(b, to, todo, cl, s, trust)
		if err != nil {
			return err
		}
		if w == nil { // the store has more now than a moment ago
			continue
		}
		err = c.wait(ctx, b, w)
		todo = w.need
		if size(todo) < before {
			try, failing = 0, time.Time{}
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errAgain):
		case ctx.Err() != nil || errors.Is(err, ErrClosed) || errors.Is(err, ErrNotKept):
			return err
		case c.o.Temporary == nil || !c.o.Temporary(err):
			return fmt.Errorf("blob %s %v: %w", b.ref.Digest, todo[0], err)
		default:
			if failing.IsZero() {
				failing = time.Now()
			}
			if time.Since(failing) > c.o.Patience {
				return fmt.Errorf("blob %s %v: gave up after %v: %w", b.ref.Digest, todo[0], c.o.Patience, err)
			}
			if err := c.pause(ctx, time.Since(failing)); err != nil {
				return err
			}
			try = 0
		}
	}
}

// pause waits a little before a temporary error is tried again: half as long as it has lasted, between 0.1
// and 5 s, with jitter so that hosts do not come back together.
func (c *Chain) pause(ctx context.Context, lasted time.Duration) error {
	d := min(max(lasted/2, 100*time.Millisecond), 5*time.Second)
	t := time.NewTimer(d/2 + rand.N(d))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.ctx.Done():
		return ErrClosed
	}
}

// fromStore reads what the store has of todo and returns the rest.
func (c *Chain) fromStore(b *blob, to reading, todo []ztoc.Range) (rest []ztoc.Range) {
	st := b.kept.get()
	if st == nil {
		return todo
	}
	if to.p == nil {
		for _, r := range todo {
			for _, m := range st.Missing(r) {
				rest = addRange(rest, r.Intersect(m))
			}
		}
		return rest
	}
	p, off := to.p, to.off
	var got int64
	for _, r := range todo {
		if st.ReadAt(p[r.Start-off:r.End-off], r.Start) == nil {
			got += r.Len()
			continue
		}
		at := r.Start
		for _, m := range append(st.Missing(r), ztoc.Range{Start: r.End, End: r.End}) {
			m = r.Intersect(m)
			if at < m.Start { // present
				if here := (ztoc.Range{Start: at, End: m.Start}); st.ReadAt(p[at-off:m.Start-off], at) == nil {
					got += here.Len()
				} else {
					rest = addRange(rest, here)
				}
			}
			rest = addRange(rest, m)
			at = m.End
		}
	}
	if got > 0 {
		c.storeBytes.Add(got)
		c.storeReads.Add(1)
	}
	return rest
}

// size is the number of bytes of rs.
func size(rs []ztoc.Range) (n int64) {
	for _, r := range rs {
		n += r.Len()
	}
	return n
}

// addRange appends r, merging it with the last range if they touch.
func addRange(rs []ztoc.Range, r ztoc.Range) []ztoc.Range {
	if r.Empty() {
		return rs
	}
	if n := len(rs); n > 0 && rs[n-1].End == r.Start {
		rs[n-1].End = r.End
		return rs
	}
	return append(rs, r)
}

// join makes a waiter for todo and sees to it that every byte of it is on its way. Nil when the store has
// some of it by now:
//
//	reader A: the store has it not      reader B: flight ends, bytes are in the store, flight is forgotten
//	reader A: no flight to join, so it would fetch it again
func (c *Chain) join(b *blob, to reading, todo []ztoc.Range, cl class, s *stream, trust bool) (*waiter, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, ErrClosed
	}
	if st := b.kept.get(); st != nil && trust {
		for _, r := range todo {
			if m := st.Missing(r); len(m) != 1 || !m[0].Contains(r) {
				return nil, nil
			}
		}
	}
	w := &waiter{p: to.p, off: to.off, stored: to.p == nil, need: todo, done: make(chan struct{})}
	for _, f := range b.flights {
		if !w.stored && f.holds(todo) && w.take(f.base, f.buf) {
			c.stats.Joined++
			close(w.done)
			return w, nil
		}
	}
	b.waiters[w] = struct{}{}
	joined := true
	o := coverOptions{stream: s, force: !trust}
	if s != nil {
		o.want = s.want
	}
	for _, r := range w.need {
		if c.cover(b, r, cl, o) {
			joined = false
		}
	}
	if joined {
		c.stats.Joined++
	}
	c.pump()
	return w, nil
}

// wait waits for w to be served, or for ctx.
func (c *Chain) wait(ctx context.Context, b *blob, w *waiter) error {
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, waiting := b.waiters[w]; !waiting {
		<-w.done // closed under the lock already
		return w.err
	}
	delete(b.waiters, w) // from here on no flight touches w.p
	for _, r := range w.need {
		c.abandon(b, r)
	}
	c.pump()
	return ctx.Err()
}

// blob is the state of a blob; r is what is asked of it.
func (c *Chain) blob(ref ztoc.BlobRef, r ztoc.Range) (*blob, error) {
	if r.Start < 0 || r.End < r.Start || r.End > ref.Size {
		return nil, fmt.Errorf("blob %s: %v is beyond its size %d", ref.Digest, r, ref.Size)
	}
	b := c.known(ref)
	if b.kept.get() == nil {
		c.openStore(b)
	}
	return b, nil
}

// known is what this chain knows about a blob, which may be nothing yet.
func (c *Chain) known(ref ztoc.BlobRef) *blob {
	v, ok := c.blobs.Load(ref)
	if !ok {
		v, _ = c.blobs.LoadOrStore(ref, &blob{ref: ref, waiters: map[*waiter]struct{}{}})
	}
	return v.(*blob)
}

// Local reports whether the store is known to have all of r, so that ReadAt would wait neither for the origin nor for the
// store to open the blob. It does not wait itself.
func (c *Chain) Local(ref ztoc.BlobRef, r ztoc.Range) bool {
	b := c.known(ref)
	if st := b.kept.get(); st != nil {
		return len(st.Missing(r)) == 0
	}
	c.openSoon(b)
	return false
}

// Prefetch asks for ranges that somebody may read soon, in this order, and returns at once. What has not
// arrived when ctx ends is dropped. Errors are not reported: a later read will meet them.
func (c *Chain) Prefetch(ctx context.Context, ref ztoc.BlobRef, ranges []ztoc.Range) {
	b, err := c.blob(ref, ztoc.Range{})
	if err != nil || b.kept.get() == nil { // fetched for nothing if it is not kept
		return
	}
	if st, ok := b.kept.get().(interface {
		Blob
		Warmer
	}); ok {
		for _, r := range ranges {
			if len(st.Missing(r)) == 0 { // on disk, perhaps not in memory
				st.WillNeed(r)
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || ctx.Err() != nil {
		return
	}
	want := &want{}
	whole := ztoc.Range{End: ref.Size}
	var wanted []ztoc.Range // neighbours joined over small gaps: a gap costs less than a request
	for _, r := range ranges {
		r = whole.Intersect(r)
		if n := len(wanted); n > 0 && r.Start >= wanted[n-1].Start && r.Start <= wanted[n-1].End+prefetchGap {
			wanted[n-1].End = max(wanted[n-1].End, r.End)
			continue
		}
		wanted = addRange(wanted, r)
	}
	for _, r := range wanted {
		for _, m := range b.kept.get().Missing(r) {
			c.cover(b, m, prefetch, coverOptions{want: want})
		}
	}
	c.pump()
	if ctx.Done() == nil || want.flights == 0 {
		return
	}
	want.stop = context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		want.gone = true
		c.abandon(b, whole)
		c.pump()
	})
}

// prefetchGap is the largest gap, in bytes, between two prefetched ranges that is fetched with them.
const prefetchGap = 32 << 10
