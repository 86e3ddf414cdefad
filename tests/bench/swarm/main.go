// Command swarm measures how an image reaches all hosts of a job: real agents on N hosts of a lab (tests/cluster/lab), every link shaped,
// Debian's docker-registry behind a link of its own.
//
//  1. debian-python (119 MB, six layers) is pushed twice, with an index and a start-up profile beside it (made by muster) and without.
//  2. For each N and round: agents with empty stores stage the image without an index until it is complete on all; and the one with an index
//     until it is warm on all, after which each host runs `import numpy` in its mount. Makespans are the stage command's own wall time.
//  3. Beside it stand the fluid limit T = max(B/Us, B/min d, N·B/(Us+Σu)) over payload bytes, so that headers (4.4 %) count against us; the
//     same stage by each host for itself (no peers); whole layers passed on along a binary tree, each host sending on what it has
//     whole (what sbcast does; bytes only, nothing is checked or mounted); and one squashfs of the image that all hosts mount over the network. This
//     kernel has neither NFS nor NBD clients, so that is nbdkit and nbdfuse: block reads of one file through the page cache, as NFS
//     would do them.
//  4. At the fault size (-faults) one host is slowed tenfold, 20 s late, absent, killed in the middle; and the origin is cut after one copy has
//     left it, with one host that begins only then.
//
// Figures are medians over rounds; processor time is that of the agents' processes alone, busy is all of the machine. Rows without peers take N
// times as long and get one round.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	benchlab "github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/images"
)

// The targets.
const (
	atEight    = 1.25 // makespan ÷ fluid limit
	atSixteen  = 1.4
	originMost = 1.03 // images
	slowest    = 1.1  // ÷ median
	warmMost   = 0.25 // of complete
	faultMost  = 1.1  // of the makespan without the fault
	waitMost   = 1.0  // seconds per host spent waiting for the slow one
	killMost   = 2.0  // seconds more
	cpuMost    = 3.5  // seconds per GB
	busyMost   = 70.0 // percent
)

const imageName = "debian-python"

