package fetch

import (
	"context"
	"errors"
	"io"
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

	// demandAhead is how far ahead of a running prefetch or stream a demand read may be and still wait for it. Further
	// away it gets a request of its own, which costs a round trip.
	demandAhead = 1 << 20

	nearlyDone = 512 << 10 // a flight with less than that, and a quarter of it, to come is not cancelled

	prefetchStart = 1 << 20 // bytes of the first requests of a Prefetch call

	// streamStall is how long a stream may wait for its reader before it gives its place among the requests to others. Without
	// that, readers that wait for each other's streams would wait for ever.
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

// A waiter is a reader waiting for bytes. Fields are guarded by Chain.mu until done is closed.
type waiter struct {
	p    []byte
	off  int64        // of p in the blob
	need []ztoc.Range // still to come, in order
	err  error
	done chan struct{}
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
		copy(w.p[got.Start-w.off:got.End-w.off], data[got.Start-off:got.End-off])
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

// at is the index of the first flight with a byte to come at or after pos.
func (b *blob) at(pos int64) int {
	return sort.Search(len(b.flights), func(i int) bool { return b.flights[i].end > pos })
}

// coverOptions are what cover passes on to the flights it makes.
type coverOptions struct {
	want   *want
	stream *stream
	force  bool
}

// cover sees to it that every byte of need will arrive, in flights of class cl or better, and says whether it
// had to make one.
func (c *Chain) cover(b *blob, need ztoc.Range, cl class, o coverOptions) (launched bool) {
	for pos := need.Start; pos < need.End; {
		i := b.at(pos)
		if i < len(b.flights) && b.flights[i].pos <= pos {
			f := b.flights[i]
			if cl == demand && f.far(pos) {
				c.carve(f, ztoc.Range{Start: pos, End: min(need.End, f.end)})
				continue
			}
			if cl == streaming && f.class == prefetch && f.state == queued {
				f.class = streaming // its old place in the queue is skipped
				c.queue[streaming] = append(c.queue[streaming], f)
			}
			f.poke()
			pos = f.end
			continue
		}
		end := need.End
		if i < len(b.flights) {
			end = min(end, b.flights[i].pos)
		}
		pos = c.launch(b, ztoc.Range{Start: pos, End: end}, cl, o)
		launched = true
	}
	return launched
}

// launch queues a flight that starts at or before r.Start and ends at or before r.End, or later if r is small. It
// returns the flight's end.
func (c *Chain) launch(b *blob, r ztoc.Range, cl class, o coverOptions) int64 {
	most := c.o.MaxDemand
	wide := r
	switch {
	case cl == streaming:
		most = maxStream
		wide.End = b.ref.Size
	case b.ref.Size <= c.o.Whole:
		wide = ztoc.Range{End: b.ref.Size}
	case r.Len() < c.o.Unit:
		wide = ztoc.Range{Start: r.Start / c.o.Unit * c.o.Unit, End: min((r.End+c.o.Unit-1)/c.o.Unit*c.o.Unit, b.ref.Size)}
	}
	if cl == prefetch {
		most = min(prefetchStart, c.o.MaxPrefetch) // merged again when they start
	}
	out := r
	if st := b.kept.get(); st != nil && !o.force {
		wide.End = max(wide.End, min((r.End+blockSize-1)/blockSize*blockSize, b.ref.Size))
		for _, m := range st.Missing(wide) {
			if m.Start <= r.Start && r.Start < m.End {
				out = ztoc.Range{Start: max(m.Start, min(wide.Start, r.Start/blockSize*blockSize)), End: min(m.End, wide.End)}
			}
		}
	} else if cl == streaming {
		out = wide
	}
	// Not into what others bring or have just brought.
	for _, g := range b.flights {
		switch {
		case g.end <= r.Start:
			out.Start = max(out.Start, g.end)
		case g.base > r.Start:
			out.End = min(out.End, g.base)
		default: // it brought these bytes once, and they were dropped
			out.Start = max(out.Start, r.Start/blockSize*blockSize)
			out.End = min(out.End, g.pos)
		}
	}
	if out.End <= r.Start {
		out = r
	}
	out.End = min(out.End, max(out.Start+most, r.Start+1))
	f := &flight{b: b, class: cl, force: o.force, start: out.Start, base: out.Start, pos: out.Start, end: out.End, want: o.want, stream: o.stream}
	c.enqueue(f, false)
	return f.end
}

// enqueue puts a flight on its blob's list and into its queue.
func (c *Chain) enqueue(f *flight, first bool) {
	f.moved = make(chan struct{}, 1)
	if f.want != nil {
		f.want.flights++
	}
	f.b.flights = slices.Insert(f.b.flights, f.b.at(f.pos), f)
	if first {
		c.queue[f.class] = slices.Insert(c.queue[f.class], 0, f)
	} else {
		c.queue[f.class] = append(c.queue[f.class], f)
	}
}

// remove takes a flight off its blob's list.
func (f *flight) remove() {
	if f.dead {
		return
	}
	f.dead = true
	if f.want != nil {
		if f.want.flights--; f.want.flights == 0 && f.want.stop != nil {
			f.want.stop()
		}
	}
	f.b.flights = slices.DeleteFunc(f.b.flights, func(g *flight) bool { return g == f })
}

// carve cuts the unit around r out of f, which is queued or has it far ahead, and makes it a demand flight. What comes
// after it is queued as it was.
func (c *Chain) carve(f *flight, r ztoc.Range) {
	u := r
	if r.Len() < c.o.Unit {
		u = ztoc.Range{Start: r.Start / c.o.Unit * c.o.Unit, End: (r.End + c.o.Unit - 1) / c.o.Unit * c.o.Unit}
	} else {
		u.Start = r.Start / blockSize * blockSize
		u.End = min((r.End+blockSize-1)/blockSize*blockSize, u.Start+c.o.MaxDemand)
	}
	u = f.toCome().Intersect(u)
	end := f.end
	f.end = u.Start
	if f.end <= f.pos && f.state == queued {
		f.remove()
	}
	f.poke()
	f.release(ztoc.Range{Start: u.Start, End: f.claimed.End})
	c.enqueue(&flight{b: f.b, class: demand, force: f.force, start: u.Start, base: u.Start, pos: u.Start, end: u.End, want: f.want}, false)
	tail := ztoc.Range{Start: u.End, End: end}
	if f.stream != nil && !f.b.awaited(tail) {
		return // the stream asks again when its reader gets there
	}
	if !tail.Empty() {
		c.enqueue(&flight{b: f.b, class: f.class, force: f.force, start: tail.Start, base: tail.Start, pos: tail.Start, end: tail.End, want: f.want, stream: f.stream}, true)
	}
}

// poke tells a flight that waits for its stream's reader to look again.
func (f *flight) poke() {
	select {
	case f.moved <- struct{}{}:
	default:
	}
}

// abandon cancels flights in r that nobody wants any more, unless they are nearly done.
func (c *Chain) abandon(b *blob, r ztoc.Range) {
	for _, f := range slices.Clone(b.flights) {
		left := f.toCome()
		if left.Intersect(r).Empty() || b.awaited(left) || f.want != nil && !f.want.gone {
			continue
		}
		if f.state == running && left.Len() <= nearlyDone && left.Len() <= max(nearlyDone/8, (f.end-f.start)/4) {
			continue
		}
		f.remove()
		if f.state == running {
			f.cancel()
		}
	}
}

// pump starts queued flights as far as the limits allow.
func (c *Chain) pump() {
	for !c.closed {
		f := c.next()
		if f == nil {
			return
		}
		if !c.ready(f) || !c.claim(f) {
			continue
		}
		if f.want != nil {
			f.want.begun++
		}
		f.state = running
		f.ctx, f.cancel = context.WithCancel(c.ctx)
		c.running[f.class]++
		c.stats.OriginRequests++
		c.wg.Add(1)
		go c.fly(f)
	}
}

// next takes the first flight off the queues that may start now.
func (c *Chain) next() *flight {
	total := c.running[demand] + c.running[streaming] + c.running[prefetch]
	for cl := range classes {
		q := c.queue[cl]
		for len(q) > 0 && (q[0].dead || q[0].class != cl || q[0].state != queued) {
			q = q[1:]
		}
		c.queue[cl] = q
		if len(q) == 0 || c.parked[cl] >= c.o.Requests {
			continue
		}
		if total >= c.o.Requests || cl != demand && total-c.running[demand] >= c.o.Requests-c.o.Reserved {
			return nil
		}
		c.queue[cl] = q[1:]
		return q[0]
	}
	return nil
}

// ready prepares a queued flight for its start: what has become present since is left out, queued neighbours are merged. False
// when nothing is left to fetch.
func (c *Chain) ready(f *flight) bool {
	b := f.b
	if st := b.kept.get(); st != nil && !f.force {
		all := f.toCome()
		miss := st.Missing(all)
		if len(miss) != 1 || !miss[0].Contains(all) {
			// Other processes, or flights that were cut, have stored some of it.
			b.wake(all, errAgain)
			f.remove()
			for i := len(miss) - 1; i >= 0; i-- {
				m := all.Intersect(miss[i])
				g := *f
				g.dead, g.start, g.base, g.pos, g.end = false, m.Start, m.Start, m.Start, m.End
				c.enqueue(&g, true)
			}
			return false
		}
	}
	most := c.o.MaxDemand
	if f.class == prefetch {
		most = c.prefetchSize(f.want)
	}
	merges := func(g *flight) bool {
		return g.state == queued && g.class == f.class && g.want == f.want && g.force == f.force && f.class != streaming &&
			f.end-f.pos+g.end-g.pos <= most
	}
	i := slices.Index(b.flights, f)
	for i+1 < len(b.flights) && b.flights[i+1].pos == f.end && merges(b.flights[i+1]) {
		g := b.flights[i+1]
		f.end = g.end
		g.remove()
	}
	for i > 0 && b.flights[i-1].end == f.pos && merges(b.flights[i-1]) {
		g := b.flights[i-1]
		f.start, f.base, f.pos = g.pos, g.pos, g.pos
		g.remove()
		i--
	}
	return true
}

// prefetchSize bounds the next request of a Prefetch call. What was asked for first is wanted first, but requests that
// run at once share the link: so the first ones are small, and each round doubles.
func (c *Chain) prefetchSize(w *want) int64 {
	if w == nil {
		return c.o.MaxPrefetch
	}
	round := w.begun / (c.o.Requests - c.o.Reserved)
	return min(prefetchStart<<min(round, 10), c.o.MaxPrefetch)
}

// fly runs a flight.
func (c *Chain) fly(f *flight) {
	defer c.wg.Done()
	began := time.Now()
	first := f.start
	ask := ztoc.Range{Start: first, End: first}
	err := func() error {
		c.mu.Lock()
		ask = f.toCome()
		c.mu.Unlock()
		if ask.Empty() {
			return nil
		}
		c.event(Event{Kind: Started, Blob: f.b.ref, Range: ask, Class: f.class.String(), At: began})
		body, err := c.o.Origin.Blob(f.ctx, f.b.ref.Digest, ask)
		if err != nil {
			return err
		}
		stop := context.AfterFunc(f.ctx, func() { body.Close() }) // also frees a Read that does not heed the context
		defer func() {
			stop()
			body.Close()
		}()
		return c.receive(f, body)
	}()
	c.storeChunk(f)
	c.mu.Lock()
	f.cancel()
	f.release(f.claimed)
	c.running[f.class]--
	got := ztoc.Range{Start: first, End: f.pos}
	left := f.toCome()
	dead := f.dead
	f.remove()
	f.buf = nil
	if err != nil && !dead {
		f.b.wake(left, err)
	}
	c.pump()
	c.mu.Unlock()
	if dead {
		err = errors.Join(err, context.Canceled)
	}
	if !ask.Empty() {
		c.event(Event{Kind: Ended, Blob: f.b.ref, Range: got, Class: f.class.String(), At: time.Now(), Took: time.Since(began), Err: err})
	}
}

// receive reads the body until the flight's end, which may come nearer meanwhile.
func (c *Chain) receive(f *flight, body io.Reader) error {
	for {
		room, err := c.room(f)
		if err != nil || room == nil {
			return err
		}
		n, err := body.Read(room)
		if n > 0 && c.arrived(f, n) {
			c.storeChunk(f)
		}
		if err != nil {
			c.mu.Lock()
			left := f.toCome()
			c.mu.Unlock()
			if left.Empty() {
				return nil
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
}

// room is where the next bytes go; nil at the flight's end. It waits while a stream is too far ahead of its reader.
func (c *Chain) room(f *flight) ([]byte, error) {
	var stall *time.Timer
	for {
		c.mu.Lock()
		left := f.end - f.pos
		if left <= 0 {
			c.mu.Unlock()
			return nil, nil
		}
		awaited := f.b.awaited(f.toCome())
		if f.stream != nil && f.want.gone && !awaited {
			f.end = f.pos // the stream was closed; others only needed it to come this far
			c.mu.Unlock()
			return nil, nil
		}
		if f.stream == nil || awaited || f.pos < f.stream.pos+c.ahead(f) {
			if len(f.buf) == cap(f.buf) {
				f.grow()
			}
			room := f.buf[len(f.buf):cap(f.buf)]
			c.mu.Unlock()
			return room[:min(int64(len(room)), left)], nil
		}
		c.mu.Unlock()
		if stall == nil {
			stall = time.NewTimer(streamStall)
			defer stall.Stop()
		} else {
			stall.Reset(streamStall)
		}
		select {
		case <-f.moved:
		case <-f.ctx.Done():
			return nil, f.ctx.Err()
		case <-stall.C:
			c.mu.Lock()
			if !f.b.awaited(f.toCome()) {
				f.end = f.pos // the stream's next read that finds nothing makes another flight
			}
			c.mu.Unlock()
		}
	}
}

// ahead is how far a stream's flight may run ahead: less when only its own buffer holds the bytes.
func (c *Chain) ahead(f *flight) int64 {
	if f.unstored {
		return keepOther / 2
	}
	return c.o.Ahead
}

// grow makes room in a full buffer: the first one, or, when the store keeps nothing, a longer one up to
// a limit, from where the oldest chunk is forgotten.
func (f *flight) grow() {
	most := keepOther
	if f.class == demand {
		most = keepDemand
	}
	if cap(f.buf) < most {
		longer := make([]byte, len(f.buf), int64(cap(f.buf))+min(chunkSize, f.end-f.pos))
		copy(longer, f.buf)
		f.buf = longer
		return
	}
	n := copy(f.buf, f.buf[chunkSize:])
	f.buf = f.buf[:n]
	f.base += chunkSize
}

// arrived hands n new bytes to their waiters, and says whether a chunk is full.
func (c *Chain) arrived(f *flight, n int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := len(f.buf)
	f.buf = f.buf[:old+n]
	for w := range f.b.waiters {
		if w.take(f.pos, f.buf[old:]) {
			f.b.finish(w, nil)
		}
	}
	f.b.refetched(ztoc.Range{Start: f.pos, End: f.pos + int64(n)})
	f.pos += int64(n)
	c.stats.OriginBytes += int64(n)
	return !f.unstored && (len(f.buf) == cap(f.buf) || f.pos >= f.end)
}

// storeChunk stores what has arrived. Joiners read the buffer until it is in the store.
func (c *Chain) storeChunk(f *flight) {
	st := f.b.kept.get()
	c.mu.Lock()
	buf, base, skip := f.buf, f.base, f.unstored || len(f.buf) == 0
	c.mu.Unlock()
	if skip {
		return
	}
	kept := st != nil && st.WriteAt(buf, base) == nil
	c.event(Event{Kind: Arrived, Blob: f.b.ref, Range: ztoc.Range{Start: base, End: base + int64(len(buf))}, Class: f.class.String(), At: time.Now()})
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range f.rejected {
		if st != nil {
			st.Drop(r)
		}
	}
	if kept {
		f.base, f.buf = f.pos, f.buf[:0]
		f.release(ztoc.Range{Start: f.claimed.Start, End: f.base / blockSize * blockSize})
		return
	}
	f.unstored = true
	f.release(f.claimed) // nobody gains by waiting for it
	c.stats.UnstoredBytes += int64(len(buf))
	if f.class == prefetch && !f.dead && !f.b.awaited(f.toCome()) {
		f.remove() // fetched for nothing
		f.cancel()
	}
}
