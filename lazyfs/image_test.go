package lazyfs_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// member is one file of a test layer.
type member struct {
	tar.Header
	body []byte
}

func file(name string, body []byte) member {
	return member{tar.Header{Name: name, Mode: 0o644, Size: int64(len(body)), ModTime: time.Unix(1e9, 5)}, body}
}

// text is n bytes that compress about as programs do, the same for the same seed.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := make([][]byte, 512)
	for i := range words {
		words[i] = make([]byte, 3+r.IntN(12))
		for j := range words[i] {
			words[i][j] = byte(r.Uint32())
		}
	}
	b := make([]byte, 0, n+16)
	for len(b) < n {
		b = append(b, words[r.IntN(512)]...)
	}
	return b[:n]
}

// image is a built image: its layers, their ztocs, its table.
type image struct {
	table  *tree.Table
	layers []lazyfs.Layer
	blobs  map[ztoc.Digest][]byte
	files  map[string][]byte // content of regular files of the top, by name
}

const testSpan = 256 << 10

// build makes an image; span is the span size of its ztocs.
func build(t testing.TB, span int64, compress bool, layers ...[]member) *image {
	t.Helper()
	img := &image{blobs: map[ztoc.Digest][]byte{}, files: map[string][]byte{}}
	var tl []tree.Layer
	for _, members := range layers {
		var blob bytes.Buffer
		tw := tar.NewWriter(&blob)
		var zw *gzip.Writer
		if compress {
			zw, _ = gzip.NewWriterLevel(&blob, gzip.BestSpeed)
			tw = tar.NewWriter(zw)
		}
		for _, m := range members {
			h := m.Header
			h.Format = tar.FormatPAX
			if err := tw.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if _, err := tw.Write(m.body); err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == 0 || h.Typeflag == tar.TypeReg {
				img.files[h.Name] = m.body
			}
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		if zw != nil {
			if err := zw.Close(); err != nil {
				t.Fatal(err)
			}
		}
		b := blob.Bytes()
		ref := ztoc.BlobRef{Digest: ztoc.DigestOf(b), Size: int64(len(b))}
		z, _, err := ztoc.Build(bytes.NewReader(b), ztoc.BuildOptions{SpanSize: span, Want: ref.Digest})
		if err != nil {
			t.Fatal(err)
		}
		entries, err := z.Entries()
		if err != nil {
			t.Fatal(err)
		}
		img.blobs[ref.Digest] = b
		img.layers = append(img.layers, lazyfs.Layer{Ref: ref, Ztoc: z})
		tl = append(tl, tree.Layer{LayerRef: tree.LayerRef{Blob: ref}, Entries: entries})
	}
	var out bytes.Buffer
	if _, err := tree.Build(&out, tl, tree.Options{}); err != nil {
		t.Fatal(err)
	}
	tab, err := tree.Open(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	img.table = tab
	return img
}

// memory is Blobs over an image, with a log of what was asked and ways to break it.
type memory struct {
	blobs map[ztoc.Digest][]byte

	mu      sync.Mutex
	log     []request
	bad     map[ztoc.Range]int // flips a byte of the reads of this range, so many times
	rejects int
	giveUp  int           // after so many rejects; 0: 3
	gate    chan struct{} // reads wait until it is closed; nil: not
	err     error
	waiting int
	most    int // reads that waited at the same time
}

type request struct {
	blob ztoc.Digest
	r    ztoc.Range
	pri  ztoc.Priority
}

func (m *memory) ReadAt(ctx context.Context, blob ztoc.BlobRef, p []byte, off int64, pri ztoc.Priority) error {
	r := ztoc.Range{Start: off, End: off + int64(len(p))}
	m.mu.Lock()
	m.log = append(m.log, request{blob.Digest, r, pri})
	gate, err := m.gate, m.err
	m.waiting++
	m.most = max(m.most, m.waiting)
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.waiting--
		m.mu.Unlock()
	}()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err != nil {
		return err
	}
	copy(p, m.blobs[blob.Digest][r.Start:r.End])
	m.mu.Lock()
	defer m.mu.Unlock()
	for b, n := range m.bad {
		if n > 0 && r.Contains(b) {
			m.bad[b]--
			p[b.Start-r.Start] ^= 0x40
		}
	}
	return nil
}

var errLiars = errors.New("three sources sent wrong bytes")

func (m *memory) Reject(ztoc.BlobRef, ztoc.Range, error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rejects++
	if m.rejects >= cmp.Or(m.giveUp, 3) {
		return errLiars
	}
	return nil
}

// set changes how m behaves, or looks at what it counted.
func (m *memory) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func (m *memory) asked() []request {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.log)
}

