// Command start measures the time from nothing to a program's first output.
//
//  1. debian-scipy and one-layer are pushed to Debian's docker-registry behind a shaped link, each
//     twice: with an index beside it (made and pushed by muster) and without.
//  2. For every link and round, interleaved: containerd pulls and runs them (ctr, overlayfs); muster runs
//     each command from an empty store, with the index and without; on the unlimited link, muster runs
//     each again with the page cache dropped, beside the same over a plain directory treated alike.
//  3. The floor of a row is what no tool can go below: bytes ÷ link + inflate ÷ cores + the same
//     command over a plain directory. Bytes are those muster fetched, inflating is measured in this run.
//
// Medians go to build/bench/start.json. Where containerd's own rows spread by more than 1.5, the machine
// was too noisy for ratios to it and only the floor counts.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// A command is a program to start, with its targets at 1 Gbit/s.
type command struct {
	name    string
	args    []string
	indexed float64 // of ctr, with an index
}

var commands = []command{
	{"true", []string{"true"}, 0.03},
	{"print(1)", []string{"python3", "-c", "print(1)"}, 0.04},
	{"numpy", []string{"python3", "-c", "import numpy; print(1)"}, 0.08},
	{"scipy", []string{"python3", "-c", "import scipy.linalg; print(1)"}, 0.10},
}

const (
	firstPullTarget = 0.25 // of ctr
	oneLayerSlack   = 1.3  // its targets are these, times so much
	numpyBytes      = 0.15 // of the image, with an index
	againTarget     = 1.2  // of a plain directory
	noisy           = 1.5  // spread of the ctr rows beyond which ratios to them mean nothing
)

