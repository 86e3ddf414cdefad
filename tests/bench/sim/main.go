// Command sim says how a stage goes on up to 16,384 hosts: real plans over simulated clusters (planner/sim), beside the fluid limit and what people
// do today. It prints a table, writes build/bench/sim.json and draws build/bench/sim.html and sim.svg.
//
//  1. For each N and each scenario: the planner's plan, and Simulate over hosts with links of 100 Mbit/s, an origin with such a link, and what
//     agents cost of disks and processors.
//  2. Beside it: the fluid limit; every host pulling from that origin; whole layers along one tree, each host sending on what it has whole; one
//     squashfs on a file server with ten such links.
//  3. What bench-swarm has measured on the shaped cluster, when build/bench/swarm.json is there: the same image, N and processors, all on one
//     machine, simulated, and the two makespans compared.
//
// The figures depend on the model alone: they are the same on every machine, but for the time that simulating takes.
package main

import (
	"flag"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/muster-hpc/muster/chart"
	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/planner/sim"
	"github.com/muster-hpc/muster/tests/bench/report"
)

const rate = 12.5e6 // bytes per second, of a link of 100 Mbit/s

// The targets.
const (
	growth     = 1.5  // makespan at the most hosts ÷ that at 16
	validation = 0.15 // |simulated ÷ measured − 1|
	originMost = 1.03 // images
)

// A scenario is a way in which an image gets to N hosts.
type scenario struct {
	name  string
	goal  bool // growth is held against the target
	most  int  // hosts; 0: any number
	spec  func(n int) *planner.JobSpec
	hosts func(n int) *sim.Cluster
}

// groupOf is how many hosts share an uplink in the scenarios with groups.
const groupOf = 32

var scenarios = []scenario{
	{
		"muster", true, 0,
		func(n int) *planner.JobSpec { return sim.Spec(n, 0, planner.Params{}, true, sim.Image...) },
		func(n int) *sim.Cluster { return sim.Uniform(n, rate, 1, 0, 0) },
	},
	{
		"muster, groups of 32 behind 4:1", true, 0,
		func(n int) *planner.JobSpec { return sim.Spec(n, groupOf, planner.Params{}, true, sim.Image...) },
		func(n int) *sim.Cluster { return sim.Uniform(n, rate, 1, groupOf, 4) },
	},
	{
		"muster, the same, groups not known", false, 1024,
		func(n int) *planner.JobSpec { return sim.Spec(n, 0, planner.Params{}, true, sim.Image...) },
		func(n int) *sim.Cluster { return sim.Uniform(n, rate, 1, groupOf, 4) },
	},
	{
		"muster, 1.5 % of hosts half as fast, 0.5 % die", false, 0,
		func(n int) *planner.JobSpec { return sim.Spec(n, 0, planner.Params{}, true, sim.Image...) },
		func(n int) *sim.Cluster { return sim.Uniform(n, rate, 1, 0, 0).Trouble(0.015, 2, 0.005, 8) },
	},
	{
		"muster, first pull without an index", false, 0,
		func(n int) *planner.JobSpec { return sim.Spec(n, 0, planner.Params{}, false, sim.Image...) },
		func(n int) *sim.Cluster { return sim.Uniform(n, rate, 1, 0, 0) },
	},
	{
		"whole layers along one tree", false, 0,
		func(n int) *planner.JobSpec {
			return sim.Spec(n, 0, planner.Params{Trees: 1, Seeds: 1, Fanout: 2, Piece: planner.MaxPiece}, true, sim.Image...)
		},
		func(n int) *sim.Cluster { return sim.Uniform(n, rate, 1, 0, 0) },
	},
}

func main() {
	most := flag.Int("most", 16_384, "the largest number of hosts")
	flag.Parse()
	if err := run(*most); err != nil {
		fmt.Fprintln(os.Stderr, "sim:", err)
		os.Exit(1)
	}
}

// A point is one simulation.
type point struct {
	n                        int
	makespan, origin, uneven float64
}

