package peer

import (
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/muster-hpc/muster/ztoc"
)

// normal is ranges sorted and merged, in new memory. Empty ones are left out.
func normal(ranges []ztoc.Range) ([]ztoc.Range, error) {
	out := make([]ztoc.Range, 0, len(ranges))
	for _, r := range ranges {
		if r.Start < 0 || r.End > maxOffset {
			return nil, fmt.Errorf("peer: range %v out of bounds", r)
		}
		if !r.Empty() {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b ztoc.Range) int {
		if a.Start != b.Start {
			return int(min(max(a.Start-b.Start, -1), 1))
		}
		return int(min(max(a.End-b.End, -1), 1))
	})
	n := 0
	for _, r := range out {
		if n > 0 && r.Start <= out[n-1].End {
			out[n-1].End = max(out[n-1].End, r.End)
			continue
		}
		out[n] = r
		n++
	}
	return out[:n], nil
}

// A cut is normal ranges cut at the grid of pieces: item i is what piece grid and ranges share.
type cut struct {
	ranges []ztoc.Range
	first  []int // item at which ranges[i] begins; one more than ranges
}

func newCut(ranges []ztoc.Range) (cut, error) {
	c := cut{ranges: ranges, first: make([]int, 1, len(ranges)+1)}
	var n int64
	for _, r := range ranges {
		n += (r.End-1)/ztoc.PieceSize - r.Start/ztoc.PieceSize + 1
		if n > MaxPieces {
			return c, fmt.Errorf("%w: more than %d pieces in one want", ErrProtocol, MaxPieces)
		}
		c.first = append(c.first, int(n))
	}
	return c, nil
}

func (c cut) len() int { return c.first[len(c.first)-1] }

func (c cut) item(i int) ztoc.Range {
	k := sort.SearchInts(c.first, i+1) - 1
	return ztoc.Piece(c.ranges[k].Start/ztoc.PieceSize + int64(i-c.first[k])).Range(maxOffset).Intersect(c.ranges[k])
}

// touching calls f for the items that r touches.
func (c cut) touching(r ztoc.Range, f func(i int)) {
	k := sort.Search(len(c.ranges), func(k int) bool { return c.ranges[k].End > r.Start })
	for ; k < len(c.ranges) && c.ranges[k].Start < r.End; k++ {
		in := c.ranges[k].Intersect(r)
		if in.Empty() {
			continue
		}
		base := c.ranges[k].Start / ztoc.PieceSize
		for p := in.Start / ztoc.PieceSize; p <= (in.End-1)/ztoc.PieceSize; p++ {
			f(c.first[k] + int(p-base))
		}
	}
}

// holds reports whether one of the normal ranges contains r.
func holds(ranges []ztoc.Range, r ztoc.Range) bool {
	k := sort.Search(len(ranges), func(k int) bool { return ranges[k].End > r.Start })
	return k < len(ranges) && ranges[k].Contains(r)
}

// errorKind is the sentinel of this package that err is made of, ErrNotHere if none.
func errorKind(err error) error {
	for _, known := range []error{ErrDenied, ErrBusy, ErrProtocol, ErrClosed, ErrUnknown} {
		if errors.Is(err, known) {
			return known
		}
	}
	return ErrNotHere
}
