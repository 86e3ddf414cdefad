package costmodel

import (
	"math"
	"testing"
)

func TestSwarm(t *testing.T) {
	like := Swarm{Bytes: 120e6, Hosts: 8, Seeds: 8, Fanout: 4, Piece: 256 << 10, Origin: 12.5e6, Up: 12.5e6, Down: 12.5e6}
	for _, c := range []struct {
		name           string
		change         func(*Swarm)
		fluid, oneCopy float64
	}{
		{"like links", func(*Swarm) {}, 9.6, 9.6},
		{"fast origin", func(s *Swarm) { s.Origin *= 100 }, 9.6, 9.6},
		{"slow origin", func(s *Swarm) { s.Origin /= 2 }, 19.2, 19.2},
		{"hosts send at half", func(s *Swarm) { s.Up /= 2 }, 8 * 120e6 / (5 * 12.5e6), 7 * 120e6 / (4 * 12.5e6)},
		{"half are leaves", func(s *Swarm) { s.Leaves = 4 }, 9.6, 7 * 120e6 / (4 * 12.5e6)},
		{"all are leaves", func(s *Swarm) { s.Leaves = 8 }, 9.6, 7 * 9.6},
		{"one host", func(s *Swarm) { s.Hosts, s.Seeds = 1, 1 }, 9.6, 9.6},
		{"nothing", func(s *Swarm) { s.Bytes = 0 }, 0, 0},
		{"links without limit", func(s *Swarm) { s.Origin, s.Up, s.Down = 0, 0, 0 }, 0, 0},
	} {
		s := like
		c.change(&s)
		if math.Abs(s.Fluid()-c.fluid) > 1e-9 || math.Abs(s.OneCopy()-c.oneCopy) > 1e-9 {
			t.Errorf("%s: fluid %g, one copy %g; expected %g and %g", c.name, s.Fluid(), s.OneCopy(), c.fluid, c.oneCopy)
		}
		if p := s.Pipeline(); math.IsNaN(p) || p < s.OneCopy() || p > 1.3*s.OneCopy() {
			t.Errorf("%s: pipeline %g over %g", c.name, p, s.OneCopy())
		}
	}
	deep := like
	deep.Hop = 1
	if got := deep.Pipeline() - like.Pipeline(); math.Abs(got-2) > 1e-9 {
		t.Errorf("two hops of a second cost %g s", got)
	}
}

func TestDepth(t *testing.T) {
	for _, c := range [][3]int{{1, 4, 0}, {2, 4, 1}, {5, 4, 1}, {6, 4, 2}, {21, 4, 2}, {22, 4, 3}, {16_384, 4, 7}, {4, 1, 3}, {3, 0, 2}} {
		if got := Depth(c[0], c[1]); got != c[2] {
			t.Errorf("%d hosts, fan-out %d: %d hops, expected %d", c[0], c[1], got, c[2])
		}
	}
}
