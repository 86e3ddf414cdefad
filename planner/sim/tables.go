package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// Image is what tables are made for: 120 MB in layers as a Python image has them.
var Image = []int64{28_000_000, 3_500_000, 12_500_000, 72_000_000, 4_000_000}

// rack is how many hosts share a leaf switch in the tables.
const rack = 32

// Spec is a job of n like hosts that may all reach the origin, and of layers. Groups are of so many hosts, 0: not known. tables tells that layers have
// theirs already, so that nobody has to build any.
func Spec(n, group int, p planner.Params, tables bool, blobs ...int64) *planner.JobSpec {
	s := &planner.JobSpec{Planner: planner.Version, Job: "tables", Manifest: ztoc.DigestOf(nil), Params: p}
	for i := range n {
		h := planner.Host{Name: fmt.Sprint("node", i), Addr: "node:7464", Seed: true}
		if group > 0 {
			h.Group = fmt.Sprint(i / group)
		}
		s.Hosts = append(s.Hosts, h)
	}
	for i, size := range blobs {
		b := planner.Blob{BlobRef: ztoc.BlobRef{Digest: ztoc.DigestOf([]byte{byte(i)}), Size: size}}
		if tables {
			b.Ztoc = ztoc.DigestOf([]byte{byte(i), 1})
		}
		s.Blobs = append(s.Blobs, b)
	}
	return s
}

// Tables writes the tables of docs/trees.md, in Markdown's way of preformatted text.
func Tables(w io.Writer) error {
	if err := shapes(w); err != nil {
		return err
	}
	return times(w)
}

func shapes(w io.Writer) error {
	fmt.Fprintf(w, "```\n")
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "hosts\ttrees\tfan-out\tracks known\tpeers\tsent max÷mean\tcopies into a rack\thops\tlast piece\tby way of one host\t")
	row := func(n int, trees string, fanout int, known string, s Shape) {
		fmt.Fprintf(tw, "%d\t%s\t%d\t%s\t%d\t%.2f\t%.1f\t%d\t%d\t%.1f %%\t\n",
			n, trees, fanout, known, s.Peers, s.Uneven, s.Rack, s.Depth, s.Drain, 100*s.Late)
	}
	for _, n := range []int{1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16_384} {
		for _, c := range []struct{ trees, seeds, fanout, group int }{
			{1, 1, 2, 0},
			{0, 0, 4, 0}, // piece trees
			{16, 16, 2, 0},
			{16, 16, 4, 0},
			{16, 16, 16, 0},
			{64, 16, 4, 0},
			{16, 16, 4, rack},
		} {
			if c.group >= n || (n > 64 && c.trees == 64 && n != 1024) || (n == 1 && c.trees != 16) || (n < 16 && c.fanout == 16) || (n == 1 && c.fanout != 4) {
				continue
			}
			if c.trees == 0 {
				pieces := 0
				for _, l := range Image {
					pieces += int((l + ztoc.PieceSize - 1) / ztoc.PieceSize)
				}
				row(n, "per piece", c.fanout, "no", PieceTrees(n, pieces, c.fanout, rack))
				continue
			}
			p, err := planner.New(Spec(n, c.group, planner.Params{Trees: c.trees, Seeds: c.seeds, Fanout: c.fanout}, true, Image...))
			if err != nil {
				return err
			}
			known := "no"
			if c.group > 0 {
				known = "yes"
			}
			row(n, fmt.Sprint(p.Trees()), c.fanout, known, ShapeOf(p, rack))
		}
	}
	_ = tw.Flush()
	fmt.Fprintf(w, "```\n")
	return nil
}

