package sim

import (
	"errors"
	"slices"

	"github.com/muster-hpc/muster/planner"
)

// What can happen.
const (
	evCame   = iota // the last byte of piece has come to host
	evHave          // host has looked at piece and written it
	evGroup         // the first byte of piece is at the link into host's group
	evLink          // it is at host's own link
	evServe         // the origin's link is free
	evFree          // host's link is free to send the next piece
	evFetch         // host's request to the origin gives its next piece; piece: of its requests
	evBegin         // host begins
	evDie           // host is gone
	evNotice        // host has waited long enough for peer
	evTable         // host has the table of blob piece
)

// An event is something that happens to a host at a time.
type event struct {
	at    float64
	seq   int32 // of two at one time, the first one planned comes first
	kind  int32
	host  int32
	peer  int32 // where a piece came from, -1: the origin
	piece planner.Piece
	sent  float32 // how long it was under way until at
	ends  float32 // when its last byte has passed the links so far, after at
}

// events is a heap of four children: shallow, and its nodes lie side by side.
type events struct {
	list []event
	seq  int32
	all  int
}

func (a event) before(b event) bool {
	return a.at < b.at || a.at == b.at && a.seq-b.seq < 0
}

func (e *events) push(v event) {
	e.seq++
	e.all++
	v.seq = e.seq
	e.list = append(e.list, v)
	i := len(e.list) - 1
	for i > 0 {
		p := (i - 1) / 4
		if !v.before(e.list[p]) {
			break
		}
		e.list[i] = e.list[p]
		i = p
	}
	e.list[i] = v
}

func (e *events) pop() event {
	top := e.list[0]
	last := e.list[len(e.list)-1]
	e.list = e.list[:len(e.list)-1]
	n := len(e.list)
	if n == 0 {
		return top
	}
	i := 0
	for {
		c := 4*i + 1
		if c >= n {
			break
		}
		best := c
		for k := c + 1; k < min(c+4, n); k++ {
			if e.list[k].before(e.list[best]) {
				best = k
			}
		}
		if !e.list[best].before(last) {
			break
		}
		e.list[i] = e.list[best]
		i = best
	}
	e.list[i] = last
	return top
}

// A sim is a simulation under way.
type sim struct {
	p *planner.Plan
	c *Cluster
	events
	now     float64
	over    float64
	pieces  int
	trees   int
	byTree  [][]planner.Piece
	sizes   []float64 // of pieces, bytes
	hosts   []host
	origin  server  // its link
	wanting []event // what waits for it
	tokens  server  // the requests that it takes
	shared  server  // processors, where all hosts share them
	groups  [][2]server
	parent  [][]int32 // by tree and host; origin where a host fetches by itself
	tables  map[int]*table
	out     Outcome
}

// theOrigin stands for the origin where hosts are numbers.
const theOrigin = -1

// A host is the state of one.
type host struct {
	have        []uint64 // pieces, a bit each
	left        int      // pieces that are missing
	tables      int      // tables that are missing
	begun, dead bool
	sending     bool
	queue       []send
	head        int
	up, down    server
	disk, cpu   server
	runs        []run // that it will ask the origin for
	open        []run // requests under way
	extra       map[int32][]int32
	late        map[int32]bool // hosts that are passed over
	feeds       []pace         // by parent
	all         pace           // of all parents together
	checked     float64
	received    int // pieces
}

// A send is a piece that a host will send.
type send struct {
	to    int32
	piece planner.Piece
}

// A run is adjacent pieces that are asked of the origin in one request.
type run struct {
	next  planner.Piece
	count int
}

// A pace is what came lately from one parent, faded as the agent's referee does.
type pace struct {
	peer        int32
	bytes, time float64
	at          float64 // when something came last
	others      int     // pieces that the host had received by then
}

// A table is a layer's table that is built on the way.
type table struct {
	blob  int
	host  int32   // the indexer
	left  int     // pieces that it has not inflated
	busy  server  // its processor
	bytes float64 // of the table
	ready bool
	waits []int32 // who asked before it was
}

// How the agents judge their parents (agent/referee.go).
const (
	sharing     = 8 // children to which a host with much to send sends at the same time
	fadeSeconds = 1.2
	slowAfter   = 0.9
	slowFactor  = 4
	stuckAfter  = 4.0
	stuckPieces = 16
	checkEvery  = 0.5
)

// requestsAtOnce is how many runs a seed has under way (agent/steps.go).
const requestsAtOnce = 2

// tableShare is how large a packed table is beside its layer (docs/spans.md).
const tableShare = 0.01

// errStuck says that hosts are left that nothing will happen to.
var errStuck = errors.New("hosts are left without what they wait for")

