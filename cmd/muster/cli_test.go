package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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

	"github.com/muster-hpc/muster/agent/runtime"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// mainEnv makes this test binary muster. The processes that muster starts of itself are known by their
// names, as in main.
const mainEnv = "MUSTER_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" || os.Args[0] != "" && strings.HasPrefix(os.Args[0], "muster-") {
		main()
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the tests of the command line mount and make namespaces: run them as root")
		os.Exit(1)
	}
	// Real hosts let everybody open it.
	if err := os.Chmod("/dev/fuse", 0o666); err != nil {
		fmt.Fprintln(os.Stderr, "these tests need FUSE:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// visitor is a user without rights and without an entry in /etc/passwd.
const visitor = 4243

// games has an entry on every Debian, which fusermount3 insists on.
const games = 5

// A cli runs muster with a store of its own.
type cli struct {
	t     *testing.T
	dir   string // world-readable; the store is in it
	image string // a small image
	uid   int
}

// hostPrograms are in every small image, with the libraries they need.
const hostPrograms = "sh id ls cat sleep stty touch grep true env pwd mount"

// programs is a layer with some of the host's programs.
var programs = sync.OnceValues(func() (images.Blob, error) {
	files := map[string]bool{}
	for _, name := range strings.Fields(hostPrograms) {
		path, err := exec.LookPath(name)
		if err != nil {
			return images.Blob{}, err
		}
		files[path] = true
		libs, err := exec.Command("ldd", path).CombinedOutput()
		if err != nil {
			return images.Blob{}, fmt.Errorf("ldd %s: %s", path, libs)
		}
		for _, f := range strings.Fields(string(libs)) {
			if strings.HasPrefix(f, "/") {
				files[f] = true
			}
		}
	}
	entries := []images.Entry{
		images.Dir("etc"), images.Dir("srv"),
		images.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nworker:x:77:78::/srv:/bin/sh\n"),
		images.File("etc/group", "root:x:0:\nworker:x:78:\nstaff:x:50:worker\n"),
		images.File("srv/file", "content\n").With(0o640, 77, 78),
		images.File("srv/script", "#!/bin/nothing\n").With(0o755, 0, 0),
	}
	// What a user could gain rights by, in an image that a stranger made.
	for f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return images.Blob{}, err
		}
		name := strings.TrimPrefix(f, "/")
		if slices.Contains(strings.Fields(hostPrograms), filepath.Base(f)) {
			name = "bin/" + filepath.Base(f) // wherever the host has them
		}
		entries = append(entries, images.File(name, string(b)).With(0o755, 0, 0))
		if filepath.Base(f) == "id" {
			entries = append(entries,
				images.File("srv/suid", string(b)).With(0o4755, 0, 0),
				images.File("srv/capable", string(b)).With(0o755, 0, 0).Xattr("security.capability", setuidCapability))
		}
	}
	return images.Layer(entries...), nil
})

// setuidCapability is a security.capability (version 2) that gives cap_setuid, permitted and effective.
const setuidCapability = "\x01\x00\x00\x02\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// newCLI makes a small image, and a cli for root or for a user.
func newCLI(t *testing.T, uid int, config images.RunConfig) *cli {
	t.Helper()
	layer, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "cli")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &cli{t: t, dir: dir, uid: uid, image: "oci:" + filepath.Join(dir, "image")}
	if config.Env == nil {
		config.Env = []string{images.PathEnv}
	}
	if err := images.WriteImage(filepath.Join(dir, "image"), images.Image{Layers: []images.Blob{layer}, Config: config}); err != nil {
		t.Fatal(err)
	}
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, _ error) error {
		if d.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return os.Chmod(path, 0o644)
	})
	if err := errors.Join(os.Mkdir(c.store(), 0o755), os.Chown(c.store(), uid, uid)); err != nil {
		t.Fatal(err)
	}
	return c
}

// registry starts an empty registry that ends with the test.
func (c *cli) registry() *registry.Proxy {
	c.t.Helper()
	h, err := registry.NewHandler(c.t.TempDir(), registry.Options{})
	if err != nil {
		c.t.Fatal(err)
	}
	p, err := registry.StartProxy(h)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { p.Close() })
	return p
}

