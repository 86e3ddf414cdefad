// Command read measures reading through a mount when everything is local and the page cache is cold,
// beside a plain ext4 directory with the same files, in turns.
//
//  1. The image is debian-scipy with a layer on top: a file of 500 MB made of the image's own bytes, and as
//     many small files as 50,000 inodes need. muster mounts it from a registry, umoci unpacks it.
//  2. Walks: find -printf, first and again. Reading: the large file in order, against one core's
//     inflate of the same layer. Everything: tar, against ext4's tar plus inflating once.
//  3. Memory: private bytes of the mount's processes, idle, after reading everything, and with 500
//     readers blocked on a registry that does not answer.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc/inflate"
)

// The targets.
const (
	firstWalk    = 1.2 // of ext4
	nextWalk     = 1.1 // of ext4
	sequential   = 1.5 // of one core's inflate
	wholeTree    = 1.2 // of ext4's tar plus inflating once
	idleMemory   = 30  // MB
	readMemory   = 120 // MB
	readers      = 500
	inodes       = 50_000
	bigFile      = 500 << 20
	smallPerDir  = 100
	smallContent = 900
	spare        = 5_000 // names that the count by headers takes for inodes and that are none
)

func main() {
	rounds := flag.Int("rounds", 3, "rounds per row")
	muster := flag.String("muster", "build/muster", "binary to measure")
	only := flag.String("only", "", "the one step to measure: walks, big, tar or blocked; all when empty")
	keep := flag.String("keep", "", "directory in which what is prepared stays for the next run; a temporary one when empty")
	flag.Parse()
	b := &bench{rounds: *rounds, only: *only, dir: *keep}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends at once
	err := b.run(ctx, *muster)
	b.close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-read:", err)
		os.Exit(1)
	}
}

type bench struct {
	rounds   int
	only     string
	muster   string
	dir      string // scratch
	plain    string // unpacked tree
	mounted  string
	proxy    *registry.Proxy
	ref      string
	pid      int     // of the mount's parent
	rate     float64 // inflated bytes per second and core
	inflated int64   // bytes of all layers
	rows     []report.Row
	closers  []func()
}

func (b *bench) close() {
	for i := len(b.closers) - 1; i >= 0; i-- {
		b.closers[i]()
	}
}

func (b *bench) run(ctx context.Context, muster string) (err error) {
	if b.muster, err = filepath.Abs(muster); err != nil {
		return err
	}
	if b.dir == "" {
		if b.dir, err = os.MkdirTemp("/var/tmp", "muster-bench-"); err != nil {
			return err
		}
		b.closers = append(b.closers, func() { os.RemoveAll(b.dir) })
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{{"", b.first}, {"walks", b.walks}, {"big", b.big}, {"tar", b.tar}, {"blocked", b.blocked}} {
		if step.name == "" || b.only == "" || b.only == step.name {
			if err := step.do(ctx); err != nil {
				return err
			}
		}
	}
	name := "read"
	if b.only != "" {
		name += "-" + b.only
	}
	_, err = report.Write(os.Stdout, name, b.rows)
	return err
}

// prepare makes the image, unpacks it, and serves it from an embedded registry.
func (b *bench) prepare(ctx context.Context) error {
	base, err := images.Get("debian-scipy")
	if err != nil {
		return err
	}
	layout, bundle := filepath.Join(b.dir, "layout"), filepath.Join(b.dir, "bundle")
	done := filepath.Join(b.dir, "prepared") // exists when all of it does, and says how many bytes the layers inflate to
	b.plain = filepath.Join(bundle, "rootfs")
	if text, err := os.ReadFile(done); err == nil {
		if b.inflated, err = strconv.ParseInt(string(text), 10, 64); err != nil {
			return err
		}
	} else {
		if err := os.MkdirAll(b.dir, 0o755); err != nil {
			return err
		}
		if err := b.grow(base, layout); err != nil {
			return err
		}
		if _, err := lab.Unpack(layout, bundle); err != nil {
			return err
		}
		if err := os.WriteFile(done, []byte(strconv.FormatInt(b.inflated, 10)), 0o644); err != nil {
			return err
		}
	}
	h, err := registry.NewHandler(filepath.Join(b.dir, "registry"), registry.Options{})
	if err != nil {
		return err
	}
	if b.proxy, err = registry.StartProxy(h); err != nil {
		return err
	}
	b.closers = append(b.closers, func() { b.proxy.Close() })
	b.ref = b.proxy.Addr + "/bench:latest"
	if _, err := registry.Push(ctx, b.ref, layout, ""); err != nil {
		return err
	}
	b.mounted = filepath.Join(b.dir, "mnt")
	b.closers = append(b.closers, func() { exec.Command("umount", "-l", b.mounted).Run() }) //nolint:errcheck // it is gone, usually
	return os.MkdirAll(b.mounted, 0o755)
}

// grow writes base's image with one more layer to layout.
func (b *bench) grow(base, layout string) error {
	blobs, err := images.ReadLayout(base)
	if err != nil {
		return err
	}
	layers, err := lab.Layers(base)
	if err != nil {
		return err
	}
	var big []byte
	have := 0
	for _, l := range layers {
		tar, err := gunzip(l.Path)
		if err != nil {
			return err
		}
		b.inflated += int64(len(tar))
		if len(big) < bigFile {
			big = append(big, tar[:min(len(tar), bigFile-len(big))]...)
		}
		have += bytes.Count(tar, []byte("\x00ustar")) // near enough: inodes are filled up to at least 50,000
	}
	entries := []images.Entry{images.Dir("bench"), images.File("bench/big", string(big))}
	for i := range inodes - have + spare {
		if i%smallPerDir == 0 {
			entries = append(entries, images.Dir(fmt.Sprintf("bench/%d", i/smallPerDir)))
		}
		content := strings.Repeat(fmt.Sprintf("file %d\n", i), smallContent/10)
		entries = append(entries, images.File(fmt.Sprintf("bench/%d/%d", i/smallPerDir, i), content))
	}
	tar := images.Tar(entries...)
	b.inflated += int64(len(tar))
	return images.WriteLayout(layout, append(blobs, images.NewLayer(images.MediaLayerGzip, images.Gzip(tar), tar))...)
}

func gunzip(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(inflate.NewReader(f, inflate.Options{}))
}

// first pulls everything, through a mount, and measures its idle memory.
func (b *bench) first(ctx context.Context) error {
	if err := b.mount(ctx); err != nil {
		return err
	}
	layers, err := lab.Layers(filepath.Join(b.dir, "layout"))
	if err != nil {
		return err
	}
	start := time.Now()
	for _, l := range layers {
		if _, err := l.Inflate(); err != nil {
			return err
		}
	}
	b.rate = float64(b.inflated) / time.Since(start).Seconds()
	b.rows = append(b.rows, report.Figure("one-core inflate of all layers", b.rate/1e6, "MB/s out"))
	return nil
}

func (b *bench) mount(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, b.muster, "--store-dir", filepath.Join(b.dir, "store"), "mount", "--json", b.ref, b.mounted)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("mount: %w: %s", err, stderr.String())
	}
	var m struct {
		Pid int `json:"pid"`
	}
	if err := json.Unmarshal(out, &m); err != nil {
		return err
	}
	b.pid = m.Pid
	return nil
}

