package lazyfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// spansOf are the blob ranges of the spans that hold [off, off+n) of a file in layer 0.
func (img *image) spansOf(t *testing.T, name string, off, n int64) (r []ztoc.Range) {
	t.Helper()
	row, err := img.table.Resolve(name, false)
	if err != nil {
		t.Fatal(err)
	}
	e := img.table.Extent(row, off)
	z := img.layers[e.Layer].Ztoc
	lo, hi := z.SpansOf(ztoc.Range{Start: e.Offset, End: e.Offset + n})
	for i := lo; i < hi; i++ {
		r = append(r, z.Span(i).Blob)
	}
	return r
}

func pread(t *testing.T, path string, off int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	k, err := f.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b[:k]
}

// A 4 KiB read in a cold file causes exactly the request for its span; again, none.
func TestOneReadAsksForOneSpan(t *testing.T) {
	img := build(t, testSpan, true, []member{file("a", text(9, 1000)), file("big", text(1, 8<<20)), file("z", text(8, 1000))})
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		const off = 5<<20 + 4096
		if got := pread(t, m.path("big"), off, 4096); !bytes.Equal(got, img.files["big"][off:off+4096]) {
			t.Error("wrong bytes")
		}
		want := img.spansOf(t, "big", off, 4096)
		var got []ztoc.Range
		for _, r := range m.blobs.asked() {
			got = append(got, r.r)
			if r.pri != ztoc.Demand {
				t.Errorf("asked with priority %v", r.pri)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("asked for %v, want %v", got, want)
		}
		m.blobs.forget()
		pread(t, m.path("big"), off+8192, 4096) // same span, other page
		if l := m.blobs.asked(); len(l) != 0 && len(want) == 1 {
			t.Errorf("asked again: %v", l)
		}
	})
}

// near is Blobs whose bytes are all local.
type near struct{ *memory }

func (near) Local(ztoc.BlobRef, ztoc.Range) bool { return true }

// Where it costs no network, the span behind one that was missing is inflated too, and the next when that is read.
func TestNeighbour(t *testing.T) {
	img := build(t, testSpan, true, []member{file("big", text(1, 8<<20))})
	m := mount(t, img, "", func(c *lazyfs.Config) { c.Blobs = near{c.Blobs.(*memory)} })
	z := img.layers[0].Ztoc
	for i := range 3 {
		first := 10 + i
		s := z.Span(first)
		off := s.Out.Start + 8192 - 512 // the content begins behind a header of 512 bytes
		if got := pread(t, m.path("big"), off, 4096); !bytes.Equal(got, img.files["big"][off:off+4096]) {
			t.Error("wrong bytes")
		}
		waitFor(t, "the next span", func() bool { return m.server.Stats().Inflated == int64(i+2) })
	}
	var demanded int
	for _, r := range m.blobs.asked() {
		if r.pri == ztoc.Demand {
			demanded++
		}
	}
	if s := m.server.Stats(); demanded != 1 || s.AheadUsed != 2 {
		t.Errorf("%d spans asked for on demand, %+v", demanded, s)
	}
}

// Reading everything in order asks for each span once, whatever was fetched ahead.
func TestEverythingIsFetchedOnce(t *testing.T) {
	var members []member
	for i := range 200 {
		members = append(members, file(fmt.Sprintf("f%03d", i), text(uint64(i), 1+i*700)))
	}
	members = append(members, file("large", text(7, 20<<20)))
	img := build(t, testSpan, true, members)
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		for _, f := range members {
			got, err := os.ReadFile(m.path(f.Name))
			if err != nil || !bytes.Equal(got, f.body) {
				t.Errorf("%s: %d bytes of %d, %v", f.Name, len(got), len(f.body), err)
			}
		}
		seen := map[ztoc.Range]int{}
		for _, r := range m.blobs.asked() {
			seen[r.r]++
		}
		for r, n := range seen {
			if n != 1 {
				t.Errorf("%v was fetched %d times", r, n)
			}
		}
		s := m.server.Stats()
		if s.AheadInflated == 0 || s.AheadUsed < s.AheadInflated {
			t.Errorf("of %d spans inflated ahead %d were used", s.AheadInflated, s.AheadUsed)
		}
	})
}

