package mountd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// A blocked is a program that waits for bytes of a mount that do not come.
type blocked struct {
	*exec.Cmd
	ended chan error
	out   bytes.Buffer
}

// block starts n programs that read the file, in every way that the kernel waits in, and returns when all do.
func block(t *testing.T, n int, file string) (all []*blocked) {
	t.Helper()
	for i := range n {
		var cmd *exec.Cmd
		switch i % 3 {
		case 0:
			cmd = exec.Command("cat", file)
		case 1: // waits for the very request, not for a page
			cmd = exec.Command("dd", "if="+file, "iflag=direct", "bs=4k", "count=1", fmt.Sprint("skip=", i), "status=none")
		case 2:
			cmd = exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), asMapper+"="+file)
		}
		b := &blocked{Cmd: cmd, ended: make(chan error, 1)}
		cmd.Stderr = &b.out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { b.ended <- cmd.Wait() }()
		all = append(all, b)
	}
	for end := time.Now().Add(soon); ; time.Sleep(10 * time.Millisecond) {
		waiting := 0
		for _, b := range all {
			for _, w := range waits(b.Process.Pid) {
				if strings.Contains(w, "fuse") || strings.Contains(w, "folio") || strings.Contains(w, "page") {
					waiting++
					break
				}
			}
		}
		if waiting == n {
			return all
		}
		if time.Now().After(end) {
			t.Fatalf("%d of %d programs wait for the mount", waiting, n)
		}
	}
}

// waits is where in the kernel the threads of a process wait.
func waits(pid int) (where []string) {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	for _, name := range all {
		b, _ := os.ReadFile(name)
		where = append(where, string(b))
	}
	return where
}

// The bytes do not come any more, and everybody who waits for them is killed: with the server there, with the server killed
// at the same moment, and with both killed. Nobody hangs, and the mount can be unmounted.
func TestBlockedReadersAreKilled(t *testing.T) {
	for _, compat := range []string{"", string(lazyfs.Compat514)} {
		for _, also := range []string{"nobody", "server", "parent", "all"} {
			t.Run(also+" "+compat, func(t *testing.T) {
				t.Setenv(lazyfs.CompatVariable, compat)
				dir, _ := picture(t, 32<<20, 0)
				m, err := start(t, order{Dir: dir, Delay: time.Hour}, nil)
				if err != nil {
					t.Fatal(err)
				}
				all := block(t, 64, m.Dir+"/data")
				began := time.Now()
				switch also {
				case "server", "parent":
					kill(t, also, m.Dir)
				case "all":
					killAll(t, m.Dir)
				}
				for _, b := range all {
					if err := b.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
						t.Error(err)
					}
				}
				for _, b := range all {
					select {
					case <-b.ended:
					case <-time.After(time.Until(began.Add(soon))):
						t.Fatalf("%v hangs: %q", b.Args, waits(b.Process.Pid))
					}
				}
				took := time.Since(began)
				began = time.Now()
				if busy, err := mountd.Unmount(t.Context(), m.Dir); busy || err != nil {
					t.Errorf("unmount: busy %v, %v", busy, err)
				}
				gone(t, m.Dir, soon)
				t.Logf("64 readers gone in %v, the mount in %v", took.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
			})
		}
	}
}

// Who is inside a mount that is unmounted is served on for the linger, then his requests end with an error and nothing is
// left: also when he waits for bytes that do not come, and whichever process of the mount dies meanwhile.
func TestUnmountUnderABlockedReader(t *testing.T) {
	for _, also := range []string{"nobody", "server", "parent"} {
		t.Run(also, func(t *testing.T) {
			dir, _ := picture(t, 1<<20, 0)
			m, err := start(t, order{Dir: dir, Delay: time.Hour}, func(o *mountd.Options) { o.Linger = time.Second })
			if err != nil {
				t.Fatal(err)
			}
			all := block(t, 3, m.Dir+"/data")
			began := time.Now()
			if busy, err := mountd.Unmount(t.Context(), m.Dir); !busy || err != nil {
				t.Errorf("unmount: busy %v, %v", busy, err)
			}
			if _, err := lazyfs.Mounted(m.Dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("still mounted: %v", err)
			}
			if also != "nobody" {
				kill(t, also, m.Dir)
			}
			for _, b := range all {
				select {
				case err := <-b.ended:
					if err == nil {
						t.Errorf("%v read what was not there", b.Args)
					}
				case <-time.After(soon):
					b.Process.Kill() //nolint:errcheck // cleared up
					t.Errorf("%v hangs", b.Args)
				}
			}
			gone(t, m.Dir, soon)
			t.Logf("all over in %v", time.Since(began).Round(time.Millisecond))
		})
	}
}

// switches is how often the processes of the mount on dir went to sleep or were put to sleep so far.
func switches(t *testing.T, dir string) (n int) {
	t.Helper()
	for _, pid := range append(processes("parent", dir), processes("server", dir)...) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		for _, name := range tasks {
			b, _ := os.ReadFile(name)
			for _, key := range []string{"\nvoluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"} {
				_, after, _ := strings.Cut(string(b), key)
				var k int
				fmt.Sscan(after, &k)
				n += k
			}
		}
	}
	return n
}

// A mount that nobody reads does nothing: also after much was read, and after its processes were replaced.
func TestQuiet(t *testing.T) {
	dir, sum := picture(t, 24<<20, 0)
	m, err := start(t, order{Dir: dir, Soon: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, after := range []string{"reading", "the server's death", "the parent's death"} {
		switch after {
		case "the server's death":
			kill(t, "server", m.Dir)
		case "the parent's death":
			kill(t, "parent", m.Dir)
		}
		if hash(t, m.Dir+"/data") != sum {
			t.Error("wrong content")
		}
		if err := unix.Statfs(m.Dir, new(unix.Statfs_t)); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second) // memory is given back, timers of the start run out
		before := switches(t, m.Dir)
		time.Sleep(5 * time.Second)
		if n := switches(t, m.Dir) - before; n > 20 {
			t.Errorf("after %s: %d context switches in five seconds without a request", after, n)
		} else {
			t.Logf("after %s: %d context switches in five seconds", after, n)
		}
	}
	threads := 0
	for _, pid := range append(processes("parent", m.Dir), processes("server", m.Dir)...) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		threads += len(tasks)
	}
	t.Logf("%d threads, %d MiB", threads, private(t, m.Dir)>>20)
	if threads > 40 {
		t.Errorf("%d threads", threads)
	}
}

// Sixty-four ranks read at once, each at its own places, and the server keeps within its memory.
func TestMemoryUnderRanks(t *testing.T) {
	dir, _ := picture(t, 96<<20, 0)
	m, err := start(t, order{Dir: dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	script := `for my $i (0..63) { next if fork; srand $i; open my $f, "<", $ARGV[0] or die; for (1..60) { sysseek $f, int(rand(95 << 20)), 0; sysread($f, my $b, 100000) == 100000 or die } exit }
my $bad = 0; while (wait != -1) { $bad ||= $? } exit($bad != 0)`
	ranks := exec.Command("perl", "-e", script, m.Dir+"/data")
	if err := ranks.Start(); err != nil {
		t.Fatal("this test needs perl (package perl-base): ", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- ranks.Wait() }()
	most := 0
	for running := true; running; {
		select {
		case err := <-ended:
			running = false
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Millisecond):
			most = max(most, private(t, m.Dir))
		}
	}
	if most > 120<<20 {
		t.Errorf("%d MiB while 64 ranks read", most>>20)
	} else {
		t.Logf("%d MiB while 64 ranks read", most>>20)
	}
}
