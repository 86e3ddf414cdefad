package sim

import (
	"math"
	"slices"

	"github.com/muster-hpc/muster/planner"
)

// enqueue has host i send a piece.
func (s *sim) enqueue(i, to int32, x planner.Piece) {
	h := &s.hosts[i]
	if h.dead {
		return
	}
	h.queue = append(h.queue, send{to, x})
	s.sendNext(i)
}

// sendNext has host i send the next piece that somebody still wants of it.
func (s *sim) sendNext(i int32) {
	h := &s.hosts[i]
	for !h.sending && h.head < len(h.queue) {
		q := h.queue[h.head]
		h.head++
		if h.head == len(h.queue) {
			h.queue, h.head = h.queue[:0], 0
		}
		to := &s.hosts[q.to]
		if to.dead || s.has(q.to, q.piece) || s.parent[s.p.Tree(q.piece)][q.to] != i {
			continue
		}
		bytes := s.sizes[q.piece] * s.over
		_, free := h.up.serve(s.now, over(bytes, s.c.Hosts[i].Up))
		// Agents send to several children at once: each piece is under way the longer.
		others := min(len(h.queue)-h.head, sharing-1)
		s.out.Sent[i] += s.sizes[q.piece]
		h.sending = true
		s.push(event{at: free, kind: evFree, host: i})
		s.travel(event{host: q.to, peer: i, piece: q.piece, sent: float32((free - s.now) * float64(others))}, free)
	}
}

// A piece passes all links on its way at once: it begins to pass each when its first byte is there and those before it have passed, and is through
// with all when the slowest has let its last byte pass. So it enters each link's queue when its first byte comes there, in the order of these times.

// travel has a piece whose first byte leaves its sender now, and whose last byte does so after ends, go to its host.
func (s *sim) travel(e event, ends float64) {
	e.at = s.now
	from, into := -1, s.c.Hosts[e.host].Group
	if e.peer >= 0 {
		from = s.c.Hosts[e.peer].Group
	}
	if from == into {
		s.intoHost(e, ends-s.now)
		return
	}
	if from < 0 {
		s.intoGroup(e, ends-s.now)
		return
	}
	start, end := s.groups[from][0].serve(s.now, over(s.sizes[e.piece]*s.over, s.c.Groups[from]))
	e.kind, e.at, e.sent, e.ends = evGroup, start, e.sent+float32(start-s.now), float32(max(ends, end)-start)
	s.push(e)
}

// intoGroup has a piece, whose first byte is at the link into its host's group, pass it. ends is when its last byte has come so far, from now.
func (s *sim) intoGroup(e event, ends float64) {
	into := s.c.Hosts[e.host].Group
	if into < 0 {
		s.intoHost(e, ends)
		return
	}
	start, end := s.groups[into][1].serve(s.now, over(s.sizes[e.piece]*s.over, s.c.Groups[into]))
	e.kind, e.at, e.sent, e.ends = evLink, start, e.sent+float32(start-s.now), float32(max(s.now+ends, end)-start)
	s.push(e)
}

// intoHost has a piece pass its host's own link.
func (s *sim) intoHost(e event, ends float64) {
	_, end := s.hosts[e.host].down.serve(s.now, over(s.sizes[e.piece]*s.over, s.c.Hosts[e.host].Down))
	at := max(s.now+ends, end) + s.c.Hop
	e.kind, e.at, e.sent = evCame, at, e.sent+float32(at-s.now)
	s.push(e)
}

// came has a piece be looked at and written.
func (s *sim) came(e event) {
	m, h := &s.c.Hosts[e.host], &s.hosts[e.host]
	at, bytes := s.now, s.sizes[e.piece]
	if s.c.Shared > 0 {
		_, at = s.shared.serve(at, bytes*m.CPU/s.c.Shared)
	} else {
		_, at = h.cpu.serve(at, bytes*m.CPU)
	}
	_, at = h.disk.serve(at, over(bytes, m.Disk))
	if at == s.now {
		s.arrived(e)
		return
	}
	e.kind, e.at = evHave, at
	s.push(e)
}

// arrived passes a piece on, and looks at how the host's parents come along.
func (s *sim) arrived(e event) {
	h := &s.hosts[e.host]
	if s.has(e.host, e.piece) {
		return // it came another way too
	}
	h.have[e.piece/64] |= 1 << (e.piece % 64)
	h.left--
	h.received++
	tree := s.p.Tree(e.piece)
	for c := range s.p.Children(tree, int(e.host)) {
		s.enqueue(e.host, int32(c), e.piece)
	}
	for _, c := range h.extra[int32(tree)] {
		s.enqueue(e.host, c, e.piece)
	}
	s.inflate(e.host, e.piece)
	s.maybeDone(e.host)
	if e.peer >= 0 {
		s.judge(e)
	}
}

