package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests start this binary again: as stage and as builtin runtime through Inside, and as a front
// through frontEnv, so that each run has its own standard output and can be killed.
const frontEnv = "MUSTER_TEST_FRONT"

// testMount shows the front's working directory in place of a FUSE tree: what is tested here is what
// happens around the tree. Its name would not do, since it is hidden by the private tmpfs.
func testMount(_ context.Context, dir string, _ Options) (*os.File, error) {
	if err := unix.Mount(".", dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return nil, err
	}
	return os.Open("/dev/null")
}

func TestMain(m *testing.M) {
	Inside(testMount)
	if os.Getenv(frontEnv) != "" {
		os.Exit(testFront(os.Args[1:]))
	}
	dir, err := testTree()
	if err != nil {
		fmt.Fprintln(os.Stderr, "a small root for the tests:", err)
		os.Exit(1)
	}
	tree = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	_ = os.RemoveAll(dir + "-user")
	os.Exit(code)
}

// tree is a small image: some of the host's programs and the libraries they need.
var tree string

func testTree() (string, error) {
	dir, err := os.MkdirTemp("", "runtime-tree")
	if err != nil {
		return "", err
	}
	files := map[string]bool{}
	for _, name := range strings.Fields("sh sleep id ls cat grep sed head wc touch mkdir rm true chmod stty tty") {
		path, err := exec.LookPath(name)
		if err != nil {
			return dir, err
		}
		files[path] = true
		libs, err := exec.Command("ldd", path).CombinedOutput()
		if err != nil {
			return dir, fmt.Errorf("ldd %s: %s", path, libs)
		}
		for _, f := range strings.Fields(string(libs)) {
			if strings.HasPrefix(f, "/") {
				files[f] = true
			}
		}
	}
	write := func(path string, b []byte, mode os.FileMode) error {
		to := filepath.Join(dir, path)
		return errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, mode))
	}
	for f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return dir, err
		}
		if err := write(f, b, 0o755); err != nil {
			return dir, err
		}
	}
	return dir, errors.Join(os.Chmod(dir, 0o755),
		write("etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/usr/sbin:/bin/sh\nbin:x:2:2::/bin:/bin/sh\nlp:x:7:7::/var/spool/lpd:/bin/sh"), 0o644),
		write("etc/group", []byte("root:x:0:\ndaemon:x:1:\nbin:x:2:\nlp:x:7:\nstaff:x:50:daemon,lp\ngames:x:60:\n"), 0o644),
		write("usr/share/doc/copyright", nil, 0o644),
		write("etc/motd", nil, 0o644),
		os.Chmod(filepath.Join(dir, "usr/share/doc"), 0o755))
}

// testFront is a small muster run: RUNTIME USER DIR FLAGS BINDS ENV -- CMD…
func testFront(args []string) int {
	o := Options{Runtime: args[0], ReadOnly: strings.Contains(args[3], "r"), Terminal: strings.Contains(args[3], "t"), WritableSize: 16 << 20}
	for _, b := range strings.Fields(args[4]) {
		bind, err := ParseBind(b)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		o.Binds = append(o.Binds, bind)
	}
	s, err := Start(context.Background(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "start:", err)
		return 125
	}
	defer s.Close()
	s.Device().Close()
	signals := make(chan os.Signal, 8)
	Notify(signals)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	code, err := s.Run(context.Background(), Command{Args: args[7:], Env: strings.Fields(args[5]), Dir: args[2], User: args[1]}, signals, func() {})
	var c *CommandError
	if errors.As(err, &c) {
		fmt.Fprintln(os.Stderr, err)
		return c.Code
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
		return 125
	}
	return code
}

type trial struct {
	runtime, user, dir, flags, binds, env string
	as                                    uint32 // who runs it; 0 is root
}

func (r trial) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests run as root: they make containers, and give up privileges where a test is about users")
	}
	cmd := exec.Command("/proc/self/exe", append([]string{r.runtime, r.user, r.dir, r.flags, r.binds, r.env, "--"}, args...)...)
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), frontEnv+"=1")
	if r.as != 0 {
		cmd.Path, cmd.Dir = shared(t), userTree(t)
		cmd.Env = append(cmd.Env, "HOME=/nonexistent", "USER=visitor")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: r.as, Gid: r.as}}
	}
	return cmd
}

// userTree is the tree as an unprivileged user's presentation shows it: all his own.
func userTree(t *testing.T) string {
	t.Helper()
	dir := tree + "-user"
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if out, err := exec.Command("cp", "-a", tree, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", visitor, visitor), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// shared is a copy of the test binary that every user can execute.
func shared(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "runtime")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	b, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "runtime.test"), b, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "runtime.test")
}

