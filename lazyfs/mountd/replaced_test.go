package mountd_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// Variables by which this program, started again, knows what to do.
const (
	asMapper   = "MUSTER_TEST_MAP"     // maps a file and prints the hash of what is there
	asKeeper   = "MUSTER_TEST_KEEP"    // keeps a mount until its standard input ends
	asUpgrader = "MUSTER_TEST_UPGRADE" // has a mount's processes replaced by its own program's
)

// stranger in the name of this program's file makes its builder one that cannot read what others built.
const stranger = "stranger"

func hashMapped(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err == nil {
		err = unix.Madvise(b, unix.MADV_RANDOM) // a fault for every page
	}
	fmt.Printf("%x", sha256.Sum256(b))
	return err
}

func keepUntilTold(dir string) error {
	k := mountd.NewKeeper(nil, os.Stderr)
	defer k.Close()
	if err := k.Keep(context.Background(), dir); err != nil {
		return err
	}
	fmt.Println("kept")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func upgradeTo(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return mountd.Upgrade(ctx, dir)
}

// again is this program, or a copy of it, with an errand.
func again(t *testing.T, program, errand, arg string) *exec.Cmd {
	t.Helper()
	if program == "" {
		program = "/proc/self/exe"
	}
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Env = append(os.Environ(), errand+"="+arg)
	cmd.Stderr = os.Stderr
	return cmd
}

// A load is programs that read a mount all the time, in every way there is, and complain of whatever is not as it should be.
type load struct {
	t    *testing.T
	dir  string
	sums map[string]string // of files, in hexadecimal
	stop chan struct{}
	wg   sync.WaitGroup
	mu   sync.Mutex
	done map[string]int // rounds, by program
}

// begin starts the load on a mount of an image with data, many/… and this program in it.
func begin(t *testing.T, dir string, sums map[string]string) *load {
	l := &load{t: t, dir: dir, sums: sums, stop: make(chan struct{}), done: map[string]int{}}
	self := filepath.Base(os.Args[0])
	l.loop("cat", func(int) error { return l.shell("data", `cat "$1" | sha256sum | cut -c-64 | tr -d '\n'`) })
	l.loop("dd", func(int) error {
		return l.shell("data", `dd if="$1" bs=64k iflag=direct status=none | sha256sum | cut -c-64 | tr -d '\n'`)
	})
	l.loop("mmap", func(int) error { return l.run("data", exec.Command("/proc/self/exe"), asMapper+"="+dir+"/data") })
	// Not by this program: Go cannot stop the world while a child of it waits for its executable.
	l.loop("exec", func(int) error {
		return l.run(self, exec.Command("sh", "-c", `exec "$0"`, dir+"/"+self), asMapper+"="+dir+"/"+self)
	})
	l.loop("find", func(i int) error {
		out, err := exec.Command("find", fmt.Sprintf("%s/many/%03d", dir, i%100), "-type", "f", "-printf", "%s\n").CombinedOutput()
		if n := bytes.Count(out, []byte("0\n")); err != nil || n != 200 {
			return fmt.Errorf("%d files of 200, %w: %s", n, err, out[:min(len(out), 200)])
		}
		return nil
	})
	l.loop("open", func(i int) error {
		// The kernel knows none of these names yet.
		if _, err := os.Open(fmt.Sprintf("%s/none-%d", dir, i)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("a file that is not there: %w", err)
		}
		f, err := os.Open(dir + "/data")
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.ReadAt(make([]byte, 4096), int64(i)*37<<12%(4<<20))
		return err
	})
	return l
}

func (l *load) loop(name string, once func(i int) error) {
	l.wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-l.stop:
				return
			default:
			}
			if err := once(i); err != nil {
				l.t.Errorf("%s, round %d: %v", name, i, err)
				return
			}
			l.mu.Lock()
			l.done[name]++
			l.mu.Unlock()
		}
	})
}

func (l *load) shell(file, script string) error {
	return l.run(file, exec.Command("bash", "-o", "pipefail", "-c", script, "sh", filepath.Join(l.dir, file)), "X=")
}

// run runs cmd, which prints the hash of file, with what the page cache has of it dropped.
func (l *load) run(file string, cmd *exec.Cmd, env string) error {
	f, err := os.Open(filepath.Join(l.dir, file))
	if err != nil {
		return err
	}
	err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	f.Close()
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd.Env = append(os.Environ(), env)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if string(out) != l.sums[file] {
		err = errors.Join(err, fmt.Errorf("hash %.20q, not %s", out, l.sums[file]))
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, stderr.String())
	}
	return nil
}