// maybeDone notes when a host has everything.
func (s *sim) maybeDone(i int32) {
	if h := &s.hosts[i]; h.left == 0 && h.tables == 0 && s.out.Done[i] == 0 {
		s.out.Done[i] = s.now
	}
}

func (p *pace) add(now, bytes, took float64) {
	fade := math.Exp(-(now - p.at) / fadeSeconds)
	p.bytes, p.time, p.at = p.bytes*fade+bytes, p.time*fade+took, now
}

func (p *pace) rate() float64 { return p.bytes / max(p.time, 1e-6) }

// judge is the agents' referee: who sends at less than a quarter of the others' pace, or nothing while others send a lot, is passed over.
func (s *sim) judge(e event) {
	h := &s.hosts[e.host]
	// Where several pieces are under way the time is counted once.
	p := h.feed(e.peer)
	took := min(float64(e.sent), s.now-p.at)
	p.add(s.now, s.sizes[e.piece], took)
	p.others = h.received
	h.all.add(s.now, s.sizes[e.piece], took)
	if p.time > slowAfter && p.rate() < h.all.rate()/2 {
		var known []float64
		for k := range h.feeds {
			if q := &h.feeds[k]; !h.late[q.peer] {
				known = append(known, q.rate())
			}
		}
		slices.Sort(known)
		if len(known) > 1 && p.rate() < known[len(known)/2]/slowFactor {
			s.passOver(e.host, e.peer)
		}
	}
	if s.now-h.checked < checkEvery {
		return
	}
	h.checked = s.now
	for k := range h.feeds {
		q := &h.feeds[k]
		if s.now-q.at > stuckAfter && h.received-q.others > stuckPieces && !h.late[q.peer] && s.wants(e.host, q.peer) {
			s.passOver(e.host, q.peer)
		}
	}
}

// feed is what host h knows of a parent's pace.
func (h *host) feed(peer int32) *pace {
	for k := range h.feeds {
		if h.feeds[k].peer == peer {
			return &h.feeds[k]
		}
	}
	h.feeds = append(h.feeds, pace{peer: peer})
	return &h.feeds[len(h.feeds)-1]
}

// wants reports whether host i waits for pieces of a parent.
func (s *sim) wants(i, peer int32) bool {
	for t := range s.trees {
		if s.parent[t][i] == peer && s.missing(i, t) {
			return true
		}
	}
	return false
}

func (s *sim) missing(i int32, t int) bool {
	return slices.ContainsFunc(s.byTree[t], func(x planner.Piece) bool { return !s.has(i, x) })
}

// passOver has host i take nothing from another one any more.
func (s *sim) passOver(i, bad int32) {
	h := &s.hosts[i]
	if h.late[bad] {
		return
	}
	if h.late == nil {
		h.late = map[int32]bool{}
	}
	h.late[bad] = true
	s.out.Passed++
	for t := range s.trees {
		if s.parent[t][i] == bad {
			s.assign(t, i)
		}
	}
}

// assign gives a tree to the nearest ancestor that is not passed over, or to the origin.
func (s *sim) assign(t int, i int32) {
	h := &s.hosts[i]
	if !s.missing(i, t) {
		return
	}
	for _, a := range s.p.Ancestors(t, int(i)) {
		q := int32(a)
		if h.late[q] {
			continue
		}
		s.parent[t][i] = q
		if s.hosts[q].dead {
			s.push(event{at: s.now + s.c.Silence, kind: evNotice, host: i, peer: q})
			return
		}
		at := &s.hosts[q]
		if at.extra == nil {
			at.extra = map[int32][]int32{}
		}
		at.extra[int32(t)] = append(at.extra[int32(t)], i)
		for _, x := range s.byTree[t] {
			if s.has(q, x) && !s.has(i, x) {
				s.enqueue(q, i, x)
			}
		}
		return
	}
	s.parent[t][i] = theOrigin
	for _, x := range s.byTree[t] {
		if s.has(i, x) {
			continue
		}
		if n := len(h.runs); n > 0 && h.runs[n-1].next+planner.Piece(h.runs[n-1].count) == x {
			h.runs[n-1].count++
		} else {
			h.runs = append(h.runs, run{x, 1})
		}
	}
	s.openRuns(i)
}

