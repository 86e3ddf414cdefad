package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/registry"
)

// cgroups is every cgroup there is; none may stay that was not there before.
func cgroups() map[string]bool {
	all := map[string]bool{}
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error { //nolint:errcheck // they come and go
		if err == nil && d.IsDir() && strings.Contains(path, "muster") {
			all[path] = true
		}
		return nil
	})
	return all
}

// TestKilledRuns: muster run is killed at random moments of its pull, its start and its command; nothing stays, and
// the next run works. Its namespaces end with its processes.
func TestKilledRuns(t *testing.T) {
	before := cgroups()
	for name, user := range map[string]uint32{"root": 0, "user": somebody} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(1, uint64(user)))
			p := front(t)
			ref := through(p, image(t, "mixed"))
			h := newHost(t, user)
			for i := range 24 {
				if i%8 == 0 {
					h.forget() // so that there is something to pull
				}
				// A shell that waits for a program keeps SIGINT until that ends, in a container as outside; hence exec.
				r := h.start("run", ref, "sh", "-c", "python3 -c 'import json'; sleep 60 & exec sleep 60")
				time.Sleep(time.Duration(random.ExpFloat64() * float64(400*time.Millisecond)))
				sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT}[i%4]
				began := time.Now()
				r.Process.Signal(sig) //nolint:errcheck // waited for
				if code := r.end(t); sig != syscall.SIGKILL && code != 128+int(sig) {
					t.Errorf("%v: exit code %d: %s", sig, code, r.err.String())
				} else if sig != syscall.SIGKILL {
					plainMessage(t, strings.ReplaceAll(r.err.String(), "left\n", "left "))
				}
				h.processesGone(fmt.Sprintf("run %d, %v", i, sig))
				if took := time.Since(began); took > 2*time.Second {
					t.Logf("run %d took %v to end by %v", i, took, sig)
				}
				if t.Failed() {
					return
				}
			}
			if r := h.must("run", ref); !strings.Contains(r.stdout, "python") {
				t.Errorf("the next run: %q", r.stdout)
			}
			h.must("cache", "gc")
			h.clean("killed runs")
		})
	}
	t.Cleanup(func() {
		for c := range cgroups() {
			if !before[c] {
				t.Errorf("left behind: cgroup %s", c)
			}
		}
	})
}

// processesGone is clean without the files, which a killed process cannot take along: the next one does.
func (h *host) processesGone(after string) {
	h.t.Helper()
	for _, l := range left(h.dir) {
		h.t.Errorf("%s left behind: %s", after, l)
	}
}

// forget empties the host's store.
func (h *host) forget() {
	h.t.Helper()
	all, _ := filepath.Glob(filepath.Join(h.store, "*"))
	for _, f := range all {
		if err := os.RemoveAll(f); err != nil {
			h.t.Fatal(err)
		}
	}
}

// TestKilledStages: the process that holds a container's namespaces is killed; muster says so, and nothing stays.
func TestKilledStages(t *testing.T) {
	h := newHost(t, 0)
	ref := indexed(t, "debian-python")
	r := h.start("run", ref, "sh", "-c", "echo ready; sleep 60")
	eventually(t, "the command runs", func() bool { return strings.Contains(r.out.String(), "ready") })
	killed := false
	for _, p := range processesWith(h.store) {
		if strings.HasPrefix(commandLine(p), "muster-") {
			killed = unix.Kill(p, unix.SIGKILL) == nil
		}
	}
	if !killed {
		t.Fatal("found no process that holds the namespaces")
	}
	if code := r.end(t); code == 0 {
		t.Errorf("exit code %d", code)
	}
	plainMessage(t, r.err.String(), "muster: ")
	h.clean("a killed stage")
}

// TestKilledMounts: the command, the parent and the server of a mount are killed at random moments, alone and together.
// Either is replaced under the mount; both leave a mount that umount ends; in the end
// nothing is left and the directory can be mounted on again.
func TestKilledMounts(t *testing.T) {
	for name, user := range map[string]uint32{"root": 0, "user": somebody} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(2, uint64(user)))
			p := front(t)
			ref := through(p, big(t, 3))
			h := newHost(t, user)
			dir := h.mountPoint()
			for i := range 16 {
				what := []string{"command", "parent", "server", "both"}[i%4]
				if i%8 == 0 {
					h.forget()
				}
				p.Clear()
				if i < 8 {
					p.Inject(blobs(""), 0, registry.Trickle(2_000_000))
				}
				r := h.start("mount", ref, dir)
				if what == "command" {
					time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond)
					r.Process.Kill() //nolint:errcheck // waited for
					r.end(t)
				} else {
					if i%2 == 0 {
						r.end(t) // after the mount is ready, else at any moment
					}
					time.Sleep(time.Duration(random.IntN(150)) * time.Millisecond)
					for _, pid := range processesWith(h.store) {
						line := commandLine(pid)
						if what == "both" && strings.HasPrefix(line, "muster-") || strings.HasPrefix(line, "muster-mountd "+what) {
							unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may have ended
						}
					}
					r.end(t)
				}
				if what == "server" && i%2 == 0 {
					// Whoever reads notices nothing.
					if b, err := h.readFile(dir + "/data/0"); err != nil || len(b) != bigFileSize {
						t.Errorf("under a server that was killed: %d bytes, %v", len(b), err)
					}
				}
				if isMounted(dir) {
					// Whoever serves it may be faster.
					if r := h.muster("umount", dir); r.code != 0 && isMounted(dir) {
						t.Errorf("umount after killing the %s: exit code %d, %s", what, r.code, r.stderr)
					}
				}
				h.processesGone(fmt.Sprintf("mount %d, killed the %s", i, what))
				if t.Failed() {
					return
				}
			}
			p.Clear()
			h.must("mount", ref, dir)
			if b, err := h.readFile(dir + "/data/1"); err != nil || len(b) != bigFileSize {
				t.Errorf("the next mount: %d bytes, %v", len(b), err)
			}
			h.must("umount", dir)
			h.must("cache", "gc")
			h.clean("killed mounts")
		})
	}
}

