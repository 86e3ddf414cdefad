package lazyfs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// copies is a Backing in a directory.
type copies struct {
	dir string

	mu   sync.Mutex
	made int
	hide bool
}

func (c *copies) path(content []lazyfs.ProfileRange) string {
	return filepath.Join(c.dir, fmt.Sprintf("%x", sha256.Sum256(fmt.Append(nil, content))))
}

func (c *copies) Any() bool { return true }

func (c *copies) Open(content []lazyfs.ProfileRange) *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hide {
		return nil
	}
	f, err := os.Open(c.path(content))
	if err != nil {
		return nil
	}
	return f
}

func (c *copies) Make(content []lazyfs.ProfileRange, size int64, write func(io.Writer) error) error {
	f, err := os.CreateTemp(c.dir, "tmp")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if st, err := f.Stat(); err != nil || st.Size() != size {
		return errors.New("wrong size")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.made++
	return os.Rename(f.Name(), c.path(content))
}

// evict removes all copies.
func (c *copies) evict(t *testing.T) {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(c.dir, "*"))
	if err != nil || len(all) == 0 {
		t.Fatal("nothing to evict", err)
	}
	for _, f := range all {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
}

// diskDir is a directory on a disk: the kernel passes nothing through from a file system that is stacked.
func diskDir(t *testing.T) string {
	t.Helper()
	return t.TempDir()
}

// nearMemory is memory all of which is local.
type nearMemory struct {
	*memory
	near
}

func backed(c *copies, img *image) func(*lazyfs.Config) {
	return func(cfg *lazyfs.Config) {
		cfg.Backing, cfg.Quiet, cfg.Blobs = c, 100*time.Millisecond, nearMemory{&memory{blobs: img.blobs}, near{}}
	}
}

func twoLarge(t *testing.T) *image {
	return build(t, 1<<20, true, []member{file("first", text(1, 100)), file("large", text(2, 9<<20)), file("other", text(3, 10<<20)), file("small", text(4, 1<<20))})
}

func (m *mounted) same(t *testing.T, img *image, names ...string) {
	t.Helper()
	for _, name := range names {
		if got, err := os.ReadFile(m.path(name)); err != nil || !bytes.Equal(got, img.files[name]) {
			t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(img.files[name]), err)
		}
	}
}

// What was really read gets a plain copy, and the next mount passes it through; old kernels do without.
func TestBacking(t *testing.T) {
	img := twoLarge(t)
	eachMode(t, func(t *testing.T, compat lazyfs.Compat) {
		c := &copies{dir: diskDir(t)}
		m := mount(t, img, compat, backed(c, img))
		m.same(t, img, "first", "large", "small")
		if compat != "" {
			m.unmount(t)
			if s := m.server.Stats(); s.Backed != 0 || s.Passed != 0 {
				t.Errorf("%+v", s)
			}
			return
		}
		waitFor(t, "a backing file", func() bool { return m.server.Stats().Backed == 1 })
		m.same(t, img, "large") // cached, as it was: this mount answers no opens
		m.unmount(t)
		if s := m.server.Stats(); s.Passed != 0 || c.made != 1 {
			t.Errorf("%+v, %d made", s, c.made)
		}

		m = mount(t, img, compat, backed(c, img))
		before := m.server.Stats().ReadBytes
		m.same(t, img, "large")
		m.same(t, img, "large")
		if s := m.server.Stats(); s.Passed != 2 || s.ReadBytes != before {
			t.Errorf("passed through %d times, and %d bytes read from the server", s.Passed, s.ReadBytes-before)
		}
		m.same(t, img, "first", "other", "small")
		m.unmount(t)
		if m.log.String() != "" {
			t.Errorf("logged: %s", m.log)
		}
	})
}

