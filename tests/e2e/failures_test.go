package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// ranged selects requests for parts of one layer.
func ranged(digest string) registry.Match {
	m := blobs(digest)
	m.Where = func(r *registry.Record) bool { return r.Range != "" }
	return m
}

// readBig compares data/n of an image of big's kind with what it must be.
func readBig(dir string, seed byte, n int) error {
	b, err := os.ReadFile(filepath.Join(dir, "data", strconv.Itoa(n)))
	if err == nil && !bytes.Equal(b, bigBody(seed, n)) {
		err = fmt.Errorf("data/%d has wrong bytes", n)
	}
	return err
}

// TestFlippedOnce (F8): a byte that is wrong once is fetched again, and the reader sees the right one.
func TestFlippedOnce(t *testing.T) {
	p, h := front(t), newHost(t, 0)
	ref := through(p, big(t, 1))
	dir := h.mount(ref)
	p.Inject(ranged(bigLayer(1).Digest), 1, registry.FlipAt(100_000))
	for n := range bigFiles {
		if err := readBig(dir, 1, n); err != nil {
			t.Error(err)
		}
	}
	flips := 0
	for _, r := range p.Log(blobs("")) {
		if r.Fault != "" {
			flips++
		}
	}
	if flips != 1 {
		t.Errorf("%d requests were damaged, want 1", flips)
	}
	if n, size := p.Bytes(blobs(bigLayer(1).Digest)), bigLayer(1).Size; n > size+8<<20 {
		t.Errorf("%d bytes were fetched of a layer of %d: too much again", n, size)
	}
}

// TestFlippedAlways (F8): readers get EIO, nothing wrong is kept, and when the origin is right again so are they.
func TestFlippedAlways(t *testing.T) {
	p, h := front(t), newHost(t, 0)
	ref := through(p, big(t, 1))
	dir := h.mount(ref)
	p.Inject(ranged(bigLayer(1).Digest), 0, registry.FlipAt(100_000))
	bad := 0
	for n := range bigFiles {
		b, err := os.ReadFile(fmt.Sprintf("%s/data/%d", dir, n))
		if errors.Is(err, unix.EIO) {
			bad++
		} else if err != nil || !bytes.Equal(b, bigBody(1, n)) {
			t.Errorf("data/%d: neither right nor EIO: %d bytes, %v", n, len(b), err)
		}
	}
	if bad == 0 {
		t.Error("no reader got an error")
	}
	log, err := os.ReadFile(filepath.Join(h.store, "mount.log"))
	if err != nil || !strings.Contains(string(log), bigLayer(1).Digest[7:19]) {
		t.Errorf("the log of mounts does not name the layer: %v %s", err, log)
	}
	p.Clear()
	h.must("umount", dir)
	p.ResetLog()
	dir = h.mount(ref)
	for n := range bigFiles {
		if err := readBig(dir, 1, n); err != nil {
			t.Errorf("after the origin was repaired: %v", err)
		}
	}

	// On the very first pull, where a whole layer is hashed: an integrity error.
	q := front(t)
	q.Inject(blobs(bigLayer(1).Digest), 0, registry.FlipAt(100_000))
	fresh := newHost(t, 0)
	r := fresh.muster("mount", "--index-use=false", through(q, big(t, 1)), fresh.mountPoint())
	if r.code != 6 {
		t.Errorf("first pull: exit code %d: %s", r.code, r.stderr)
	}
	plainMessage(t, r.stderr, bigLayer(1).Digest[7:19], q.Addr)
	q.Clear()
	dir = fresh.mount(through(q, big(t, 1)), "--index-use=false")
	for n := range bigFiles {
		if err := readBig(dir, 1, n); err != nil {
			t.Errorf("the next pull: %v", err)
		}
	}
}

// TestOutage (F9): while the network is away reads wait, and then return the right bytes; --origin-patience bounds
// how long.
func TestOutage(t *testing.T) {
	p, h := front(t), newHost(t, 0)
	dir := h.mount(through(p, big(t, 1)), "--origin-patience", "5m")
	p.Down() //nolint:errcheck // it is down
	done := make(chan error, bigFiles)
	for n := range bigFiles {
		go func() { done <- readBig(dir, 1, n) }()
	}
	select {
	case err := <-done:
		t.Fatalf("a read ended without an origin: %v", err)
	case <-time.After(3 * time.Second):
	}
	if err := p.Up(); err != nil {
		t.Fatal(err)
	}
	for range bigFiles {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("reads do not go on when the origin is back")
		}
	}

	short := newHost(t, 0)
	dir = short.mount(through(p, big(t, 1)), "--origin-patience", "1s")
	p.Down() //nolint:errcheck // it is down
	began := time.Now()
	if b, err := os.ReadFile(dir + "/data/0"); !errors.Is(err, unix.EIO) {
		t.Errorf("without an origin: %d bytes, %v", len(b), err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("a patience of a second took %v", took)
	}
}

