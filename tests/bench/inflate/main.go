// Command inflate is bench-inflate: it compares muster's inflate with gzip -dc, Go's and klauspost's
// libraries and igzip -dc, on container layers, text, binaries, incompressible data and long runs.
//
//	inflate [-rounds n] [-size MB] [layer.gz ...]
//
// Each input is inflated by each in turn, round after round, on one core and to nowhere, and the
// medians of the CPU time are compared: so a busy minute of the machine hits all of them alike. Layers are
// the files named, without any the larger layers of the test image debian-python. Text and binaries come
// from the files of one-layer.
package main

import (
	"bytes"
	stdgzip "compress/gzip"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/ztoc"
	"github.com/muster-hpc/muster/ztoc/inflate"
)

// A rival inflates an input to nowhere and says how many bytes there were.
type rival struct {
	name string
	run  func(in *input) (int64, error)
}

var rivals = []rival{
	{"gzip -dc", func(in *input) (int64, error) { return tool(in, "gzip", "-dc") }},
	{"go", func(in *input) (int64, error) {
		z, err := stdgzip.NewReader(onlyReader{bytes.NewReader(in.gz)})
		if err != nil {
			return 0, err
		}
		return io.Copy(io.Discard, z)
	}},
	{"klauspost", func(in *input) (int64, error) {
		z, err := gzip.NewReader(onlyReader{bytes.NewReader(in.gz)})
		if err != nil {
			return 0, err
		}
		return io.Copy(io.Discard, z)
	}},
	{"igzip -dc", func(in *input) (int64, error) { return tool(in, "igzip", "-dc") }},
	{"muster", func(in *input) (int64, error) {
		return io.Copy(io.Discard, inflate.NewReader(onlyReader{bytes.NewReader(in.gz)}, inflate.Options{}))
	}},
}

// onlyReader hides everything but Read, as a layer from the network is.
type onlyReader struct{ io.Reader }