// TestParentKilledAlone: a mount goes on when its parent is killed, and umount ends it as ever.
func TestParentKilledAlone(t *testing.T) {
	h := newHost(t, 0)
	dir := h.mountPoint()
	var m struct{ PID int }
	unmarshal(t, h.must("mount", "--json", image(t, "escape"), dir).stdout, &m)
	if err := unix.Kill(m.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another parent is there", func() bool {
		for _, pid := range processesWith(h.store) {
			if pid != m.PID && strings.HasPrefix(commandLine(pid), "muster-mountd parent") {
				return true
			}
		}
		return false
	})
	if b, err := h.readFile(dir + "/bin/say"); err != nil || len(b) != len(say()) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	h.must("umount", dir)
	h.processesGone("umount")
	h.must("mount", image(t, "escape"), dir)
}

// TestSignalsAtEachPhase: INT and TERM while muster resolves, pulls, and mounts end it at once, with 128 + N and nothing
// left.
func TestSignalsAtEachPhase(t *testing.T) {
	for _, phase := range []struct {
		name  string
		match registry.Match
		do    registry.Action
	}{
		{"resolve", registry.Match{Kind: registry.Manifest}, registry.Hang()},
		{"config", registry.Match{Kind: registry.Blob}, registry.Hang()},
		{"index", registry.Match{Kind: registry.Referrers}, registry.Hang()},
		{"pull", blobs(""), registry.Trickle(100_000)},
		{"stalled", blobs(""), registry.StallAfter(100_000)},
	} {
		for _, command := range []string{"run", "mount", "index create", "preflight"} {
			if command == "preflight" && phase.name != "resolve" {
				continue // it pulls nothing
			}
			t.Run(phase.name+"/"+command, func(t *testing.T) {
				t.Parallel()
				for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
					p, h := front(t), newHost(t, 0)
					p.Inject(phase.match, 0, phase.do)
					args := append(strings.Fields(command), through(p, image(t, "mixed")))
					dir := filepath.Join(h.newDir(), "new")
					if command == "mount" {
						args = append(args, dir)
					}
					r := h.start(args...)
					eventually(t, "it asks", func() bool {
						for _, r := range p.Log(registry.Match{}) {
							if r.Fault != "" {
								return true
							}
						}
						return false
					})
					began := time.Now()
					r.Process.Signal(sig) //nolint:errcheck // waited for
					if code := r.end(t); code != 128+int(sig) {
						t.Errorf("%v: exit code %d: %s", sig, code, r.err.String())
					}
					if took := time.Since(began); took > 20*time.Second {
						t.Errorf("it took %v to end", took)
					}
					plainMessage(t, lastLine(r.err.String()), "interrupted")
					h.clean(strconv.Quote(command) + " that was ended")
					if _, err := os.Stat(dir); err == nil {
						t.Error("the directory that mount made is left")
					}
				}
			})
		}
	}
}

// TestSignalBeforeTheCommandRuns: the tree is mounted, and the file that says who the command is to run as does not come.
func TestSignalBeforeTheCommandRuns(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p, h := front(t), newHost(t, 0)
			ref, dir := through(p, big(t, 1)), h.mountPoint()
			h.must("mount", ref, dir) // keeps the tables
			h.must("umount", dir)
			if err := os.RemoveAll(filepath.Join(h.store, "blobs")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(h.store, "blobs"), 0o700); err != nil {
				t.Fatal(err)
			}
			p.ResetLog()
			programs := blobs(bigImage(1).Layers[0].Descriptor.Digest)
			p.Inject(programs, 0, registry.Hang())
			r := h.start("run", "--user", "worker", ref, "/bin/say")
			eventually(t, "bytes are asked for", func() bool {
				for _, r := range p.Log(programs) {
					if r.Fault != "" {
						return true
					}
				}
				return false
			})
			time.Sleep(500 * time.Millisecond) // so that it waits for them
			began := time.Now()
			r.Process.Signal(sig) //nolint:errcheck // waited for
			if code := r.end(t); code != 128+int(sig) {
				t.Errorf("exit code %d: %s", code, r.err.String())
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %v to end", took)
			}
			plainMessage(t, lastLine(r.err.String()), "interrupted")
			h.clean("a run that was ended before its command ran")
		})
	}
}

func lastLine(s string) string {
	all := strings.Split(strings.TrimSpace(s), "\n")
	return all[len(all)-1]
}