func run(most int) error {
	var sizes []int
	for _, n := range []int{4, 16, 64, 256, 1024, 4096, 16_384} {
		if n <= most {
			sizes = append(sizes, n)
		}
	}
	var bytes float64
	for _, b := range sim.Image {
		bytes += float64(b)
	}
	began := time.Now()
	points := map[string][]point{}
	for _, s := range scenarios {
		for _, n := range sizes {
			if s.most > 0 && n > s.most {
				continue
			}
			p, err := planner.New(s.spec(n))
			if err != nil {
				return err
			}
			o, err := sim.Simulate(p, s.hosts(n))
			if err != nil {
				return fmt.Errorf("%s, %d hosts: %w", s.name, n, err)
			}
			points[s.name] = append(points[s.name], point{n, o.Makespan(), o.Origin / bytes, o.Uneven()})
			fmt.Fprintf(os.Stderr, "%s, %d hosts: %.2f s, after %.0f s\n", s.name, n, o.Makespan(), time.Since(began).Seconds())
		}
	}
	took := time.Since(began)
	names := slices.Clone(today)
	for _, name := range names {
		for _, n := range sizes {
			points[name] = append(points[name], formula(name, n, bytes))
		}
	}
	for i := range scenarios {
		names = slices.Insert(names, i, scenarios[i].name)
	}
	table(names, points)
	rows := results(points, took)
	checks, err := validate()
	if err != nil {
		return err
	}
	if _, err := report.Write(os.Stdout, "sim", append(rows, checks...)); err != nil {
		return err
	}
	return draw(names, points)
}

// What people do today, and what cannot be beaten, as formulas over the same links.
const (
	fluid    = "fluid limit"
	pull     = "every host pulls from the registry"
	squashfs = "squashfs on a file server with ten links, 30 % of it read"
)

var today = []string{pull, squashfs, fluid}

func formula(name string, n int, bytes float64) point {
	s := costmodel.Swarm{Bytes: bytes, Hosts: n, Origin: rate, Up: rate, Down: rate}
	switch name {
	case pull:
		return point{n, float64(n) * bytes / rate, float64(n), 1}
	case squashfs:
		return point{n, 0.3 * bytes / min(rate, 10*rate/float64(n)), 0, 1}
	}
	return point{n, s.OneCopy(), 1, 1}
}

func table(names []string, points map[string][]point) {
	fmt.Printf("\nmakespan in seconds (origin bytes ÷ image; slowest ÷ median), links of 100 Mbit/s, image of 120 MB\n")
	tw := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
	fmt.Fprint(tw, "hosts")
	for _, p := range points[names[0]] {
		fmt.Fprintf(tw, "\t%d", p.n)
	}
	fmt.Fprintln(tw)
	for _, name := range names {
		fmt.Fprint(tw, name)
		for _, p := range points[name] {
			fmt.Fprintf(tw, "\t%.4g (%.4g; %.2f)", p.makespan, p.origin, p.uneven)
		}
		fmt.Fprintln(tw)
	}
	_ = tw.Flush()
	fmt.Println()
}

// results are the rows for scripts.
func results(points map[string][]point, took time.Duration) (rows []report.Row) {
	for _, s := range scenarios {
		at16 := 0.0
		for _, p := range points[s.name] {
			row := fmt.Sprintf("N=%d %s", p.n, s.name)
			rows = append(rows, report.Figure(row, p.makespan, "s"), report.Figure(row+" slowest / median", p.uneven, ""))
			if s.goal {
				rows = append(rows, report.AtMost(row+" origin bytes / image", p.origin, "images", originMost))
			} else {
				rows = append(rows, report.Figure(row+" origin bytes / image", p.origin, "images"))
			}
			if p.n == 16 {
				at16 = p.makespan
			}
		}
		last := points[s.name][len(points[s.name])-1]
		if row := fmt.Sprintf("%s, N=%d / N=16", s.name, last.n); s.goal {
			rows = append(rows, report.AtMost(row, last.makespan/at16, "", growth))
		} else {
			rows = append(rows, report.Figure(row, last.makespan/at16, ""))
		}
	}
	return append(rows, report.Figure("time to simulate", took.Seconds(), "s"))
}