func TestWrongBytes(t *testing.T) {
	img := build(t, testSpan, true, []member{file("big", text(1, 2<<20))})
	want := img.files["big"]
	bad := img.spansOf(t, "big", 1<<20, 1)[0]
	t.Run("once", func(t *testing.T) {
		m := mount(t, img, "", nil)
		m.blobs.set(func() { m.blobs.bad = map[ztoc.Range]int{{Start: bad.Start + 100, End: bad.Start + 101}: 1} })
		got, err := os.ReadFile(m.path("big"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if s := m.server.Stats(); s.Rejected != 1 || s.Failed != 0 {
			t.Errorf("%+v", s)
		}
		m.blobs.set(func() {
			if m.blobs.rejects != 1 {
				t.Errorf("%d rejects", m.blobs.rejects)
			}
		})
	})
	t.Run("always", func(t *testing.T) {
		m := mount(t, img, "", nil)
		m.blobs.set(func() {
			m.blobs.bad = map[ztoc.Range]int{{Start: bad.Start + 100, End: bad.Start + 101}: 1 << 30}
			m.blobs.giveUp = 3
		})
		for range 3 {
			f, err := os.Open(m.path("big"))
			if err != nil {
				t.Fatal(err)
			}
			if n, err := f.ReadAt(make([]byte, 10), 1<<20); !isErrno(err, unix.EIO) {
				t.Errorf("read of wrong bytes: %d, %v", n, err)
			}
			f.Close()
			m.blobs.set(func() { m.blobs.rejects = 0 })
		}
		if n := strings.Count(m.log.String(), "level=ERROR"); n != 1 {
			t.Errorf("%d lines for one cause:\n%s", n, m.log)
		}
		m.blobs.set(func() { m.blobs.bad = nil })
		if got, err := os.ReadFile(m.path("big")); err != nil || !bytes.Equal(got, want) {
			t.Errorf("after the liar is gone: %d bytes, %v", len(got), err)
		}
	})
}

// hold makes all reads of blobs wait until the returned function is called.
func (m *mounted) hold() (release func()) {
	gate := make(chan struct{})
	m.blobs.mu.Lock()
	m.blobs.gate = gate
	m.blobs.mu.Unlock()
	return sync.OnceFunc(func() {
		m.blobs.mu.Lock()
		m.blobs.gate = nil
		m.blobs.mu.Unlock()
		close(gate)
	})
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// While the network is away reads wait, then get right bytes; what is at hand, and metadata, goes on meanwhile.
func TestOutage(t *testing.T) {
	img := build(t, testSpan, true, []member{file("big", text(1, 8<<20)), file("other", text(2, 4<<20))})
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		pread(t, m.path("big"), 4<<20, 4096)
		release := m.hold()
		defer release()
		type result struct {
			b   []byte
			err error
		}
		got := make(chan result, 1)
		go func() {
			b, err := os.ReadFile(m.path("other"))
			got <- result{b, err}
		}()
		waitFor(t, "the reader to wait", func() bool { return m.server.Stats().Waiting > 0 })
		if b := pread(t, m.path("big"), 4<<20+8192, 4096); !bytes.Equal(b, img.files["big"][4<<20+8192:][:4096]) {
			t.Error("wrong bytes from an inflated span")
		}
		if l, err := os.ReadDir(m.dir); err != nil || len(l) != 2 {
			t.Errorf("readdir: %v, %v", l, err)
		}
		select {
		case r := <-got:
			t.Fatalf("%d bytes, %v during the outage", len(r.b), r.err)
		default:
		}
		release()
		if r := <-got; r.err != nil || !bytes.Equal(r.b, img.files["other"]) {
			t.Errorf("after the outage: %d bytes, %v", len(r.b), r.err)
		}
	})
}

// Readers that wait for the network are gone when killed, whether they wait in read, a page fault or a direct read; one
// that only gets a signal goes on.
func TestKilledReaders(t *testing.T) {
	img := build(t, testSpan, true, []member{file("big", text(1, 8<<20))})
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		release := m.hold()
		defer release()
		path := m.path("big")
		if _, err := exec.LookPath("python3"); err != nil {
			t.Fatal("this test needs python3 (package python3-minimal)")
		}
		fault := exec.Command("python3", "-c", "import mmap,sys; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=1); print(m[5<<20])", path)
		for _, cmd := range []*exec.Cmd{
			exec.Command("cat", path),
			exec.Command("dd", "if="+path, "of=/dev/null", "bs=64k", "count=1", "skip=50", "iflag=direct"),
			fault,
		} {
			before := m.server.Stats().Reads
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the reader to wait", func() bool { return m.server.Stats().Reads > before })
			time.Sleep(20 * time.Millisecond)
			began := time.Now()
			cmd.Process.Kill()
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case <-ended:
				t.Logf("%s gone after %v", cmd.Args[0], time.Since(began))
			case <-time.After(time.Second):
				t.Errorf("%v is still there a second after it was killed", cmd.Args)
				release()
				<-ended
			}
		}
		if s := m.server.Stats(); s.Interrupted == 0 {
			t.Errorf("no read was given up: %+v", s)
		}

		direct := exec.Command("dd", "if="+path, "of=/dev/null", "bs=64k", "count=1", "skip=90", "iflag=direct")
		before := m.server.Stats().Reads
		if err := direct.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the reader to wait", func() bool { return m.server.Stats().Reads > before })
		for range 3 {
			time.Sleep(70 * time.Millisecond)
			direct.Process.Signal(syscall.SIGUSR1) // dd tells its progress and goes on
		}
		release()
		if err := direct.Wait(); err != nil {
			t.Errorf("a reader that got a harmless signal: %v", err)
		}
	})
}

