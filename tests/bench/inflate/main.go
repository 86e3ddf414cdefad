// Command inflate is bench-inflate: it compares muster's inflate with gzip -dc, Go's and klauspost's
// libraries and igzip -dc, on container layers, text, binaries, incompressible data and long runs.
//
//	inflate [-rounds n] [-size MB] [layer.gz ...]
//
// Each input is inflated by each in turn, round after round, on one core and to nowhere, and the
// medians of the CPU time are compared: so a busy minute of the machine hits all of them alike. Layers are the files
// named, without any the test images' (tests/images), and without those a tar of /usr/lib.
package main

import (
	"bytes"
	stdgzip "compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/ztoc/inflate"
)

// An input is something to inflate.
type input struct {
	name  string
	gz    []byte
	path  string // of a file in memory with gz
	layer bool
	size  int64 // inflated, bytes
}

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
	size := flag.Int("size", 100, "inflated size of each input in `MB`, at most")
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
		if in.layer {
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

// twoCores compares two cores with one on the same file, by the clock: CPU time would not show it.
func twoCores(in input, rounds int) ([]report.Row, error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU()))
	var took [2][]float64
	for range rounds {
		for i := range took {
			start := time.Now()
			z := inflate.NewReader(onlyReader{bytes.NewReader(in.gz)}, inflate.Options{Cores: i + 1})
			if n, err := io.Copy(io.Discard, z); err != nil || n != in.size {
				return nil, fmt.Errorf("%s on %d cores: %d bytes, %w", in.name, i+1, n, err)
			}
			took[i] = append(took[i], time.Since(start).Seconds())
		}
	}
	// Whatever else runs only ever makes a round slower, so the fastest count here.
	one, two := slices.Min(took[0]), slices.Min(took[1])
	return []report.Row{
		report.Figure(in.name+": muster, one core by the clock", float64(in.size)/1e6/one, "MB/s out"),
		report.Figure(in.name+": muster, two cores by the clock", float64(in.size)/1e6/two, "MB/s out"),
		report.AtLeast(in.name+": two cores to one", one/two, "ratio", 1.7),
	}, nil
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

// gather makes the inputs.
func gather(files []string, size int64) ([]input, error) {
	var inputs []input
	if len(files) == 0 {
		found, err := filepath.Glob("/var/cache/muster-test-images/debian-python-*/blobs/sha256/*")
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			if st, err := os.Stat(f); err == nil && st.Size() > 8<<20 {
				files = append(files, f)
			}
		}
	}
	for _, f := range files {
		gz, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		in, err := cut(gz, size)
		if errors.Is(err, inflate.BadMagic) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		in.name, in.layer = fmt.Sprintf("layer %.12s", filepath.Base(f)), true
		inputs = append(inputs, in)
	}
	more, err := others(size, len(inputs) == 0)
	return append(inputs, more...), err
}

// cut makes an input of gz, or where that inflates to more than size of its start, compressed anew.
func cut(gz []byte, size int64) (input, error) {
	z := inflate.NewReader(bytes.NewReader(gz), inflate.Options{})
	var b bytes.Buffer
	n, err := io.Copy(&b, io.LimitReader(z, size+1))
	if err != nil || n <= size {
		return input{gz: gz, size: n}, err
	}
	return packed(b.Bytes()[:size])
}

// packed makes an input of data with GNU gzip, the compressor of most layers and archives.
func packed(data []byte) (input, error) {
	cmd := exec.Command("gzip", "-c")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(data), os.Stderr
	gz, err := cmd.Output()
	return input{gz: gz, size: int64(len(data))}, err
}

// others are the inputs that are no layers, and a tar of /usr/lib when a layer is wanting.
func others(size int64, layer bool) ([]input, error) {
	var inputs []input
	add := func(name string, data []byte, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		in, err := packed(data)
		in.name, in.layer = name, name == "layer"
		inputs = append(inputs, in)
		return err
	}
	if layer {
		data, err := some(size, "/usr/lib", func(string, fs.FileInfo) bool { return true })
		if err := add("layer", data, err); err != nil {
			return nil, err
		}
	}
	data, err := some(size, "/usr/share", func(name string, _ fs.FileInfo) bool {
		switch filepath.Ext(name) {
		case ".py", ".h", ".txt", ".pl", ".pm", ".html", ".xml", ".js", ".css", ".json", ".go", ".c":
			return true
		}
		return false
	})
	if err := add("text", data, err); err != nil {
		return nil, err
	}
	data, err = some(size, "/usr", func(name string, fi fs.FileInfo) bool {
		return fi.Size() > 100_000 && (filepath.Base(filepath.Dir(name)) == "bin" || strings.Contains(name, ".so"))
	})
	if err := add("binaries", data, err); err != nil {
		return nil, err
	}
	noise := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(noise)
	if err := add("incompressible", noise, nil); err != nil {
		return nil, err
	}
	runs := noise[:0] // of one byte each, from short to very long, with a few in between
	for r := rand.New(rand.NewPCG(1, 2)); int64(len(runs)) < size; {
		runs = append(runs, bytes.Repeat([]byte{byte(r.Uint32())}, 1<<r.IntN(17))...)
	}
	return inputs, add("runs", runs[:size], nil)
}

// errEnough ends a walk.
var errEnough = errors.New("enough")

// some is up to size bytes of the files below dir that are wanted, with their names, as in an archive.
func some(size int64, dir string, want func(name string, fi fs.FileInfo) bool) ([]byte, error) {
	var b bytes.Buffer
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil // what cannot be read is left out
		}
		fi, err := e.Info()
		if err != nil || !want(name, fi) {
			return nil
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return nil
		}
		fmt.Fprintf(&b, "%-512s", name)
		b.Write(data)
		b.Write(make([]byte, -len(data)&511))
		if int64(b.Len()) >= size {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return b.Bytes()[:min(size, int64(b.Len()))], err
}
