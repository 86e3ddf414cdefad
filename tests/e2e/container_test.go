package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/tests/e2e/compare"
)

// containers are the images that containers are compared for.
var containers = []string{"debian-python", "torture"}

// TestContainerEqualsContainer lists the whole tree from inside a container that muster runs with runc, and
// from inside one that runc runs over umoci's unpack: both are the same.
func TestContainerEqualsContainer(t *testing.T) {
	for _, name := range containers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, 0)
			cmd := h.command("run", "--runtime", "runc", "--bind", self()+":/walker:ro", "--env", asUser+"="+inside, "--user", "0:0", "--workdir", "/", "--entrypoint", "/walker", image(t, name))
			got := h.inside(cmd)

			u := h.unpacked(name)
			bundle := filepath.Dir(u.root)
			h.editBundle(bundle)
			id := fmt.Sprintf("muster-e2e-%d-%s", os.Getpid(), name)
			runc := exec.Command("runc", "--root", h.newDir(), "run", "--bundle", bundle, id)
			want := h.inside(runc)
			report(t, compare.Diff(got, want, compare.DiffOptions{UnpackedAt: u.began, IgnorePaths: []string{
				"/etc/resolv.conf", "/etc/hosts", "/tmp", // the last is made where an image has none
			}}))
		})
	}
}

// inside, instead of a directory, tells the walker to list the container that it is in.
const inside = "container"

// notTheImages are what a runtime puts into a container's root; /etc is there for its time, which making
// resolv.conf in it changes.
var notTheImages = []string{"dev", "proc", "sys", "run", "walker"}

// inside is the listing that the walker in a container makes.
func (h *host) inside(cmd *exec.Cmd) compare.Listing {
	h.t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		h.t.Fatalf("%v: %v: %s", cmd.Args, err, errs.String())
	}
	var l compare.Listing
	if err := gob.NewDecoder(&out).Decode(&l); err != nil {
		h.t.Fatalf("%v: %v: %s", cmd.Args, err, errs.String())
	}
	if len(l) < 10 {
		h.t.Fatalf("%v listed %d files", cmd.Args, len(l))
	}
	return l
}

// editBundle makes umoci's config run the walker, with the capabilities that muster gives.
func (h *host) editBundle(dir string) {
	h.t.Helper()
	file := filepath.Join(dir, "config.json")
	b, err := os.ReadFile(file)
	if err != nil {
		h.t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(b, &c); err != nil {
		h.t.Fatal(err)
	}
	process := c["process"].(map[string]any)
	process["args"], process["terminal"] = []string{"/walker"}, false
	process["env"] = []string{asUser + "=" + inside}
	process["cwd"], process["user"] = "/", map[string]any{"uid": 0, "gid": 0}
	caps := []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
		"CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_AUDIT_WRITE", "CAP_SETFCAP",
	}
	process["capabilities"] = map[string]any{"bounding": caps, "effective": caps, "permitted": caps}
	delete(process, "rlimits")
	mounts := c["mounts"].([]any)
	c["mounts"] = append(slices.DeleteFunc(mounts, func(m any) bool {
		return m.(map[string]any)["destination"] == "/sys/fs/cgroup"
	}), map[string]any{"destination": "/walker", "type": "bind", "source": self(), "options": []string{"bind", "ro"}})
	if b, err = json.Marshal(c); err == nil {
		err = os.WriteFile(file, b, 0o644)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// fileOf is the content of one file of a tar archive.
func fileOf(archive []byte, name string) ([]byte, error) {
	tr := tar.NewReader(bytes.NewReader(archive))
	for {
		e, err := tr.Next()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if strings.TrimPrefix(e.Name, "./") == name {
			return io.ReadAll(tr)
		}
	}
}