// Many readers that wait cost little, and do not hold up others.
func TestManyWaiting(t *testing.T) {
	const readers = 500
	img := build(t, testSpan, true, []member{file("big", text(1, readers*testSpan/4)), file("small", text(2, 64<<10))}, []member{file("top", text(3, 1<<20))})
	m := mount(t, img, "", nil)
	pread(t, m.path("top"), 0, 4096)
	release := m.hold()
	defer release()
	var wg sync.WaitGroup
	size := len(img.files["big"])
	for i := range readers {
		wg.Go(func() {
			off := int64(i) * int64(size/readers)
			f, err := os.Open(m.path("big"))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM)
			b := make([]byte, 4096)
			if _, err := f.ReadAt(b, off); err != nil || !bytes.Equal(b, img.files["big"][off:off+4096]) {
				t.Errorf("at %d: %v", off, err)
			}
		})
	}
	waitFor(t, "all readers to wait", func() bool { return m.server.Stats().Waiting >= readers-4 })
	s := m.server.Stats()
	if s.Memory > 64<<20 {
		t.Errorf("%d MiB for readers that wait", s.Memory>>20)
	}
	m.blobs.set(func() {
		if m.blobs.most > 64+8+8 { // demanded, ahead, and those of them raised to demand
			t.Errorf("%d fetches at once", m.blobs.most)
		}
	})
	if b := pread(t, m.path("top"), 8192, 4096); !bytes.Equal(b, img.files["top"][8192:8192+4096]) {
		t.Error("wrong bytes")
	}
	release()
	wg.Wait()
	if s := m.server.Stats(); s.Waiting != 0 {
		t.Errorf("%d still wait", s.Waiting)
	}
}

// Random reads from many goroutines with far too little memory.
func TestRandomReads(t *testing.T) {
	img := build(t, 128<<10, true, []member{file("a", text(1, 3<<20)), file("b", text(2, 1<<20+7)), file("c", text(3, 100))})
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, func(c *lazyfs.Config) { c.Memory = 300 << 10; c.Loops = 4 })
		var wg sync.WaitGroup
		for g := range 16 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(g), 3))
				buf := make([]byte, 600<<10)
				for range 40 {
					name := []string{"a", "b", "c"}[r.IntN(3)]
					want := img.files[name]
					fd, err := unix.Open(m.path(name), unix.O_RDONLY|unix.O_DIRECT, 0)
					if err != nil {
						t.Error(err)
						return
					}
					off := r.IntN(len(want)) &^ 4095
					n, err := unix.Pread(fd, buf[:4096+r.IntN(len(buf)-4096)&^4095], int64(off))
					if err != nil || !bytes.Equal(buf[:n], want[off:off+n]) || n == 0 {
						t.Errorf("%s at %d: %d bytes, %v", name, off, n, err)
					}
					unix.Close(fd)
				}
			})
		}
		wg.Wait()
	})
}

// Holes read as zeros and are seen by lseek; a file in hundreds of pieces is put together.
func TestSparse(t *testing.T) {
	img := build(t, testSpan, true, []member{file("data", text(4, 2<<20))})
	entries := sparseEntries(t, img)
	img.table = entries
	want := make([]byte, 3<<20)
	src := img.files["data"]
	copy(want[4096:], src[:8192])
	copy(want[2<<20:], src[100:100+5000])
	many := make([]byte, 0, 1<<20)
	for i := range 2000 {
		many = append(many, src[i*512:i*512+100]...)
		many = append(many, make([]byte, 412)...)
	}
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		for name, want := range map[string][]byte{"holes": want, "many": many} {
			if got, err := os.ReadFile(m.path(name)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
			}
		}
		f, err := os.Open(m.path("holes"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, x := range []struct{ whence, off, want int64 }{
			{unix.SEEK_DATA, 0, 4096}, {unix.SEEK_HOLE, 4096, 12288}, {unix.SEEK_DATA, 12288, 2 << 20}, {unix.SEEK_HOLE, 2 << 20, 2<<20 + 5000},
		} {
			if got, err := f.Seek(x.off, int(x.whence)); err != nil || got != x.want {
				t.Errorf("seek %d from %d: %d, %v", x.whence, x.off, got, err)
			}
		}
		if _, err := f.Seek(2<<20+6000, unix.SEEK_DATA); !isErrno(err, unix.ENXIO) {
			t.Errorf("seek behind all data: %v", err)
		}
	})
}