// pushed is a registry that has the cli's image, and its reference there.
func (c *cli) pushed() (p *registry.Proxy, ref string) {
	c.t.Helper()
	p = c.registry()
	ref = p.Addr + "/app:1"
	if _, err := registry.Push(c.t.Context(), ref, filepath.Join(c.dir, "image"), ""); err != nil {
		c.t.Fatal(err)
	}
	return p, ref
}

func (c *cli) store() string { return filepath.Join(c.dir, "store") }

var copyBinary = sync.OnceValues(func() ([]byte, error) { return os.ReadFile("/proc/self/exe") })

// command is muster with args.
func (c *cli) command(args ...string) *exec.Cmd {
	c.t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "muster"
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), mainEnv+"=1", "MUSTER_STORE_DIR="+c.store(), "MUSTER_LOG_FORMAT=text", "MUSTER_ORIGIN_RESOLVE_PATIENCE=1s")
	if c.uid != 0 {
		cmd.Path = filepath.Join(c.dir, "muster")
		if _, err := os.Stat(cmd.Path); err != nil {
			b, err := copyBinary()
			if err == nil {
				err = os.WriteFile(cmd.Path, b, 0o755)
			}
			if err != nil {
				c.t.Fatal(err)
			}
		}
		cmd.Env = append(cmd.Env, "HOME=/nonexistent", "USER=visitor")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.uid)}}
	}
	return cmd
}

