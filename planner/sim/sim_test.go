package sim

import (
	"bytes"
	"math"
	"os"
	"testing"

	"github.com/muster-hpc/muster/planner"
)

// TestPage: docs/trees.md has the tables that the code prints.
func TestPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/trees.md")
	if err != nil {
		t.Fatal(err)
	}
	_, have, _, err := Between(page)
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := Tables(&want); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want.Bytes()) {
		t.Errorf("docs/trees.md is of other code: make sim-trees\n%s", want.Bytes())
	}
}

// TestConservation: hosts have everything in the end, all copies were sent by somebody, no faster than links allow.
func TestConservation(t *testing.T) {
	for _, n := range []int{1, 2, 5, 12} {
		p, err := planner.New(Spec(n, 0, planner.Params{}, true, 3_000_000, 0, 5, 7_000_000))
		if err != nil {
			t.Fatal(err)
		}
		l := Like(n, 1e6)
		f := Run(p, l)
		var sent float64
		for h := range n {
			sent += f.Sent[h]
			if f.Done[h] <= 0 || f.Sent[h] > l.Up[h]*f.Makespan()*1.001 {
				t.Errorf("%d hosts: host %d was done at %g s and sent %g bytes in %g s", n, h, f.Done[h], f.Sent[h], f.Makespan())
			}
		}
		const all = 10_000_005
		if math.Abs(sent-float64(n-1)*all) > 1 {
			t.Errorf("%d hosts sent %g bytes", n, sent)
		}
		if limit := SwarmOf(p, l).OneCopy(); f.Makespan() < limit*0.999 || f.Makespan() > 2*limit+1 {
			t.Errorf("%d hosts: %g s, the limit is %g s", n, f.Makespan(), limit)
		}
	}
}

// TestFormula: what muster plan predicts is what the simulation gives, within a tenth, for the cluster it is asked for most.
func TestFormula(t *testing.T) {
	for _, n := range []int{2, 8, 16} {
		for _, ratio := range []float64{0.5, 1, 4} {
			p, err := planner.New(Spec(n, 0, planner.Params{}, true, Image...))
			if err != nil {
				t.Fatal(err)
			}
			l := Like(n, 12.5e6)
			l.Origin *= ratio
			got, want := SwarmOf(p, l).Pipeline(), Run(p, l).Makespan()
			if math.Abs(got/want-1) > 0.1 {
				t.Errorf("%d hosts, origin's link %g times theirs: formula %.2f s, simulation %.2f s", n, ratio, got, want)
			}
		}
	}
}

// TestPieceTrees holds the arithmetic of trees per piece against trees per piece.
func TestPieceTrees(t *testing.T) {
	want := PieceTrees(64, 458, planner.DefaultFanout, 8)
	p, err := planner.New(Spec(64, 0, planner.Params{}, true, Image...))
	if err != nil {
		t.Fatal(err)
	}
	got := ShapeOf(p, 8)
	if want.Peers != 63 || math.Abs(want.Rack-got.Rack) > 1 || want.Depth > got.Depth || want.Uneven < 1.1 || want.Uneven > 1.4 {
		t.Errorf("%+v beside %+v", want, got)
	}
}
