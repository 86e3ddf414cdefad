package planner

import (
	"fmt"
	"iter"
	"slices"
	"sort"

	"github.com/muster-hpc/muster/ztoc"
)

// A Plan says for each piece which tree it travels along, and for each tree who has whom for a parent. Hosts are numbers into
// JobSpec.Hosts, trees are numbers below Trees, pieces are numbers below Pieces over all blobs in order. A Plan
// never changes and may be used by many goroutines.
type Plan struct {
	spec   *JobSpec
	id     PlanID
	number map[string]int // of a host's name
	first  []Piece        // the first piece of each blob, and behind the last one
	grid   int64          // bytes of a piece
	treeOf []uint8        // per piece
	trees  []tree
	seeds  []int         // who fetches, in the order in which runs are dealt
	origin bool          // the seeds may reach the origin
	runs   map[int][]Run // by host
	index  []int         // hosts that may build tables, in the job's own order
	turn   map[int]int   // of a layer without a ztoc: where in index its builder stands
}

// A Piece is a number of a piece: blobs in the JobSpec's order, each cut at the grid of Params.Piece.
type Piece int32

// A Run is what a root asks of the origin (or of a holder) in one request: adjacent pieces of one blob.
type Run struct {
	Blob  int
	Range ztoc.Range
	First Piece
	Count int
}

// New makes the plan of s, which must not change afterwards. It is a pure function: equal specs give equal plans on every host.
// ErrInvalid as Validate; ErrVersion when s is for another planner.
//
// Costs O(trees · hosts · log hosts + pieces).
func New(s *JobSpec) (*Plan, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	if s.Planner != Version {
		return nil, fmt.Errorf("%w: it is of version %d, this is %d", ErrVersion, s.Planner, Version)
	}
	p := &Plan{spec: s, id: s.ID(), grid: s.piece(), runs: map[int][]Run{}, number: make(map[string]int, len(s.Hosts))}
	for i, h := range s.Hosts {
		p.number[h.Name] = i
	}
	p.cut()
	p.chooseSeeds()
	shares := p.deal()
	p.grow(shares)
	p.chooseIndexers()
	return p, nil
}

// ID is the plan's identity.
func (p *Plan) ID() PlanID { return p.id }

// Spec is what the plan was made of. Not to be changed.
func (p *Plan) Spec() *JobSpec { return p.spec }

// Host is the number of the host with this name, or -1.
func (p *Plan) Host(name string) int {
	if i, ok := p.number[name]; ok {
		return i
	}
	return -1
}

// cut lays the grid over the blobs.
func (p *Plan) cut() {
	size := p.grid
	p.first = make([]Piece, len(p.spec.Blobs)+1)
	for i, b := range p.spec.Blobs {
		p.first[i+1] = p.first[i] + Piece((b.Size+size-1)/size)
	}
}

// Pieces is how many pieces there are.
func (p *Plan) Pieces() int { return int(p.first[len(p.first)-1]) }

// PieceSize is the grid in bytes. The last piece of a blob is shorter.
func (p *Plan) PieceSize() int64 { return p.grid }

// BlobPieces is the pieces of a blob: [from, to).
func (p *Plan) BlobPieces(blob int) (from, to Piece) { return p.first[blob], p.first[blob+1] }

// Range is where a piece lies.
func (p *Plan) Range(x Piece) (blob int, r ztoc.Range) {
	blob = sort.Search(len(p.spec.Blobs), func(i int) bool { return p.first[i+1] > x })
	size := p.grid
	start := int64(x-p.first[blob]) * size
	return blob, ztoc.Range{Start: start, End: min(start+size, p.spec.Blobs[blob].Size)}
}

// PieceAt is the piece that holds a byte of a blob.
func (p *Plan) PieceAt(blob int, offset int64) Piece {
	return p.first[blob] + Piece(offset/p.grid)
}

// Seeds are the hosts that fetch from the origin, each the root of some trees, in the order in which runs are dealt to them.
func (p *Plan) Seeds() []int { return slices.Clone(p.seeds) }

// FromOrigin reports whether the seeds may reach the origin. Where no host of the job may, the roots take their runs from holders outside
// the job.
func (p *Plan) FromOrigin() bool { return p.origin }

// Trees is how many trees there are.
func (p *Plan) Trees() int { return len(p.trees) }

// Tree is the tree that a piece travels along.
func (p *Plan) Tree(x Piece) int { return int(p.treeOf[x]) }

// Bytes is how much travels along a tree, once to each host.
func (p *Plan) Bytes(tree int) int64 { return p.trees[tree].bytes }

// Root is the host that fetches a tree's pieces. It is a seed.
func (p *Plan) Root(tree int) int { return int(p.trees[tree].order[0]) }

// Parent is the host that gives a tree's pieces to host, or -1 for the root.
func (p *Plan) Parent(tree, host int) int { return int(p.trees[tree].parent[host]) }

// Children are the hosts that host gives a tree's pieces to.
func (p *Plan) Children(tree, host int) iter.Seq[int] {
	t := &p.trees[tree]
	return func(yield func(int) bool) {
		for c := t.child[host]; c >= 0; c = t.sibling[c] {
			if !yield(int(c)) {
				return
			}
		}
	}
}

// Rank is where host stands in a tree's order, from 0, the root. Whoever waits for a piece waits for a host of lower rank.
func (p *Plan) Rank(tree, host int) int { return int(p.trees[tree].pos[host]) }

// Before reports whether host a stands before host b in a tree's order: b may wait for a, and never the other way. It is false for a == b.
func (p *Plan) Before(tree, a, b int) bool { return p.trees[tree].pos[a] < p.trees[tree].pos[b] }

// MayWait reports whether host lets asker wait for a piece of a tree: asker named this plan, and stands behind host. It is the whole rule that
// keeps waits from cycling; doc.go says why.
func (p *Plan) MayWait(id PlanID, tree, host, asker int) bool {
	return id == p.id && p.Before(tree, host, asker)
}

// Depth is the number of hops from a tree's root to host.
func (p *Plan) Depth(tree, host int) int {
	n := 0
	for h := p.trees[tree].parent[host]; h >= 0; h = p.trees[tree].parent[h] {
		n++
	}
	return n
}

// Deputies is how many hosts stand in for a root at most.
const Deputies = 2

// Deputies are the hosts that stand in for a tree's root when it is gone.
func (p *Plan) Deputies(tree int) (list []int) {
	for _, d := range p.trees[tree].deputies {
		list = append(list, int(d))
	}
	return list
}

// Ancestors are the hosts that host may ask for a tree's pieces and wait for, in the order in which to try them: the parent, its parent and so
// on to the root, then the root's deputies: the first hosts in the tree's order that may reach the origin. All stand before host. A host that
// has tried them in vain, or has none, asks holders and, if it may, the origin.
func (p *Plan) Ancestors(tree, host int) []int {
	t := &p.trees[tree]
	var list []int
	for h := t.parent[host]; h >= 0; h = t.parent[h] {
		list = append(list, int(h))
	}
	for _, d := range t.deputies {
		if t.pos[d] < t.pos[host] && !slices.Contains(list, int(d)) {
			list = append(list, int(d))
		}
	}
	return list
}

// Runs are what host fetches from the origin or from a holder, in order; empty unless it is a seed. All runs of all hosts together are
// each piece once.
func (p *Plan) Runs(host int) []Run { return slices.Clone(p.runs[host]) }
