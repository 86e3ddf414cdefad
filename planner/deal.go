package planner

import (
	"math/bits"

	"github.com/muster-hpc/muster/ztoc"
)

// chooseSeeds takes up to Params.Seeds hosts among those that may reach the origin, spread over groups and then over the list. Slow
// hosts only where there is no other.
func (p *Plan) chooseSeeds() {
	hosts := p.spec.Hosts
	pick := func(ok func(Host) bool) (list []int) {
		for i, h := range hosts {
			if ok(h) {
				list = append(list, i)
			}
		}
		return list
	}
	may := pick(func(h Host) bool { return h.Seed && !h.Slow })
	if may == nil {
		may = pick(func(h Host) bool { return h.Seed })
	}
	p.origin = may != nil
	if may == nil {
		may = pick(func(h Host) bool { return !h.Slow })
	}
	if may == nil {
		may = pick(func(Host) bool { return true })
	}
	want := p.spec.Params.Seeds
	if want == 0 {
		want = DefaultSeeds
	}
	// A seed for less than this is a connection and a token more than it is worth.
	const least = 1 << 20
	want = int(min(int64(want), max(1, p.spec.size()/least), int64(len(may))))
	p.seeds = spread(may, hosts, want)
}

// spread takes n of list so that groups have about equal shares, and within a group at equal distances.
func spread(list []int, hosts []Host, n int) []int {
	var names []string
	byGroup := map[string][]int{}
	for _, i := range list {
		g := hosts[i].Group
		if byGroup[g] == nil {
			names = append(names, g)
		}
		byGroup[g] = append(byGroup[g], i)
	}
	if len(names) > n { // not one for each group: groups at equal distances
		every := make([]string, n)
		for k := range every {
			every[k] = names[k*len(names)/n]
		}
		names = every
	}
	// How many of each group, dealt one at a time so that the small ones run out and the large ones take over.
	take := make([]int, len(names))
	for left := n; left > 0; {
		for g, name := range names {
			if left > 0 && take[g] < len(byGroup[name]) {
				take[g]++
				left--
			}
		}
	}
	out := make([]int, 0, n)
	for k := 0; len(out) < n; k++ { // one of each group in turn, so that neighbours in the list are far apart
		for g, name := range names {
			if k < take[g] {
				out = append(out, byGroup[name][k*len(byGroup[name])/take[g]])
			}
		}
	}
	return out
}

// deal cuts the bytes of all blobs into sections of about Params.Run, as many for each seed, and deals the pieces of a section to its seed's
// trees in turn. It says how many bytes each tree has got.
func (p *Plan) deal() (shares []int64) {
	s := p.spec
	seeds := len(p.seeds)
	perSeed := max(1, p.wantTrees()/seeds)
	shares = make([]int64, seeds*perSeed)
	p.treeOf = make([]uint8, p.Pieces())
	total := s.size()
	run := s.Params.Run
	if run == 0 {
		run = DefaultRun
	}
	rounds := max(1, (total+run*int64(seeds)/2)/(run*int64(seeds)))
	sections := rounds * int64(seeds)
	size := p.PieceSize()
	given := make([]int64, seeds) // bytes dealt to each seed so far
	var at int64                  // bytes before this piece
	section := int64(-1)          // of the piece before
	for i, b := range s.Blobs {
		for off := int64(0); off < b.Size; off += size {
			x := p.PieceAt(i, off)
			r := ztoc.Range{Start: off, End: min(off+size, b.Size)}
			now := mulDiv(at+r.Len()/2, sections, total)
			seed := int(now % int64(seeds))
			// A tree takes a piece's worth of bytes before the next one's turn, so that small blobs do not make it uneven.
			t := seed + seeds*int(given[seed]/size%int64(perSeed))
			p.treeOf[x] = uint8(t)
			shares[t] += r.Len()
			given[seed] += r.Len()
			at += r.Len()
			p.extend(p.seeds[seed], i, x, r, now == section && off > 0)
			section = now
		}
	}
	return shares
}

// extend adds a piece to the last run of host, or begins another.
func (p *Plan) extend(host, blob int, x Piece, r ztoc.Range, joins bool) {
	runs := p.runs[host]
	if joins {
		last := &runs[len(runs)-1]
		last.Range.End = r.End
		last.Count++
		return
	}
	p.runs[host] = append(runs, Run{Blob: blob, Range: r, First: x, Count: 1})
}

// mulDiv is a·b/c for 0 ≤ a < c: no product overflows.
func mulDiv(a, b, c int64) int64 {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	q, _ := bits.Div64(hi, lo, uint64(c))
	return int64(q)
}
