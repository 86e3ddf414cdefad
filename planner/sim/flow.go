package sim

import (
	"math"

	"github.com/muster-hpc/muster/planner"
)

// Links are the speeds of a cluster in bytes per second, and how far its hosts are apart.
type Links struct {
	Origin float64   // what the origin sends to all together
	Up     []float64 // what each host sends
	Down   []float64 // what each host receives
	Hop    float64   // seconds from a byte's leaving to its being passed on: latency, and looking at the piece
}

// Like is n hosts and an origin with links of the same rate in both directions.
func Like(n int, rate float64) Links {
	l := Links{Origin: rate, Up: make([]float64, n), Down: make([]float64, n)}
	for i := range n {
		l.Up[i], l.Down[i] = rate, rate
	}
	return l
}

// Flows is what Run has seen.
type Flows struct {
	Done   []float64 // when each host had everything, seconds
	Origin float64   // when the last byte left the origin
	Sent   []float64 // bytes that each host has sent
}

// Makespan is when the last host had everything.
func (f Flows) Makespan() float64 {
	var last float64
	for _, d := range f.Done {
		last = max(last, d)
	}
	return last
}

// A flow is a connection: one piece after the other, in the order in which they became ready.
type flow struct {
	from, to int // links: 0 is the origin, host h is h+1
	queue    []planner.Piece
	left     float64 // bytes of queue[0]
	rate     float64
}

// Run lets pieces travel as the plan says. A seed asks for one run after the other. Whoever has all of a piece sends it to its children,
// each over a connection of its own, in the order in which pieces came. All that is under way shares the links max-min fairly, as TCP
// roughly does. It is meant for some hundred hosts at most.
func Run(p *planner.Plan, l Links) Flows {
	n := len(p.Spec().Hosts)
	s := &running{p: p, l: l, have: make([]int, n), index: map[[2]int]*flow{}}
	out := Flows{Done: make([]float64, n), Sent: make([]float64, n)}
	for _, h := range p.Seeds() {
		for _, r := range p.Runs(h) {
			for x := r.First; x < r.First+planner.Piece(r.Count); x++ {
				s.send(0, h+1, x)
			}
		}
	}
	pieces := p.Pieces()
	now := 0.0
	for len(s.active) > 0 || len(s.arriving) > 0 {
		s.share()
		step := math.Inf(1)
		for _, f := range s.active {
			step = min(step, f.left/f.rate)
		}
		for _, a := range s.arriving {
			step = min(step, a.at-now)
		}
		step = max(step, 0)
		now += step
		var ended []*flow
		keep := s.active[:0]
		for _, f := range s.active {
			f.left -= f.rate * step
			if f.left > 1e-3 {
				keep = append(keep, f)
				continue
			}
			ended = append(ended, f)
		}
		s.active = keep
		for _, f := range ended {
			x := f.queue[0]
			if f.from == 0 {
				out.Origin = now
			} else {
				out.Sent[f.from-1] += s.size(x)
			}
			s.arriving = append(s.arriving, arrival{now + l.Hop, f.to - 1, x})
			if f.queue = f.queue[1:]; len(f.queue) > 0 {
				f.left = s.size(f.queue[0])
				s.active = append(s.active, f)
			}
		}
		rest := s.arriving[:0:0]
		for _, a := range s.arriving {
			if a.at > now {
				rest = append(rest, a)
				continue
			}
			if s.have[a.host]++; s.have[a.host] == pieces {
				out.Done[a.host] = now
			}
			for c := range p.Children(p.Tree(a.piece), a.host) {
				s.send(a.host+1, c+1, a.piece)
			}
		}
		s.arriving = rest
	}
	return out
}

type arrival struct {
	at    float64
	host  int
	piece planner.Piece
}

type running struct {
	p        *planner.Plan
	l        Links
	have     []int
	index    map[[2]int]*flow
	active   []*flow // with something to send
	arriving []arrival

	// Used by share: what is left of the origin's link, of each host's sending and each host's receiving, and what goes through.
	room  []float64
	count []int
	of    [][]*flow
}

func (s *running) size(x planner.Piece) float64 {
	_, r := s.p.Range(x)
	return float64(r.Len())
}

func (s *running) send(from, to int, x planner.Piece) {
	f := s.index[[2]int{from, to}]
	if f == nil {
		f = &flow{from: from, to: to}
		s.index[[2]int{from, to}] = f
	}
	if f.queue = append(f.queue, x); len(f.queue) == 1 {
		f.left = s.size(x)
		s.active = append(s.active, f)
	}
}

// share gives each active flow its max-min fair rate: the link with the least for each of its flows is full first; what its flows take is
// taken from their other links, and so on.
func (s *running) share() {
	n := len(s.l.Up)
	if s.room == nil {
		s.room, s.count, s.of = make([]float64, 2*n+1), make([]int, 2*n+1), make([][]*flow, 2*n+1)
	}
	room, count, of := s.room, s.count, s.of
	for k := range of {
		count[k], of[k] = 0, of[k][:0]
	}
	room[0] = s.l.Origin
	for h := range n {
		room[1+h], room[1+n+h] = s.l.Up[h], s.l.Down[h]
	}
	for _, f := range s.active {
		f.rate = -1
		for _, k := range [2]int{f.from, n + f.to} {
			count[k]++
			of[k] = append(of[k], f)
		}
	}
	for {
		full, least := -1, math.Inf(1)
		for k, c := range count {
			if c > 0 && room[k]/float64(c) < least {
				full, least = k, room[k]/float64(c)
			}
		}
		if full < 0 {
			return
		}
		for _, f := range of[full] {
			if f.rate >= 0 {
				continue
			}
			f.rate = max(least, 1e-9)
			for _, k := range [2]int{f.from, n + f.to} {
				room[k] -= least
				count[k]--
			}
		}
		count[full] = 0
	}
}
