package fetch

import (
	"context"
	"slices"

	"github.com/muster-hpc/muster/ztoc"
)

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
			if cl == demand && (f.far(pos) || c.o.PatientPrefetch && f.waits()) {
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
	if st := b.kept.get(); st != nil && cl == demand && wide != r && wide.Start > 0 &&
		len(st.Missing(ztoc.Range{Start: wide.Start - 1, End: wide.Start})) == 0 {
		// What lies before it was wanted too, so what lies behind it probably will be.
		wide.End = min(wide.End+followUnits*c.o.Unit, b.ref.Size)
	}
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
	f.want.hold()
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
	f.want.let()
	f.b.flights = slices.DeleteFunc(f.b.flights, func(g *flight) bool { return g == f })
}

// carve cuts the unit around r out of f, which is queued or has it far ahead, and makes it a demand flight.
// What comes after it is queued as it was.
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
	f.want.hold() // until its parts are queued
	defer f.want.let()
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
		pri := ztoc.Demand
		if f.class == prefetch {
			pri = ztoc.Prefetch
		}
		f.ctx, f.cancel = context.WithCancel(context.WithValue(c.ctx, priorityKey{}, pri))
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

// ready prepares a queued flight for its start: what has become present since is left out, queued
// neighbours are merged. False when nothing is left to fetch.
func (c *Chain) ready(f *flight) bool {
	b := f.b
	if st := b.kept.get(); st != nil && !f.force {
		all := f.toCome()
		miss := st.Missing(all)
		if len(miss) != 1 || !miss[0].Contains(all) {
			// Other processes, or flights that were cut, have stored some of it.
			b.wake(all, errAgain)
			f.want.hold() // until its parts are queued
			defer f.want.let()
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

// prefetchSize bounds the next request of a Prefetch call. What was asked for first is wanted first, but
// requests that run at once share the link: so the first ones are small, and each round doubles.
func (c *Chain) prefetchSize(w *want) int64 {
	if w == nil {
		return c.o.MaxPrefetch
	}
	round := w.begun / (c.o.Requests - c.o.Reserved)
	return min(prefetchStart<<min(round, 10), c.o.MaxPrefetch)
}