// run returns what came out and the exit code.
func (r trial) run(t *testing.T, args ...string) (string, string, int) {
	t.Helper()
	cmd := r.command(t, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// visitor is an unprivileged user without an entry in passwd.
const visitor = 4242

// everywhere runs f with each runtime that the test machine has, as root and as a user.
func everywhere(t *testing.T, f func(t *testing.T, r trial)) {
	t.Helper()
	for _, need := range []struct{ name, debian string }{{"runc", "runc"}, {"crun", "crun"}, {"bwrap", "bubblewrap"}, {"ch-run", "charliecloud-runtime"}} {
		if Installed(need.name) == "" {
			t.Fatalf("%s is needed: apt-get install %s", need.name, need.debian)
		}
	}
	for _, r := range []trial{
		{runtime: "runc"},
		{runtime: "crun"},
		{runtime: "builtin"},
		{runtime: "builtin", as: visitor},
		{runtime: "bwrap", as: visitor},
		{runtime: "ch-run", as: visitor},
		{runtime: "runc", as: visitor},
	} {
		who := "root"
		if r.as != 0 {
			who = "user"
		}
		t.Run(who+"/"+r.runtime, func(t *testing.T) { f(t, r) })
	}
}

func TestExitCodesAndOutput(t *testing.T) {
	everywhere(t, func(t *testing.T, r trial) {
		r.env = "GREETING=hello GREETING=goodbye"
		r.dir = "/usr/share"
		out, errs, code := r.run(t, "sh", "-c", `echo $GREETING; pwd; echo oops >&2; exit 42`)
		if out != "goodbye\n/usr/share\n" || errs != "oops\n" || code != 42 {
			t.Errorf("out %q, err %q, code %d", out, errs, code)
		}
		if _, errs, code := r.run(t, "no-such-program"); code != 127 || !strings.Contains(errs, "no-such-program") {
			t.Errorf("a command that is not there: code %d, %s", code, errs)
		}
		if _, errs, code := r.run(t, "/etc/passwd"); code != 126 {
			t.Errorf("a file that is no program: code %d, %s", code, errs)
		}
		if _, errs, code := r.run(t, "sh", "-c", "kill -9 $$"); code != 128+9 {
			t.Errorf("a command that is killed: code %d, %s", code, errs)
		}
	})
}

func TestIdentity(t *testing.T) {
	everywhere(t, func(t *testing.T, r trial) {
		out, errs, code := r.run(t, "id", "-u")
		want := strconv.Itoa(int(r.as))
		if r.as != 0 && r.runtime == "runc" {
			want = "0" // of its own user namespace
		}
		if strings.TrimSpace(out) != want || code != 0 {
			t.Errorf("id -u: %q, want %s; %d %s", out, want, code, errs)
		}
		if r.as != 0 {
			if out, errs, _ := r.run(t, "id", "-un"); r.runtime != "runc" && out != "visitor\n" {
				t.Errorf("id -un: %q, %s", out, errs)
			}
			out, errs, _ := r.run(t, "grep", "-E", "^(CapPrm|CapEff|CapAmb)", "/proc/self/status")
			if r.runtime != "runc" && r.runtime != "ch-run" && strings.Trim(strings.ReplaceAll(out, "Cap", ""), "PrmEfAb:\t0\n") != "" {
				t.Errorf("a user's command has capabilities: %s %s", out, errs)
			}
			r.user = "daemon"
			if _, errs, code := r.run(t, "true"); code != 125 || !strings.Contains(errs, "caller") {
				t.Errorf("--user of somebody else: code %d, %s", code, errs)
			}
			return
		}
		// CAP_MKNOD is bit 27, CAP_SYS_ADMIN bit 21: both must be gone.
		out, errs, _ = r.run(t, "sed", "-n", "s/^CapBnd:.//p", "/proc/self/status")
		caps, err := strconv.ParseUint(strings.TrimSpace(out), 16, 64)
		if err != nil || caps&(1<<27|1<<21) != 0 || caps == 0 {
			t.Errorf("capabilities %x, %v, %s", caps, err, errs)
		}
		for who, want := range map[string]string{"daemon": "1:1:/usr/sbin", "7:8": "7:8:/var/spool/lpd", "bin:games": "2:60:/bin", "54321": "54321:0:/"} {
			r.user = who
			if out, errs, _ := r.run(t, "sh", "-c", `echo $(id -u):$(id -g):$HOME`); strings.TrimSpace(out) != want {
				t.Errorf("--user %s: %q, want %q; %s", who, out, want, errs)
			}
		}
		r.user = "nobody-knows"
		if _, errs, code := r.run(t, "true"); code != 125 || !strings.Contains(errs, "nobody-knows") {
			t.Errorf("unknown user: code %d, %s", code, errs)
		}
	})
}

func TestRoot(t *testing.T) {
	everywhere(t, func(t *testing.T, r trial) {
		// What the image must offer, in one go: each line is a test.
		script := `
echo x > /dev/null && echo null
head -c 3 /dev/zero | wc -c
test -c /dev/urandom && test -L /dev/fd && test -d /dev/shm && echo dev
test -e /dev/sda || test -e /dev/vda || echo no disks
touch /usr/share/written && echo written
rm -r /usr/share/doc && mkdir /usr/share/doc && ls /usr/share/doc | wc -l
ls -d /proc/[0-9]* | wc -l | grep -q '^.$' && echo own processes
mkdir /sys/x 2>/dev/null || echo sys is read-only
cat /sys/class/net/lo/mtu
`
		out, errs, _ := r.run(t, "sh", "-c", script)
		want := "null\n3\ndev\nno disks\nwritten\n0\nown processes\nsys is read-only\n65536\n"
		if r.runtime == "ch-run" { // brings the host's /dev
			out = strings.Replace(out, "dev\n", "dev\nno disks\n", 1)
		}
		if out != want {
			t.Errorf("got\n%swant\n%s\n%s", out, want, errs)
		}
		if _, err := os.Stat("/usr/share/written"); err == nil {
			t.Fatal("the image's file system was written")
		}
		r.flags = "r"
		if out, errs, code := r.run(t, "sh", "-c", "touch /usr/share/written 2>/dev/null || echo no"); out != "no\n" || code != 0 {
			t.Errorf("a read-only root: %q, %s, %d", out, errs, code)
		}
	})
}

func TestBinds(t *testing.T) {
	dir, err := os.MkdirTemp("", "binds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, err := range []error{
		os.Chmod(dir, 0o777),
		os.WriteFile(filepath.Join(dir, "file"), []byte("from the host\n"), 0o666),
		os.Chmod(filepath.Join(dir, "file"), 0o666),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	everywhere(t, func(t *testing.T, r trial) {
		// The binds lie beneath the place that the stage hides for itself, too.
		r.binds = dir + ":/new/place " + dir + ":/usr/games:ro " + dir + "/file:/etc/motd"
		out, errs, code := r.run(t, "sh", "-c", `
cat /new/place/file /usr/games/file /etc/motd
echo changed > /new/place/out-`+r.runtime+`; touch /usr/games/x 2>/dev/null || echo read-only`)
		if want := strings.Repeat("from the host\n", 3) + "read-only\n"; out != want || code != 0 {
			t.Errorf("got %q, %s, %d", out, errs, code)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "out-"+r.runtime)); string(b) != "changed\n" {
			t.Errorf("on the host: %q, %v", b, err)
		}
		_ = os.Remove(filepath.Join(dir, "out-"+r.runtime))
		r.binds = "/does/not/exist:/x"
		if _, errs, code := r.run(t, "true"); code != 125 || !strings.Contains(errs, "/does/not/exist") {
			t.Errorf("a source that is not there: %d, %s", code, errs)
		}
		if r.as != 0 {
			r.binds = "/root:/x"
			if out, errs, _ := r.run(t, "ls", "/x"); out != "" {
				t.Errorf("a user reads /root: %s %s", out, errs)
			}
		}
	})
}

// A target whose path runs over the image's symbolic links stays in the image.
func TestBindTargetsStayBeneath(t *testing.T) {
	root := t.TempDir()
	for _, l := range [][2]string{{"/", "up"}, {"../../../..", "more"}, {"/etc/../../real", "to"}, {"loop", "loop"}} {
		if err := os.Symlink(l[0], filepath.Join(root, l[1])); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		"/up/a": "a", "/more/b/c": "b/c", "../../d": "d", "/to/e": "real/e", "/x/../../f": "f",
	} {
		f, err := beneath(root, path, missingDir)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		got, err := os.Readlink(proc(f))
		f.Close()
		if err != nil || got != filepath.Join(root, want) {
			t.Errorf("%s is %s, want %s in %s (%v)", path, got, want, root, err)
		}
	}
	if _, err := beneath(root, "/loop/x", missingDir); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a loop: %v", err)
	}
	if _, err := beneath(root, "/up/nowhere", missingFails); !errors.Is(err, unix.ENOENT) {
		t.Errorf("nothing there: %v", err)
	}
}

func TestSignalsReachTheCommand(t *testing.T) {
	everywhere(t, func(t *testing.T, r trial) {
		cmd := r.command(t, "sh", "-c", `
trap 'echo term' TERM; trap 'echo int' INT; trap 'echo hup' HUP; trap 'echo usr1' USR1; trap 'exit 7' USR2
echo ready; while :; do sleep 0.05; done`)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		read := func() string {
			buf := make([]byte, 64)
			n, _ := out.Read(buf)
			return string(buf[:n])
		}
		if got := read(); got != "ready\n" {
			t.Fatalf("got %q", got)
		}
		for name, sig := range map[string]os.Signal{"term": syscall.SIGTERM, "int": syscall.SIGINT, "hup": syscall.SIGHUP, "usr1": syscall.SIGUSR1} {
			_ = cmd.Process.Signal(sig)
			if got := read(); got != name+"\n" {
				t.Errorf("after %v: %q", sig, got)
			}
		}
		_ = cmd.Process.Signal(syscall.SIGUSR2)
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 7 {
			t.Errorf("code %d", code)
		}
		// One that handles nothing is ended by a signal, as it would be outside.
		cmd = r.command(t, "sh", "-c", "echo ready; exec sleep 100")
		if out, err = cmd.StdoutPipe(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		read()
		time.Sleep(20 * time.Millisecond) // until sh has become sleep
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 128+15 {
			t.Errorf("sleep after SIGTERM: code %d", code)
		}
	})
}

// Whatever is killed, and whenever, nothing stays: no process, no mount, no cgroup.
func TestKillLeavesNothing(t *testing.T) {
	everywhere(t, func(t *testing.T, r trial) {
		before := state(t)
		for _, after := range []time.Duration{0, 5, 20, 40, 80, 160, 300} {
			mark := fmt.Sprintf("%d.%d", 1000+os.Getpid(), after+1)
			cmd := r.command(t, "sh", "-c", "sleep "+mark+" & exec sleep "+mark)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after * time.Millisecond)
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			settled(t, before, fmt.Sprintf("killed after %d ms", after))
		}
		// A background process of the command ends with it.
		cmd := r.command(t, "sh", "-c", "sleep 1000 & echo started")
		if err := cmd.Run(); err != nil {
			t.Error(err)
		}
		settled(t, before, "ended with a process in the background")
	})
}

// state lists mounts, cgroups and the processes of this test.
func state(t *testing.T) []string {
	t.Helper()
	var all []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && slices.ContainsFunc(f, func(s string) bool { return s == "muster-run" || s == "muster-root" || s == "muster-dev" }) {
			all = append(all, "mount "+f[4])
		}
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), "muster") {
			all = append(all, "cgroup "+path)
		}
		return nil
	})
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		line := strings.ReplaceAll(string(b), "\x00", " ")
		if strings.HasPrefix(line, insideName) || strings.HasPrefix(line, execName) ||
			strings.Contains(line, fmt.Sprintf("sleep %d.", 1000+os.Getpid())) {
			all = append(all, "process "+line)
		}
	}
	slices.Sort(all)
	return all
}