// TestRemovalStopsTraffic (F10): what is unmounted, or whose run is ended, is not fetched any more.
func TestRemovalStopsTraffic(t *testing.T) {
	quiet := func(t *testing.T, p *registry.Proxy, h *host, after string) {
		t.Helper()
		time.Sleep(time.Second)
		before := p.Bytes(blobs(""))
		time.Sleep(500 * time.Millisecond)
		if more := p.Bytes(blobs("")) - before; more > 0 {
			t.Errorf("%d bytes came more than a second after %s", more, after)
		}
		if n := p.Conns(); n > 0 {
			t.Errorf("%d connections are open after %s", n, after)
		}
	}
	t.Run("umount", func(t *testing.T) {
		p, h := front(t), newHost(t, 0)
		dir := h.mount(through(p, big(t, 1)))
		p.SetRate(300_000)
		f, err := os.Open(dir + "/data/0")
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan struct{})
		go func() {
			io.Copy(io.Discard, f) //nolint:errcheck // any end is the end
			close(read)
		}()
		eventually(t, "bytes come", func() bool { return p.Bytes(blobs(bigLayer(1).Digest)) > 50_000 })
		cmd := exec.Command("cat", dir+"/data/1")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		cmd.Process.Kill() //nolint:errcheck // waited for
		cmd.Wait()         //nolint:errcheck // it was killed
		p.SetRate(0)
		<-read // a read under way keeps the mount busy
		f.Close()
		p.SetRate(300_000)
		h.must("umount", dir)
		quiet(t, p, h, "umount")
	})
	t.Run("run", func(t *testing.T) {
		p, h := front(t), newHost(t, 0)
		ref := through(p, indexed(t, "debian-python"))
		p.Inject(blobs(""), 0, registry.Trickle(30_000))
		r := h.start("run", ref, "python3", "-c", numpy)
		eventually(t, "bytes come", func() bool { return p.Bytes(ranged("")) > 10_000 })
		r.Process.Kill() //nolint:errcheck // waited for
		r.end(t)
		quiet(t, p, h, "kill")
		h.clean("kill")
	})
	t.Run("cache rm", func(t *testing.T) {
		p, h := front(t), newHost(t, 0)
		ref := through(p, big(t, 1))
		dir := h.mount(ref)
		if err := readBig(dir, 1, 0); err != nil {
			t.Fatal(err)
		}
		h.must("umount", dir)
		h.must("cache", "rm", ref)
		quiet(t, p, h, "cache rm")
		var l struct {
			Images []any
			Usage  struct{ Used int64 }
		}
		unmarshal(t, h.must("cache", "ls", "--json").stdout, &l)
		if len(l.Images) > 0 || l.Usage.Used > 1<<20 {
			t.Errorf("after cache rm: %+v", l)
		}

		// Beneath a mount: who reads is served, and what that stored belongs to nobody afterwards.
		dir = h.mount(ref)
		if err := readBig(dir, 1, 0); err != nil {
			t.Fatal(err)
		}
		h.must("cache", "rm", ref)
		for n := range bigFiles {
			if err := readBig(dir, 1, n); err != nil {
				t.Error(err)
			}
		}
		h.must("umount", dir)
		h.must("cache", "gc", "--grace", "0s")
		if u := used(t, h.store); u > 1<<20 {
			t.Errorf("%d bytes of a removed image are left", u)
		}
	})
}

// used is what the files of a directory take on disk.
func used(t testing.TB, dir string) (n int64) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error { //nolint:errcheck // files come and go
		var st unix.Stat_t
		if err == nil && unix.Lstat(path, &st) == nil {
			n += st.Blocks * 512
		}
		return nil
	})
	return n
}

