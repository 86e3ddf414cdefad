package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestExitCodes: a command's own code, 128 + N for a signal, and docker's codes for what could not start.
func TestExitCodes(t *testing.T) {
	ref := indexed(t, "debian-python")
	for _, w := range whoRuns(t) {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, w.user)
			for _, c := range []struct {
				want int
				args []string
			}{
				{0, []string{"true"}},
				{1, []string{"false"}},
				{42, []string{"sh", "-c", "exit 42"}},
				{255, []string{"sh", "-c", "exit 255"}},
				{126, []string{"/etc/passwd"}},
				{126, []string{"/etc"}},
				{127, []string{"no-such-command"}},
				{127, []string{"/no/such/command"}},
				{128 + 15, []string{"sh", "-c", "kill -TERM $$; sleep 1"}},
				{128 + 9, []string{"sh", "-c", "kill -KILL $$; sleep 1"}},
				{125, []string{"--no-such-flag"}},
			} {
				args := append([]string{"run", "--runtime", w.runtime, ref}, c.args...)
				if c.want == 125 {
					args = []string{"run", c.args[0], ref}
				}
				if r := h.muster(args...); r.code != c.want {
					t.Errorf("%v: exit code %d, want %d; %s", c.args, r.code, c.want, r.stderr)
				} else if c.want >= 125 && c.want <= 127 {
					plainMessage(t, r.stderr, "muster: ")
				}
			}
			h.clean("commands")
		})
	}
}

type runner struct {
	name, runtime string
	user          uint32
}

// whoRuns are root and a user, each with every runtime there is.
func whoRuns(t testing.TB) (all []runner) {
	t.Helper()
	for _, r := range []string{"runc", "builtin"} {
		all = append(all, runner{"root-" + r, r, 0})
	}
	for _, r := range userRuntimes(t) {
		all = append(all, runner{"user-" + r, r, somebody})
	}
	return all
}