// times runs plans over links of 12.5 MB/s, and prints makespans over the fluid limit.
func times(w io.Writer) error {
	const rate = 12.5e6
	type set struct {
		name   string
		params planner.Params
		seeds  int
		origin float64 // times rate
		links  float64 // times rate
		hop    float64 // seconds
		blobs  []int64
		wide   bool // for 32 hosts too
	}
	large := make([]int64, len(Image))
	for i, l := range Image {
		large[i] = 4 * l
	}
	sets := []set{
		{name: "as planned", origin: 1, links: 1, wide: true},
		{name: "fan-out 1 (chains)", params: planner.Params{Fanout: 1}, origin: 1, links: 1},
		{name: "fan-out 2", params: planner.Params{Fanout: 2}, origin: 1, links: 1, wide: true},
		{name: "fan-out 8", params: planner.Params{Fanout: 8}, origin: 1, links: 1, wide: true},
		{name: "fan-out N−1", params: planner.Params{Fanout: planner.MaxFanout}, origin: 1, links: 1},
		{name: "16 trees", params: planner.Params{Trees: 16}, origin: 1, links: 1},
		{name: "pieces of 128 KiB", params: planner.Params{Piece: 128 << 10}, origin: 1, links: 1},
		{name: "pieces of 512 KiB", params: planner.Params{Piece: 512 << 10}, origin: 1, links: 1, wide: true},
		{name: "pieces of 1 MiB", params: planner.Params{Piece: 1 << 20}, origin: 1, links: 1, wide: true},
		{name: "runs of 2 MiB", params: planner.Params{Run: 2 << 20}, origin: 1, links: 1},
		{name: "two hosts with a route", seeds: 2, origin: 1, links: 1},
		{name: "20 ms from host to host", hop: 0.02, origin: 1, links: 1},
		{name: "hosts' links twice the origin's", origin: 1, links: 2},
		{name: "origin's link 4 times the hosts'", origin: 4, links: 1},
		{name: "hosts send at half the rate", origin: 1, links: -0.5},
		{name: "image of 480 MB", origin: 1, links: 1, blobs: large},
	}
	fmt.Fprintf(w, "\n```\n")
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "makespan ÷ fluid limit (formula)\tN = 2\tN = 4\tN = 8\tN = 16\tN = 32\t")
	for _, c := range sets {
		fmt.Fprintf(tw, "%s\t", c.name)
		for _, n := range []int{2, 4, 8, 16, 32} {
			// What takes long to compute and tells little more is left out, and what is the row above again.
			if n < c.seeds || (n > 16 && !c.wide) || (n <= 8 && c.params.Fanout == 8) {
				fmt.Fprint(tw, "\t")
				continue
			}
			blobs := Image
			if c.blobs != nil {
				blobs = c.blobs
			}
			spec := Spec(n, 0, c.params, true, blobs...)
			if c.seeds > 0 {
				for i := range spec.Hosts {
					spec.Hosts[i].Seed = i < c.seeds
				}
			}
			p, err := planner.New(spec)
			if err != nil {
				return err
			}
			links := Like(n, rate)
			links.Origin *= c.origin
			links.Hop = c.hop
			for h := range n {
				if c.links < 0 {
					links.Up[h] *= -c.links
					continue
				}
				links.Up[h], links.Down[h] = links.Up[h]*c.links, links.Down[h]*c.links
			}
			formula := SwarmOf(p, links)
			fluid := formula.Fluid()
			fmt.Fprintf(tw, "%.2f (%.2f)\t", Run(p, links).Makespan()/fluid, formula.Pipeline()/fluid)
		}
		fmt.Fprintln(tw)
	}
	_ = tw.Flush()
	fmt.Fprintf(w, "```\n")
	return nil
}

// SwarmOf is what the formulas of costmodel need to know of a plan over links that are all like those of the first host.
func SwarmOf(p *planner.Plan, l Links) costmodel.Swarm {
	s := costmodel.Swarm{
		Hosts: len(p.Spec().Hosts), Seeds: len(p.Seeds()), Fanout: p.Spec().Params.Fanout, Piece: float64(p.PieceSize()),
		Origin: l.Origin, Up: l.Up[0], Down: l.Down[0], Hop: l.Hop,
	}
	if s.Fanout == 0 {
		s.Fanout = planner.DefaultFanout
	}
	for _, b := range p.Spec().Blobs {
		s.Bytes += float64(b.Size)
	}
	return s
}

// Marks of the page that holds the tables.
const (
	marked = "<!-- tables: make sim-trees -->\n"
	ended  = "<!-- end of tables -->\n"
)

// Between splits a page at its marks: before and after include them, tables is what is between.
func Between(page []byte) (before, tables, after []byte, err error) {
	i := bytes.Index(page, []byte(marked))
	j := bytes.Index(page, []byte(ended))
	if i < 0 || j < i {
		return nil, nil, nil, errors.New("no place for the tables")
	}
	i += len(marked)
	return page[:i], page[i:j], page[j:], nil
}
