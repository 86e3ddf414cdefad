package lazyfs

import (
	"context"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// A stream is somebody who reads a layer in order: a large file, or, as readdir order is layer order, a tree
// file by file. Two readers of the same stretch are one stream.
type stream struct {
	layer int
	from  int64    // offset in the inflated layer where it began
	next  int64    // offset behind what was read
	done  int64    // bytes read in order so far
	row   tree.Row // the file read last
	files int      // how many files it went through, as far as it matters: 1 or 2
	ahead int64    // up to here spans are at hand or on their way
	fetch int64    // up to here Blobs was told
	used  uint64   // clock
	bulk  *stretch // what the recorder was told to leave out; nil: nothing
}

const (
	streamStart = 192 << 10 // bytes read in order until a reader counts as a stream: more than one request of the kernel
	streamSlack = 256 << 10 // gap that a stream may jump: files that are in the page cache already, headers
	overtaken   = 4         // and how many requests of the size of this one: they overtake each other on their way
	streamBack  = 2 << 20   // how far back it may come, for the same reason
	fetchAhead  = 64 << 20  // inflated bytes that Blobs is told of ahead of a stream
	fetchStep   = 4 << 20   // and not oftener than this
)

// streamBudget bounds the inflated bytes ahead of all streams, replayBudget those ahead of the profile.
func (c *cache) streamBudget() int64 { return c.limit * 3 / 8 }
func (c *cache) replayBudget() int64 { return c.limit * 3 / 8 }

// follow looks at what is being read, and has what comes next loaded. left is how many bytes of the file there
// are from the beginning of the read on; moved, whether the read reached something that nobody had read before.
//
// The answer says whether this is a long read in order, which no program starts with.
func (s *Server) follow(where []stretch, row tree.Row, left int64, moved bool) (long bool) {
	for _, x := range where {
		st := s.streamAt(x, row)
		st.used = s.clock
		s.clock++
		if gain := x.off + x.n - st.next; gain > 0 {
			st.done += min(gain, x.n)
			st.next += gain
		}
		if st.row != row {
			st.row, st.files = row, 2
		}
		if st.done > bulk {
			s.capture.abandon()
			st.bulk = s.recorder.leaveOut(st.bulk, st.layer, st.from, st.next)
		}
		long = long || st.done > longRead && st.files == 1
		if st.done < streamStart {
			if moved {
				s.neighbour(x)
			}
			continue
		}
		limit := inflatedSize(s.layers[x.layer])
		if st.files == 1 {
			limit = min(limit, x.off+left)
		}
		s.extend(st, limit)
	}
	return long
}

func (s *Server) streamAt(x stretch, row tree.Row) *stream {
	slack, back := max(streamSlack, overtaken*x.n), max(streamBack, overtaken*x.n)
	oldest := &s.streams[0]
	for i := range s.streams {
		st := &s.streams[i]
		if st.done > 0 && st.layer == x.layer && x.off >= st.next-back && x.off <= st.next+slack {
			return st
		}
		if st.used < oldest.used {
			oldest = st
		}
	}
	*oldest = stream{layer: x.layer, from: x.off, next: x.off, row: row, files: 1, ahead: x.off, fetch: x.off}
	return oldest
}

// extend loads ahead of st: as much as it has read, within the budget, but the next span at least.
func (s *Server) extend(st *stream, limit int64) {
	window := min(st.done, s.streamBudget())
	at := max(st.ahead, st.next)
	warm := s.inWarm(st.layer, st.next-1)
	for at < limit && s.aheadOfStreams < s.streamBudget() {
		id, end := s.unitAt(st.layer, at)
		if id == zeroUnit || (warm && id.source() != warmSource) || (at >= st.next+window && st.ahead > st.next) {
			break
		}
		s.loadAhead(id, &s.aheadOfStreams)
		at = end
		st.ahead = end
	}
	if s.ahead == nil || warm || st.files == 1 && limit-st.next < fetchStep {
		return
	}
	to := min(limit, st.next+min(4*st.done, fetchAhead))
	if from := max(st.fetch, at); to >= from+fetchStep || (to == limit && to > from) {
		st.fetch = to
		layer := s.layers[st.layer]
		lo, hi := layer.Ztoc.SpansOf(ztoc.Range{Start: from, End: to})
		var r []ztoc.Range
		for i := lo; i < hi; i++ {
			r = appendRange(r, layer.Ztoc.Span(i).Blob)
		}
		go s.ahead.Prefetch(s.ctx, layer.Ref, r)
	}
}

// inWarm reports whether a byte of a layer is in the warm file: what lies behind it and is not was not read the last
// time, and will hardly be this time.
func (s *Server) inWarm(layer int, off int64) bool {
	if s.warm == nil {
		return false
	}
	piece, _, _ := s.warm.find(layer, off)
	return piece >= 0
}

const (
	missBudget  = 6 << 20 // inflated bytes behind misses that nobody has read yet
	guessMemory = 64      // neighbours after which half of the score is forgotten
)

// neighbour has the span behind x loaded, if that costs neither the network nor a processor that somebody waits for:
// what a program reads next often lies next to what it reads, and it reads one thing at a time. It stops
// while fewer than one in three are read.
func (s *Server) neighbour(x stretch) {
	if s.cpu == 0 || s.aheadOfMisses >= missBudget {
		return
	}
	if s.guessed >= guessMemory/4 && s.guessedRight*3 < s.guessed {
		if s.guessed++; s.guessed >= guessMemory { // it may be worth trying again
			s.guessed, s.guessedRight = guessMemory/8, guessMemory/24
		}
		return
	}
	here, end := s.unitAt(x.layer, x.off+x.n-1)
	id, _ := s.unitAt(x.layer, end)
	if id == zeroUnit || s.units[id] != nil || here.source() != id.source() || !s.isLocal(id) {
		return
	}
	s.loadAhead(id, &s.aheadOfMisses)
	if s.guessed++; s.guessed >= guessMemory {
		s.guessed, s.guessedRight = s.guessed/2, s.guessedRight/2
	}
}

// appendRange appends x, joined with the last of r if they touch.
func appendRange(r []ztoc.Range, x ztoc.Range) []ztoc.Range {
	if n := len(r); n > 0 && x.Start <= r[n-1].End && x.Start >= r[n-1].Start {
		r[n-1].End = max(r[n-1].End, x.End)
		return r
	}
	return append(r, x)
}

// inflatedSize is the length of an inflated layer in bytes.
func inflatedSize(l Layer) int64 {
	if n := l.Ztoc.NumSpans(); n > 0 {
		return l.Ztoc.Span(n - 1).Out.End
	}
	return 0
}

// unitAt is the unit that holds byte off of a layer, and where it ends; zeroUnit when there is none.
func (s *Server) unitAt(layer int, off int64) (unitID, int64) {
	if s.warm != nil {
		if piece, _, have := s.warm.find(layer, off); piece >= 0 {
			return unitOf(warmSource, piece), off + have
		}
	}
	z := s.layers[layer].Ztoc
	i, hi := z.SpansOf(ztoc.Range{Start: off, End: off + 1})
	if i >= hi {
		return zeroUnit, 0
	}
	return unitOf(layer, i), z.Span(i).Out.End
}

// A replay is a profile being loaded ahead of its readers.
type replay struct {
	units []unitID
	at    int
}

// startReplay has the spans of the configured profile loaded.
func (s *Server) startReplay() {
	if s.warm != nil {
		s.warm.advise()
	}
	s.loadInOrder(s.cfg.Profile)
}

// Ahead has what p names loaded before readers ask for it, in its order and behind what earlier calls named: the
// fetching of all of it starts now, inflating keeps within the budget for what nobody has read yet. It may be
// called before Serve runs, and waits for that then; otherwise it returns at once.
func (s *Server) Ahead(ctx context.Context, p Profile) {
	if s.waitServing(ctx) == nil {
		s.loadInOrder(p)
	}
}

// waitServing waits until Serve runs.
func (s *Server) waitServing(ctx context.Context) error {
	select {
	case <-s.serving:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Server) loadInOrder(p Profile) {
	units := s.unitsOf(p)
	s.fetchAhead(units)
	s.mu.Lock()
	s.replay.units = append(s.replay.units, units...)
	s.start()
	s.mu.Unlock()
}

// sliver is what a profile may have beyond the warm file without a span being loaded ahead for it: recording rounds to
// pages and closes small gaps, the warm file has exactly what was read.
const sliver = 64 << 10

// unitsOf is the units that hold the ranges of p, each once, in p's order.
func (s *Server) unitsOf(p Profile) (units []unitID) {
	seen := map[unitID]bool{}
	for _, r := range p.Ranges {
		if r.Layer < 0 || r.Layer >= len(s.layers) {
			continue
		}
		for at, end := max(r.Start, 0), min(r.End, inflatedSize(s.layers[r.Layer])); at < end; {
			id, next := s.unitAt(r.Layer, at)
			if id == zeroUnit {
				break
			}
			next = min(next, end)
			if s.warm != nil && id.source() != warmSource {
				_, _, gap := s.warm.find(r.Layer, at)
				next = min(next, at+gap)
				if next-at < sliver {
					at = next
					continue
				}
			}
			if !seen[id] {
				seen[id] = true
				units = append(units, id)
			}
			at = next
		}
	}
	return units
}

// fetchAhead tells Blobs which compressed bytes units need.
func (s *Server) fetchAhead(units []unitID) {
	if s.ahead == nil {
		return
	}
	var ranges []ztoc.Range
	for i, id := range units {
		if id.source() == warmSource {
			continue
		}
		l := s.layers[id.source()]
		ranges = appendRange(ranges, l.Ztoc.Span(id.index()).Blob)
		if i == len(units)-1 || units[i+1].source() != id.source() {
			s.ahead.Prefetch(s.ctx, l.Ref, ranges)
			ranges = nil
		}
	}
}

// pump goes on with the replay as far as its budget goes: what was inflated ahead and not read yet counts. Spans
// that readers have reached by themselves are passed over.
func (s *Server) pump() {
	r := &s.replay
	for r.at < len(r.units) && s.aheadOfReplay < s.replayBudget() {
		id := r.units[r.at]
		r.at++
		if id.source() == warmSource || !s.touched[id.source()].has(id.index()) {
			s.loadAhead(id, &s.aheadOfReplay)
		}
	}
	if r.at > 0 && r.at == len(r.units) {
		*r = replay{}
	}
}
