package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// other builds muster with one file of package tree changed: what stands in old becomes what stands in changed.
func other(t *testing.T, file, old, changed string) string {
	t.Helper()
	dir := tempDir(t, 0)
	source, err := filepath.Abs("../../lazyfs/tree/" + file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(b), old) != 1 {
		t.Fatalf("%s does not have %q once: the test has to follow it", file, old)
	}
	replaced := filepath.Join(dir, file)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{source: replaced}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{replaced: []byte(strings.Replace(string(b), old, changed, 1)), dir + "/overlay": overlay} {
		if err := os.WriteFile(name, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-overlay", dir+"/overlay", "-o", dir+"/muster", "../../cmd/muster")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build a muster with another %s: %v\n%s", file, err, out)
	}
	return dir + "/muster"
}

// TestUpgradeMounts: mounts in use go over to a muster that would build their tables in another order, and back, and stay as
// they are where a muster reads no table of theirs. Who reads notices nothing.
func TestUpgradeMounts(t *testing.T) {
	t.Parallel()
	backward := other(t, "encode.go", `		case a.order < b.order:
			return -1
		case a.order > b.order:
			return 1`, `		case a.order < b.order:
			return 1
		case a.order > b.order:
			return -1`)
	later := other(t, "format.go", "	version = 1\n", "	version = 2\n")
	for _, compat := range []string{"", string(lazyfs.Compat514)} {
		for name, user := range map[string]uint32{"root": 0, "user": somebody} {
			t.Run(name+" "+compat, func(t *testing.T) {
				h := newHost(t, user)
				h.env = append(h.env, lazyfs.CompatVariable+"="+compat)
				dir := h.mount(big(t, 2))
				before := h.walk(dir)

				stop := make(chan struct{})
				var wg sync.WaitGroup
				wg.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						file := fmt.Sprintf("%s/data/%d", dir, n%bigFiles)
						if f, err := os.Open(file); err == nil && user == 0 {
							unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) //nolint:errcheck // then it is from the page cache
							f.Close()
						}
						if b, err := h.readFile(file); err != nil || string(b) != string(bigBody(2, n%bigFiles)) {
							t.Errorf("%s: %d bytes, %v", file, len(b), err)
							return
						}
					}
				})
				upgrade := func(program string, args ...string) result {
					cmd := h.command(append([]string{"upgrade-mounts"}, args...)...)
					cmd.Path = program
					return h.finish(cmd)
				}
				// The old parent has answered before it ends.
				served := func(program string) {
					t.Helper()
					eventually(t, "two processes of "+program+" serve", func() bool {
						s := serving(h)
						return len(s) == 2 && s[0] == program && s[1] == program
					})
				}
				for _, program := range []string{backward, binary, backward} {
					if r := upgrade(program, dir); r.code != 0 {
						t.Errorf("upgrade: exit code %d: %s", r.code, r.stderr)
					}
					served(program)
				}
				if after := h.walk(dir); fmt.Sprint(after) != fmt.Sprint(before) {
					t.Error("the tree looks otherwise")
				}
				r := upgrade(later, dir)
				if r.code != 1 {
					t.Errorf("upgrade to a muster of another version of tables: exit code %d", r.code)
				}
				plainMessage(t, r.stderr, dir, "refused", "table", "1", "2", "served as before")
				served(backward)
				close(stop)
				wg.Wait()
				h.must("umount", dir)
			})
		}
	}
}

// serving is the programs of the processes that serve h's mounts.
func serving(h *host) (programs []string) {
	for _, pid := range processesWith(h.store) {
		if strings.HasPrefix(commandLine(pid), "muster-mountd ") {
			exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			programs = append(programs, exe)
		}
	}
	return programs
}
