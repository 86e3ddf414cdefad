package costmodel

import "math"

// A Swarm is a stage of Bytes on Hosts like hosts, each of which shall have all of them, from one origin that sends each byte once.
// Rates are in bytes per second; 0 is a link that never is the limit.
type Swarm struct {
	Bytes  float64
	Hosts  int
	Leaves int     // of them, those that pass nothing on because they are known to be slow
	Seeds  int     // hosts that fetch from the origin at one time
	Fanout int     // children of a host in a tree
	Piece  float64 // bytes that a host has before it passes them on
	Origin float64 // rate at which the origin sends to all together
	Up     float64 // of each host
	Down   float64
	Hop    float64 // seconds from a piece's arrival to its departure, and on the wire
}

// Fluid is the least time in which any scheme can do it, in seconds, were bytes a fluid: the origin has to send each byte once, each host
// has to receive all, and everybody together has to send all copies.
//
//	T = max(B/Us, B/d, N·B/(Us+N·u))
//
// R. Kumar, K. W. Ross: Peer-Assisted File Distribution: The Minimum Distribution Time, IEEE HotWeb 2006.
func (s Swarm) Fluid() float64 {
	n := float64(s.Hosts)
	return max(over(s.Bytes, s.Origin), over(s.Bytes, s.Down), over(n*s.Bytes, s.all()))
}

// OneCopy is the same where the origin may send each byte only once, which is the point of a swarm: hosts that are not leaves send the N−1
// other copies.
func (s Swarm) OneCopy() float64 {
	return max(over(s.Bytes, s.Origin), over(s.Bytes, s.Down), s.sending())
}

// sending is how long the hosts that pass on are sending, were their links always busy.
func (s Swarm) sending() float64 {
	return over(float64(s.Hosts-1)*s.Bytes, float64(max(s.Hosts-s.Leaves, 1))*s.Up)
}

// Pipeline is how long trees of pieces take, in seconds:
//
//	OneCopy + drain + waiting + depth·Hop
//	drain   = (seeds + fanout·(depth−1))·p      p = Piece/Up, one piece leaving a host
//	waiting = 0.55·(log₂N − 1)·√pieces·p·load⁴  load = OneCopy's share in which a host's links are busy
//
// The seeds end together, so the last piece of each is sent in turn by all; then each level below sends it to fan-out children. Where hosts' links are as
// busy as the origin's, pieces that meet wait for each other, and what is lost so grows with the root of their number, as queues do that are always full. The
// two factors of waiting are fitted to planner/sim (docs/trees.md), which they follow within a tenth of the whole.
func (s Swarm) Pipeline() float64 {
	t := s.OneCopy()
	if s.Hosts < 2 || s.Bytes <= 0 {
		return t
	}
	p := max(over(s.Piece, s.Up), over(s.Piece, s.Down))
	depth := float64(Depth(s.Hosts, s.Fanout))
	drain := (float64(min(s.Seeds, s.Hosts)) + float64(min(s.Fanout, s.Hosts-1))*(depth-1)) * p
	n := float64(s.Hosts)
	load := min(1, max(over(s.Bytes, s.Down), s.sending())/t)
	if t == 0 {
		load = 0
	}
	waiting := 0.55 * max(0, math.Log2(n)-1) * math.Sqrt(s.Bytes/s.Piece) * p * math.Pow(load, 4)
	return t + drain + waiting + depth*s.Hop
}

// all is the rate of everybody together.
func (s Swarm) all() float64 {
	if s.Origin == 0 || s.Up == 0 {
		return 0
	}
	return s.Origin + float64(s.Hosts)*s.Up
}

// Depth is how many hops a tree of n hosts has below its root, where each host has up to fanout children and the tree is as flat as that allows.
func Depth(n, fanout int) int {
	depth, level, total := 0, 1, 1
	for total < n {
		level *= max(fanout, 1)
		total += level
		depth++
	}
	return depth
}

// over is a/b, 0 where b is no limit.
func over(a, b float64) float64 {
	if b <= 0 {
		return 0
	}
	return a / b
}
