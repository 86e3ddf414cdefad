package sim

import (
	"math"

	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/planner"
)

// A Shape is what trees make of N hosts.
type Shape struct {
	Peers  int     // the most that one host deals with
	Uneven float64 // bytes sent by the host that sends most, over the mean
	Rack   float64 // copies of the image that enter a rack, mean
	Depth  int     // hops to the last host
	Drain  int     // pieces that leave one after the other until the last host has the last one: fan-out · depth
	Late   float64 // share of all bytes of the others that come by way of one host, for the host by which most do
}

// ShapeOf counts a plan. Racks are rack consecutive hosts each, whether the plan knows of them or not.
func ShapeOf(p *planner.Plan, rack int) Shape {
	n := len(p.Spec().Hosts)
	var s Shape
	var total int64
	for k := range p.Trees() {
		total += p.Bytes(k)
	}
	sent := make([]int64, n)
	below := make([]float64, n) // share of others' bytes by way of each host
	met := make([][]int32, n)
	order := make([]int, n)
	subtree, depth := make([]int, n), make([]int, n)
	var entered float64
	for k := range p.Trees() {
		share := float64(p.Bytes(k)) / float64(max(total, 1))
		for h := range n {
			order[p.Rank(k, h)] = h
			subtree[h] = 0
		}
		for _, h := range order {
			q := p.Parent(k, h)
			if q < 0 {
				depth[h] = 0
				entered += share
				continue
			}
			depth[h] = depth[q] + 1
			s.Depth = max(s.Depth, depth[h])
			sent[q] += p.Bytes(k)
			met[q], met[h] = append(met[q], int32(h)), append(met[h], int32(q))
			if q/rack != h/rack {
				entered += share
			}
		}
		for i := n - 1; i > 0; i-- {
			h := order[i]
			below[h] += share * float64(subtree[h])
			subtree[p.Parent(k, h)] += 1 + subtree[h]
		}
		below[order[0]] += share * float64(subtree[order[0]])
	}
	var most, sum int64
	seen := make([]int, n)
	for h := range n {
		peers := 0
		for _, o := range met[h] {
			if seen[o] != h+1 {
				seen[o] = h + 1
				peers++
			}
		}
		s.Peers = max(s.Peers, peers)
		most, sum = max(most, sent[h]), sum+sent[h]
		s.Late = max(s.Late, below[h]/float64(max(n-1, 1)))
	}
	s.Uneven = 1
	if sum > 0 {
		s.Uneven = float64(most) * float64(n) / float64(sum)
	}
	s.Rack = entered / float64((n+rack-1)/rack)
	fanout := p.Spec().Params.Fanout
	if fanout == 0 {
		fanout = planner.DefaultFanout
	}
	s.Drain = min(fanout, n-1) * s.Depth
	return s
}

// PieceTrees is what to expect when each of so many pieces has a tree of its own, with hosts at random places: the simplest rule that is balanced in the
// long run. It is a calculation; nobody plans so.
//
//   - A host meets two or so others per piece, at random.
//   - It is among those who pass on with probability 1/fanout, and sends fanout copies then: the variance of copies sent is pieces · (fanout − 1),
//     and the largest of N normal values is √(2 ln N) standard deviations above the mean.
func PieceTrees(n, pieces, fanout, rack int) Shape {
	s := Shape{Depth: costmodel.Depth(n, fanout), Uneven: 1, Rack: 1}
	s.Drain = min(fanout, n-1) * s.Depth
	if n < 2 {
		return s
	}
	others := float64(n - 1)
	s.Peers = int(math.Round(others * (1 - math.Pow(1-1/others, 2*float64(pieces)))))
	if n > 2 {
		s.Uneven = 1 + math.Sqrt(2*math.Log(float64(n))*float64(min(fanout, n-1)-1)/float64(pieces))
	}
	if n > rack {
		s.Rack = 1.0/float64(n/rack) + float64(rack)*(1-float64(rack-1)/others)
	}
	// The sum over hosts of what is below them is the sum of depths.
	sum, level, left := 0, 1, n-1
	for d := 1; left > 0; d++ {
		level *= fanout
		sum += d * min(level, left)
		left -= level
	}
	s.Late = float64(sum) / float64(n) / others
	return s
}