// tool runs a command over the input's file, its output to nowhere.
func tool(in *input, name string, args ...string) (int64, error) {
	f, err := os.Open(in.path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stderr = f, os.Stderr // no Stdout: /dev/null
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("%s (Debian's isal package has igzip): %w", name, err)
	}
	return in.size, nil
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench-inflate: ")
	rounds := flag.Int("rounds", 5, "how often each input is inflated by each")
	size := flag.Int("size", 100, "inflated size of each input that is no layer in `MiB`, at most")
	flag.Parse()
	inputs, err := gather(flag.Args(), int64(*size)<<20)
	if err != nil {
		log.Fatal(err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "bench-inflate-")
	if err != nil {
		log.Fatal(err)
	}
	rows, err := compare(inputs, *rounds, dir)
	os.RemoveAll(dir)
	if err != nil {
		log.Fatal(err)
	}
	missed, err := report.Write(os.Stdout, "inflate", rows)
	if err != nil {
		log.Fatal(err)
	}
	if missed > 0 {
		log.Fatalf("%d targets missed", missed)
	}
}

// compare inflates every input with every rival and makes the rows; dir is for files.
func compare(inputs []input, rounds int, dir string) ([]report.Row, error) {
	old := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(old)
	var rows []report.Row
	for _, in := range inputs {
		in.path = filepath.Join(dir, "input.gz")
		if err := os.WriteFile(in.path, in.gz, 0o600); err != nil {
			return nil, err
		}
		took := make(map[string][]float64)
		for range rounds {
			for _, r := range rivals {
				runtime.GC()
				start := cpu()
				n, err := r.run(&in)
				if err != nil {
					return nil, fmt.Errorf("%s: %s: %w", in.name, r.name, err)
				}
				if n != in.size {
					return nil, fmt.Errorf("%s: %s: %d bytes instead of %d", in.name, r.name, n, in.size)
				}
				took[r.name] = append(took[r.name], (cpu() - start).Seconds())
			}
		}
		rate := func(name string) float64 { return float64(in.size) / 1e6 / report.Median(took[name]) }
		for _, r := range rivals {
			rows = append(rows, report.Figure(in.name+": "+r.name, rate(r.name), "MB/s out"))
		}
		ours := rate("muster")
		if in.layer {
			rows = append(rows,
				report.AtLeast(in.name+": muster to klauspost", ours/rate("klauspost"), "ratio", 2),
				report.AtLeast(in.name+": muster to igzip", ours/rate("igzip -dc"), "ratio", 0.85))
		} else {
			rows = append(rows, report.AtLeast(in.name+": muster to klauspost", ours/rate("klauspost"), "ratio", 1))
		}
		small, err := smallSpans(in, rounds)
		if err != nil {
			return nil, err
		}
		rows = append(rows, small...)
		if in.layer && len(in.gz) > 32<<20 {
			two, err := twoCores(in, rounds)
			if err != nil {
				return nil, err
			}
			rows = append(rows, two...)
		}
	}
	return rows, nil
}

// cpu is the CPU time that this process and its finished children have used.
func cpu() time.Duration {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			log.Fatal(err)
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}

// A run is a way to go through a layer, measured by the clock.
type run struct {
	name string
	do   func(r io.Reader) (int64, error)
}

// twoCores compares what two cores do with one core's plain inflating of the same file, by the clock: CPU
// time would not show it.
func twoCores(in input, rounds int) ([]report.Row, error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	plain := func(cores int) func(io.Reader) (int64, error) {
		return func(r io.Reader) (int64, error) {
			return io.Copy(io.Discard, inflate.NewReader(r, inflate.Options{Cores: cores}))
		}
	}
	build := func(diffID bool) func(io.Reader) (int64, error) {
		return func(r io.Reader) (int64, error) {
			_, sums, err := ztoc.Build(r, ztoc.BuildOptions{Cores: 2, HashInflated: diffID})
			return sums.InflatedSize, err
		}
	}
	runs := []run{
		{"one core", plain(1)},
		{"two cores", plain(2)},
		{"ztoc build with layer and span digests, two cores", build(false)},
		{"the same with the diff ID", build(true)},
	}
	took := make([][]float64, len(runs))
	for range 2 * rounds {
		for i, r := range runs {
			start := time.Now()
			if n, err := r.do(onlyReader{bytes.NewReader(in.gz)}); err != nil || n != in.size {
				return nil, fmt.Errorf("%s, %s: %d bytes, %w", in.name, r.name, n, err)
			}
			took[i] = append(took[i], time.Since(start).Seconds())
		}
	}
	// Whatever else runs only ever makes a round slower, so the fastest count here.
	var rows []report.Row
	for i, r := range runs {
		rows = append(rows, report.Figure(in.name+" by the clock: "+r.name, float64(in.size)/1e6/slices.Min(took[i]), "MB/s out"))
	}
	one := slices.Min(took[0])
	return append(rows,
		report.AtLeast(in.name+": two cores to one", one/slices.Min(took[1]), "ratio", 1.7),
		report.AtLeast(in.name+": ztoc build on two cores to inflate on one", one/slices.Min(took[2]), "ratio", 0.85)), nil
}

// A spot is a checkpoint and its window.
type spot struct {
	inflate.Checkpoint
	window []byte
}

// smallSpans compares inflating by spans of at least 64 KiB with spans of 4 MiB: the cost per byte.
func smallSpans(in input, rounds int) ([]report.Row, error) {
	if !in.layer {
		return nil, nil
	}
	sizes := [...]int64{64 << 10, 4 << 20}
	var spots [len(sizes)][]spot
	for i, size := range sizes {
		z := inflate.NewReader(bytes.NewReader(in.gz), inflate.Options{
			Interval: size,
			OnCheckpoint: func(c inflate.Checkpoint, window []byte) error {
				spots[i] = append(spots[i], spot{c, bytes.Clone(window)})
				return nil
			},
		})
		if _, err := io.Copy(io.Discard, z); err != nil {
			return nil, err
		}
		spots[i] = append(spots[i], spot{Checkpoint: inflate.Checkpoint{In: int64(len(in.gz)), Out: in.size}})
	}
	var took [len(sizes)][]float64
	dst := make([]byte, 32<<20)
	for range rounds {
		for i := range sizes {
			start := cpu()
			for j, s := range spots[i][:len(spots[i])-1] {
				next := spots[i][j+1]
				if s.Bits > 0 {
					s.In--
				}
				if err := inflate.Span(dst[:next.Out-s.Out], in.gz[s.In:next.In], s.Bits, s.window); err != nil {
					return nil, err
				}
			}
			took[i] = append(took[i], (cpu() - start).Seconds())
		}
	}
	small, large := report.Median(took[0]), report.Median(took[1])
	return []report.Row{
		report.Figure(in.name+": muster by 4 MiB spans", float64(in.size)/1e6/large, "MB/s out"),
		report.AtMost(in.name+": cost per byte, 64 KiB to 4 MiB spans", small/large, "ratio", 1.3),
	}, nil
}
