package mountd_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// The test's own executable is what muster is outside: the processes of a mount are this program again.
func TestMain(m *testing.M) {
	mountd.Main(builder, func(error) int { return 7 })
	for name, run := range errands {
		if arg := os.Getenv(name); arg != "" {
			if err := run(arg); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	// A temporary directory of their own: tests of other packages mount too, at the same time.
	dir, err := os.MkdirTemp("", "mountd-test-")
	if err == nil {
		err = os.Setenv("TMPDIR", dir)
	}
	if err == nil {
		err = os.Chmod(dir, 0o755) // some tests are other users
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	time.Sleep(100 * time.Millisecond)
	if left := leftovers(); left != "" {
		fmt.Fprintf(os.Stderr, "left behind:\n%s\n", left)
		code = 1
	} else if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// errands are what this program does when it is started with one of these variables.
var errands = map[string]func(arg string) error{
	asUser: runErrand, asMapper: hashMapped, asKeeper: keepUntilTold, asUpgrader: upgradeTo,
}

// order is the Request of these tests: a directory with an image in it, and how to misbehave.
type order struct {
	Dir   string
	Fail  string
	Hang  bool
	Delay time.Duration // of each read of a blob

	Crash bool // of servers that replace another
	Soon  bool // to find that readers are quiet

	Private bool // for the one who mounts only, as users may

	Copies string // directory for backing files; empty: none
}

func builder(ctx context.Context, r mountd.Request) (*mountd.Source, error) {
	var o order
	if err := json.Unmarshal(r.Request, &o); err != nil {
		return nil, err
	}
	r.Report([]byte("building"))
	if o.Fail != "" {
		return nil, errors.New(o.Fail)
	}
	if exe, err := os.Readlink("/proc/self/exe"); err != nil || r.State != nil && strings.Contains(filepath.Base(exe), stranger) {
		return nil, errors.New("cannot read version 1 of the table")
	}
	if r.State != nil && o.Crash {
		os.Exit(3)
	}
	if o.Hang {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	f := r.Table
	if f == nil {
		var err error
		if f, err = os.Open(filepath.Join(o.Dir, "table")); err != nil {
			return nil, err
		}
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	table, err := tree.Open(b)
	if err != nil {
		return nil, err
	}
	packed, err := os.ReadFile(filepath.Join(o.Dir, "ztoc"))
	if err != nil {
		return nil, err
	}
	z, err := ztoc.Unpack(packed)
	if err != nil {
		return nil, err
	}
	blob, err := os.Open(filepath.Join(o.Dir, "blob"))
	if err != nil {
		return nil, err
	}
	config := lazyfs.Config{
		Table: table, Layers: []lazyfs.Layer{{Ref: table.Layers()[0].Blob, Ztoc: z}}, Blobs: slowFile{blob, o.Delay},
	}
	if o.Copies != "" {
		config.Backing, config.Blobs = copies{o.Copies}, localFile{slowFile{blob, o.Delay}}
	}
	if o.Soon {
		config.Quiet, config.Idle = 100*time.Millisecond, 200*time.Millisecond
	}
	return &mountd.Source{
		Config: config,
		Mount:  lazyfs.MountOptions{Name: "Test", AllowOther: !o.Private},
		Table:  f,
		State:  []byte("state"),
	}, nil
}

type slowFile struct {
	f     *os.File
	delay time.Duration
}

func (b slowFile) ReadAt(ctx context.Context, _ ztoc.BlobRef, p []byte, off int64, _ ztoc.Priority) error {
	select {
	case <-time.After(b.delay):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	_, err := b.f.ReadAt(p, off)
	return err
}

func (slowFile) Reject(ztoc.BlobRef, ztoc.Range, error) error { return errors.New("not again") }

// picture makes an image with one file, "data", of size bytes, a directory, and as many empty files as asked for. It
// returns where it is and the file's hash. What is in more are files of this host that it has too.
func picture(t *testing.T, size, empty int, more ...string) (dir string, sum [32]byte) {
	t.Helper()
	dir = t.TempDir()
	r := rand.New(rand.NewPCG(1, uint64(size)))
	data := make([]byte, size)
	for i := range data {
		data[i] = "muster through the mount"[r.IntN(24)]
	}
	var buf bytes.Buffer
	zw, _ := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	tw := tar.NewWriter(zw)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "inside", Mode: 0o755},
		{Name: "data", Mode: 0o644, Size: int64(size)},
	} {
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	tw.Write(data)
	for _, name := range more { // files of this host
		b, err := os.ReadFile(name)
		if err == nil {
			err = tw.WriteHeader(&tar.Header{Name: filepath.Base(name), Mode: 0o755, Size: int64(len(b))})
		}
		if err != nil {
			t.Fatal(err)
		}
		tw.Write(b)
	}
	for i := range empty {
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("many/%03d/%05d", i/200, i), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
	}
	tw.Close()
	zw.Close()
	z, _, err := ztoc.Build(bytes.NewReader(buf.Bytes()), ztoc.BuildOptions{SpanSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	entries, err := z.Entries()
	if err != nil {
		t.Fatal(err)
	}
	packed, err := ztoc.Pack(z)
	if err != nil {
		t.Fatal(err)
	}
	ref := ztoc.BlobRef{Digest: ztoc.DigestOf(buf.Bytes()), Size: int64(buf.Len())}
	var table bytes.Buffer
	if _, err := tree.Build(&table, []tree.Layer{{LayerRef: tree.LayerRef{Blob: ref}, Entries: entries}}, tree.Options{}); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"table": table.Bytes(), "ztoc": packed, "blob": buf.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, sha256.Sum256(data)
}

func start(t *testing.T, o order, with func(*mountd.Options)) (*mountd.Mount, error) {
	t.Helper()
	req, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if b, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("log of the mount:\n%s", b)
		}
	})
	opts := mountd.Options{Dir: t.TempDir(), Request: req, Log: log}
	if with != nil {
		with(&opts)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	m, err := mountd.Start(ctx, opts)
	if err == nil {
		t.Cleanup(func() {
			if _, err := lazyfs.Mounted(m.Dir); err == nil {
				// Longer than Linger: a namespace that somebody made meanwhile has a copy of the mount.
				ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
				defer cancel()
				if busy, err := m.Unmount(ctx); busy || err != nil {
					t.Errorf("unmount: busy %v, %v", busy, err)
				}
			}
			gone(t, m.Dir, soon)
		})
	}
	return m, err
}

func hash(t *testing.T, path string) [32]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return [32]byte{}
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Error(err)
	}
	return [32]byte(h.Sum(nil))
}

// processes are the ids of the processes of the mount on dir with a role.
func processes(role, dir string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range all {
		b, _ := os.ReadFile(name)
		if string(b) == "muster-mountd\x00"+role+"\x00"+dir+"\x00" {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

func leftovers() string {
	var l []string
	b, _ := os.ReadFile("/proc/mounts")
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, `muster\043Test `+os.TempDir()) {
			l = append(l, line)
		}
	}
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range all {
		if b, _ := os.ReadFile(name); bytes.HasPrefix(b, []byte("muster-mountd\x00")) && bytes.Contains(b, []byte(os.TempDir()+"/Test")) {
			l = append(l, fmt.Sprintf("%s %q", name, b))
		}
	}
	return strings.Join(l, "\n")
}

// soon is how long the end of something that ends at once may take on a machine with much else to do.
const soon = 15 * time.Second

// gone waits until neither mount nor process of dir is there.
func gone(t *testing.T, dir string, within time.Duration) {
	t.Helper()
	var why string
	for end := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		why = ""
		if _, err := lazyfs.Mounted(dir); !errors.Is(err, fs.ErrNotExist) {
			why = fmt.Sprintf("mounted: %v", err)
		}
		if p := append(processes("parent", dir), processes("server", dir)...); len(p) > 0 {
			why += fmt.Sprintf(" processes %v", p)
		}
		if why == "" {
			return
		}
		if time.Now().After(end) {
			break
		}
	}
	t.Errorf("left after %v: %s", within, why)
}

func TestMountAndUnmount(t *testing.T) {
	for _, compat := range []string{"", string(lazyfs.Compat514)} {
		t.Run("compat="+compat, func(t *testing.T) {
			t.Setenv(lazyfs.CompatVariable, compat)
			dir, sum := picture(t, 5<<20, 0)
			var events []string
			m, err := start(t, order{Dir: dir}, func(o *mountd.Options) { o.OnEvent = func(b []byte) { events = append(events, string(b)) } })
			if err != nil {
				t.Fatal(err)
			}
			if got := hash(t, filepath.Join(m.Dir, "data")); got != sum {
				t.Error("wrong content")
			}
			if len(events) != 1 || events[0] != "building" {
				t.Errorf("events: %q", events)
			}
			if busy, err := mountd.Unmount(t.Context(), m.Dir); busy || err != nil {
				t.Errorf("unmount: busy %v, %v", busy, err)
			}
			gone(t, m.Dir, 0)
			if _, err := mountd.Unmount(t.Context(), m.Dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("unmounting nothing: %v", err)
			}
		})
	}
}

func TestBuilderFails(t *testing.T) {
	m, err := start(t, order{Fail: "no such image"}, nil)
	var e *mountd.Error
	if !errors.As(err, &e) || e.Code != 7 || e.Text != "no such image" {
		t.Errorf("%v, %v", m, err)
	}
}

func TestCommandGivesUp(t *testing.T) {
	dir := t.TempDir()
	req, _ := json.Marshal(order{Hang: true})
	ctx, cancel := context.WithCancel(t.Context())
	began := make(chan struct{})
	go func() { <-began; cancel() }()
	_, err := mountd.Start(ctx, mountd.Options{Dir: dir, Request: req, OnEvent: func([]byte) { close(began) }})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	gone(t, dir, soon)
}

func TestParentIsTerminated(t *testing.T) {
	dir, _ := picture(t, 1<<20, 0)
	m, err := start(t, order{Dir: dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(m.Parent, syscall.SIGTERM)
	gone(t, m.Dir, soon)
}

func TestUnmountWithAProcessInside(t *testing.T) {
	dir, _ := picture(t, 1<<20, 0)
	m, err := start(t, order{Dir: dir}, func(o *mountd.Options) { o.Linger = 300 * time.Millisecond })
	if err != nil {
		t.Fatal(err)
	}
	inside := exec.Command("sleep", "60")
	inside.Dir = filepath.Join(m.Dir, "inside")
	if err := inside.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { inside.Process.Kill(); inside.Wait() }()
	if busy, err := m.Unmount(t.Context()); !busy || err != nil {
		t.Errorf("unmount: busy %v, %v", busy, err)
	}
	if _, err := lazyfs.Mounted(m.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still mounted: %v", err)
	}
	gone(t, m.Dir, soon)
}

// private is the memory that the processes of a mount have for themselves, bytes.
func private(t *testing.T, dir string) (n int) {
	t.Helper()
	for _, pid := range append(processes("parent", dir), processes("server", dir)...) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"RssAnon:", "RssShmem:"} {
			_, after, _ := strings.Cut(string(b), key)
			var kb int
			fmt.Sscan(after, &kb)
			n += kb << 10
		}
	}
	return n
}

func TestMemory(t *testing.T) {
	const size = 96 << 20
	dir, sum := picture(t, size, 50_000)
	m, err := start(t, order{Dir: dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("find", m.Dir, "-printf", "%s").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if n := private(t, m.Dir); n > 30<<20 {
		t.Errorf("%d MiB with 50,000 inodes", n>>20)
	}
	if hash(t, filepath.Join(m.Dir, "data")) != sum {
		t.Error("wrong content")
	}
	if n := private(t, m.Dir); n > 120<<20 {
		t.Errorf("%d MiB after reading everything", n>>20)
	} else {
		t.Logf("%d MiB after reading everything", n>>20)
	}
	if _, err := m.Unmount(t.Context()); err != nil {
		t.Fatal(err)
	}

	// 500 readers whose bytes do not come, in a mount that has read nothing.
	if m, err = start(t, order{Dir: dir, Delay: time.Hour}, nil); err != nil {
		t.Fatal(err)
	}
	script := `my @p; for my $i (0..499) { my $p = fork; if (!$p) { open my $f, "<", $ARGV[0]; sysseek $f, $i * 200000, 0; sysread $f, my $b, 4096; exit } push @p, $p }
print "started\n"; <STDIN>; kill 9, @p; wait for @p`
	readers := exec.Command("perl", "-e", "$| = 1; "+script, filepath.Join(m.Dir, "data"))
	stdin, err := readers.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := readers.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := readers.Start(); err != nil {
		t.Fatal("this test needs perl (package perl-base): ", err)
	}
	stdout.Read(make([]byte, 10))
	time.Sleep(500 * time.Millisecond)
	if n := private(t, m.Dir); n > 120<<20 {
		t.Errorf("%d MiB with 500 readers waiting", n>>20)
	} else {
		t.Logf("%d MiB with 500 readers waiting", n>>20)
	}
	began := time.Now()
	stdin.Close()
	if err := readers.Wait(); err != nil || time.Since(began) > soon {
		t.Errorf("readers ended after %v: %v", time.Since(began), err)
	}
	gone := time.Now()
	if busy, err := m.Unmount(t.Context()); err != nil || busy || time.Since(gone) > soon {
		t.Errorf("unmount after %v: busy %v, %v", time.Since(gone), busy, err)
	}
}