// settled waits until everything is as before; other tests of this machine may run stages of their own,
// so only what is more than before counts after a while.
func settled(t *testing.T, before []string, when string) {
	t.Helper()
	var more []string
	for range 100 {
		more = more[:0]
		for _, s := range state(t) {
			if !slices.Contains(before, s) {
				more = append(more, s)
			}
		}
		if len(more) == 0 {
			return
		}
		time.Sleep(30 * time.Millisecond)
	}
	t.Errorf("%s: left %q", when, more)
}

func TestParseBind(t *testing.T) {
	for s, want := range map[string]Bind{
		"/a": {"/a", "/a", false}, "/a:/b": {"/a", "/b", false}, "/a:/b:ro": {"/a", "/b", true}, "/a/../c:/b:rw": {"/c", "/b", false},
	} {
		if got, err := ParseBind(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", ":/b", "/a:b", "/a:/", "/a:/b:rx", "/a:/b:ro:z", "/a:/.."} {
		if got, err := ParseBind(s); err == nil {
			t.Errorf("%q is read as %+v", s, got)
		}
	}
}

func TestEnvironment(t *testing.T) {
	got := environment([]string{"A=1", "PATH=/bin", "B=", "A=2", "nothing", "=x"}, "/home")
	if want := []string{"PATH=/bin", "HOME=/home", "A=2", "B="}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