// TestRunPassesOn: standard streams byte by byte, signals, environment, directories, users, binds.
func TestRunPassesOn(t *testing.T) {
	ref := indexed(t, "debian-python")
	data := make([]byte, 3<<20)
	rand.Read(data) //nolint:errcheck // never fails
	for _, w := range whoRuns(t) {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, w.user)
			run := func(args ...string) string {
				t.Helper()
				return h.must(append([]string{"run", "--runtime", w.runtime}, args...)...).stdout
			}
			is := func(what, got, want string) {
				t.Helper()
				if strings.TrimSpace(got) != want {
					t.Errorf("%s is %q, want %q", what, got, want)
				}
			}
			cmd := h.command("run", "--runtime", w.runtime, ref, "cat")
			cmd.Stdin = bytes.NewReader(data)
			if r := h.finish(cmd); r.stdout != string(data) || r.stderr != "" {
				t.Errorf("cat gives %d bytes of %d and says %q", len(r.stdout), len(data), r.stderr)
			}
			r := h.muster("run", "--runtime", w.runtime, ref, "sh", "-c", "echo out; echo err >&2")
			if r.stdout != "out\n" || r.stderr != "err\n" {
				t.Errorf("stdout %q, stderr %q", r.stdout, r.stderr)
			}

			is("a variable", run("--env", "A=b c", "--env", "EMPTY=", ref, "sh", "-c", `echo "$A|$EMPTY|${UNSET-unset}|$PATH"`),
				"b c||unset|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
			h.env = []string{"SLURM_JOB_ID=7", "SLURM_NTASKS=2", "SECRET=x"}
			is("what is passed on", run("--env", "SLURM_*", ref, "sh", "-c", `echo "$SLURM_JOB_ID $SLURM_NTASKS $SECRET"`), "7 2")
			h.env = nil
			is("--workdir", run("--workdir", "/usr/lib", ref, "pwd"), "/usr/lib")
			is("--workdir with a link", run("--workdir", "/bin", ref, "pwd", "-P"), "/usr/bin")

			ids := map[bool]string{true: "0:0", false: "65534:65534"}[w.user == 0 || w.runtime == "runc"]
			is("who it is", run(ref, "sh", "-c", "echo $(id -u):$(id -g)"), ids)
			if w.user == 0 {
				is("--user name", run("--user", "daemon", ref, "sh", "-c", "echo $(id -un):$(id -gn)"), "daemon:daemon")
				is("--user number", run("--user", "12345:54", ref, "sh", "-c", "echo $(id -u):$(id -g)"), "12345:54")
				is("--user of two names", run("--user", "daemon:bin", ref, "sh", "-c", "echo $(id -u):$(id -gn)"), "1:bin")
				if r := h.muster("run", "--user", "nobody-knows", ref, "true"); r.code != 125 {
					t.Errorf("an unknown user: exit code %d, %s", r.code, r.stderr)
				} else {
					plainMessage(t, r.stderr, "nobody-knows")
				}
			} else if r := h.muster("run", "--runtime", w.runtime, "--user", "daemon", ref, "id"); r.code == 0 {
				t.Errorf("a user runs as daemon: %s", r.stdout)
			} else {
				plainMessage(t, r.stderr)
			}

			dir := h.newDir()
			if _, err := h.sh("echo from the host > " + dir + "/file"); err != nil {
				t.Fatal(err)
			}
			is("a bind", run("--bind", dir+":/mnt/new/place", ref, "sh", "-c", "cat /mnt/new/place/file; echo from inside > /mnt/new/place/back"), "from the host")
			if b, err := os.ReadFile(dir + "/back"); string(b) != "from inside\n" {
				t.Errorf("written through a bind: %q, %v", b, err)
			}
			is("a bind of a file", run("--bind", dir+"/file:/etc/debian_version", ref, "cat", "/etc/debian_version"), "from the host")
			is("a read-only bind", run("--bind", dir+":/mnt:ro", ref, "sh", "-c", "(echo x > /mnt/file) 2>/dev/null || echo refused"), "refused")
			if b, _ := os.ReadFile(dir + "/file"); string(b) != "from the host\n" {
				t.Errorf("a read-only bind was written through: %q", b)
			}

			is("writing", run(ref, "sh", "-c", "echo new > /root-file && echo more >> /etc/passwd && rm /usr/bin/cat && mkdir -p /opt/a/b && cat /root-file 2>/dev/null || echo gone"), "gone")
			is("after it", run(ref, "sh", "-c", "ls /root-file /opt/a 2>/dev/null; grep -c more /etc/passwd; ls /usr/bin/cat"), "0\n/usr/bin/cat")
			is("--read-only", run("--read-only", ref, "sh", "-c", "(echo x > /file) 2>/dev/null || echo refused; (echo x > /usr/file) 2>/dev/null || echo refused"), "refused\nrefused")
			if w.runtime != "ch-run" { // which has a /tmp of its own in any case
				is("/tmp with --read-only", run("--read-only", ref, "sh", "-c", "(echo x > /tmp/file) 2>/dev/null || echo refused"), "refused")
			}
			h.clean("runs")
		})
	}
}

// TestSignals: TERM and INT to muster go to the command, which decides; its code comes back.
func TestSignals(t *testing.T) {
	ref := indexed(t, "debian-python")
	for _, w := range whoRuns(t) {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, w.user)
			for _, c := range []struct {
				name, script string
				signal       syscall.Signal
				want         int
				says         string
			}{
				{"a handler that exits", "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done", syscall.SIGTERM, 7, "bye"},
				{"a handler that goes on", "trap 'echo once; exec true' INT; echo ready; while :; do sleep 0.05; done", syscall.SIGINT, 0, "once"},
				{"USR1", "trap 'echo usr1; exit 3' USR1; echo ready; while :; do sleep 0.05; done", syscall.SIGUSR1, 3, "usr1"},
				{"none", "echo ready; exec python3 -c 'import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.pause()'", syscall.SIGTERM, 128 + 15, ""},
			} {
				r := h.start("run", "--runtime", w.runtime, ref, "sh", "-c", c.script)
				eventually(t, "the command runs: "+c.name, func() bool { return strings.Contains(r.out.String(), "ready") })
				// "none" has no handler from the beginning only once Python is there; a namespace's first process is
				// spared signals that it has no handler for, so it has to be asked again.
				stop := make(chan struct{})
				go func() {
					for {
						r.Process.Signal(c.signal) //nolint:errcheck // its end is waited for
						select {
						case <-stop:
							return
						case <-time.After(2 * time.Second):
						}
					}
				}()
				code := r.end(t)
				close(stop)
				if code != c.want || !strings.Contains(r.out.String(), c.says) {
					t.Errorf("%s: exit code %d, want %d; %q %q", c.name, code, c.want, r.out.String(), r.err.String())
				}
			}
			h.clean("signals")
		})
	}
}