func (b *bench) umount(ctx context.Context) error {
	if out, err := exec.CommandContext(ctx, b.muster, "umount", b.mounted).CombinedOutput(); err != nil {
		return fmt.Errorf("umount: %w: %s", err, out)
	}
	return nil
}

// remount gives every measurement a fresh server and a cold page cache.
func (b *bench) remount(ctx context.Context) error {
	if err := b.umount(ctx); err != nil {
		return err
	}
	if err := b.mount(ctx); err != nil {
		return err
	}
	return lab.DropCaches()
}

func (b *bench) walks(ctx context.Context) error {
	var ext4, ours, ext4Next, oursNext []float64
	for range b.rounds {
		if err := lab.DropCaches(); err != nil {
			return err
		}
		for range 2 {
			t, n, err := walk(ctx, b.plain)
			if err != nil {
				return err
			}
			if n < inodes {
				return fmt.Errorf("the tree has %d inodes, fewer than %d", n, inodes)
			}
			ext4, ext4Next = appendFirst(ext4, ext4Next, t)
		}
		if err := b.remount(ctx); err != nil {
			return err
		}
		for range 2 {
			t, _, err := walk(ctx, b.mounted)
			if err != nil {
				return err
			}
			ours, oursNext = appendFirst(ours, oursNext, t)
		}
	}
	b.rows = append(b.rows,
		report.Figure("first walk, ext4", report.Median(ext4), "s"),
		report.AtMost("first walk / ext4", report.Median(ours)/report.Median(ext4), "", firstWalk),
		report.Figure("next walk, ext4", report.Median(ext4Next), "s"),
		report.AtMost("next walk / ext4", report.Median(oursNext)/report.Median(ext4Next), "", nextWalk))
	return nil
}

// appendFirst appends to first and next in turns.
func appendFirst(first, next []float64, t float64) (f, n []float64) {
	if len(first) == len(next) {
		return append(first, t), next
	}
	return first, append(next, t)
}

func walk(ctx context.Context, dir string) (seconds float64, n int, err error) {
	cmd := exec.CommandContext(ctx, "find", dir, "-printf", "%s %m %p\n")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	for s := bufio.NewScanner(out); s.Scan(); {
		n++
	}
	err = cmd.Wait()
	return time.Since(start).Seconds(), n, err
}

