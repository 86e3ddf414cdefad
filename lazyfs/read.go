package lazyfs

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// A run is a part of a read: n bytes from lo of a unit, or of zeros.
type run struct {
	id    unitID
	lo, n int64
}

// A miss is a read that waits: a small record, whatever it asked for. Fields are guarded by Server.mu
// while it is in Server.parked, and belong to whoever took it out otherwise.
type miss struct {
	slot   slot
	unique uint64
	pid    uint32
	row    tree.Row
	off, n int64

	on    *unit   // waits for it
	next  *miss   // of the same unit
	keeps []*unit // at hand already, and referenced so that they stay
	over  bool    // answered; guarded by Server.mu
	long  bool    // of a long read in order

	inner chan error // of one of our own waiters instead of a reader: gets the outcome, and a reference with nil
}

// Limits of a read.
const (
	maxRead   = 16 << 20 // bytes; the kernel asks for 1 MiB at most
	maxPieces = 512      // of a reply that is sent from where its bytes lie; one in more pieces is copied together
)

// read answers the READ in sl, or parks it together with its slot.
func (s *Server) read(w *scratch, sl slot, in *fuse.ReadIn) (parked bool) {
	row, ok := s.table.Row(in.NodeId)
	if !ok {
		s.send(w, in.Unique, syscall.ESTALE)
		return false
	}
	off, n := int64(in.Offset), int64(in.Size)
	n = min(n, s.table.Size(row)-off)
	if off < 0 || n <= 0 || !s.table.IsReg(row) {
		s.reply(w, in.Unique, nil)
		return false
	}
	if n > maxRead {
		s.send(w, in.Unique, syscall.EINVAL)
		return false
	}
	s.stats.reads.Add(1)
	s.stats.readBytes.Add(n)
	if err := s.plan(w, row, off, n); err != nil {
		s.fail(w, in.Unique, err)
		return false
	}
	s.recorder.note(w.where)
	s.grow.note(row, s.table.Size(row), n)

	s.mu.Lock()
	on := s.pin(w)
	long := s.follow(w.where, row, s.table.Size(row)-off, w.moved)
	s.start()
	if on == nil {
		s.mu.Unlock()
		s.stats.hits.Add(1)
		s.answer(w, in.Unique, n)
		if !long {
			s.capture.take(w)
		}
		s.unpin(w.pins)
		s.recorder.done()
		return false
	}
	s.unpinLocked(w.pins)
	s.park(&miss{slot: sl, unique: in.Unique &^ resentUnique, pid: in.Pid, row: row, off: off, n: n, long: long}, on)
	s.mu.Unlock()
	s.stats.misses.Add(1)
	return true
}

// A stretch is bytes [off, off+n) of an inflated layer.
type stretch struct {
	layer  int
	off, n int64
}

