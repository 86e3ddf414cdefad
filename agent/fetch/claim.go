package fetch

import (
	"slices"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// claimPoll is how often a flight that waits for another process looks whether its bytes are there.
const claimPoll = 10 * time.Millisecond

// claim announces a flight that is about to start to the other processes of the host. False when one of them is
// fetching the same: then the flight is parked, and tried again when it may have changed.
//
// A process shows progress by releasing what it has stored. A flight waits as long as it sees progress, and
// Options.Yield beyond. A demand read does not wait for a claim that begins far before it.
func (c *Chain) claim(f *flight) bool {
	cl, ok := f.b.kept.get().(Claimer)
	if !ok || f.force {
		return true
	}
	all := f.toCome()
	by, ok := cl.Claim(all)
	if !ok && by.Start > all.Start {
		// The first part is free. The rest waits by itself.
		rest := ztoc.Range{Start: by.Start, End: f.end}
		f.end = by.Start
		if f.stream == nil || f.b.awaited(rest) {
			c.enqueue(&flight{b: f.b, class: f.class, start: rest.Start, base: rest.Start, pos: rest.Start, end: rest.End, want: f.want, stream: f.stream}, true)
		}
		all = f.toCome()
		by, ok = cl.Claim(all)
	}
	if ok {
		f.claimed = all
		return true
	}
	now := time.Now()
	if f.since.IsZero() || by != f.blocker {
		f.blocker, f.since = by, now
	}
	if now.Sub(f.since) > c.o.Yield || f.class == demand && f.pos-by.Start > demandAhead {
		return true // beside the other, and without a claim
	}
	c.stats.Yielded++
	was := f.class
	c.parked[was]++
	time.AfterFunc(claimPoll, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.parked[was]--
		if !f.dead && f.class == was {
			c.queue[was] = slices.Insert(c.queue[was], 0, f)
		}
		c.pump()
	})
	return false
}

// release ends the claim on r, which is at the beginning or the end of what is claimed.
func (f *flight) release(r ztoc.Range) {
	r = f.claimed.Intersect(r)
	if r.Empty() {
		return
	}
	if cl, ok := f.b.kept.get().(Claimer); ok {
		cl.Release(r)
	}
	if r.Start == f.claimed.Start {
		f.claimed.Start = r.End
	} else {
		f.claimed.End = r.Start
	}
}
