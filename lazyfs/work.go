package lazyfs

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// newUnit is unit id, not at hand, in no queue yet.
func (s *Server) newUnit(id unitID) *unit {
	u := &unit{id: id}
	if id.source() == warmSource {
		u.size = s.warm.size(id.index())
	} else {
		span := s.layers[id.source()].Ztoc.Span(id.index())
		u.size, u.packed = span.Out.Len(), span.Blob.Len()
	}
	s.units[id] = u
	return u
}

// isLocal says whether a unit can be loaded without the network.
func (s *Server) isLocal(id unitID) bool {
	if id.source() == warmSource {
		return true
	}
	l := s.layers[id.source()]
	return s.local != nil && s.local.Local(l.Ref, l.Ztoc.Span(id.index()).Blob)
}

// demand has u, which is not ready, loaded because somebody waits for it; urgent puts it before all others
// that wait.
func (s *Server) demand(u *unit, urgent bool) {
	if u.state == loading {
		if u.fetching && !u.poked {
			u.poked = true
			go s.poke(s.layers[u.id.source()], s.layers[u.id.source()].Ztoc.Span(u.id.index()).Blob)
		}
		u.demand = true
		return
	}
	if u.demand && !urgent {
		return
	}
	u.demand = true
	l := &s.far
	if s.isLocal(u.id) {
		l = &s.near
	}
	if urgent {
		l.q.pushFront(u)
	} else {
		l.q.push(u)
	}
}

// loadAhead has the unit loaded before anybody asks, against a budget; false when it is at hand or on its way.
func (s *Server) loadAhead(id unitID, budget *int64) bool {
	if s.units[id] != nil {
		return false
	}
	u := s.newUnit(id)
	u.ahead = budget
	*budget += u.size
	s.idle.q.push(u)
	return true
}

// poke raises a fetch that was begun ahead: reading the same range on demand joins it. What it reads is not
// used, so little memory is enough.
func (s *Server) poke(l Layer, r ztoc.Range) {
	buf := make([]byte, min(r.Len(), 64<<10))
	for r.Start < r.End {
		p := buf[:min(int64(len(buf)), r.Len())]
		if s.blobs.ReadAt(s.ctx, l.Ref, p, r.Start, ztoc.Demand) != nil {
			return
		}
		r.Start += int64(len(p))
	}
}

// start begins as many loads as the lanes allow. A worker lives as long as there is work.
func (s *Server) start() {
	if s.closed {
		return
	}
	s.pump()
	for {
		u := s.next()
		if u == nil {
			return
		}
		s.working.Add(1)
		go s.work(u)
	}
}

// next is the load that comes next: what is local, what is waited for, what is ahead.
func (s *Server) next() *unit {
	if s.closed {
		return nil
	}
	for _, l := range [...]*lane{&s.near, &s.far, &s.idle} {
		if u := l.take(); u != nil {
			return u
		}
	}
	return nil
}

var scratches = sync.Pool{New: func() any { return newScratch() }}

// work loads u, wakes who waits for it, and goes on with the next.
func (s *Server) work(u *unit) {
	defer s.working.Done()
	w := scratches.Get().(*scratch)
	defer scratches.Put(w)
	for u != nil {
		err := s.load(u)

		s.mu.Lock()
		waiting := u.first
		u.first, u.last = nil, nil
		for m := waiting; m != nil; m = m.next {
			m.on = nil
			delete(s.parked, m.unique)
			if m.inner != nil && !m.over {
				if err == nil {
					u.refs++
				}
				m.inner <- err
			}
		}
		u.lane.workers--
		u.lane.bytes -= u.packed
		u.lane = nil
		if err == nil {
			u.state = ready
			u.refs++
			s.link(u)
			s.stats.inflated.Add(1)
			s.stats.inflatedBytes.Add(u.size)
			if !u.demand {
				s.stats.aheadInflated.Add(1)
			}
		} else {
			delete(s.units, u.id)
			s.settle(u)
		}
		s.start()
		s.mu.Unlock()

		for m := waiting; m != nil; {
			next := m.next
			if m.inner == nil {
				s.resume(w, m, err)
			}
			m = next
		}

		s.mu.Lock()
		if err == nil {
			u.refs--
		}
		u = s.next()
		s.mu.Unlock()
	}
}

// errRotten says that a piece of the warm file is not what was written there. Readers fall back to spans.
var errRotten = errors.New("a piece of the warm file is rotten")

// maxRejects bounds how often one load takes bytes that turn out wrong, whatever Blobs says.
const maxRejects = 8

