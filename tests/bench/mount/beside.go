package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/tests/bench/report"
)

// The targets: by how much the loop may be slower, in percent.
const (
	idleMedian, idleTail = 0.2, 1.0
	fillMedian, fillTail = 1.0, 3.0
)

const (
	loopTime = 3 * time.Second // of one window of a variant
	settle   = 3 * time.Second // until a new mount has done what it does once
	unitTime = 5 * time.Millisecond
)

// A variant is what the loop runs beside.
type variant struct {
	name  string
	begin func() (end func() error, err error)
	units []float64 // seconds, of all windows
	mid   []float64 // ratio of the medians of a window and of the one beside nothing in the same round
	tail  []float64 // the same of the 99th percentiles
	cpu   float64   // seconds that muster's processes used
}

// beside measures a loop of fixed work on every core.
func (b *bench) beside(ctx context.Context) error {
	iterations, err := calibrate()
	if err != nil {
		return err
	}
	_, umount, err := b.mount(ctx)
	if err != nil {
		return err
	}
	fill := 0.0
	all := []*variant{
		// The idle mount stands for "nothing" too unless it is away then.
		{name: "nothing", begin: func() (func() error, error) {
			if err := umount(); err != nil {
				return nil, err
			}
			return func() error {
				_, umount, err = b.mount(ctx)
				time.Sleep(settle)
				return err
			}, nil
		}},
		{name: "an idle mount", begin: func() (func() error, error) { return func() error { return nil }, nil }},
		{name: "a mount that fills", begin: func() (func() error, error) { return b.fill(ctx, &fill) }},
		{name: "a download at the same rate", begin: func() (func() error, error) {
			h, _, err := b.helper("as-download", fmt.Sprintf("http://%s/v2/bench/blobs/%s", strings.TrimSuffix(b.slow, "/bench:latest"), b.layer))
			if err != nil {
				return nil, err
			}
			return h.end, nil
		}},
	}
	for round := range b.rounds {
		at := map[*variant][]float64{}
		for i := range all {
			v := all[(i+round)%len(all)]
			end, err := v.begin()
			if err != nil {
				return fmt.Errorf("%s: %w", v.name, err)
			}
			time.Sleep(time.Second)
			before := b.busy()
			units, err := runLoop(ctx, iterations)
			if err != nil {
				return err
			}
			v.cpu += b.busy() - before
			at[v] = units
			v.units = append(v.units, units...)
			if err := end(); err != nil {
				return fmt.Errorf("%s: %w", v.name, err)
			}
		}
		for _, v := range all {
			v.mid = append(v.mid, percentile(at[v], 50)/percentile(at[all[0]], 50))
			v.tail = append(v.tail, percentile(at[v], 99)/percentile(at[all[0]], 99))
		}
	}
	slower := func(v []float64) float64 { return (report.Median(v) - 1) * 100 }
	for i, v := range all {
		switch i {
		case 0:
			b.rows = append(b.rows,
				report.Figure("fixed work beside nothing: spread of the medians", (report.Spread(medians(v.units, b.rounds))-1)*100, "%"))
		case 1:
			b.rows = append(b.rows,
				report.AtMost("fixed work beside "+v.name+": slower, median", slower(v.mid), "%", idleMedian),
				report.AtMost("fixed work beside "+v.name+": slower, p99", slower(v.tail), "%", idleTail),
				report.Figure("processor time of "+v.name, v.cpu*1000, "ms"))
		case 2:
			b.rows = append(b.rows,
				report.AtMost("fixed work beside "+v.name+": slower, median", slower(v.mid), "%", fillMedian),
				report.AtMost("fixed work beside "+v.name+": slower, p99", slower(v.tail), "%", fillTail),
				report.Figure("rate of "+v.name, fill/float64(b.rounds)/1e6, "MB/s"),
				report.Figure("processor time of "+v.name, v.cpu/float64(b.rounds)/loopTime.Seconds()*100, "% of a core"))
		case 3:
			b.rows = append(b.rows,
				report.Figure("fixed work beside "+v.name+": slower, median", slower(v.mid), "%"),
				report.Figure("fixed work beside "+v.name+": slower, p99", slower(v.tail), "%"))
		}
	}
	return umount()
}

// medians are those of n equal parts of v.
func medians(v []float64, n int) (m []float64) {
	for part := range slices.Chunk(v, max(len(v)/n, 1)) {
		m = append(m, percentile(part, 50))
	}
	return m
}