// end waits for all programs to end, and wants each to have gone round.
func (l *load) end() {
	l.t.Helper()
	close(l.stop)
	ended := make(chan struct{})
	go func() { l.wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		l.t.Error("programs hang")
		return
	}
	l.t.Logf("rounds: %v", l.done)
	for _, name := range []string{"cat", "dd", "mmap", "exec", "find", "open"} {
		if l.done[name] == 0 && !l.t.Failed() {
			l.t.Errorf("%s did not go round once", name)
		}
	}
}

// kills is how often something is killed in a test of it.
func kills() int {
	if os.Getenv("MUSTER_LONG") != "" {
		return 100
	}
	return 20
}

// wound hurts the mount on dir n times at random moments under load, each time followed by a request that says how long
// it took until the mount answered again.
func wound(t *testing.T, n int, what string, hurt func(dir string)) {
	for _, mode := range []struct {
		name    string
		compat  lazyfs.Compat
		through bool // what is large is passed through to copies, which are evicted on the way
	}{{"now", "", false}, {"5.14", lazyfs.Compat514, false}, {"passthrough", "", true}} {
		t.Run(mode.name, func(t *testing.T) {
			t.Setenv(lazyfs.CompatVariable, string(mode.compat))
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			dir, sum := picture(t, 12<<20, 20_000, self)
			b, err := os.ReadFile(self)
			if err != nil {
				t.Fatal(err)
			}
			o, n := order{Dir: dir, Delay: time.Millisecond}, n
			var copies []string
			if mode.through {
				o.Copies = t.TempDir()
				copies = graduate(t, o, "data")
				if os.Getenv("MUSTER_LONG") == "" {
					n /= 2
				}
			}
			m, err := start(t, o, nil)
			if err != nil {
				t.Fatal(err)
			}
			l := begin(t, m.Dir, map[string]string{
				"data": fmt.Sprintf("%x", sum), filepath.Base(self): fmt.Sprintf("%x", sha256.Sum256(b)),
			})
			random := rand.New(rand.NewPCG(3, uint64(n)))
			var pauses []time.Duration
			for i := range n {
				if i == n/2 {
					for _, c := range copies {
						if err := os.Remove(c); err != nil {
							t.Error(err)
						}
					}
				}
				time.Sleep(time.Duration(100+random.IntN(300)) * time.Millisecond)
				began := time.Now()
				hurt(m.Dir)
				var st unix.Statfs_t
				if err := unix.Statfs(m.Dir, &st); err != nil {
					t.Errorf("statfs: %v", err)
				}
				pauses = append(pauses, time.Since(began))
				if t.Failed() {
					break
				}
			}
			l.end()
			slices.Sort(pauses)
			t.Logf("%s %d times: pause %v median, %v longest", what, len(pauses), pauses[len(pauses)/2].Round(time.Millisecond), pauses[len(pauses)-1].Round(time.Millisecond))
		})
	}
}

// kill kills the process of the mount on dir that has a role, waiting for it where there is none just now.
func kill(t *testing.T, role, dir string) {
	t.Helper()
	for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for _, pid := range processes(role, dir) {
			if syscall.Kill(pid, syscall.SIGKILL) == nil {
				return
			}
		}
	}
	t.Errorf("no %s to kill", role)
}

// killAll kills all processes of the mount on dir at once: none has the time to start another.
func killAll(t *testing.T, dir string) {
	t.Helper()
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		var pids []int
		for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(time.Millisecond) {
			pids = append(processes("parent", dir), processes("server", dir)...)
			for _, pid := range pids {
				syscall.Kill(pid, sig) //nolint:errcheck // it may be gone
			}
			if now := append(processes("parent", dir), processes("server", dir)...); len(now) >= 2 && slices.Equal(now, pids) || sig == syscall.SIGKILL {
				break
			}
		}
	}
}

func TestServerIsKilled(t *testing.T) {
	wound(t, kills(), "server killed", func(dir string) { kill(t, "server", dir) })
}

func TestParentIsKilled(t *testing.T) {
	wound(t, kills(), "parent killed", func(dir string) { kill(t, "parent", dir) })
}