// run returns what came out and the exit code.
func (c *cli) run(args ...string) (string, string, int) {
	c.t.Helper()
	cmd := c.command(args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// ok is run for what must succeed.
func (c *cli) ok(args ...string) string {
	c.t.Helper()
	out, errs, code := c.run(args...)
	if code != 0 {
		c.t.Fatalf("muster %s: code %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

func TestRun(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{
		Entrypoint: []string{"/bin/sh", "-c", `echo "$0 $* in $(pwd) as $(id -u):$(id -g) with $COLOUR"`},
		Cmd:        []string{"default"}, Env: []string{images.PathEnv, "COLOUR=red"}, WorkingDir: "/srv", User: "worker",
	})
	for _, test := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{c.image}, "default  in /srv as 77:78 with red\n", 0},
		{[]string{c.image, "one", "two"}, "one two in /srv as 77:78 with red\n", 0},
		{[]string{"--user", "0", "-w", "/etc", "-e", "COLOUR=blue", c.image}, "default  in /etc as 0:0 with blue\n", 0},
		{[]string{"--entrypoint", "/bin/cat", c.image, "file"}, "content\n", 0},
		{[]string{"--entrypoint", "id", c.image}, "uid=77(worker) gid=78(worker) groups=78(worker),50(staff)\n", 0},
		{[]string{"--entrypoint", "sh", c.image, "-c", "exit 42"}, "", 42},
		{[]string{"--entrypoint", "sh", c.image, "-c", "kill -TERM $$"}, "", 143},
		{[]string{"--entrypoint", "nothing", c.image}, "", 127},
		{[]string{"--entrypoint", "/srv/file", c.image}, "", 126},
		{[]string{"--entrypoint", "/srv", c.image}, "", 126},
		{[]string{"--no-such-flag", c.image}, "", 125},
		{[]string{}, "", 125},
		{[]string{"oci:/no/such/place"}, "", 125},
		{[]string{"--tty", c.image}, "", 125},
		{[]string{"--bind", "relative:also", c.image}, "", 125},
		{[]string{"--runtime", "unheard", c.image}, "", 125},
		{[]string{"--user", "stranger", c.image}, "", 125},
	} {
		out, errs, code := c.run(append([]string{"run"}, test.args...)...)
		if out != test.want || code != test.code {
			t.Errorf("run %q: %q, code %d; want %q, code %d\n%s", test.args, out, code, test.want, test.code, errs)
		}
		if strings.Contains(errs, "goroutine") {
			t.Errorf("run %q: a stack trace:\n%s", test.args, errs)
		}
		if code >= 125 && code < 128 && !strings.HasPrefix(errs, "muster: ") {
			t.Errorf("run %q: code %d without a reason: %q", test.args, code, errs)
		}
	}
	// What is one's own is passed on by name or pattern only.
	cmd := c.command("run", "-e", "SLURM_*", "--entrypoint", "env", c.image)
	cmd.Env = append(cmd.Env, "SLURM_JOB_ID=7", "SECRET=x")
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "SLURM_JOB_ID=7\n") || strings.Contains(string(out), "SECRET") || strings.Contains(string(out), mainEnv) {
		t.Errorf("environment: %v\n%s", err, out)
	}
}

func TestRunReportsModes(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	report := filepath.Join(c.dir, "report.json")
	for _, mode := range []string{"pulled", "kept"} {
		c.ok("run", "--report", report, c.image, "true")
		var r struct {
			Layers []struct{ Mode, Reason string }
			Exit   int
			Ready  float64 `json:"ready_seconds"`
		}
		b, err := os.ReadFile(report)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil || len(r.Layers) != 1 || r.Layers[0].Mode == "" || r.Ready <= 0 {
			t.Fatalf("report: %v\n%s", err, b)
		}
		if mode == "kept" && r.Layers[0].Mode != mode {
			t.Errorf("the second time the layer was %q", r.Layers[0].Mode)
		}
		if mode == "pulled" && r.Layers[0].Reason == "" {
			t.Errorf("no reason for %q", r.Layers[0].Mode)
		}
	}
}

// A layer that has to be fetched whole is refused when that was asked for, with the reason.
func TestRequireLazy(t *testing.T) {
	dir, err := images.Get("gzip")
	if err != nil {
		t.Fatal(err)
	}
	c := newCLI(t, 0, images.RunConfig{})
	for command, want := range map[string]int{"run": 125, "mount": 9} {
		_, errs, code := c.run(command, "--require-lazy", "oci:"+dir, filepath.Join(c.dir, "on"))
		if code != want || !strings.Contains(errs, "before it is fetched") {
			t.Errorf("%s: code %d, want %d: %s", command, code, want, errs)
		}
	}
}

func TestUsersGainNothing(t *testing.T) {
	c := newCLI(t, visitor, images.RunConfig{User: "worker"})
	for _, r := range runtime.Names(false) {
		if r != "builtin" && runtime.Installed(r) == "" {
			continue // tests/setup installs what Debian has
		}
		t.Run(r, func(t *testing.T) {
			c := *c
			c.t = t
			out := c.ok("run", "--runtime", r, "-w", "/srv", c.image, "sh", "-c",
				"id -u; ./suid -u; ./capable -u; grep -h ^CapEff /proc/self/status; cat /srv/file; touch /srv/mine && echo mine; mount -t tmpfs none /srv 2>/dev/null || echo no mount")
			want := fmt.Sprintf("%d\n%d\n%d\nCapEff:\t0000000000000000\ncontent\nmine\nno mount\n", visitor, visitor, visitor)
			if r == "runc" {
				want = strings.ReplaceAll(want, fmt.Sprint(visitor), "0")
			}
			if out != want {
				t.Errorf("got\n%swant\n%s", out, want)
			}
			// Root's files on the host stay root's.
			if _, errs, code := c.run("run", "--runtime", r, "--bind", "/root:/r", c.image, "ls", "/r"); code == 0 {
				t.Errorf("a user lists /root: %s", errs)
			}
		})
	}
}

func TestMountAsRootAndUser(t *testing.T) {
	for _, uid := range []int{0, games} {
		t.Run(fmt.Sprint(uid), func(t *testing.T) {
			c := newCLI(t, uid, images.RunConfig{})
			dir := filepath.Join(c.dir, "on")
			if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, uid, uid)); err != nil {
				t.Fatal(err)
			}
			var m struct {
				Dir    string
				Layers []struct{ Mode string }
			}
			if err := json.Unmarshal([]byte(c.ok("mount", "--json", c.image, dir)), &m); err != nil || m.Dir != dir || len(m.Layers) != 1 {
				t.Errorf("mount --json: %+v, %v", m, err)
			}
			options, err := exec.Command("findmnt", "-no", "FSTYPE,OPTIONS", dir).Output()
			for _, want := range []string{"fuse.muster", "ro,", "nosuid", "nodev"} {
				if err != nil || !strings.Contains(string(options), want) {
					t.Errorf("the mount lacks %s: %s %v", want, options, err)
				}
			}
			// A setuid program in a mount that a user can reach is a program like any other.
			suid := exec.Command(filepath.Join(dir, "srv/suid"), "-u")
			who := uint32(games) // root's mounts are open to all, a user's are his alone
			suid.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: who, Gid: who}}
			if out, err := suid.Output(); err != nil || string(out) != fmt.Sprintln(who) {
				t.Errorf("setuid program: %q, %v", out, err)
			}
			if _, errs, code := c.run("mount", c.image, dir); code != exitUsage {
				t.Errorf("a second mount on %s: code %d, %s", dir, code, errs)
			}
			c.ok("umount", dir)
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
				t.Errorf("after umount: %v, %v", entries, err)
			}
			if _, _, code := c.run("umount", dir); code == 0 {
				t.Error("umount of nothing succeeds")
			}
		})
	}
}

