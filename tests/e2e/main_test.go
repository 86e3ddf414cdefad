// Package e2e runs the muster binary as people do, against real registries, real images and real
// kernels, and looks at what comes out. It needs root, /dev/fuse and the Debian packages that
// tests/setup installs; without them it fails and says so.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/e2e/compare"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// long says that what takes minutes is wanted too: make e2e-long.
var long = os.Getenv("MUSTER_LONG") != ""

// binary is the muster under test, built once.
var binary string

// somebody is a user with no rights: it need not be in /etc/passwd.
const somebody = 54321

// asUser is the argument that makes the test binary list a tree for a test that may not see it itself.
const asUser = "MUSTER_E2E_WALK"

func TestMain(m *testing.M) {
	if dir := os.Getenv(asUser); dir != "" {
		os.Exit(walkFor(dir))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the end-to-end tests mount and make namespaces: run them as root")
		return 1
	}
	// Real hosts let everybody open it; here only root may at first.
	if err := os.Chmod("/dev/fuse", 0o666); err != nil {
		fmt.Fprintln(os.Stderr, "the end-to-end tests need FUSE:", err)
		return 1
	}
	dir, err := os.MkdirTemp("/var/tmp", "muster-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) //nolint:errcheck // other users run the binary from here
	binary = filepath.Join(dir, "muster")
	build := exec.Command("go", "build", "-o", binary, "../../cmd/muster")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building muster: %v\n%s", err, out)
		return 1
	}
	defer origins.close()
	return m.Run()
}

// origins is the embedded registry of the whole run, with the images that were asked for in it.
var origins pushed

type pushed struct {
	mu     sync.Mutex
	dir    string
	h      http.Handler
	server *registry.Proxy
	have   map[string]bool
}

// image pushes a test image to the registry, once, and gives its reference there.
func image(t testing.TB, name string) string {
	t.Helper()
	p := &origins
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server == nil {
		p.start(t)
	}
	ref := p.server.Addr + "/" + name + ":latest"
	if !p.have[name] {
		if _, err := registry.Push(t.Context(), ref, layout(t, name), "latest"); err != nil {
			t.Fatalf("pushing %s: %v", name, err)
		}
		p.have[name] = true
	}
	return ref
}

func (p *pushed) start(t testing.TB) {
	var err error
	if p.dir, err = os.MkdirTemp("/var/tmp", "muster-e2e-registry-"); err != nil {
		t.Fatal(err)
	}
	if p.h, err = registry.NewHandler(p.dir, registry.Options{}); err != nil {
		t.Fatal(err)
	}
	if p.server, err = registry.StartProxy(p.h); err != nil {
		t.Fatal(err)
	}
	p.have = map[string]bool{}
}

func (p *pushed) close() {
	if p.server != nil {
		p.server.Close()
		os.RemoveAll(p.dir)
	}
}

// front is a proxy of this test's own in front of the run's registry.
func front(t testing.TB) *registry.Proxy {
	t.Helper()
	image(t, "small")
	p, err := registry.StartProxy(origins.h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// through is a reference as seen through a proxy of front.
func through(p *registry.Proxy, ref string) string {
	_, rest, _ := strings.Cut(ref, "/")
	return p.Addr + "/" + rest
}

func layout(t testing.TB, name string) string {
	t.Helper()
	dir, err := images.Get(name)
	if err != nil {
		t.Fatalf("test image %s: %v", name, err)
	}
	return dir
}

// A result is what a muster command said.
type result struct {
	stdout, stderr string
	code           int
}

// A host is where muster commands of one test run: one store, one user.
type host struct {
	t     testing.TB
	store string
	user  uint32 // 0: root
}

// newHost makes a host whose store is empty and goes with the test.
func newHost(t testing.TB, user uint32) *host {
	t.Helper()
	h := &host{t: t, store: tempDir(t, user), user: user}
	return h
}

// tempDir is a directory of a user, on a real disk, that goes with the test.
func tempDir(t testing.TB, user uint32) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "muster-e2e-dir-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if user != 0 {
		if err := os.Chown(dir, int(user), int(user)); err != nil {
			t.Fatal(err)
		}
	} else if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// command is a muster command on the host, not yet started.
func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "MUSTER_STORE_DIR="+h.store, "HOME="+h.store, "USER=somebody")
	cmd.Dir = "/"
	if h.user != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.user, Gid: h.user}}
	}
	return cmd
}

// muster runs a command to its end, which must come within five minutes.
func (h *host) muster(args ...string) result {
	h.t.Helper()
	return h.finish(h.command(args...))
}

func (h *host) finish(cmd *exec.Cmd) result {
	h.t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	timer := time.AfterFunc(5*time.Minute, func() { cmd.Process.Kill() }) //nolint:errcheck // its end tells
	err := cmd.Wait()
	if !timer.Stop() {
		h.t.Fatalf("%v did not end within five minutes; it said %s", cmd.Args, errs.String())
	}
	r := result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
	if r.code < 0 {
		h.t.Fatalf("%v: %v: %s", cmd.Args, err, r.stderr)
	}
	return r
}

// must runs a command that has to succeed.
func (h *host) must(args ...string) result {
	h.t.Helper()
	r := h.muster(args...)
	if r.code != 0 {
		h.t.Fatalf("muster %s: exit code %d: %s", strings.Join(args, " "), r.code, r.stderr)
	}
	return r
}

// mount mounts an image on a new directory until the test ends.
func (h *host) mount(ref string, args ...string) string {
	h.t.Helper()
	dir := tempDir(h.t, h.user)
	h.must(append(append([]string{"mount"}, args...), ref, dir)...)
	h.t.Cleanup(func() {
		if isMounted(dir) {
			h.must("umount", dir)
		}
	})
	return dir
}

func isMounted(dir string) bool {
	b, err := os.ReadFile("/proc/self/mounts")
	return err == nil && strings.Contains(string(b), " "+dir+" ")
}

// walk lists a tree as the host's user sees it.
func (h *host) walk(dir string) compare.Listing {
	h.t.Helper()
	if h.user == 0 {
		l, err := compare.Walk(h.t.Context(), dir, compare.Options{})
		if err != nil {
			h.t.Fatal(err)
		}
		return l
	}
	return h.walkAsUser(dir)
}

// eventually fails the test unless ok becomes true within ten seconds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not within ten seconds: %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