// TestQuota (F11): the store stays within its quota while images that do not fit together are read, and what was
// evicted is fetched again when it is wanted.
func TestQuota(t *testing.T) {
	h := newHost(t, 0)
	const quota, slack = 32 << 20, 5 << 20 // a span of 4 MiB, and tables
	h.env = []string{fmt.Sprintf("MUSTER_STORE_QUOTA=%d", quota)}
	for _, seed := range []byte{1, 2, 3, 1} {
		dir := h.mount(big(t, seed))
		for n := range bigFiles {
			if err := readBig(dir, seed, n); err != nil {
				t.Error(err)
			}
			if u := used(t, h.store); u > quota+slack {
				t.Errorf("the store takes %d bytes with a quota of %d", u, quota)
			}
		}
		h.must("umount", dir)
	}
	if u := used(t, h.store); u < 16<<20 {
		t.Errorf("the store keeps only %d bytes", u)
	}
	// An image larger than the quota runs all the same.
	h.env = []string{fmt.Sprintf("MUSTER_STORE_QUOTA=%d", 8<<20)}
	dir := h.mount(big(t, 2))
	for n := range bigFiles {
		if err := readBig(dir, 2, n); err != nil {
			t.Error(err)
		}
	}
}

// disk is a file system of its own, of so many MiB.
func disk(t testing.TB, size int) string {
	t.Helper()
	file, dir := filepath.Join(tempDir(t, 0), "disk"), tempDir(t, 0)
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", size), file},
		{"mkfs.ext4", "-q", "-F", "-m", "0", file},
		{"mount", "-o", "loop", file, dir},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// TestFullDisk (F12): with the disk of the store full, reads are served, and one warning names the path.
func TestFullDisk(t *testing.T) {
	small := disk(t, 12)
	h := newHost(t, 0)
	h.store = filepath.Join(small, "store")
	dir := h.newDir()
	for i := range 2 {
		cmd := h.command("mount", "--log-format", "text", big(t, 1), dir)
		if r := h.finish(cmd); r.code != 0 {
			t.Fatalf("mount: exit code %d: %s", r.code, r.stderr)
		}
		for n := range bigFiles {
			if err := readBig(dir, 1, n); err != nil {
				t.Error(err)
			}
		}
		h.must("umount", dir)
		log, err := os.ReadFile(filepath.Join(h.store, "mount.log"))
		if n := strings.Count(string(log), "WARN"); i == 0 && (err != nil || n != 1 || !strings.Contains(string(log), h.store)) {
			t.Errorf("%v, %d warnings, want one that names %s: %s", err, n, h.store, log)
		}
	}
	ref := indexed(t, "debian-python")
	r := h.muster("run", "--log-format", "text", ref, "python3", "-c", numpy)
	if r.code != 0 || r.stdout != numpySay || strings.Count(r.stderr, "WARN") != 1 || !strings.Contains(r.stderr, h.store) {
		t.Errorf("run: exit code %d, %q, %s", r.code, r.stdout, r.stderr)
	}
	// A first pull is larger than the disk too.
	r = h.muster("run", "--log-format", "text", "--index-use=false", image(t, "mixed"))
	if r.code != 0 && r.code != 125 {
		t.Errorf("first pull: exit code %d, %s", r.code, r.stderr)
	}
	plainMessage(t, r.stderr)
	h.clean("a full disk")
}

// TestManyMounts (F13): two hundred images mounted at once and unmounted again leave nothing, and take little.
func TestManyMounts(t *testing.T) {
	h := newHost(t, 0)
	const mounts = 200
	dir := h.newDir()
	base := images.Layer(images.Dir("."), images.Dir("bin"), images.File("bin/say", string(say())).With(0o755, 0, 0))
	each := func(do func(i int, at string) error) {
		t.Helper()
		var wg sync.WaitGroup
		next := new(atomic.Int64)
		for range 4 {
			wg.Go(func() {
				for {
					i := int(next.Add(1)) - 1
					if i >= mounts {
						return
					}
					if err := do(i, filepath.Join(dir, strconv.Itoa(i))); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
	layouts := h.newDir()
	each(func(i int, at string) error {
		return images.WriteImage(filepath.Join(layouts, strconv.Itoa(i)), images.Image{Layers: []images.Blob{base, images.Layer(images.File("number", strconv.Itoa(i)))}})
	})
	each(func(i int, at string) error {
		out, err := h.command("mount", "oci:"+filepath.Join(layouts, strconv.Itoa(i)), at).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("mount %d: %w: %s", i, err, out)
		}
		return err
	})
	var memory int64
	pids := processesWith(h.store)
	for i := range mounts {
		if b, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(i), "number")); err != nil || string(b) != strconv.Itoa(i) {
			t.Errorf("mount %d has %q, %v", i, b, err)
		}
	}
	for _, p := range pids {
		memory += privateMemory(p)
	}
	if len(pids) > 2*mounts {
		t.Errorf("%d processes for %d mounts", len(pids), mounts)
	}
	if per := memory / mounts; per > 40<<20 {
		t.Errorf("%d bytes of private memory for each mount", per)
	}
	t.Logf("%d processes, %d MB private for each mount", len(pids), memory/mounts>>20)
	each(func(i int, at string) error {
		out, err := h.command("umount", at).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("umount %d: %w: %s", i, err, out)
		}
		return err
	})
	h.clean("two hundred mounts")
}

// privateMemory is what only this process has, in bytes.
func privateMemory(pid int) (n int64) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "Private_") {
			k, _ := strconv.ParseInt(f[1], 10, 64)
			n += k << 10
		}
	}
	return n
}