func main() {
	if len(os.Args) > 1 && os.Args[1] == relayWord {
		relayMain(os.Args[2:])
		return
	}
	sizes := flag.String("n", "1,2,4,8,16", "numbers of hosts")
	rate := flag.Int("rate", 100, "rate of each link, Mbit/s")
	rounds := flag.Int("rounds", 3, "rounds per row")
	only := flag.String("only", "", "parts to measure, of "+strings.Join(parts, ",")+"; default all")
	faults := flag.Int("faults", 8, "number of hosts for the faults")
	which := flag.String("fault", "", "faults to measure, of none,slow,late,absent,killed,origin gone; default all")
	muster := flag.String("muster", "build/muster", "binary to measure")
	add := flag.Bool("add", false, "add to what earlier runs measured (build/bench/swarm-values.json), so that the bench can be done in parts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{rate: *rate, rounds: *rounds, faultHosts: *faults, which: *which, values: map[string][]float64{}}
	err := b.prepare(ctx, *muster, *sizes, *only)
	if err == nil && *add {
		err = b.load()
	}
	if err == nil {
		err = b.run(ctx)
		err = errors.Join(err, b.save()) // what was measured counts, however it ended
	}
	if b.lab != nil {
		b.lab.Close()
	}
	if b.dir != "" {
		os.RemoveAll(b.dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-swarm:", err)
		os.Exit(1)
	}
}

// parts are what -only chooses from.
var parts = []string{"complete", "warm", "alone", "tree", "squashfs", "pair", "layers", "faults"}

type bench struct {
	dir        string
	binary     string
	rate       int // Mbit/s
	rounds     int
	sizes      []int
	judged     []int // sizes that earlier runs measured
	only       []string
	faultHosts int
	which      string // faults to measure; empty: all
	lab        *lab.Lab
	size       int64 // of the image's layers, bytes
	indexSize  int64 // of the tables beside the indexed image that are fetched, bytes
	squash     string
	reason     string // why there is no squashfs row
	values     map[string][]float64
	order      []string
	notes      []string
}

func (b *bench) wants(part string) bool { return len(b.only) == 0 || slices.Contains(b.only, part) }

func (b *bench) prepare(ctx context.Context, muster, sizes, only string) (err error) {
	for _, s := range strings.Split(sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("-n %q: numbers of hosts", sizes)
		}
		b.sizes = append(b.sizes, n)
	}
	if only != "" {
		b.only = strings.Split(only, ",")
		for _, p := range b.only {
			if !slices.Contains(parts, p) {
				return fmt.Errorf("-only %q: parts are %v", p, parts)
			}
		}
	}
	if b.binary, err = filepath.Abs(muster); err != nil {
		return err
	}
	if _, err := os.Stat(b.binary); err != nil {
		return err
	}
	b.dir, err = os.MkdirTemp("/var/tmp", "muster-bench-swarm-")
	return err
}

// open makes a lab of n hosts, all of whose images are pushed.
func (b *bench) open(ctx context.Context, n int) error {
	if b.lab != nil {
		b.lab.Close()
		b.lab = nil
	}
	l, err := lab.New(ctx, lab.Options{
		Hosts: n, Rate: b.rate, Binary: b.binary, Dir: filepath.Join(b.dir, fmt.Sprintf("lab-%d", n)), Registry: filepath.Join(b.dir, "registry"),
	})
	if err != nil {
		return err
	}
	b.lab = l
	if b.size == 0 {
		return b.push(ctx)
	}
	return nil
}

// push fills the registry, once.
func (b *bench) push(ctx context.Context) error {
	layout, err := images.Get(imageName)
	if err != nil {
		return err
	}
	layers, err := benchlab.Layers(layout)
	if err != nil {
		return err
	}
	var size int64
	for _, l := range layers {
		size += l.Size
	}
	if _, err := b.lab.Push(ctx, imageName, layout); err != nil {
		return err
	}
	if b.wants("warm") {
		if err := b.index(ctx, layout); err != nil {
			return err
		}
	}
	if b.wants("layers") {
		for _, name := range dialects {
			layout, err := images.Get(name)
			if err != nil {
				return err
			}
			if _, err := b.lab.Push(ctx, name, layout); err != nil {
				return err
			}
		}
	}
	if b.wants("squashfs") {
		if b.reason = b.squashfs(layout); b.reason != "" {
			b.notes = append(b.notes, "no squashfs rows: "+b.reason)
		}
	}
	b.size = size
	return nil
}

// indexed is the image with an index and a profile beside it.
const indexed = imageName + "-indexed"

// start is the program whose start is measured.
var start = []string{"python3", "-c", "import numpy; print(1)"}

// index pushes the image with an index and the profile of one run of the program.
func (b *bench) index(ctx context.Context, layout string) error {
	if _, err := b.lab.Push(ctx, indexed, layout); err != nil {
		return err
	}
	store := filepath.Join(b.dir, "index-store")
	defer os.RemoveAll(store)
	ref := b.lab.Direct() + "/" + indexed + ":latest"
	for _, args := range [][]string{append([]string{"run", ref}, start...), {"index", "push", "--json", ref}} {
		cmd := exec.CommandContext(ctx, b.binary, append([]string{"--store-dir", store, "--quiet", "--origin-plain-http", b.lab.Direct()}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
		say("%s:\n%s", args[0], out)
		if args[0] == "index" {
			var x struct {
				Layers []struct {
					Packed int64 `json:"packedBytes"`
				} `json:"layers"`
			}
			if err := json.Unmarshal(out, &x); err != nil {
				return fmt.Errorf("%v: %w", args, err)
			}
			for _, l := range x.Layers {
				b.indexSize += l.Packed
			}
		}
	}
	return nil
}

func (b *bench) run(ctx context.Context) error {
	for _, n := range b.sizes {
		if err := b.open(ctx, n); err != nil {
			return err
		}
		for round := range b.rounds {
			say("N = %d, round %d of %d", n, round+1, b.rounds)
			for _, p := range []struct {
				part string
				once bool
				f    func(context.Context, int) error
			}{
				{"complete", false, b.complete},
				{"warm", false, b.warm},
				{"tree", false, b.tree},
				{"squashfs", false, b.overNetwork},
				{"alone", true, b.alone},
			} {
				if !b.wants(p.part) || p.once && round > 0 {
					continue
				}
				if err := p.f(ctx, n); err != nil {
					return fmt.Errorf("part %s, N = %d: %w", p.part, n, err)
				}
			}
		}
	}
	if b.wants("pair") {
		if err := b.pair(ctx); err != nil {
			return err
		}
	}
	if b.wants("layers") {
		if err := b.layers(ctx); err != nil {
			return err
		}
	}
	if b.wants("faults") {
		if err := b.faults(ctx); err != nil {
			return err
		}
	}
	_, err := report.Write(os.Stdout, "swarm", b.rows())
	for _, n := range b.notes {
		fmt.Println("note:", n)
	}
	return err
}

// valuesFile has every single value, by row.
const valuesFile = "build/bench/swarm-values.json"

// A kept is what one run leaves for the next.
type kept struct {
	Sizes  []int
	Order  []string
	Values map[string][]float64
}

// allSizes are the numbers of hosts that were measured.
func (b *bench) allSizes() []int {
	all := append(slices.Clone(b.judged), b.sizes...)
	slices.Sort(all)
	return slices.Compact(all)
}

func (b *bench) save() error {
	text, err := json.MarshalIndent(kept{b.allSizes(), b.order, b.values}, "", " ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(valuesFile), 0o755)
	}
	if err != nil {
		return err
	}
	return os.WriteFile(valuesFile, text, 0o644)
}

// load takes up what earlier runs have left. The sizes to judge are those of all runs; those to measure stay.
func (b *bench) load() error {
	text, err := os.ReadFile(valuesFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var k kept
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err != nil {
		return err
	}
	b.order, b.values, b.judged = k.Order, k.Values, k.Sizes
	return nil
}

// fluid is the time below which n hosts cannot have b bytes, s.
func (b *bench) fluid(n int) float64 {
	bits, link := float64(b.size)*8, float64(b.rate)*1e6
	return max(bits/link, bits/link, float64(n)*bits/(link+float64(n)*link))
}

func key(n int, what string) string { return fmt.Sprintf("N=%d %s", n, what) }

func (b *bench) add(row string, v float64) {
	if b.values[row] == nil {
		b.order = append(b.order, row)
	}
	b.values[row] = append(b.values[row], v)
	say("  %s %.3f", row, v)
}

func (b *bench) median(row string) float64 { return report.Median(b.values[row]) }

func (b *bench) has(row string) bool { return b.values[row] != nil }

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