// openRuns asks the origin for what the host is to fetch, some requests at once.
func (s *sim) openRuns(i int32) {
	h := &s.hosts[i]
	for k := 0; len(h.runs) > 0 && k < requestsAtOnce; k++ {
		for len(h.open) <= k {
			h.open = append(h.open, run{})
		}
		if h.open[k].count > 0 {
			continue
		}
		h.open[k], h.runs = h.runs[0], h.runs[1:]
		s.out.Requests++
		at, _ := s.tokens.serve(s.now, over(1, s.c.Origin.Requests))
		s.push(event{at: at + s.c.Origin.Latency, kind: evFetch, host: i, piece: planner.Piece(k)})
	}
}

// fetchNext has the origin send the next piece of a request.
func (s *sim) fetchNext(i int32, k int) {
	h := &s.hosts[i]
	r := &h.open[k]
	for r.count > 0 && s.has(i, r.next) {
		r.next++
		r.count--
	}
	if r.count == 0 {
		s.openRuns(i)
		return
	}
	x := r.next
	r.next++
	r.count--
	s.wanting = append(s.wanting, event{host: i, peer: theOrigin, piece: x, kind: int32(k)})
	s.serveOrigin()
}

// serveOrigin has the origin send what was wanted of it first.
func (s *sim) serveOrigin() {
	for len(s.wanting) > 0 && s.origin.free <= s.now {
		e := s.wanting[0]
		k := e.kind
		s.wanting = s.wanting[1:]
		bytes := s.sizes[e.piece] * s.over
		_, free := s.origin.serve(s.now, over(bytes, s.c.Origin.Rate))
		ends := max(free, s.now+over(bytes, s.c.Origin.Connection))
		s.out.Origin += s.sizes[e.piece]
		s.travel(e, ends)
		s.push(event{at: ends, kind: evFetch, host: e.host, piece: planner.Piece(k)})
		s.push(event{at: free, kind: evServe})
	}
}

// inflate has an indexer go on with a layer, and its table go to those who asked when it is ready.
func (s *sim) inflate(i int32, x planner.Piece) {
	if len(s.tables) == 0 {
		return
	}
	b, _ := s.p.Range(x)
	t := s.tables[b]
	if t == nil || t.host != i || t.ready {
		return
	}
	// Pieces come in any order and are inflated in their own: the last one's end is what counts.
	_, at := t.busy.serve(s.now, over(s.sizes[x], s.c.Hosts[i].Inflate))
	if t.left--; t.left > 0 {
		return
	}
	t.ready = true
	s.push(event{at: at, kind: evTable, host: i})
	for _, w := range t.waits {
		s.sendTable(t, w, at)
	}
}

// askTable has host i ask the indexer for a table.
func (s *sim) askTable(t *table, i int32) {
	switch {
	case t.host == i:
	case t.ready:
		s.sendTable(t, i, s.now)
	default:
		t.waits = append(t.waits, i)
	}
}

// sendTable has a table go from its indexer to a host: behind what its link has to send already.
func (s *sim) sendTable(t *table, to int32, ready float64) {
	bytes := t.bytes * s.over
	_, at := s.hosts[t.host].up.serve(max(s.now, ready), over(bytes, s.c.Hosts[t.host].Up))
	s.out.Sent[t.host] += t.bytes
	s.push(event{at: at + s.c.Hop, kind: evTable, host: to})
}

// moveTable gives a table to the next indexer when the one before is gone.
func (s *sim) moveTable(t *table) {
	list := s.p.Indexers(t.blob, len(s.hosts))
	for _, k := range list {
		if s.hosts[k].dead {
			continue
		}
		t.host = int32(k)
		from, to := s.p.BlobPieces(t.blob)
		t.left = 0
		t.busy.free = s.now + s.c.Silence
		for x := from; x < to; x++ {
			if !s.has(t.host, x) {
				t.left++
			} else {
				t.busy.free += over(s.sizes[x], s.c.Hosts[k].Inflate)
			}
		}
		t.waits = slices.DeleteFunc(t.waits, func(i int32) bool { return i == t.host })
		if t.left == 0 {
			t.ready = true
			s.push(event{at: t.busy.free, kind: evTable, host: t.host})
			for _, w := range t.waits {
				s.sendTable(t, w, t.busy.free)
			}
		}
		return
	}
}