// TestImageConfig: entrypoint, command, variables, directory and user of the image, and what overrides them.
func TestImageConfig(t *testing.T) {
	h := newHost(t, 0)
	ref := image(t, "mixed")
	if got := h.must("run", ref).stdout; !strings.Contains(got, `"python": [3,`) {
		t.Errorf("the image's own command: %q", got)
	}
	if got := h.must("run", "--entrypoint", "/bin/echo", ref, "a", "b").stdout; got != "a b\n" {
		t.Errorf("--entrypoint: %q", got)
	}
}

// TestTerminal: a command has a terminal of the size of ours, follows its changes, and Ctrl-C reaches it.
func TestTerminal(t *testing.T) {
	ref := indexed(t, "debian-python")
	for _, w := range whoRuns(t) {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, w.user)
			cmd := h.command("run", "--runtime", w.runtime, "--tty", ref, "bash", "-c",
				`tty -s && stty size; trap 'stty size; exit 5' WINCH; trap 'echo interrupted' INT; echo ready; while :; do sleep 0.05; done`)
			cmd.Env = append(cmd.Env, "TERM=xterm")
			f, slave := openTerminal(t, 33, 77)
			defer f.Close()
			cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
			if cmd.SysProcAttr == nil {
				cmd.SysProcAttr = new(syscall.SysProcAttr)
			}
			cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
			if err := os.Chown(slave.Name(), int(w.user), -1); err != nil {
				t.Fatal(err)
			}
			err := cmd.Start()
			slave.Close()
			if err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill() //nolint:errcheck // it has ended
			var out locked
			read := make(chan struct{})
			go func() {
				buf := make([]byte, 4096)
				for {
					n, err := f.Read(buf)
					out.Write(buf[:n]) //nolint:errcheck // a buffer
					if err != nil {
						close(read)
						return
					}
				}
			}()
			eventually(t, "the command runs", func() bool { return strings.Contains(out.String(), "ready") })
			f.Write([]byte{3}) //nolint:errcheck // seen below
			eventually(t, "Ctrl-C arrives", func() bool { return strings.Contains(out.String(), "interrupted") })
			resize(t, f, 44, 99)
			cmd.Wait() //nolint:errcheck // the code is looked at
			<-read
			if code := cmd.ProcessState.ExitCode(); code != 5 || !strings.Contains(out.String(), "33 77") || !strings.Contains(out.String(), "44 99") {
				t.Errorf("exit code %d: %q", code, out.String())
			}
			h.clean("a terminal")
		})
	}
}

// openTerminal makes a terminal; what is written to f is typed there.
func openTerminal(t testing.TB, rows, columns uint16) (f, slave *os.File) {
	t.Helper()
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	resize(t, f, rows, columns)
	n := 0
	control(t, f, func(fd int) (err error) {
		if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		}
		return err
	})
	if slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	return f, slave
}

func resize(t testing.TB, f *os.File, rows, columns uint16) {
	t.Helper()
	control(t, f, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
	})
}