// A file's mode holds as long as the mount: it stays passed through when its copy is evicted, made again, and made to be something
// else; it stays cached when a copy is made after it was opened. Nobody gets an error.
func TestModeNeverChanges(t *testing.T) {
	img := twoLarge(t)
	c := &copies{dir: diskDir(t)}
	m := mount(t, img, "", backed(c, img))
	m.same(t, img, "large")
	waitFor(t, "a backing file", func() bool { return m.server.Stats().Backed == 1 })
	m.unmount(t)

	m = mount(t, img, "", backed(c, img))
	large, err := os.Open(m.path("large"))
	if err != nil {
		t.Fatal(err)
	}
	defer large.Close()
	mapped, err := unix.Mmap(int(large.Fd()), 0, len(img.files["large"]), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped) //nolint:errcheck // the test is over
	other, err := os.Open(m.path("other"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	m.same(t, img, "other")
	waitFor(t, "another backing file", func() bool { return m.server.Stats().Backed == 1 })
	m.same(t, img, "other", "large")
	c.evict(t)
	m.same(t, img, "other", "large")
	for name := range img.files { // copies of other bytes are nobody's
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte("wrong"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(mapped, img.files["large"]) {
		t.Error("the mapping of a passed-through file changed")
	}
	got := make([]byte, len(img.files["other"]))
	if _, err := other.ReadAt(got, 0); err != nil || !bytes.Equal(got, img.files["other"]) {
		t.Errorf("other: %v", err)
	}
	m.same(t, img, "other", "large")
	if s := m.server.Stats(); s.Passed != 4 || s.Failed != 0 {
		t.Errorf("%+v", s)
	}
	large.Close()
	other.Close()
	unix.Munmap(mapped) //nolint:errcheck // as above
	m.unmount(t)
}

// A server that takes over knows how files were opened, also when their copies are gone or new.
func TestSuccessorKnowsModes(t *testing.T) {
	img := twoLarge(t)
	c := &copies{dir: diskDir(t)}
	m := mount(t, img, "", backed(c, img))
	m.same(t, img, "large")
	waitFor(t, "a backing file", func() bool { return m.server.Stats().Backed == 1 })
	m.unmount(t)

	modes := make([]byte, lazyfs.ModesSize)
	mem, err := unix.Mmap(-1, 0, lazyfs.SlotsSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem) //nolint:errcheck // the test is over
	dir := t.TempDir()
	dev, err := lazyfs.Mount(t.Context(), dir, lazyfs.MountOptions{Name: t.Name()})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	agreed, err := lazyfs.Negotiate(dev, "", true)
	if err != nil {
		t.Fatal(err)
	}
	// The threads of a server that was stopped keep waiting for requests, so each server has a device of its own.
	serve := func() (*mounted, func()) {
		cfg := lazyfs.Config{Table: img.table, Layers: img.layers, Init: agreed, Modes: modes}
		backed(c, img)(&cfg)
		if cfg.Slots, err = lazyfs.NewSharedSlots(mem); err != nil {
			t.Fatal(err)
		}
		s, err := lazyfs.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		m := &mounted{dir: dir, server: s, done: make(chan error, 1)}
		ctx, stop := context.WithCancel(context.Background())
		go func() { m.done <- s.Serve(ctx, dev) }()
		return m, stop
	}
	first, stop := serve()
	first.same(t, img, "large", "other")
	if s := first.server.Stats(); s.Passed != 1 {
		t.Errorf("first: %+v", s)
	}
	stop()
	<-first.done
	// Its threads still answer, from what they remember; so does the next one's, from the shared memory.
	waitFor(t, "the memory", func() bool { return !bytes.Equal(modes, make([]byte, len(modes))) })
	c.mu.Lock()
	c.hide = true
	c.mu.Unlock()
	second, stop := serve()
	defer stop()
	for range 20 {
		second.same(t, img, "large", "other")
	}
	if s := second.server.Stats(); s.Passed == 0 || s.Failed != 0 {
		t.Errorf("second: %+v", s)
	}
	if busy, err := lazyfs.Unmount(t.Context(), dir); err != nil || busy {
		t.Errorf("unmount: %v, %v", busy, err)
	}
	select {
	case <-second.done:
	case <-time.After(20 * time.Second):
		t.Error("still serving")
	}
}

// Where the kernel refuses, files are read through the server as ever, and that is said once.
func TestPassthroughIsRefused(t *testing.T) {
	img := twoLarge(t)
	c := &copies{dir: diskDir(t)}
	m := mount(t, img, "", backed(c, img))
	m.same(t, img, "large", "other")
	waitFor(t, "backing files", func() bool { return m.server.Stats().Backed == 2 })
	m.unmount(t)

	// An overlay stands for what the kernel calls stacked.
	at, upper, work := t.TempDir(), t.TempDir(), t.TempDir()
	if err := unix.Mount("overlay", at, "overlay", 0, "lowerdir="+c.dir+",upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH) //nolint:errcheck // the directory is removed, or that fails
	m = mount(t, img, "", backed(&copies{dir: at}, img))
	m.same(t, img, "large", "other", "small", "large")
	m.unmount(t)
	if s := m.server.Stats(); s.Passed != 0 || s.Failed != 0 {
		t.Errorf("%+v", s)
	}
	if n := strings.Count(m.log.String(), "level="); n != 1 || !strings.Contains(m.log.String(), "stacked") {
		t.Errorf("logged: %s", m.log)
	}
}

var (
	_ lazyfs.Backing = (*copies)(nil)
	_ lazyfs.Local   = nearMemory{}
)