// Errors say what failed, where, why and what to try, with the documented code.
func TestErrors(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	p, ref := c.pushed()
	small := filepath.Join(c.dir, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		do     *registry.Action
		kind   registry.Kind
		image  string
		code   int
		in     []string
		within time.Duration
	}{
		{name: "no such tag", image: p.Addr + "/app:2", code: exitNoImage, in: []string{p.Addr + "/app:2", "404", "try: "}},
		{name: "no such repository", image: p.Addr + "/none:1", code: exitNoImage, in: []string{p.Addr + "/none:1", "try: "}},
		{name: "refused", image: ref, kind: registry.Manifest, do: action(registry.Answer(403, `{"errors":[{"code":"DENIED","message":"not for you"}]}`)), code: exitUnauthorized, in: []string{ref, "403", "not for you", "login"}},
		{name: "wrong bytes", image: ref, kind: registry.Blob, do: action(registry.FlipAt(1000)), code: exitIntegrity, in: []string{ref}},
		{name: "nobody there", image: "127.0.0.1:1/app:1", code: exitUnreachable, in: []string{"127.0.0.1:1/app:1", "refused", "try: "}, within: 10 * time.Second},
		{name: "no name", image: "UPPER:case:x", code: exitUsage, in: []string{"UPPER"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.do != nil {
				p.Inject(registry.Match{Kind: test.kind}, 1000, *test.do)
				defer p.Clear()
			}
			began := time.Now()
			cc := *c
			cc.t, cc.dir = t, t.TempDir()
			if err := os.Mkdir(cc.store(), 0o755); err != nil {
				t.Fatal(err)
			}
			for command, code := range map[string]int{"index create": test.code, "run": exitRunFailed} {
				_, errs, got := cc.run(append(strings.Fields(command), test.image)...)
				if got != code {
					t.Errorf("%s: code %d, want %d: %s", command, got, code, errs)
				}
				for _, want := range test.in {
					if !strings.Contains(errs, want) {
						t.Errorf("%s: %q is not in: %s", command, want, errs)
					}
				}
				if strings.Contains(errs, "goroutine ") {
					t.Errorf("a stack trace: %s", errs)
				}
			}
			if test.within > 0 && time.Since(began) > 2*test.within {
				t.Errorf("took %s", time.Since(began))
			}
		})
	}
}

func action(a registry.Action) *registry.Action { return &a }