// Parent and server are killed at once, and the keeper starts others; the keeper is killed too, when nothing else is.
func TestKeeper(t *testing.T) {
	var keeper *exec.Cmd
	var stdin io.WriteCloser
	i := 0
	end := func() {
		stdin.Close()
		keeper.Wait() //nolint:errcheck // it may have been killed
		keeper = nil
	}
	kept := ""
	wound(t, kills(), "both killed", func(dir string) {
		if keeper != nil && (i%4 == 3 || dir != kept) {
			keeper.Process.Kill() //nolint:errcheck // waited for
			end()
		}
		if keeper == nil {
			keeper = again(t, "", asKeeper, dir)
			var err error
			stdin, err = keeper.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := keeper.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := keeper.Start(); err != nil {
				t.Fatal(err)
			}
			if b := make([]byte, 5); true {
				if _, err := io.ReadFull(out, b); err != nil {
					t.Fatal("the keeper: ", err)
				}
			}
			kept = dir
		}
		i++
		killAll(t, dir)
	})
	if keeper != nil {
		end()
	}
}

// This program, as another file, takes over the mount again and again.
func TestUpgrade(t *testing.T) {
	wound(t, kills(), "upgraded", func(dir string) {
		old := append(processes("parent", dir), processes("server", dir)...)
		if err := again(t, "", asUpgrader, dir).Run(); err != nil {
			t.Error(err)
		}
		for end := time.Now().Add(soon); ; time.Sleep(time.Millisecond) {
			now := append(processes("parent", dir), processes("server", dir)...)
			if len(now) == 2 && !slices.ContainsFunc(now, func(pid int) bool { return slices.Contains(old, pid) }) {
				break
			}
			if time.Now().After(end) {
				t.Errorf("processes were %v, are %v", old, now)
				break
			}
		}
	})
}

// A program that cannot read what the mount is made of leaves it as it is, and says so.
func TestUpgradeIsRefused(t *testing.T) {
	dir, sum := picture(t, 2<<20, 0)
	m, err := start(t, order{Dir: dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), stranger)
	if out, err := exec.Command("cp", self, other).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	old := append(processes("parent", m.Dir), processes("server", m.Dir)...)
	cmd := again(t, other, asUpgrader, m.Dir)
	cmd.Stderr = nil
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "refused: cannot read version 1 of the table") {
		t.Errorf("%v: %s", err, out)
	}
	if now := append(processes("parent", m.Dir), processes("server", m.Dir)...); !slices.Equal(now, old) {
		t.Errorf("processes were %v, are %v", old, now)
	}
	if hash(t, m.Dir+"/data") != sum {
		t.Error("wrong content")
	}
	if again(t, "", asUpgrader, m.Dir).Run() != nil {
		t.Error("cannot be upgraded any more")
	}
	if hash(t, m.Dir+"/data") != sum {
		t.Error("wrong content")
	}
}

// Servers that die without having answered anything end the mount, with a reason, and whoever waits is let go.
func TestTooManyDeaths(t *testing.T) {
	dir, _ := picture(t, 1<<20, 0)
	var log string
	m, err := start(t, order{Dir: dir, Crash: true, Delay: time.Hour}, func(o *mountd.Options) { log = o.Log.Name() })
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(m.Dir + "/data")
		read <- err
	}()
	time.Sleep(200 * time.Millisecond)
	kill(t, "server", m.Dir)
	select {
	case err := <-read:
		if err == nil {
			t.Error("read what was not there")
		}
	case <-time.After(soon):
		t.Error("a reader hangs")
	}
	gone(t, m.Dir, soon)
	if b, err := os.ReadFile(log); err != nil || !strings.Contains(string(b), "died 5 times within 30s without having answered anything") {
		t.Errorf("log: %s", b)
	}
}

// Without a keeper nothing is left when both are killed but a dead mount, which umount takes away.
func TestBothKilled(t *testing.T) {
	dir, _ := picture(t, 1<<20, 0)
	m, err := start(t, order{Dir: dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	killAll(t, m.Dir)
	for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = unix.Statfs(m.Dir, new(unix.Statfs_t)); errors.Is(err, unix.ENOTCONN) {
			break
		}
	}
	if !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("statfs: %v", err)
	}
	if busy, err := mountd.Unmount(t.Context(), m.Dir); busy || err != nil {
		t.Errorf("unmount: busy %v, %v", busy, err)
	}
	gone(t, m.Dir, 0)
}