// percentile is the value that p percent of v do not exceed.
func percentile(v []float64, p int) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[min(len(s)*p/100, len(s)-1)]
}

// fill mounts the image with an empty store and has it fetched in the background. rate gets the bytes per second.
func (b *bench) fill(ctx context.Context, rate *float64) (end func() error, err error) {
	dir, err := os.MkdirTemp(b.dir, "fill-")
	if err != nil {
		return nil, err
	}
	at, st := filepath.Join(dir, "mnt"), filepath.Join(dir, "store")
	for _, d := range []string{at, st} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	request, err := json.Marshal(order{b.slow, st})
	if err != nil {
		return nil, err
	}
	m, err := mountd.Start(ctx, mountd.Options{Dir: at, Request: request, Log: os.Stderr})
	if err != nil {
		return nil, err
	}
	b.closers = append(b.closers, func() { exec.Command("umount", "-l", at).Run() }) //nolint:errcheck // it is gone, usually
	began, had := time.Now(), used(st)
	return func() error {
		*rate += (used(st) - had) / time.Since(began).Seconds()
		if busy, err := m.Unmount(context.Background()); err != nil || busy {
			return fmt.Errorf("unmount: busy %v, %w", busy, err)
		}
		return os.RemoveAll(dir)
	}, nil
}

// used is the bytes that lie in a directory.
func used(dir string) (n float64) {
	out, _ := exec.Command("du", "-s", "-B1", dir).Output()
	fmt.Sscan(string(out), &n) //nolint:errcheck // nothing is nothing
	return n
}

// busy is the processor time that the processes of this bench's mounts have used, seconds.
func (b *bench) busy() (seconds float64) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range all {
		if line, _ := os.ReadFile(name); !bytes.HasPrefix(line, []byte("muster-mountd\x00")) || !bytes.Contains(line, []byte(b.dir)) {
			continue
		}
		stat, _ := os.ReadFile(filepath.Dir(name) + "/stat")
		_, after, _ := strings.Cut(string(stat), ") ")
		f := strings.Fields(after)
		if len(f) < 13 {
			continue
		}
		for _, ticks := range f[11:13] {
			n, _ := strconv.ParseFloat(ticks, 64)
			seconds += n / 100
		}
	}
	return seconds
}

// runLoop runs the loop in a process of its own and returns the time of each unit, seconds.
func runLoop(ctx context.Context, iterations int) (units []float64, err error) {
	out, err := exec.CommandContext(ctx, "/proc/self/exe", "as-loop", strconv.Itoa(iterations), loopTime.String()).Output()
	if err == nil {
		err = json.Unmarshal(out, &units)
	}
	if err == nil && len(units) < 100 {
		err = fmt.Errorf("the loop went round %d times only", len(units))
	}
	return units, err
}

// loop does units of fixed work on every core until the time is over, and says how long each took.
func loop(args []string) error {
	iterations, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	limit, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	debug.SetGCPercent(-1)
	var wg sync.WaitGroup
	all := make([][]float64, runtime.NumCPU())
	for cpu := range all {
		all[cpu] = make([]float64, 0, 2*limit/unitTime+1000)
		wg.Go(func() {
			runtime.LockOSThread()
			var set unix.CPUSet
			set.Set(cpu)
			_ = unix.SchedSetaffinity(0, &set) // where it may not be pinned it runs all the same
			for end := time.Now().Add(limit); time.Now().Before(end); {
				began := time.Now()
				_ = work(iterations)
				all[cpu] = append(all[cpu], time.Since(began).Seconds())
			}
		})
	}
	wg.Wait()
	return json.NewEncoder(os.Stdout).Encode(slices.Concat(all...))
}

// work is arithmetic in registers, the same each time.
//
//go:noinline
func work(iterations int) uint64 {
	x := uint64(88172645463325252)
	for range iterations {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	return x
}

// calibrate is how many iterations take unitTime.
func calibrate() (int, error) {
	n := 1 << 16
	for range 30 {
		began := time.Now()
		_ = work(n)
		if took := time.Since(began); took > unitTime/2 {
			return int(float64(n) * float64(unitTime) / float64(took)), nil
		}
		n *= 2
	}
	return 0, fmt.Errorf("the loop takes no time")
}