func (b *bench) big(ctx context.Context) error {
	var ours, ext4 []float64
	for range b.rounds {
		for _, x := range []struct {
			root string
			to   *[]float64
		}{{b.plain, &ext4}, {b.mounted, &ours}} {
			if err := b.remount(ctx); err != nil {
				return err
			}
			start := time.Now()
			f, err := os.Open(filepath.Join(x.root, "bench/big"))
			if err != nil {
				return err
			}
			n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 1<<20))
			f.Close()
			if err != nil {
				return err
			}
			*x.to = append(*x.to, float64(n)/time.Since(start).Seconds())
		}
	}
	b.rows = append(b.rows,
		report.Figure("500 MB in order, ext4", report.Median(ext4)/1e6, "MB/s"),
		report.Figure("500 MB in order, mount", report.Median(ours)/1e6, "MB/s"),
		report.AtLeast("500 MB in order / one-core inflate", report.Median(ours)/b.rate, "", sequential))
	return nil
}

func (b *bench) tar(ctx context.Context) error {
	var ours, ext4 []float64
	idle := 0.0
	for range b.rounds {
		if err := b.remount(ctx); err != nil {
			return err
		}
		t, err := tarOf(ctx, b.plain)
		if err != nil {
			return err
		}
		ext4 = append(ext4, t)
		if err := b.remount(ctx); err != nil {
			return err
		}
		if err := lab.Sleep(ctx, 12*time.Second); err != nil { // idle is when nobody reads: after ten seconds the server gives memory back
			return err
		}
		if idle, err = b.memory(); err != nil {
			return err
		}
		if t, err = tarOf(ctx, b.mounted); err != nil {
			return err
		}
		ours = append(ours, t)
	}
	after, err := b.memory()
	if err != nil {
		return err
	}
	once := float64(b.inflated) / b.rate
	b.rows = append(b.rows,
		report.Figure("tar of everything, ext4", report.Median(ext4), "s"),
		report.Figure("tar of everything, mount", report.Median(ours), "s"),
		report.Figure("inflating everything once, one core", once, "s"),
		report.AtMost("tar / (ext4 + inflating once)", report.Median(ours)/(report.Median(ext4)+once), "", wholeTree),
		report.AtMost("private memory, idle", idle, "MB", idleMemory),
		report.AtMost("private memory, after reading everything", after, "MB", readMemory))
	return nil
}

func tarOf(ctx context.Context, dir string) (seconds float64, err error) {
	start := time.Now()
	err = lab.Tar(ctx, dir)
	return time.Since(start).Seconds(), err
}

// blocked measures memory while 500 readers wait for a registry that says nothing: an index is beside the
// image by then, the store is empty.
func (b *bench) blocked(ctx context.Context) error {
	if err := b.umount(ctx); err != nil {
		return err
	}
	store := filepath.Join(b.dir, "store")
	if out, err := exec.CommandContext(ctx, b.muster, "--store-dir", store, "index", "push", b.ref).CombinedOutput(); err != nil {
		return fmt.Errorf("index push: %w: %s", err, out)
	}
	if err := os.RemoveAll(store); err != nil {
		return err
	}
	files, err := someFiles(filepath.Join(b.plain, "usr"), readers)
	if err != nil {
		return err
	}
	if err := b.mount(ctx); err != nil {
		return err
	}
	b.proxy.Inject(registry.Match{Kind: registry.Blob}, 0, registry.Hang())
	var wg sync.WaitGroup
	for _, f := range files {
		rel, _ := filepath.Rel(b.plain, f)
		wg.Go(func() {
			if f, err := os.Open(filepath.Join(b.mounted, rel)); err == nil {
				f.Read(make([]byte, 4096)) //nolint:errcheck // ends when it ends
				f.Close()
			}
		})
	}
	lab.Sleep(ctx, 3*time.Second) //nolint:errcheck // the readers must be let go first
	waiting, err := b.memory()
	b.proxy.Clear()
	if err != nil {
		return err
	}
	if err := b.umount(ctx); err != nil {
		return err
	}
	wg.Wait()
	b.rows = append(b.rows, report.AtMost(fmt.Sprintf("private memory, %d readers blocked", readers), waiting, "MB", readMemory))
	return nil
}

func someFiles(dir string, n int) (files []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || len(files) == n {
			return err
		}
		if info, err := d.Info(); err == nil && d.Type().IsRegular() && info.Size() > 8<<10 {
			files = append(files, path)
		}
		return nil
	})
	return files, err
}

// memory is the private memory of the mount's processes, MB: what is theirs alone and not the page cache's, which
// the kernel takes back when it must.
func (b *bench) memory() (float64, error) {
	total := 0.0
	for _, pid := range append(children(b.pid), b.pid) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) > 1 && (f[0] == "RssAnon:" || f[0] == "RssShmem:" || f[0] == "VmSwap:") {
				kb, _ := strconv.ParseFloat(f[1], 64)
				total += kb / 1e3
			}
		}
	}
	return total, nil
}

func children(pid int) (all []int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		text, _ := os.ReadFile(t)
		for _, f := range strings.Fields(string(text)) {
			if c, err := strconv.Atoi(f); err == nil {
				all = append(append(all, c), children(c)...)
			}
		}
	}
	return all
}
