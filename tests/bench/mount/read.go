package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/tests/images"
)

// The targets: of what a plain ext4 directory with the same files does in the same time.
const (
	withBacking    = 0.95
	withoutBacking = 0.5
)

const (
	readFiles   = 4
	readSize    = 64 << 20  // of each, bytes
	programSize = 200 << 20 // of the program, bytes
	smallFiles  = 2000
	randomReads = 1500
	randomSize  = 16 << 10 // bytes
	readRounds  = 3
	backWait    = 2 * time.Minute // for the backing files of everything
)

// A reading is one way to read a tree.
type reading struct {
	name string
	do   func(ctx context.Context, dir string) error
}

var readings = []reading{
	{"sequential", readInOrder},
	{"random 16 KiB", readAtRandom},
	{"exec of a 200 MB program", runProgram},
	{"tar of everything", lab.Tar},
}

// reads measures reading with a cold page cache when everything is local: through a mount whose large files have backing files, through
// one whose files have none (for which the quota leaves no room), and a plain directory on ext4, in turns.
func (b *bench) reads(ctx context.Context) error {
	layout, plain := filepath.Join(b.dir, "read-layout"), filepath.Join(b.dir, "read-plain")
	if err := makeReadImage(layout, plain); err != nil {
		return err
	}
	stores := map[bool]string{false: filepath.Join(b.dir, "read-store-0"), true: filepath.Join(b.dir, "read-store-1")}
	tight, err := layoutSize(layout)
	if err != nil {
		return err
	}
	quota := map[bool]string{false: strconv.FormatInt(tight+readSize*3/4, 10), true: "20GiB"} // room for the image and for no copy
	at := filepath.Join(b.dir, "read-mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		return err
	}
	mount := func(backing bool) error {
		return b.call(ctx, "--store-dir", stores[backing], "--store-quota", quota[backing], "mount", "oci:"+layout+":latest", at)
	}
	umount := func() error { return b.call(ctx, "umount", at) }
	b.closers = append(b.closers, func() { exec.Command("umount", "-l", at).Run() }) //nolint:errcheck // it is gone, usually
	for _, backing := range []bool{false, true} {
		// Everything becomes local, and what is large is really read.
		if err := mount(backing); err != nil {
			return err
		}
		if err := lab.Tar(ctx, at); err != nil {
			return err
		}
		if backing {
			if err := waitForCopies(ctx, stores[true], readFiles+1); err != nil {
				return err
			}
		}
		if err := umount(); err != nil {
			return err
		}
	}
	took := map[string][]float64{}
	measure := func(kind, dir string, r reading) error {
		if err := lab.DropCaches(); err != nil {
			return err
		}
		began := time.Now()
		if err := r.do(ctx, dir); err != nil {
			return fmt.Errorf("%s, %s: %w", r.name, kind, err)
		}
		took[r.name+kind] = append(took[r.name+kind], time.Since(began).Seconds())
		return nil
	}
	for range min(b.rounds, readRounds) {
		for _, r := range readings {
			if err := measure("ext4", plain, r); err != nil {
				return err
			}
			for _, backing := range []bool{true, false} {
				if err := mount(backing); err != nil {
					return err
				}
				if err := measure(fmt.Sprint(backing), at, r); err != nil {
					return err
				}
				if err := umount(); err != nil {
					return err
				}
			}
		}
	}
	for _, r := range readings {
		ext4 := report.Median(took[r.name+"ext4"])
		b.rows = append(b.rows,
			report.Figure(r.name+", ext4", ext4, "s"),
			report.AtLeast(r.name+", with backing files: rate / ext4", ext4/report.Median(took[r.name+"true"]), "", withBacking),
			report.AtLeast(r.name+", without: rate / ext4", ext4/report.Median(took[r.name+"false"]), "", withoutBacking))
	}
	return nil
}

// makeReadImage writes the same files to an image and to a directory: large ones that compress as programs do, a program of
// 200 MB, and small ones.
func makeReadImage(layout, plain string) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	like := func(seed, size int) []byte {
		// Blocks of this program in another order: compressible as it is, and nowhere the same for long.
		r := rand.New(rand.NewPCG(7, uint64(seed)))
		out := make([]byte, 0, size)
		for len(out) < size {
			at := r.IntN(len(self) - 64<<10)
			out = append(out, self[at:at+min(64<<10, size-len(out))]...)
		}
		return out
	}
	entries := []images.Entry{images.Dir("data"), images.Dir("small")}
	for i := range readFiles {
		entries = append(entries, images.File(fmt.Sprintf("data/%d", i), string(like(i, readSize))))
	}
	program := images.File("program", string(append(bytes.Clone(self), like(99, programSize-len(self))...)))
	program.Mode = 0o755
	entries = append(entries, program)
	for i := range smallFiles {
		entries = append(entries, images.File(fmt.Sprintf("small/%d", i), string(like(1000+i, 4000))))
	}
	for _, e := range entries {
		path := filepath.Join(plain, e.Name)
		if e.Body == nil && e.Name[len(e.Name)-1] == '/' {
			err = os.MkdirAll(path, 0o755)
		} else {
			err = os.WriteFile(path, e.Body, os.FileMode(e.Mode))
		}
		if err != nil {
			return err
		}
	}
	return images.WriteImage(layout, images.Image{Layers: []images.Blob{images.Layer(entries...)}})
}

// layoutSize is the bytes of all blobs of a layout.
func layoutSize(layout string) (n int64, err error) {
	all, err := filepath.Glob(filepath.Join(layout, "blobs/sha256/*"))
	for _, name := range all {
		if st, err := os.Stat(name); err == nil {
			n += st.Size()
		}
	}
	return n, err
}

// waitForCopies waits until a store has n backing files.
func waitForCopies(ctx context.Context, dir string, n int) error {
	return lab.Wait(ctx, backWait, func() error {
		all, err := filepath.Glob(filepath.Join(dir, "files/backing/*"))
		if err == nil && len(all) < n {
			err = fmt.Errorf("%d backing files, not %d", len(all), n)
		}
		return err
	})
}

func readInOrder(_ context.Context, dir string) error {
	buf := make([]byte, 1<<20)
	for i := range readFiles {
		f, err := os.Open(filepath.Join(dir, "data", strconv.Itoa(i)))
		if err != nil {
			return err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		f.Close()
		if err != nil || n != readSize {
			return fmt.Errorf("%d bytes: %w", n, err)
		}
	}
	return nil
}

func readAtRandom(_ context.Context, dir string) error {
	r := rand.New(rand.NewPCG(3, 4))
	var open [readFiles]*os.File
	for i := range open {
		f, err := os.Open(filepath.Join(dir, "data", strconv.Itoa(i)))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
			return err
		}
		open[i] = f
	}
	buf := make([]byte, randomSize)
	for range randomReads {
		if _, err := open[r.IntN(readFiles)].ReadAt(buf, r.Int64N(readSize-randomSize)); err != nil {
			return err
		}
	}
	return nil
}

// runProgram runs this program from the tree, where it is 200 MB long. It touches each of its pages.
func runProgram(ctx context.Context, dir string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "program"), "as-program").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// touchSelf is what the program does.
func touchSelf([]string) error {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, programSize, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	sum := 0
	for at := 0; at < len(m); at += 4096 {
		sum += int(m[at])
	}
	if sum == 0 {
		return fmt.Errorf("the program is all zeros")
	}
	return unix.Munmap(m)
}