// debianPython are the layers of the image that bench-swarm stages.
var debianPython = []int64{60_300_000, 15_400_000, 14_000_000, 16_000_000, 12_300_000, 300, 1_400_000}

// validate holds the simulation against what bench-swarm has measured. There all hosts share the processors of one machine, and an agent's cost
// per byte is measured too.
func validate() (rows []report.Row, err error) {
	measured, err := report.Read("swarm")
	if os.IsNotExist(err) {
		fmt.Println("not validated: no build/bench/swarm.json; make bench-swarm writes it")
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	value := map[string]float64{}
	for _, r := range measured {
		value[r.Name] = r.Value
	}
	for _, n := range []int{4, 8, 16} {
		name := "N=" + strconv.Itoa(n) + " complete"
		want, cpu := value[name], value[name+" CPU per GB"]
		if want == 0 || cpu == 0 {
			continue
		}
		p, err := planner.New(sim.Spec(n, 0, planner.Params{}, false, debianPython...))
		if err != nil {
			return nil, err
		}
		c := sim.Uniform(n, rate, 1, 0, 0)
		c.Shared = float64(runtime.NumCPU())
		for i := range c.Hosts {
			c.Hosts[i].CPU = cpu / 1e9
		}
		o, err := sim.Simulate(p, c)
		if err != nil {
			return nil, err
		}
		off := o.Makespan()/want - 1
		fmt.Printf("N=%d: simulated %.2f s, measured %.2f s: %+.1f %%\n", n, o.Makespan(), want, 100*off)
		rows = append(rows, report.Figure(name+" simulated", o.Makespan(), "s"), report.AtMost(name+" simulated, off by", max(off, -off), "", validation))
	}
	return rows, nil
}

// draw writes the charts.
func draw(names []string, points map[string][]point) error {
	lines := func(f func(point) float64) (all []chart.Series) {
		for _, name := range names {
			s := chart.Series{Name: name, Dashed: slices.Contains(today, name)}
			for _, p := range points[name] {
				s.Points = append(s.Points, [2]float64{float64(p.n), f(p)})
			}
			all = append(all, s)
		}
		return all
	}
	var marks []float64
	for _, p := range points[names[0]] {
		marks = append(marks, float64(p.n))
	}
	axes := func(y string) chart.Axes {
		return chart.Axes{X: "hosts", Y: y, LogX: true, LogY: true, MarkX: marks, TickX: func(v float64) string { return fmt.Sprint(int(v)) }}
	}
	makespan := chart.Lines(axes("makespan, seconds"), lines(func(p point) float64 { return p.makespan }))
	uneven := axes("slowest ÷ median")
	uneven.LogY = false
	body := "<h1>An image of 120 MB on N hosts</h1>\n<p class=\"note\">Real plans over simulated links of 100 Mbit/s (package planner/sim); dashed lines are formulas.</p>\n<h2>Makespan</h2>\n" +
		makespan + "\n<h2>Bytes that leave the origin, ÷ image</h2>\n" + chart.Lines(axes("copies of the image"), lines(func(p point) float64 { return p.origin })) +
		"\n<h2>Slowest host ÷ median host</h2>\n" + chart.Lines(uneven, lines(func(p point) float64 { return p.uneven })[:len(scenarios)])
	dir := filepath.Join("build", "bench")
	if err := os.WriteFile(filepath.Join(dir, "sim.svg"), []byte(chart.Alone(makespan)), 0o644); err != nil {
		return err
	}
	var page strings.Builder
	if err := chart.Page(&page, "muster sim", template.HTML(body)); err != nil { //nolint:gosec // made above
		return err
	}
	return os.WriteFile(filepath.Join(dir, "sim.html"), []byte(page.String()), 0o644)
}