// TestSlowRegistry (F14): five hundred readers of a slow registry share few connections, and each range has one
// request.
func TestSlowRegistry(t *testing.T) {
	p, h := front(t), newHost(t, 0)
	const limit = 6
	dir := h.mount(through(p, big(t, 2)), "--origin-connections", strconv.Itoa(limit))
	p.ResetLog()
	p.SetRate(50_000)
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() {
			f, err := os.Open(fmt.Sprintf("%s/data/%d", dir, i%bigFiles))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			at := int64(i/bigFiles*16) << 10
			b := make([]byte, 4096)
			if _, err := f.ReadAt(b, at); err != nil || !bytes.Equal(b, bigBodies()[i%bigFiles][at:at+4096]) {
				t.Errorf("reader %d: wrong bytes or %v", i, err)
			}
		})
	}
	time.Sleep(3 * time.Second)
	if n := p.PeakConns(); n > limit {
		t.Errorf("%d connections, the limit is %d", n, limit)
	}
	for _, pid := range processesWith(h.store) {
		if m := privateMemory(pid); m > 120<<20 {
			t.Errorf("%s has %d bytes with readers waiting", commandLine(pid), m)
		}
	}
	p.SetRate(0)
	wg.Wait()
	if n := p.PeakConns(); n > limit {
		t.Errorf("%d connections, the limit is %d", n, limit)
	}
	once(t, p, bigLayer(2))
}

var bigBodies = sync.OnceValue(func() (all [bigFiles][]byte) {
	for n := range all {
		all[n] = bigBody(2, n)
	}
	return all
})

// once fails when a byte of a layer came twice.
func once(t testing.TB, p *registry.Proxy, layer images.Descriptor) {
	t.Helper()
	var ends []int64 // of ranges, by start
	seen := map[int64]bool{}
	for _, r := range p.Log(blobs(layer.Digest)) {
		var a, b int64
		if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &a, &b); err != nil {
			a, b = 0, layer.Size-1
		}
		if r.Bytes < b-a+1 {
			b = a + r.Bytes - 1 // cut off
		}
		for at := a; at <= b; at += 4096 {
			if seen[at/4096] {
				t.Errorf("byte %d was sent twice, now in %s", at, r.Range)
				break
			}
			seen[at/4096] = true
		}
		ends = append(ends, b)
	}
	if len(ends) == 0 {
		t.Error("nothing was asked for")
	}
}

// TestXattrs (F19, F20): listing attributes is supported where there are none, a capability comes through as it was,
// and asking costs the origin nothing.
func TestXattrs(t *testing.T) {
	p, h := front(t), newHost(t, 0)
	dir := h.mount(through(p, image(t, "escape")))
	p.ResetLog()
	b := make([]byte, 256)
	for range 1000 {
		if n, err := unix.Llistxattr(dir+"/bin/say", b); err != nil || n != 0 {
			t.Fatalf("a file without attributes lists %q, %v", b[:max(n, 0)], err)
		}
		if _, err := unix.Lgetxattr(dir+"/bin/say", "trusted.overlay.opaque", b); !errors.Is(err, unix.ENODATA) {
			t.Fatalf("an attribute that is not there: %v", err)
		}
		if n, err := unix.Lgetxattr(dir+"/bin/cap-setuid", "security.capability", b); err != nil || string(b[:n]) != images.CapSetuid {
			t.Fatalf("security.capability is %q, %v", b[:max(n, 0)], err)
		}
	}
	if n := p.Count(registry.Match{}); n > 0 {
		t.Errorf("%d requests to the origin", n)
	}
}

