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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/e2e/compare"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// long says that what takes minutes is wanted too: make e2e-long.
var long = os.Getenv("MUSTER_LONG") != ""

// binary is the muster under test, built once.
var binary string

// somebody is a user with no rights: nobody, because fusermount3 wants a user of /etc/passwd.
const somebody = 65534

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
	if err := makeHome(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(home)
	binary = filepath.Join(home, "muster")
	build := exec.Command("go", "build", "-o", binary, "../../cmd/muster")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building muster: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	origins.close()
	for _, l := range left(home) {
		fmt.Fprintln(os.Stderr, "FAIL left behind by the end-to-end tests:", l)
		code = 1
	}
	return code
}

// home has everything that the run makes: the binary, the registry, stores, mounts, temporary files. So what
// is left behind can be told from what others do on this machine.
var home string

// makeHome makes it where the gate looks, unless that is memory: stores behave otherwise there.
func makeHome() (err error) {
	at := os.TempDir()
	var fs unix.Statfs_t
	if unix.Statfs(at, &fs) != nil || fs.Type == unix.TMPFS_MAGIC {
		at = "/var/tmp"
	}
	if home, err = os.MkdirTemp(at, "muster-e2e-"); err != nil {
		return err
	}
	return os.Chmod(home, 0o755) // other users run the binary from here
}

// left waits a moment for what is on its way out, then names the mounts beneath dir and the processes that have
// dir in their environment, this one and its helpers excepted.
func left(dir string) (all []string) {
	for range 100 {
		all = all[:0]
		mounts, _ := os.ReadFile("/proc/self/mounts")
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
				all = append(all, "mount "+f[1])
			}
		}
		for _, p := range processesWith(dir) {
			all = append(all, fmt.Sprintf("process %d: %s", p, commandLine(p)))
		}
		if len(all) == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return all
}

// processesWith are the processes that have text in their environment. Zombies have none.
func processesWith(text string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, e := range all {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(e)))
		if b, err := os.ReadFile(e); err == nil && pid != os.Getpid() && bytes.Contains(b, []byte(text)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func commandLine(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
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
	if p.dir, err = os.MkdirTemp(home, "registry-"); err != nil {
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
	image(t, "docker")
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
	dir   string // what the host's commands may write to
	store string
	tmp   string // TMPDIR
	user  uint32 // 0: root
	env   []string
}

// newHost makes a host whose store is empty and goes with the test. The test fails when a process, a mount or
// a temporary file of the host is left by then.
func newHost(t testing.TB, user uint32) *host {
	t.Helper()
	dir := tempDir(t, user)
	h := &host{t: t, dir: dir, store: filepath.Join(dir, "store"), tmp: filepath.Join(dir, "tmp"), user: user}
	for _, d := range []string{h.store, h.tmp} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(d, int(user), int(user)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, l := range left(dir) {
			t.Errorf("left behind: %s", l)
		}
		for _, l := range h.files() {
			t.Errorf("left behind: temporary file %s", l)
		}
	})
	return h
}

// files names the temporary files of the host: in TMPDIR, and in the store those being made.
func (h *host) files() []string {
	all, _ := filepath.Glob(filepath.Join(h.tmp, "*"))
	more, _ := filepath.Glob(filepath.Join(h.store, "tmp", "*"))
	return append(all, more...)
}

// tempDir is a directory of a user, on a real disk, that goes with the test.
func tempDir(t testing.TB, user uint32) string {
	t.Helper()
	dir, err := os.MkdirTemp(home, "dir-")
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
	cmd.Env = append(append(os.Environ(), "MUSTER_STORE_DIR="+h.store, "TMPDIR="+h.tmp, "HOME="+h.dir, "USER=somebody"), h.env...)
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
	dir := h.mountPoint()
	h.must(append(append([]string{"mount"}, args...), ref, dir)...)
	return dir
}

// newDir is a new directory of the host's user.
func (h *host) newDir() string {
	h.t.Helper()
	dir, err := os.MkdirTemp(h.dir, "dir-")
	if err == nil {
		err = os.Chown(dir, int(h.user), int(h.user))
	}
	if err == nil && h.user == 0 {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return dir
}

// mountPoint is a new directory that is unmounted when the test ends.
func (h *host) mountPoint() string {
	h.t.Helper()
	dir := h.newDir()
	h.t.Cleanup(func() {
		if isMounted(dir) {
			if r := h.muster("umount", dir); r.code != 0 {
				h.t.Errorf("umount %s: %s", dir, r.stderr)
			}
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