func sparseEntries(t *testing.T, img *image) *tree.Table {
	t.Helper()
	data, err := img.table.Resolve("data", false)
	if err != nil {
		t.Fatal(err)
	}
	at := img.table.Extent(data, 0).Offset
	holes := ztoc.Entry{Name: "holes", Mode: 0o644, Size: 3 << 20, Offset: at, Sparse: []ztoc.Extent{
		{FileOff: 4096, Offset: at, Len: 8192}, {FileOff: 2 << 20, Offset: at + 100, Len: 5000},
	}}
	many := ztoc.Entry{Name: "many", Mode: 0o644, Size: 2000 * 512, Offset: at}
	for i := range int64(2000) {
		many.Sparse = append(many.Sparse, ztoc.Extent{FileOff: i * 512, Offset: at + i*512, Len: 100})
	}
	var b bytes.Buffer
	if _, err := tree.Build(&b, []tree.Layer{{LayerRef: img.table.Layers()[0], Entries: []ztoc.Entry{holes, many}}}, tree.Options{}); err != nil {
		t.Fatal(err)
	}
	tab, err := tree.Open(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func TestXattrs(t *testing.T) {
	img := small(t)
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		buf := make([]byte, 1000)
		if n, err := unix.Lgetxattr(m.path("etc/withattrs"), "user.two", buf); err != nil || string(buf[:n]) != strings.Repeat("2", 300) {
			t.Errorf("%q, %v", buf[:max(n, 0)], err)
		}
		if _, err := unix.Lgetxattr(m.path("etc/withattrs"), "user.two", buf[:10]); err != unix.ERANGE {
			t.Errorf("too little room: %v", err)
		}
		if n, err := unix.Lgetxattr(m.path("etc/withattrs"), "user.two", nil); err != nil || n != 300 {
			t.Errorf("size: %d, %v", n, err)
		}
		if n, err := unix.Llistxattr(m.path("etc/withattrs"), buf); err != nil || string(buf[:n]) != "user.one\x00user.two\x00" {
			t.Errorf("%q, %v", buf[:max(n, 0)], err)
		}
		for _, name := range []string{"etc/hostname", "usr", ""} {
			if n, err := unix.Llistxattr(m.path(name), buf); err != nil || n != 0 {
				t.Errorf("list of %q: %d, %v", name, n, err)
			}
			if _, err := unix.Lgetxattr(m.path(name), "security.capability", buf); err != unix.ENODATA {
				t.Errorf("missing attribute of %q: %v", name, err)
			}
		}
	})
}

// A program runs from the mount: exec, the loader's mmap, page faults.
func TestProgramRuns(t *testing.T) {
	exe, err := exec.LookPath("sha256sum")
	if err != nil {
		t.Fatal("this test needs sha256sum (package coreutils)")
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	prog := file("bin/prog", b)
	prog.Mode = 0o755
	img := build(t, 64<<10, true, []member{prog})
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		// By way of a shell: the runtime stands still between fork and exec, and we are the one to answer exec's reads.
		got, err := exec.Command("sh", "-c", `exec "$0" "$0"`, m.path("bin/prog")).Output()
		if want, e := exec.Command(exe, exe).Output(); err != nil || e != nil || string(got[:64]) != string(want[:64]) {
			t.Errorf("%q, %v; plain %q, %v", got, err, want, e)
		}
	})
}

// Mounting and unmounting leaves no memory behind.
func TestManyMounts(t *testing.T) {
	img := build(t, testSpan, true, []member{file("a", text(1, 4<<20))})
	once := func() {
		m := mount(t, img, "", nil)
		pread(t, m.path("a"), 2<<20, 4096)
		m.unmount(t)
	}
	resident := func() int {
		var pages, total int
		b, _ := os.ReadFile("/proc/self/statm")
		fmt.Sscan(string(b), &total, &pages)
		return pages * os.Getpagesize()
	}
	for range 20 {
		once()
	}
	start := resident()
	for range 180 {
		once()
	}
	if now := resident(); now > start+start/5+(4<<20) {
		t.Errorf("%d MiB after 20 mounts, %d MiB after 200", start>>20, now>>20)
	}
}