// load fetches u's compressed bytes, inflates them, which proves them, and leaves the result in u.buf.
func (s *Server) load(u *unit) error {
	if u.id.source() == warmSource {
		return s.loadWarm(u)
	}
	layer := s.layers[u.id.source()]
	span := layer.Ztoc.Span(u.id.index())
	packed, err := s.compressed.get(int(span.Blob.Len()))
	if err != nil {
		return err
	}
	defer s.compressed.put(packed)
	for try := 0; ; try++ {
		if err := s.blobs.ReadAt(s.ctx, layer.Ref, packed, span.Blob.Start, s.priority(u)); err != nil {
			return fmt.Errorf("layer %s: %w", layer.Ref.Digest, err)
		}
		s.stats.fetchedBytes.Add(int64(len(packed)))
		s.inflater(u)
		buf, err := s.reserve(u)
		if err != nil {
			s.leave()
			return err
		}
		began := time.Now()
		err = layer.Ztoc.Inflate(buf, u.id.index(), packed)
		s.stats.inflateTime.Add(int64(time.Since(began)))
		s.leave()
		if err == nil {
			u.buf = buf
			return nil
		}
		s.unreserve(buf)
		if !errors.Is(err, ztoc.ErrMismatch) {
			return fmt.Errorf("layer %s, span %d: %w", layer.Ref.Digest, u.id.index(), err)
		}
		s.stats.rejected.Add(1)
		if e := s.blobs.Reject(layer.Ref, span.Blob, err); e != nil || try == maxRejects {
			return fmt.Errorf("layer %s, span %d: %w", layer.Ref.Digest, u.id.index(), errors.Join(e, err))
		}
	}
}

// priority is what u is fetched with now.
func (s *Server) priority(u *unit) ztoc.Priority {
	s.mu.Lock()
	defer s.mu.Unlock()
	u.fetching = true
	if u.demand {
		u.poked = true // need not be raised
		return ztoc.Demand
	}
	return ztoc.Prefetch
}

// loadWarm reads a piece of the warm file and checks it. A rotten piece is not read again: whoever wants its
// bytes plans anew and finds spans.
func (s *Server) loadWarm(u *unit) error {
	buf, err := s.reserve(u)
	if err != nil {
		return err
	}
	if err := s.warm.read(buf, u.id.index()); err != nil {
		s.unreserve(buf)
		s.stats.warmBad.Add(1)
		if s.logged.first("warm") {
			s.log.Warn("warm file is damaged, using spans where it is", "error", err)
		}
		return errRotten
	}
	s.stats.warmPieces.Add(1)
	u.buf = buf
	return nil
}

// inflater waits until u may use a processor. Loads that somebody waits for go first.
func (s *Server) inflater(u *unit) {
	s.mu.Lock()
	if s.cpu > 0 {
		s.cpu--
		s.mu.Unlock()
		return
	}
	wake := make(chan struct{})
	s.wake[u] = wake
	s.cpuWait = append(s.cpuWait, u)
	s.mu.Unlock()
	<-wake // bounded: who inflates waits for nothing
}

// leave ends what inflater began; the next may start.
func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.cpuWait) == 0 {
		s.cpu++
		return
	}
	at := 0
	for i, c := range s.cpuWait {
		if c.demand {
			at = i
			break
		}
	}
	c := s.cpuWait[at]
	s.cpuWait = append(s.cpuWait[:at], s.cpuWait[at+1:]...)
	close(s.wake[c])
	delete(s.wake, c)
}

// reserve is a buffer for u, for which others are dropped if need be.
func (s *Server) reserve(u *unit) ([]byte, error) {
	size := int64(class(int(u.size)))
	s.mu.Lock()
	free := s.makeRoom(size)
	s.bytes += size
	s.mu.Unlock()
	for _, b := range free {
		s.inflated.put(b)
	}
	buf, err := s.inflated.get(int(u.size))
	s.mu.Lock()
	s.bytes += int64(cap(buf)) - size
	s.mu.Unlock()
	return buf, err
}

func (s *Server) unreserve(buf []byte) {
	s.mu.Lock()
	s.bytes -= int64(cap(buf))
	s.mu.Unlock()
	s.inflated.put(buf)
}

// drain waits for the workers of a Serve that is ending, and gives the memory back.
func (s *Server) drain() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.working.Wait()
	s.forget()
}

// forget drops everything at hand that is not in use.
func (s *Server) forget() {
	s.mu.Lock()
	limit := s.limit
	s.limit = 0
	free := s.makeRoom(0)
	s.limit = limit
	s.mu.Unlock()
	for _, b := range free {
		s.inflated.put(b)
	}
	s.inflated.trim()
	s.compressed.trim()
}