func main() {
	rounds := flag.Int("rounds", 3, "rounds per row")
	links := flag.String("links", "1000,300,0", "links in Mbit/s, 0 is unlimited")
	muster := flag.String("muster", "build/muster", "binary to measure")
	only := flag.String("images", "debian-scipy,one-layer", "images to measure")
	noCtr := flag.Bool("no-ctr", false, "leave out containerd, for quick looks")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{muster: *muster, rounds: *rounds, noCtr: *noCtr, values: map[string][]float64{}}
	for _, s := range strings.Split(*links, ",") {
		n, err := strconv.Atoi(s)
		if err != nil {
			fail(fmt.Errorf("-links %q: %w", *links, err))
		}
		b.links = append(b.links, n)
	}
	err := b.run(ctx, strings.Split(*only, ","))
	if b.lab != nil {
		b.lab.Close()
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench-start:", err)
	os.Exit(1)
}

type bench struct {
	muster string
	rounds int
	links  []int // Mbit/s
	noCtr  bool
	lab    *lab.Lab
	images []*image
	values map[string][]float64 // by row
	order  []string
	rate   float64 // inflated bytes per second and core
}

type image struct {
	name   string
	layout string
	size   int64 // of the layers, bytes
	plain  *lab.Bundle
}

func (im *image) ref(l *lab.Lab, indexed bool) string {
	return l.Host() + "/" + im.name + map[bool]string{true: "-indexed", false: ""}[indexed] + ":latest"
}

func (b *bench) run(ctx context.Context, names []string) (err error) {
	if b.muster, err = filepath.Abs(b.muster); err != nil {
		return err
	}
	if b.lab, err = lab.New(ctx); err != nil {
		return err
	}
	for _, name := range names {
		if err := b.prepare(ctx, name); err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
	}
	if b.rate, err = inflateRate(b.images[0].layout); err != nil {
		return err
	}
	for _, link := range b.links {
		if err := b.lab.Rate(link); err != nil {
			return err
		}
		for round := range b.rounds {
			for _, im := range b.images {
				say("link %s, round %d of %d, %s", linkName(link), round+1, b.rounds, im.name)
				if err := b.round(ctx, link, im); err != nil {
					return err
				}
			}
		}
	}
	_, err = report.Write(os.Stdout, "start", b.rows())
	return err
}

// prepare pushes an image with and without an index and unpacks it.
func (b *bench) prepare(ctx context.Context, name string) error {
	layout, err := images.Get(name)
	if err != nil {
		return err
	}
	im := &image{name: name, layout: layout}
	if im.size, err = layerBytes(layout); err != nil {
		return err
	}
	for _, indexed := range []bool{false, true} {
		if err := push(ctx, im.ref(b.lab, indexed), layout); err != nil {
			return err
		}
	}
	store := filepath.Join(b.lab.Dir, "index-store")
	if out, err := b.command(store, "index", "push", im.ref(b.lab, true)).CombinedOutput(); err != nil {
		return fmt.Errorf("index push: %w: %s", err, out)
	}
	os.RemoveAll(store)
	if im.plain, err = lab.Unpack(layout, filepath.Join(b.lab.Dir, "plain-"+name)); err != nil {
		return err
	}
	b.images = append(b.images, im)
	return nil
}

func (b *bench) command(store string, args ...string) *exec.Cmd {
	return exec.Command(b.muster, append([]string{"--store-dir", store, "--quiet", "--origin-plain-http", b.lab.Host()}, args...)...)
}

func (b *bench) round(ctx context.Context, link int, im *image) error {
	if !b.noCtr {
		if err := b.ctr(ctx, link, im); err != nil {
			return err
		}
	}
	for _, c := range commands {
		if err := ctx.Err(); err != nil {
			return err
		}
		plain, err := im.plain.Command(c.args...)
		if err != nil {
			return err
		}
		first, _, err := lab.FirstOutput(plain)
		if err != nil {
			return err
		}
		b.add(key(im, c, link, "plain"), first.Seconds())
		for _, indexed := range []bool{true, false} {
			store := filepath.Join(b.lab.Dir, "store")
			if err := b.lazily(link, im, c, indexed, store); err != nil {
				return err
			}
			if indexed && link == 0 {
				if err := b.again(im, c, store); err != nil {
					return err
				}
			}
			os.RemoveAll(store)
		}
	}
	return nil
}

func (b *bench) ctr(ctx context.Context, link int, im *image) error {
	c, err := b.lab.StartContainerd(ctx)
	if err != nil {
		return err
	}
	defer c.Stop()
	pull, err := c.Pull(im.ref(b.lab, false))
	if err != nil {
		return err
	}
	for _, cmd := range commands {
		first, _, err := lab.FirstOutput(c.Command(im.ref(b.lab, false), cmd.args...))
		if err != nil {
			return err
		}
		b.add(key(im, cmd, link, "ctr"), (pull + first).Seconds())
	}
	return nil
}

// lazily measures one run of muster from an empty store.
func (b *bench) lazily(link int, im *image, c command, indexed bool, store string) error {
	how := map[bool]string{true: "index", false: "first pull"}[indexed]
	rep := filepath.Join(b.lab.Dir, "report.json")
	cmd := b.command(store, append([]string{"run", "--report", rep, im.ref(b.lab, indexed)}, c.args...)...)
	before := b.lab.Received()
	first, _, err := lab.FirstOutput(cmd)
	if err != nil {
		return err
	}
	b.add(key(im, c, link, how), first.Seconds())
	b.add(key(im, c, link, how+" wire"), float64(b.lab.Received()-before))
	r, err := readReport(rep)
	if err != nil {
		return err
	}
	b.add(key(im, c, link, how+" bytes"), float64(r.Bytes))
	b.add(key(im, c, link, how+" inflated"), float64(r.inflated()))
	return nil
}

// again runs a command a second time over what is local, everything else cold.
func (b *bench) again(im *image, c command, store string) error {
	// The first run ended before readers had been quiet for the profile's two seconds; its end counts as
	// that. What it learned is written by now.
	if err := lab.DropCaches(); err != nil {
		return err
	}
	first, _, err := lab.FirstOutput(b.command(store, append([]string{"run", im.ref(b.lab, true)}, c.args...)...))
	if err != nil {
		return err
	}
	b.add(key(im, c, 0, "again"), first.Seconds())
	plain, err := im.plain.Command(c.args...)
	if err != nil {
		return err
	}
	if err := lab.DropCaches(); err != nil {
		return err
	}
	if first, _, err = lab.FirstOutput(plain); err != nil {
		return err
	}
	b.add(key(im, c, 0, "plain cold"), first.Seconds())
	return nil
}

func key(im *image, c command, link int, what string) string {
	return fmt.Sprintf("%s %s %s %s", im.name, c.name, linkName(link), what)
}

func linkName(mbit int) string {
	if mbit == 0 {
		return "unlimited"
	}
	return fmt.Sprintf("%d Mbit/s", mbit)
}

func (b *bench) add(row string, v float64) {
	if b.values[row] == nil {
		b.order = append(b.order, row)
	}
	b.values[row] = append(b.values[row], v)
}

func (b *bench) median(im *image, c command, link int, what string) float64 {
	return report.Median(b.values[key(im, c, link, what)])
}

// rows judges the medians.
func (b *bench) rows() []report.Row {
	rows := []report.Row{report.Figure("one-core inflate", b.rate/1e6, "MB/s out")}
	for _, row := range b.order {
		unit, v := "s", report.Median(b.values[row])
		if strings.HasSuffix(row, "bytes") || strings.HasSuffix(row, "inflated") || strings.HasSuffix(row, "wire") {
			unit, v = "MB", v/1e6
		}
		rows = append(rows, report.Figure(row, v, unit))
	}
	for _, link := range b.links {
		for _, im := range b.images {
			for _, c := range commands {
				rows = append(rows, b.judge(link, im, c)...)
			}
		}
	}
	return rows
}

func (b *bench) judge(link int, im *image, c command) (rows []report.Row) {
	slack := 1.0
	if im.name == "one-layer" {
		slack = oneLayerSlack
	}
	ctr := b.median(im, c, link, "ctr")
	spread := report.Spread(b.values[key(im, c, link, "ctr")])
	if !b.noCtr {
		rows = append(rows, report.Figure(key(im, c, link, "ctr spread"), spread, "max/min"))
	}
	for _, how := range []string{"index", "first pull"} {
		t := b.median(im, c, link, how)
		limit, factor := c.indexed, 2.0
		if how == "first pull" {
			limit, factor = firstPullTarget, 1.3
		}
		if name := key(im, c, link, how+" / ctr"); !b.noCtr {
			if link == 1000 && spread <= noisy {
				rows = append(rows, report.AtMost(name, t/ctr, "", limit*slack))
			} else {
				rows = append(rows, report.Figure(name, t/ctr, ""))
			}
		}
		floor := b.floor(link, im, c, how)
		rows = append(rows, report.Figure(key(im, c, link, how+" floor"), floor, "s"))
		name := key(im, c, link, how+" - floor bound")
		if link == 1000 {
			rows = append(rows, report.AtMost(name, t, "s", (factor*floor+0.3)*slack))
		}
		share := b.median(im, c, link, how+" bytes") / float64(im.size)
		switch name := key(im, c, link, how+" bytes / image"); {
		case how == "index" && c.name == "numpy":
			rows = append(rows, report.AtMost(name, share, "", numpyBytes*slack))
		case how == "first pull":
			rows = append(rows, report.AtMost(name, share, "", 1.001))
		default:
			rows = append(rows, report.Figure(name, share, ""))
		}
	}
	if link == 0 {
		rows = append(rows, report.AtMost(key(im, c, link, "again / plain cold"),
			b.median(im, c, link, "again")/b.median(im, c, link, "plain cold"), "", againTarget))
	}
	return rows
}

// floor is what no tool can go below with the bytes that were fetched.
func (b *bench) floor(link int, im *image, c command, how string) float64 {
	t := b.median(im, c, link, "plain") + b.median(im, c, link, how+" inflated")/(b.rate*float64(runtime.NumCPU()))
	if link > 0 {
		t += b.median(im, c, link, how+" bytes") * 8 / (float64(link) * 1e6)
	}
	return t
}

// A runReport is what `muster run --report` writes, as far as it is needed here.
type runReport struct {
	Layers []struct {
		Mode     string `json:"mode"`
		Inflated int64  `json:"inflatedBytes"`
	} `json:"layers"`
	Bytes  int64 `json:"origin_bytes"` // manifests, index, layers
	Server struct {
		Inflated int64 `json:"inflated_bytes"`
	} `json:"server"`
}

// inflated is what had to be inflated: layers pulled whole once to build their tables, and what was
// read.
func (r runReport) inflated() int64 {
	n := r.Server.Inflated
	for _, l := range r.Layers {
		if l.Mode == "pulled" || l.Mode == "derived" {
			n += l.Inflated
		}
	}
	return n
}

func readReport(path string) (r runReport, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(b, &r)
}

// inflateRate is the rate at which one core inflates the largest layer of an image, in inflated bytes
// per second, best of three.
func inflateRate(layout string) (float64, error) {
	layers, err := lab.Layers(layout)
	if err != nil {
		return 0, err
	}
	best := 0.0
	for range 3 {
		start := time.Now()
		n, err := layers[0].Inflate()
		if err != nil {
			return 0, err
		}
		best = max(best, float64(n)/time.Since(start).Seconds())
	}
	return best, nil
}

func layerBytes(layout string) (n int64, err error) {
	layers, err := lab.Layers(layout)
	for _, l := range layers {
		n += l.Size
	}
	return n, err
}

func push(ctx context.Context, ref, layout string) error {
	_, err := registry.Push(ctx, ref, layout, "")
	return err
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