// plan says in w.plan in which units the n bytes from off of row lie, and in w.where in which layers. It only
// calculates.
func (s *Server) plan(w *scratch, row tree.Row, off, n int64) error {
	w.plan, w.where = w.plan[:0], w.where[:0]
	for n > 0 {
		e := s.table.Extent(row, off)
		k := min(n, e.Len)
		if k <= 0 {
			return fmt.Errorf("inode %d: no extent at %d", row.Node(), off)
		}
		if e.Layer < 0 {
			w.plan = append(w.plan, run{id: zeroUnit, n: k})
		} else if err := s.planLayer(w, e.Layer, e.Offset, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (s *Server) planLayer(w *scratch, layer int, off, n int64) error {
	w.where = append(w.where, stretch{layer, off, n})
	z := s.layers[layer].Ztoc
	for n > 0 {
		limit := n
		if s.warm != nil {
			piece, lo, have := s.warm.find(layer, off)
			if piece >= 0 {
				k := min(n, have)
				w.plan = append(w.plan, run{unitOf(warmSource, piece), lo, k})
				off, n = off+k, n-k
				continue
			}
			limit = min(n, have)
		}
		i, hi := z.SpansOf(ztoc.Range{Start: off, End: off + 1})
		if i >= hi {
			return fmt.Errorf("layer %d, %s: no span holds byte %d of the inflated layer", layer, s.layers[layer].Ref.Digest, off)
		}
		out := z.Span(i).Out
		k := min(limit, out.End-off)
		if k <= 0 {
			return fmt.Errorf("layer %d, %s: span %d does not hold byte %d", layer, s.layers[layer].Ref.Digest, i, off)
		}
		w.plan = append(w.plan, run{unitOf(layer, i), off - out.Start, k})
		off, n = off+k, n-k
	}
	return nil
}

// pin takes references to the units of w.plan that are at hand, in w.pins, and has the others loaded. It
// returns the first of these, nil when there is none.
func (s *Server) pin(w *scratch) (missing *unit) {
	w.pins, w.moved = w.pins[:0], false
	last := zeroUnit
	for _, r := range w.plan {
		if r.id == zeroUnit || r.id == last {
			continue
		}
		last = r.id
		u := s.units[r.id]
		if u == nil {
			u = s.newUnit(r.id)
			s.demand(u, false)
		} else if u.state != ready {
			s.demand(u, false)
		}
		if s.used(u) {
			s.stats.aheadUsed.Add(1)
			w.moved = true
		}
		if r.id.source() != warmSource {
			s.touched[r.id.source()].set(r.id.index())
		}
		if u.state == ready {
			u.refs++
			w.pins = append(w.pins, u)
			s.touch(u)
		} else if missing == nil {
			missing = u
		}
	}
	w.moved = w.moved || missing != nil
	if missing == nil {
		s.count(w)
	}
	return missing
}

// count notes how much of the units of w.plan has been read. What was read to its end is in the page cache now, so it is
// the first to go, before what somebody will come back to.
func (s *Server) count(w *scratch) {
	at, last := -1, zeroUnit
	for _, r := range w.plan {
		if r.id == zeroUnit {
			continue
		}
		if r.id != last {
			at, last = at+1, r.id
		}
		u := w.pins[at]
		if u.read += r.n; u.read >= u.size {
			s.sink(u)
		}
	}
}

func (s *Server) unpinLocked(pins []*unit) {
	for _, u := range pins {
		u.refs--
	}
}

func (s *Server) unpin(pins []*unit) {
	s.mu.Lock()
	s.unpinLocked(pins)
	s.mu.Unlock()
}

// answer sends the n bytes of w.plan, all of whose units are in w.pins, from where they lie.
func (s *Server) answer(w *scratch, unique uint64, n int64) {
	w.start()
	if len(w.plan) > maxPieces {
		b := w.grow(int(n))[:0]
		s.eachPiece(w, func(p []byte) { b = append(b, p...) })
		w.add(b)
	} else {
		s.eachPiece(w, w.add)
	}
	s.send(w, unique, 0)
}

func (s *Server) eachPiece(w *scratch, f func([]byte)) { w.eachPiece(func(b []byte, _ bool) { f(b) }) }

// eachPiece goes through the bytes of w.plan, in order, and says which are of a hole.
func (w *scratch) eachPiece(f func(b []byte, hole bool)) {
	at := -1
	last := zeroUnit
	for _, r := range w.plan {
		if r.id == zeroUnit {
			z := zeros()
			for n := r.n; n > 0; n -= int64(len(z)) {
				f(z[:min(n, int64(len(z)))], true)
			}
			continue
		}
		if r.id != last {
			at++
			last = r.id
		}
		f(w.pins[at].buf[r.lo:r.lo+r.n], false)
	}
}

// park makes m wait for u.
func (s *Server) park(m *miss, u *unit) {
	m.on = u
	u.wait(m)
	s.parked[m.unique] = m
}

// wait appends m to those who wait for u.
func (u *unit) wait(m *miss) {
	m.next = nil
	if u.last != nil {
		u.last.next = m
	} else {
		u.first = m
	}
	u.last = m
}

// unpark takes m out of the waiters of its unit.
func (s *Server) unpark(m *miss) {
	delete(s.parked, m.unique)
	u := m.on
	var prev *miss
	for at := u.first; at != nil; prev, at = at, at.next {
		if at != m {
			continue
		}
		if prev == nil {
			u.first = m.next
		} else {
			prev.next = m.next
		}
		if u.last == m {
			u.last = prev
		}
		break
	}
	m.on, m.next = nil, nil
}

// maxHeld bounds the bytes of units that reads keep while they wait for more; one read may always keep.
const maxHeld = 16 << 20

// resume goes on with a read whose unit has arrived, or failed with err.
//
// A read may need several units, and a thousand reads may wait at once, so that the first unit of a read can
// be pushed out by others before its second arrives, for ever. So a read that was woken and still lacks
// something keeps what it has (as far as maxHeld goes, and one read always) and goes to the front.
func (s *Server) resume(w *scratch, m *miss, err error) {
	if s.ctx.Err() != nil {
		return // Serve is ending: the request stays in its slot, for a successor
	}
	if err == nil || errors.Is(err, errRotten) {
		err = s.plan(w, m.row, m.off, m.n) // again: what was to come from the warm file may have to come from spans
	}
	if err != nil {
		s.fail(w, m.unique, err)
		s.finish(m)
		return
	}
	s.mu.Lock()
	on := s.pin(w)
	s.release(m)
	if on != nil {
		var size int64
		for _, u := range w.pins {
			size += u.size
		}
		if s.held == 0 || s.held+size <= maxHeld {
			m.keeps = append(m.keeps[:0], w.pins...)
			s.held += size
		} else {
			s.unpinLocked(w.pins)
		}
		s.demand(on, true)
		s.park(m, on)
		s.start()
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	s.answer(w, m.unique, m.n)
	if !m.long {
		s.capture.take(w)
	}
	s.unpin(w.pins)
	s.finish(m)
}

// release lets go of what m kept.
func (s *Server) release(m *miss) {
	for _, u := range m.keeps {
		u.refs--
		s.held -= u.size
	}
	m.keeps = m.keeps[:0]
}

// finish ends a miss that was answered and is not parked.
func (s *Server) finish(m *miss) {
	s.mu.Lock()
	s.release(m)
	m.over = true
	s.mu.Unlock()
	s.slots.put(m.slot)
	s.recorder.done()
}

// fail answers EIO, and says why in the log, once per cause.
func (s *Server) fail(w *scratch, unique uint64, err error) {
	s.stats.failed.Add(1)
	if s.logged.first(err.Error()) {
		s.log.Error("read failed: the reader gets an input/output error", "error", err)
	}
	s.send(w, unique, syscall.EIO)
}

// causes remembers what was logged, so that ten thousand failing reads are one line. Beyond its bound
// everything counts as said.
type causes struct {
	mu   sync.Mutex
	seen map[string]bool
}

func (c *causes) first(cause string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen[cause] || len(c.seen) >= 100 {
		return false
	}
	if c.seen == nil {
		c.seen = map[string]bool{}
	}
	c.seen[cause] = true
	return true
}