// A full disk costs the keeping of bytes, not the run, and is said once.
func TestFullDisk(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	if err := unix.Mount("small", c.store(), "tmpfs", 0, "size=64k,mode=700"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(c.store(), unix.MNT_DETACH) //nolint:errcheck // the directory is removed after it
	out, errs, code := c.run("run", c.image, "cat", "/srv/file")
	if out != "content\n" || code != 0 {
		t.Errorf("%q, code %d: %s", out, code, errs)
	}
	if !strings.Contains(errs, c.store()) {
		t.Errorf("no warning that names %s: %s", c.store(), errs)
	}
}

func TestTerminal(t *testing.T) {
	for _, uid := range []int{0, visitor} {
		c := newCLI(t, uid, images.RunConfig{})
		for _, r := range runtime.Names(uid == 0) {
			if r != "builtin" && runtime.Installed(r) == "" {
				continue // tests/setup installs what Debian has
			}
			t.Run(fmt.Sprintf("%d/%s", uid, r), func(t *testing.T) {
				master, slave := openPTY(t)
				defer master.Close()
				cmd := c.command("run", "--runtime", r, c.image, "sh", "-c", "test -t 0 && test -t 1 && echo terminal; stty size; read line; echo got $line; exec sleep 100")
				cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
				if cmd.SysProcAttr == nil {
					cmd.SysProcAttr = &syscall.SysProcAttr{}
				}
				cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				slave.Close()
				var seen strings.Builder
				expect := func(want string) {
					t.Helper()
					buf := make([]byte, 1024)
					for deadline := time.Now().Add(60 * time.Second); !strings.Contains(seen.String(), want); {
						if time.Now().After(deadline) {
							t.Fatalf("no %q in %q", want, seen.String())
						}
						_ = master.SetReadDeadline(deadline)
						n, err := master.Read(buf)
						seen.Write(buf[:n])
						if err != nil {
							t.Fatalf("no %q in %q: %v", want, seen.String(), err)
						}
					}
				}
				expect("terminal\r\n33 77\r\n")
				_, _ = master.WriteString("hello\n")
				expect("got hello\r\n")
				_, _ = master.WriteString("\x03") // Ctrl-C, for the command and not for muster
				_ = cmd.Wait()
				if code := cmd.ProcessState.ExitCode(); code != 128+2 {
					t.Errorf("after Ctrl-C: code %d", code)
				}
			})
		}
	}
}

// openPTY is a terminal of 33 rows and 77 columns.
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	number := 0
	_ = raw.Control(func(fd uintptr) {
		err = errors.Join(unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 77}))
		number, _ = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
	})
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// Whenever muster is killed, nothing stays but the store.
func TestKilledRunLeavesNothing(t *testing.T) {
	for _, uid := range []int{0, visitor} {
		t.Run(fmt.Sprint(uid), func(t *testing.T) {
			c := newCLI(t, uid, images.RunConfig{})
			for _, after := range []time.Duration{1, 30, 60, 100, 200, 400, 800} {
				for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
					cmd := c.command("run", c.image, "sh", "-c", "sleep 1000 & sleep 1000")
					if err := cmd.Start(); err != nil {
						t.Fatal(err)
					}
					time.Sleep(after * time.Millisecond)
					_ = cmd.Process.Signal(sig)
					_ = cmd.Wait()
					if left := leftOf(c, 5*time.Second); left != "" {
						t.Fatalf("%v after %d ms left %s", sig, after, left)
					}
				}
			}
		})
	}
}

// leftOf waits for all processes with c's store in their environment, and mounts that name its image, to
// be gone.
func leftOf(c *cli, patience time.Duration) (left string) {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		left = ""
		procs, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, p := range procs {
			if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte("MUSTER_STORE_DIR="+c.store()+"\x00")) {
				line, _ := os.ReadFile(filepath.Dir(p) + "/cmdline")
				left += "process " + strings.ReplaceAll(string(line), "\x00", " ") + "; "
			}
		}
		mounts, _ := os.ReadFile("/proc/mounts")
		for line := range strings.Lines(string(mounts)) {
			if strings.Contains(line, c.dir) {
				left += "mount " + line
			}
		}
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

// F11: what is pinned stays while others are evicted, until it is unpinned.
func TestPin(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	c.ok("run", c.image, "true")
	here := func() (present int64, pinned bool) {
		t.Helper()
		var l struct {
			Images []struct {
				Present int64
				Pinned  bool
			}
		}
		if err := json.Unmarshal([]byte(c.ok("cache", "ls", "--json")), &l); err != nil || len(l.Images) != 1 {
			t.Fatalf("%+v, %v", l, err)
		}
		return l.Images[0].Present, l.Images[0].Pinned
	}
	before, _ := here()
	c.ok("cache", "pin", c.image)
	c.ok("cache", "gc", "--target", "4KiB")
	if n, pinned := here(); n != before || !pinned || n == 0 {
		t.Errorf("pinned: %d bytes of %d are here, pinned %v", n, before, pinned)
	}
	c.ok("cache", "unpin", c.image)
	c.ok("cache", "gc", "--target", "4KiB")
	if n, pinned := here(); n != 0 || pinned {
		t.Errorf("unpinned: %d bytes are here, pinned %v", n, pinned)
	}
	if _, errs, code := c.run("cache", "pin", "nobody/knows:this"); code != exitNoImage || !strings.Contains(errs, "not in the store") {
		t.Errorf("code %d: %s", code, errs)
	}
}