// Simulate lets a plan's pieces travel over a cluster. Each link, disk and processor does one piece at a time, in the order in which they come;
// a piece passes through all links on its way at once and is passed on when it has been written. Hosts that send nothing or little are
// passed over as agents do: next comes the parent's parent, and so on to the root, its deputies, and the origin. A layer without a table has
// it built by its indexer, which every host asks for it.
//
// It takes about 0.3 µs per piece and host.
func Simulate(p *planner.Plan, c *Cluster) (*Outcome, error) {
	n := len(p.Spec().Hosts)
	if n != len(c.Hosts) {
		return nil, errors.New("a plan and a cluster of different hosts")
	}
	s := &sim{
		p: p, c: c, over: max(c.Overhead, 1), pieces: p.Pieces(), trees: p.Trees(), byTree: make([][]planner.Piece, p.Trees()),
		hosts: make([]host, n), groups: make([][2]server, len(c.Groups)), parent: make([][]int32, p.Trees()), tables: map[int]*table{},
		out: Outcome{Done: make([]float64, n), Sent: make([]float64, n)},
	}
	for x := range planner.Piece(s.pieces) {
		_, r := p.Range(x)
		s.sizes = append(s.sizes, float64(r.Len()))
		s.byTree[p.Tree(x)] = append(s.byTree[p.Tree(x)], x)
	}
	for t := range s.parent {
		s.parent[t] = make([]int32, n)
		for h := range n {
			s.parent[t][h] = int32(p.Parent(t, h))
		}
	}
	for b, blob := range p.Spec().Blobs {
		if i := p.Indexer(b); i >= 0 {
			from, to := p.BlobPieces(b)
			s.tables[b] = &table{blob: b, host: int32(i), left: int(to - from), bytes: tableShare * float64(blob.Size)}
		}
	}
	words := (s.pieces + 63) / 64
	bits := make([]uint64, n*words)
	for h := range s.hosts {
		at := &s.hosts[h]
		at.have, at.left, at.tables = bits[h*words:(h+1)*words], s.pieces, len(s.tables)
		switch m := c.Hosts[h]; {
		case m.Dies < 0:
			at.dead = true
		case m.Dies > 0:
			s.push(event{at: m.Dies, kind: evDie, host: int32(h)})
		}
		s.push(event{at: c.Hosts[h].Start, kind: evBegin, host: int32(h)})
	}
	for len(s.list) > 0 {
		e := s.pop()
		s.now = e.at
		s.happen(e)
	}
	for h := range s.hosts {
		if at := &s.hosts[h]; !at.dead && (at.left > 0 || at.tables > 0) {
			return &s.out, errStuck
		}
	}
	s.out.Events = s.all
	return &s.out, nil
}

func (s *sim) has(h int32, x planner.Piece) bool { return s.hosts[h].have[x/64]&(1<<(x%64)) != 0 }

func (s *sim) happen(e event) {
	if e.kind == evServe {
		s.serveOrigin()
		return
	}
	h := &s.hosts[e.host]
	if h.dead {
		return
	}
	switch e.kind {
	case evCame:
		s.came(e)
	case evGroup:
		s.intoGroup(e, float64(e.ends))
	case evLink:
		s.intoHost(e, float64(e.ends))
	case evBegin:
		s.begin(e.host)
	case evHave:
		s.arrived(e)
	case evFree:
		h.sending = false
		s.sendNext(e.host)
	case evFetch:
		s.fetchNext(e.host, int(e.piece))
	case evDie:
		s.die(e.host)
	case evNotice:
		s.passOver(e.host, e.peer)
	case evTable:
		h.tables--
		s.maybeDone(e.host)
	}
}

// begin has a host ask: the origin for its runs, indexers for tables. A parent that is gone already is noticed.
func (s *sim) begin(i int32) {
	h := &s.hosts[i]
	h.begun = true
	for _, r := range s.p.Runs(int(i)) {
		h.runs = append(h.runs, run{r.First, r.Count})
	}
	s.openRuns(i)
	seen := map[int32]bool{}
	for t := range s.trees {
		if q := s.parent[t][i]; q >= 0 && !seen[q] && s.hosts[q].dead {
			seen[q] = true
			s.push(event{at: s.now + s.c.Silence, kind: evNotice, host: i, peer: q})
		}
	}
	for _, t := range s.inOrder() {
		s.askTable(t, i)
	}
}

// inOrder are the tables by blob.
func (s *sim) inOrder() (list []*table) {
	for _, t := range s.tables {
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *table) int { return a.blob - b.blob })
	return list
}

// die takes a host away: whoever waits for it notices after a while, and its own work is lost.
func (s *sim) die(i int32) {
	s.hosts[i].dead = true
	s.hosts[i].queue = nil
	seen := map[int32]bool{}
	for t := range s.trees {
		for c := range s.parent[t] {
			if s.parent[t][c] == i && !seen[int32(c)] {
				seen[int32(c)] = true
				s.push(event{at: s.now + s.c.Silence, kind: evNotice, host: int32(c), peer: i})
			}
		}
	}
	for _, t := range s.inOrder() { // the next indexer in its place
		if t.host == i && !t.ready {
			s.moveTable(t)
		}
	}
}