func (m *memory) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = nil
}

// mounted is a served mount of a test.
type mounted struct {
	dir    string
	server *lazyfs.Server
	blobs  *memory
	dev    *os.File
	done   chan error
	stop   context.CancelFunc
	log    *logged
}

func (m *mounted) path(name string) string { return filepath.Join(m.dir, name) }

// logged collects log lines.
type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// mount serves img until the test ends. with may change the configuration.
func mount(t testing.TB, img *image, compat lazyfs.Compat, with func(*lazyfs.Config)) *mounted {
	t.Helper()
	m := &mounted{dir: t.TempDir(), blobs: &memory{blobs: img.blobs}, done: make(chan error, 1), log: &logged{}}
	cfg := lazyfs.Config{
		Table: img.table, Layers: img.layers, Blobs: m.blobs, Compat: compat,
		Log: slog.New(slog.NewTextHandler(m.log, nil)),
	}
	if with != nil {
		with(&cfg)
	}
	s, err := lazyfs.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.server = s
	dev, err := lazyfs.Mount(t.Context(), m.dir, lazyfs.MountOptions{Name: t.Name(), AllowOther: true})
	if err != nil {
		t.Fatalf("these tests need root and /dev/fuse: %v", err)
	}
	m.dev = dev
	if t, ok := t.(*testing.T); ok {
		if end, ok := t.Deadline(); ok {
			// A test process that ends while one of its threads waits for its own mount never quite ends.
			rescue := time.AfterFunc(time.Until(end)-2*time.Second, func() { _ = lazyfs.Abort(m.dir) })
			t.Cleanup(func() { rescue.Stop() })
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	m.stop = stop
	go func() { m.done <- s.Serve(ctx, dev) }()
	t.Cleanup(func() { m.unmount(t) })
	if _, err := os.Stat(m.dir); err != nil {
		t.Fatal(err)
	}
	m.ready(t, img)
	return m
}

// ready makes the mount safe to be read from the process that serves it. The first os.Open of a file has the kernel ask
// whether it can be polled, in a system call during which the runtime cannot stop the world; a collection that begins just
// then would wait for it, and our answer for the collection. The kernel asks once, so it is asked here in another way.
func (m *mounted) ready(t testing.TB, img *image) {
	t.Helper()
	for row := range tree.Row(img.table.Len()) {
		if !img.table.IsReg(row) {
			continue
		}
		fd, err := unix.Open(m.path(string(img.table.AppendPath(nil, row))), unix.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil {
			t.Fatal(err)
		}
		return
	}
}

func (m *mounted) unmount(t testing.TB) {
	t.Helper()
	if m.dev == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	began := time.Now()
	busy, err := lazyfs.Unmount(ctx, m.dir)
	if err != nil || busy {
		t.Errorf("unmount: busy %v, %v", busy, err)
	}
	unmounted := time.Since(began)
	select {
	case err := <-m.done:
		if err != nil {
			t.Errorf("serve: %v", err)
		}
	case <-time.After(5 * time.Second):
		// Somebody copied the mount into a namespace of his own while it was there.
		t.Logf("still mounted somewhere (unmounting took %v)", unmounted)
		m.stop()
		if err := <-m.done; !errors.Is(err, context.Canceled) {
			t.Errorf("serve: %v", err)
		}
	}
	m.stop()
	m.dev.Close()
	m.dev = nil
}

// eachMode runs a test with all features of this kernel and with those of an old one.
func eachMode(t *testing.T, f func(t *testing.T, compat lazyfs.Compat)) {
	for _, c := range []lazyfs.Compat{"", lazyfs.Compat514} {
		t.Run("compat="+string(c), func(t *testing.T) { f(t, c) })
	}
}

// TestMain fails the run when a test left a mount behind. It gives the tests a temporary directory of their own: those of
// other packages mount too, at the same time.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "lazyfs-test-")
	if err == nil {
		err = os.Setenv("TMPDIR", dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if left := mounts(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "mounts left behind:\n%s\n", strings.Join(left, "\n"))
		code = 1
	} else if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// mounts are the lines of /proc/mounts that are below the temporary directory and of our kind.
func mounts() (l []string) {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return []string{err.Error()}
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 2 && f[2] == "fuse."+lazyfs.Subtype && strings.HasPrefix(f[1], os.TempDir()) && strings.Contains(f[0], "Test") {
			l = append(l, strings.TrimSpace(line))
		}
	}
	return l
}
