package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// made pushes an image of the test's own under name, which no other test may use, and gives its reference.
func made(t testing.TB, name string, i images.Image) string {
	t.Helper()
	image(t, "docker") // the registry is up
	dir, err := os.MkdirTemp(home, "layout-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := images.WriteImage(dir, i); err != nil {
		t.Fatal(err)
	}
	ref := origins.server.Addr + "/" + name + ":latest"
	if _, err := registry.Push(t.Context(), ref, dir, "latest"); err != nil {
		t.Fatal(err)
	}
	return ref
}

// say is a program of the image escape, for layers of one's own: it prints "uid 0" or "not root".
var say = sync.OnceValue(func() []byte {
	dir, err := images.Get("escape")
	if err != nil {
		panic(err)
	}
	layers, err := images.ReadLayout(dir)
	if err != nil {
		panic(err)
	}
	archive, err := images.Gunzip(layers[0])
	if err != nil {
		panic(err)
	}
	b, err := fileOf(archive, "bin/say")
	if err != nil {
		panic(err)
	}
	return b
})

// The files of big: six of 4 MiB that do not compress.
const (
	bigFiles    = 6
	bigFileSize = 4 << 20
)

// bigBody is the content of data/n of an image of big's kind; seed tells such images apart.
func bigBody(seed byte, n int) []byte {
	b := make([]byte, bigFileSize)
	rand.NewChaCha8([32]byte{seed, byte(n)}).Read(b)
	return b
}

// bigImage is an image whose second layer has 24 MiB that do not compress.
func bigImage(seed byte) images.Image {
	entries := []images.Entry{images.Dir("data")}
	for n := range bigFiles {
		entries = append(entries, images.File(fmt.Sprintf("data/%d", n), string(bigBody(seed, n))))
	}
	return images.Image{
		Config: images.RunConfig{Env: []string{images.PathEnv}, Cmd: []string{"/bin/say"}},
		Layers: []images.Blob{
			images.Layer(images.Dir("."), images.Dir("bin"), images.File("bin/say", string(say())).With(0o755, 0, 0),
				images.Dir("etc"), images.File("etc/passwd", "worker:x:1234:1234::/:/bin/say\n")),
			images.Layer(entries...),
		},
	}
}

// bigLayer is the digest of the large layer of an image of big's kind.
func bigLayer(seed byte) images.Descriptor { return bigs[seed].layer }

var bigs = map[byte]*bigMade{1: {}, 2: {}, 3: {}}

type bigMade struct {
	once  sync.Once
	ref   string
	layer images.Descriptor
}

// big is an image with an index beside it, of which nothing large is fetched before it is read.
func big(t testing.TB, seed byte) string {
	t.Helper()
	b := bigs[seed]
	b.once.Do(func() {
		i := bigImage(seed)
		ref := made(t, fmt.Sprintf("big-%d", seed), i)
		b.layer = i.Layers[1].Descriptor
		newHost(t, 0).must("index", "push", ref)
		b.ref = ref
	})
	if b.ref == "" {
		t.Fatal("the image was not made, see the test that tried first")
	}
	return b.ref
}

var indexes sync.Map // of test images, by name: func() string

// indexed is a test image that has an index beside it.
func indexed(t testing.TB, name string) string {
	t.Helper()
	ref := image(t, name)
	once, _ := indexes.LoadOrStore(name, sync.OnceValue(func() bool {
		newHost(t, 0).must("index", "push", ref)
		return true
	}))
	if !once.(func() bool)() {
		t.Fatal("the index was not pushed, see the test that tried first")
	}
	return ref
}

// blobs selects requests for parts of a layer; digest may be empty.
func blobs(digest string) registry.Match {
	return registry.Match{Kind: registry.Blob, Method: http.MethodGet, Ref: digest}
}

// layerReport is how one layer was opened, as --json and --report have it.
type layerReport struct {
	Digest, Format, Mode, Reason string
	Size                         int64
}

// summary is what --json of mount and --report of run have in common.
type summary struct {
	Image, Digest, Start string
	Offline              bool
	Layers               []layerReport
	Notes                []string
	Bytes                int64 `json:"origin_bytes"`
	Exit                 int
}

func parse(t testing.TB, text string) (s summary) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return s
}

// reported runs a command with --report and returns that too.
func (h *host) reported(args ...string) (result, summary) {
	h.t.Helper()
	file := filepath.Join(h.newDir(), "report")
	r := h.muster(append([]string{"run", "--report", file}, args...)...)
	b, err := os.ReadFile(file)
	if err != nil {
		h.t.Fatalf("%v; run said %s", err, r.stderr)
	}
	return r, parse(h.t, string(b))
}

// clean fails the test when anything of the host is left, and says after what.
func (h *host) clean(after string) {
	h.t.Helper()
	for _, l := range left(h.dir) {
		h.t.Errorf("%s left behind: %s", after, l)
	}
	for _, l := range h.files() {
		h.t.Errorf("%s left behind: temporary file %s", after, l)
	}
}

// plainMessage fails unless text is a message for people: it has all the words, and is no dump of a program.
func plainMessage(t testing.TB, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("the message lacks %q: %s", w, text)
		}
	}
	for _, w := range []string{"goroutine ", "panic:", "runtime error", ".go:", "0xc0"} {
		if strings.Contains(text, w) {
			t.Errorf("a message for people has %q: %s", w, text)
		}
	}
	if n := strings.Count(strings.TrimSpace(text), "\n"); n > 4 {
		t.Errorf("a message of %d lines: %s", n+1, text)
	}
}

// as makes cmd one of the host's user.
func (h *host) as(cmd *exec.Cmd) *exec.Cmd {
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	if h.user != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.user, Gid: h.user}}
	}
	return cmd
}

// sh runs a shell command of this machine as the host's user and returns what it said.
func (h *host) sh(command string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := h.as(exec.CommandContext(ctx, "sh", "-c", command))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// A running is a muster command under way.
type running struct {
	*exec.Cmd
	out, err locked
	ended    chan struct{}
}

// locked is a buffer that may be read while it is written.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start starts a command; it is killed when the test ends before it.
func (h *host) start(args ...string) *running {
	h.t.Helper()
	r := &running{Cmd: h.command(args...), ended: make(chan struct{})}
	r.Stdout, r.Stderr = &r.out, &r.err
	r.WaitDelay = 5 * time.Second
	if err := r.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		r.Wait() //nolint:errcheck // its code tells
		close(r.ended)
	}()
	h.t.Cleanup(func() {
		r.Process.Kill() //nolint:errcheck // it has ended
		<-r.ended
	})
	return r
}

// end waits for the end of the command, which must come within a minute, and gives its exit code, 128 + N when
// a signal ended it.
func (r *running) end(t testing.TB) int {
	t.Helper()
	select {
	case <-r.ended:
	case <-time.After(time.Minute):
		t.Fatalf("%v does not end; it said %s", r.Args, r.err.String())
	}
	if ws, ok := r.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return r.ProcessState.ExitCode()
}

// nobodyListens is an address where nothing answers.
func nobodyListens(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// readFile reads a file on a mount, in a process of its own when the mount belongs to another user.
func (h *host) readFile(path string) ([]byte, error) {
	if h.user == 0 {
		return os.ReadFile(path)
	}
	cmd := h.as(exec.Command("cat", path))
	return cmd.Output()
}

func unmarshal(t testing.TB, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
}