// TestOverlayOnTop (F22): the kernel's overlayfs takes a mount as its lower directory: files are copied up with their
// attributes, whiteouts hide them, and the whole tree reads the same.
func TestOverlayOnTop(t *testing.T) {
	h := newHost(t, 0)
	lower, scratch, at := h.mount(image(t, "escape")), h.newDir(), h.newDir()
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(scratch, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, scratch, scratch)
	if err := unix.Mount("overlay", at, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(at, 0) //nolint:errcheck // the host's clean-up tells
	report(t, diffNames(h.walk(at), h.walk(lower)))
	if err := os.WriteFile(at+"/etc/passwd", []byte("changed"), 0o644); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(at+"/bin/cap-setuid", 0o700); err != nil {
		t.Error(err)
	}
	b := make([]byte, 64)
	if n, err := unix.Lgetxattr(at+"/bin/cap-setuid", "security.capability", b); err != nil || string(b[:n]) != images.CapSetuid {
		t.Errorf("after copying up: %q, %v", b[:max(n, 0)], err)
	}
	if err := os.Remove(at + "/bin/say"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(at + "/bin/say"); !errors.Is(err, os.ErrNotExist) {
		t.Error("a removed file is there")
	}
	if b, _ := os.ReadFile(lower + "/etc/passwd"); string(b) == "changed" {
		t.Error("the image changed")
	}
}

// TestReadyAndGone (F31): mount returns when the tree answers, umount when nothing is left; a process that is inside
// is served a little longer and leaves nothing behind either.
func TestReadyAndGone(t *testing.T) {
	for name, user := range map[string]uint32{"root": 0, "user": somebody} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, user)
			ref := image(t, "escape")
			for range 5 {
				dir := h.newDir()
				h.must("mount", ref, dir)
				if out, err := h.sh("stat " + dir + "/bin/say"); err != nil {
					t.Errorf("right after mount: %s", out)
				}
				h.must("umount", dir)
				if isMounted(dir) || len(processesWith(h.store)) > 0 {
					t.Error("something is there right after umount")
				}
			}
			dir := h.newDir()
			h.must("mount", ref, dir)
			inside := h.as(exec.Command("sh", "-c", "exec 3< bin/say; while [ ! -e "+h.dir+"/gone ]; do sleep 0.02; done; cat <&3 | wc -c; exec sleep 60"))
			inside.Dir = dir
			inside.SysProcAttr = nil
			if user != 0 {
				inside.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
				inside.Dir = "/"
				inside.Args[2] = "cd " + dir + " && " + inside.Args[2]
			}
			var out locked
			inside.Stdout, inside.Stderr = &out, &out
			if err := inside.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				inside.Process.Kill() //nolint:errcheck // it has ended
				inside.Wait()         //nolint:errcheck // it was killed
			}()
			eventually(t, "somebody is inside", func() bool {
				to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", inside.Process.Pid))
				return strings.HasSuffix(to, "/bin/say")
			})
			r := h.must("umount", dir)
			if isMounted(dir) {
				t.Error("it is still mounted")
			}
			plainMessage(t, r.stderr, dir, "in use")
			if err := os.WriteFile(h.dir+"/gone", nil, 0o644); err != nil {
				t.Fatal(err)
			}
			eventually(t, "who is inside reads on", func() bool { return strings.Contains(out.String(), strconv.Itoa(len(say()))) })
			// The linger of ten seconds, and no more, even though the process stays.
			var servers []string
			for wait := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				servers = nil
				for _, p := range processesWith(h.store) {
					if line := commandLine(p); strings.HasPrefix(line, "muster") {
						servers = append(servers, line)
					}
				}
				if len(servers) == 0 || time.Now().After(wait) {
					break
				}
			}
			if len(servers) > 0 {
				t.Errorf("left behind while somebody is inside: %q", servers)
			}
			if inside.Process.Signal(syscall.Signal(0)) != nil {
				t.Error("who was inside is gone too")
			}
		})
	}
}