func control(t testing.TB, f *os.File, do func(fd int) error) {
	t.Helper()
	raw, err := f.SyscallConn()
	if err == nil {
		if e := raw.Control(func(fd uintptr) { err = do(int(fd)) }); e != nil {
			err = e
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// numpy is a program that touches a real part of the image, and what it prints.
const (
	numpy    = "import numpy; a = numpy.arange(12.).reshape(3, 4); print(int((a @ a.T).sum()), numpy.linalg.matrix_rank(a))"
	numpySay = "1134 2\n"
)

// TestNumpy runs a real program from an image with an index, without one, again, and without its registry.
func TestNumpy(t *testing.T) {
	withIndex, plain := indexed(t, "debian-python"), image(t, "debian-python")
	for name, user := range map[string]uint32{"root": 0, "user": somebody} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := front(t)
			check := func(h *host, what string, args ...string) summary {
				t.Helper()
				p.ResetLog()
				r, s := h.reported(append(args, "python3", "-c", numpy)...)
				if r.code != 0 || r.stdout != numpySay {
					t.Errorf("%s: exit code %d, %q, %s", what, r.code, r.stdout, r.stderr)
				}
				return s
			}
			lazy := newHost(t, user)
			s := check(lazy, "with an index", through(p, withIndex))
			var size, fetched int64
			for _, l := range s.Layers {
				size += l.Size
				if l.Mode != "index" && l.Size >= 4<<20 {
					t.Errorf("layer %s is %s: %s", l.Digest, l.Mode, l.Reason)
				}
			}
			if fetched = p.Bytes(blobs("")); fetched > size/2 {
				t.Errorf("%d bytes of %d were fetched with an index", fetched, size)
			}
			t.Logf("with an index: %d of %d bytes", fetched, size)

			h := newHost(t, user)
			s = check(h, "first pull", "--index-use=false", through(p, plain))
			for _, l := range s.Layers {
				if l.Mode != "pulled" {
					t.Errorf("layer %s is %s: %s", l.Digest, l.Mode, l.Reason)
				}
				if n := p.Bytes(blobs(l.Digest)); n != l.Size {
					t.Errorf("the first pull fetched %d bytes of layer %s, which has %d", n, l.Digest, l.Size)
				}
			}
			s = check(h, "again", through(p, plain))
			for _, l := range s.Layers {
				if n := p.Bytes(blobs(l.Digest)); n > 0 || l.Mode != "kept" {
					t.Errorf("running again fetched %d bytes of layer %s, which is %s", n, l.Digest, l.Mode)
				}
			}
			digest := strings.TrimSuffix(through(p, plain), ":latest") + "@" + s.Digest
			p.Down() //nolint:errcheck // it is down
			check(h, "offline by digest", digest)
			if s := check(h, "offline by tag", "--origin-resolve-patience", "1s", through(p, plain)); !s.Offline {
				t.Error("the report does not say that the origin was not asked")
			}
		})
	}
}

// TestManyRuns: runs of one image at once share what they fetch.
func TestManyRuns(t *testing.T) {
	p := front(t)
	h := newHost(t, 0)
	ref := through(p, image(t, "debian-python"))
	want := `[[1, 2], "é"]`
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			cmd := h.command("run", "--index-use=false", ref, "python3", "-c", fmt.Sprintf("import json; print(json.dumps([[1, 2], 'é'], ensure_ascii=False)); raise SystemExit(%d)", i))
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			cmd.Run() //nolint:errcheck // its code is looked at
			if code := cmd.ProcessState.ExitCode(); code != i || strings.TrimSpace(out.String()) != want {
				t.Errorf("run %d: exit code %d, %q, %s", i, code, out.String(), errs.String())
			}
		})
	}
	wg.Wait()
	h.clean("twenty runs")
	fetched := map[string]int64{}
	for _, r := range p.Log(blobs("")) {
		fetched[r.Ref] += r.Bytes
	}
	b := h.must("cache", "ls", "--json").stdout
	var l struct {
		Images []struct{ Size, Present int64 }
	}
	if err := json.Unmarshal([]byte(b), &l); err != nil || len(l.Images) != 1 {
		t.Fatalf("%v: %s", err, b)
	}
	var total int64
	for _, n := range fetched {
		total += n
	}
	// Processes leave each other's fetches alone; where they meet a range may come twice.
	if size := l.Images[0].Size; total > size+size/5 {
		t.Errorf("twenty runs fetched %d bytes of an image of %d", total, size)
	}
	t.Logf("%d bytes fetched of %d", total, l.Images[0].Size)
}

// TestReportFile: --report is written also when the command fails, and nothing else is.
func TestReportFile(t *testing.T) {
	h := newHost(t, 0)
	r, s := h.reported(indexed(t, "debian-python"), "sh", "-c", "exit 9")
	if r.code != 9 || s.Exit != 9 || s.Digest == "" || len(s.Layers) < 5 {
		t.Errorf("exit code %d, report %+v", r.code, s)
	}
	if names, _ := filepath.Glob(filepath.Join(h.dir, "*", "report")); len(names) != 1 {
		t.Errorf("reports: %v", names)
	}
}