// Every command that a script may read speaks JSON.
func TestJSON(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	c.ok("run", c.image, "true")
	layer := filepath.Join(c.dir, "layer")
	blob, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(layer, blob.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"version"},
		{"preflight", c.image},
		{"index", "list", c.image},
		{"index", "create", "--min-layer", "1", c.image},
		{"ztoc", "build", layer},
		{"ztoc", "show", "--files", "--spans", layer + ".ztoc"},
		{"ztoc", "verify", layer + ".ztoc", layer},
		{"cache", "ls"},
		{"cache", "gc"},
		{"cache", "rm", c.image},
	} {
		out := c.ok(append(args, "--json")...)
		var v any
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}
}

func TestZtocCommands(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	layer, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(c.dir, "layer.tar.gz")
	if err := os.WriteFile(file, layer.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	archive, err := images.Gunzip(layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, form := range []string{"soci", "muster"} {
		z := filepath.Join(c.dir, form+".ztoc")
		// From a pipe, as a registry's answer comes.
		cmd := c.command("ztoc", "build", "--format", form, "-o", z, "--index-span-size", "64KiB", "--digest", string(layer.Digest), "--diff-id", string(layer.DiffID), "-")
		cmd.Stdin = bytes.NewReader(layer.Bytes())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
		c.ok("ztoc", "verify", z, file)
		r := tar.NewReader(bytes.NewReader(archive))
		for {
			h, err := r.Next()
			if err != nil {
				break
			}
			if h.Typeflag != tar.TypeReg {
				continue
			}
			var want bytes.Buffer
			_, _ = want.ReadFrom(r)
			if got := c.ok("ztoc", "cat", z, file, "/"+h.Name); got != want.String() {
				t.Errorf("%s: %d bytes, want %d, and the same", h.Name, len(got), want.Len())
			}
		}
		for _, wrong := range [][]string{
			{"ztoc", "cat", z, file, "not/there"},
			{"ztoc", "cat", z, file, "etc"},
			{"ztoc", "verify", file, file},
			{"ztoc", "verify", z, z},
		} {
			if _, errs, code := c.run(wrong...); code == 0 || !strings.HasPrefix(errs, "muster: ") {
				t.Errorf("%q: code %d, %s", wrong, code, errs)
			}
		}
	}
	// A bit that flipped is an integrity error.
	rotten := bytes.Clone(layer.Bytes())
	rotten[len(rotten)/2] ^= 4
	if err := os.WriteFile(file, rotten, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := c.run("ztoc", "verify", filepath.Join(c.dir, "soci.ztoc"), file); code != exitIntegrity {
		t.Errorf("a rotten layer: code %d, %s", code, errs)
	}
	if _, errs, code := c.run("ztoc", "build", "--digest", string(layer.Digest), file); code != exitIntegrity && code != exitOther {
		t.Errorf("a rotten layer: code %d, %s", code, errs)
	}
}

func TestPreflightFindings(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	dirs := map[string]string{}
	for _, name := range []string{"torture", "empty-layers", "arm64-only", "zstd-single", "estargz"} {
		dir, err := images.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		dirs[name] = "oci:" + dir
	}
	for _, test := range []struct {
		image string
		args  []string
		code  int
		level string
		text  string
	}{
		{"torture", nil, 0, levelWarn, "docker takes at most 125"},
		{"empty-layers", nil, 0, levelNote, "repeated"},
		{"empty-layers", nil, 0, levelNote, "empty"},
		{"arm64-only", nil, exitNoImage, levelFail, "linux/arm64"},
		{"arm64-only", []string{"--platform", "linux/arm64"}, 0, levelNote, "mounted at once"},
		{"zstd-single", nil, 0, levelWarn, "no index"},
		{"estargz", nil, 0, levelNote, "mounted at once"},
	} {
		out, errs, code := c.run(append(append([]string{"preflight", "--json"}, test.args...), dirs[test.image])...)
		var p preflight
		if err := json.Unmarshal([]byte(out), &p); err != nil {
			t.Fatalf("%s: %v\n%s%s", test.image, err, out, errs)
		}
		if code != test.code || !slices.ContainsFunc(p.Findings, func(f finding) bool { return f.Level == test.level && strings.Contains(f.Text, test.text) }) {
			t.Errorf("%s: code %d, want %d; no %s %q in %+v", test.image, code, test.code, test.level, test.text, p.Findings)
		}
		if code == 0 && (p.OverlayLimit < 2 || p.Needed < p.Size || p.Free == 0) {
			t.Errorf("%s: %+v", test.image, p)
		}
	}
}
