package lazyfs

import (
	"context"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

const maxBulk = 64 // readers in bulk that are told from a start

// recorder notes what is read, in order, until the program has started.
type recorder struct {
	sizes []int64 // of the inflated layers

	pending atomic.Int64  // reads not answered yet
	last    atomic.Int64  // when a read came or was answered last, Unix nanoseconds
	stopped atomic.Bool   // no more to record
	asleep  atomic.Bool   // the housekeeper waits on wake
	wake    chan struct{} // the first read after a silence

	mu   sync.Mutex
	seen coverage
	bulk []*stretch // what was read in order for too long to belong to a start
	once sync.Once
}

func (r *recorder) init(layers []Layer) {
	r.wake = make(chan struct{}, 1)
	r.asleep.Store(true)
	for _, l := range layers {
		r.sizes = append(r.sizes, inflatedSize(l))
	}
}

// note is called for each read, before it is answered or parked; done when it was answered.
func (r *recorder) note(where []stretch) {
	r.pending.Add(1)
	r.last.Store(time.Now().UnixNano())
	if r.asleep.Load() && r.asleep.CompareAndSwap(true, false) {
		r.wake <- struct{}{} // has room: only whoever set asleep to false sends
	}
	if r.stopped.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range where {
		if r.isBulk(x) {
			continue
		}
		start := x.off &^ (profilePage - 1)
		end := min((x.off+x.n+profilePage-1)&^(profilePage-1), r.sizes[x.layer])
		if l, ok := r.seen.last(); ok && l.Layer == x.layer && start > l.End && start-l.End <= profileGap {
			start = l.End
		}
		r.seen.add(x.layer, start, end)
	}
	if r.seen.full {
		r.stopped.Store(true)
	}
}

func (r *recorder) done() {
	r.pending.Add(-1)
	r.last.Store(time.Now().UnixNano())
}

// leaveOut says that [from, end) of a layer belongs to a reader in bulk, and what comes behind it probably too. b is what
// it returned for the same reader before.
func (r *recorder) leaveOut(b *stretch, layer int, from, end int64) *stretch {
	if r.stopped.Load() {
		return b
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if b == nil {
		b = &stretch{layer: layer, off: from}
		if len(r.bulk) < maxBulk {
			r.bulk = append(r.bulk, b)
		}
	}
	b.n = end - from
	return b
}

// isBulk says whether x goes on where a reader in bulk is. Called with mu held.
func (r *recorder) isBulk(x stretch) bool {
	for _, b := range r.bulk {
		if x.layer == b.layer && x.off >= b.off && x.off <= b.off+b.n+streamBack {
			return true
		}
	}
	return false
}

// profile is what was recorded, without what was read in bulk. Called with mu held.
func (r *recorder) profile() Profile {
	p := Profile{Ranges: r.seen.ranges}
	for _, b := range r.bulk {
		p = p.without(*b)
	}
	return p
}

// silence is how long no read has come nor waited.
func (r *recorder) silence() time.Duration {
	if r.pending.Load() > 0 {
		return 0
	}
	return time.Duration(time.Now().UnixNano() - r.last.Load())
}

// keepHouse delivers the profile once readers have been quiet, and gives memory back when they have been quiet for
// longer. While nothing is read it sleeps without waking up.
func (s *Server) keepHouse(ctx context.Context) {
	r := &s.recorder
	idle := time.NewTimer(s.cfg.Idle)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-idle.C:
			// Nobody has come to read what was loaded ahead.
			s.forget()
			debug.FreeOSMemory()
			continue
		case <-r.wake:
			idle.Stop()
		}
		tick := time.NewTicker(max(min(s.cfg.Quiet, s.cfg.Idle)/8, time.Millisecond))
		for busy := true; busy; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
			}
			silence := r.silence()
			if silence >= s.cfg.Quiet {
				s.deliverProfile()
			}
			busy = silence < max(s.cfg.Idle, s.cfg.Quiet)
		}
		tick.Stop()
		s.forget()
		debug.FreeOSMemory()
		r.asleep.Store(true)
		if r.silence() < s.cfg.Idle && r.asleep.CompareAndSwap(true, false) {
			r.wake <- struct{}{} // a read came between the last look and falling asleep
		}
	}
}

// deliverProfile hands over what was recorded, once.
func (s *Server) deliverProfile() {
	r := &s.recorder
	r.once.Do(func() {
		r.stopped.Store(true)
		r.mu.Lock()
		p := r.profile()
		r.seen = coverage{}
		r.mu.Unlock()
		if len(p.Ranges) > 0 && s.cfg.OnProfile != nil {
			s.cfg.OnProfile(p)
		}
		s.capture.finish(s.log)
	})
}
