package e2e

import (
	"context"
	"encoding/gob"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/e2e/compare"
	"github.com/muster-hpc/muster/tests/images"
)

// TestTreeEqualsUnpack mounts every test image and holds the whole tree, names, modes, owners, times, link
// counts, xattrs and content, against what umoci unpacks: root's unpack for root's mount, a rootless one
// for a user's.
func TestTreeEqualsUnpack(t *testing.T) {
	for _, name := range images.Names() {
		plain := images.Plain(name)
		if plain == "" {
			continue // nothing that umoci could unpack it to; other tests look at these
		}
		if !long && (name == "debian-scipy" || name == "one-layer") {
			continue // 900 MB each, of the same packages as debian-python
		}
		t.Run(name, func(t *testing.T) {
			for _, user := range []uint32{0, somebody} {
				t.Run(map[bool]string{true: "image", false: "user"}[user == 0], func(t *testing.T) {
					h := newHost(t, user)
					dir := h.mount(image(t, name))
					began := time.Now()
					root := h.unpack(layout(t, plain))
					got, want := h.walk(dir), h.walk(root)
					report(t, compare.Diff(got, want, compare.DiffOptions{
						UnpackedAt: began, Rootless: user != 0, IgnorePaths: markers(name),
					}))
				})
			}
		})
	}
}

// markers are the files that an image's own builder added and its plain form lacks.
func markers(name string) (paths []string) {
	if strings.Contains(name, "stargz") {
		for _, m := range images.Markers {
			paths = append(paths, "/"+m)
		}
	}
	return paths
}

func report(t *testing.T, diff []string) {
	t.Helper()
	for _, d := range diff {
		t.Error(d)
	}
}

// unpack unpacks a layout as the host's user would with umoci.
func (h *host) unpack(layout string) string {
	h.t.Helper()
	bundle := filepath.Join(tempDir(h.t, h.user), "bundle")
	args := []string{"unpack", "--image", layout + ":latest", bundle}
	if h.user != 0 {
		args = slices.Insert(args, 1, "--rootless")
	}
	cmd := exec.Command("umoci", args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "HOME="+h.store)
	if h.user != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.user, Gid: h.user}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("umoci: %v (apt-get install umoci)\n%s", err, out)
	}
	return filepath.Join(bundle, "rootfs")
}

// walkAsUser lists a tree in a process of the host's user: a user's mount is closed to everybody else,
// root included.
func (h *host) walkAsUser(dir string) compare.Listing {
	h.t.Helper()
	self := filepath.Join(filepath.Dir(binary), "walker")
	if _, err := os.Stat(self); err != nil {
		me, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			h.t.Fatal(err)
		}
		if err := os.WriteFile(self, me, 0o755); err != nil {
			h.t.Fatal(err)
		}
	}
	cmd := exec.Command(self)
	cmd.Dir = "/"
	cmd.Env = []string{asUser + "=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.user, Gid: h.user}}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	var l compare.Listing
	if err := gob.NewDecoder(out).Decode(&l); err != nil {
		h.t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		h.t.Fatal(err)
	}
	return l
}

// walkFor is the other side of walkAsUser.
func walkFor(dir string) int {
	l, err := compare.Walk(context.Background(), dir, compare.Options{})
	if err == nil {
		err = gob.NewEncoder(os.Stdout).Encode(l)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
