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
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
		for _, user := range []uint32{0, somebody} {
			if !long && user != 0 && (name == "estargz-50k" || plain == "gzip" && name != "gzip") {
				continue // nothing about them is different for a user, and umoci takes long
			}
			t.Run(name+map[bool]string{true: "/image", false: "/user"}[user == 0], func(t *testing.T) {
				t.Parallel()
				h := newHost(t, user)
				want := h.unpacked(plain)
				got := h.walk(h.mount(image(t, name)))
				report(t, compare.Diff(got, want.list, compare.DiffOptions{
					UnpackedAt: want.began, Rootless: user != 0, IgnorePaths: markers(name),
				}))
			})
		}
	}
}

// TestTreeOnOldKernels does the same with the features of newer kernels masked: RHEL 8 and 9 are where HPC lives.
func TestTreeOnOldKernels(t *testing.T) {
	for _, name := range []string{"gzip", "estargz", "escape"} {
		for _, user := range []uint32{0, somebody} {
			t.Run(name+map[bool]string{true: "/image", false: "/user"}[user == 0], func(t *testing.T) {
				t.Parallel()
				h := newHost(t, user)
				h.env = []string{"MUSTER_FUSE_COMPAT=5.14"}
				want := h.unpacked(name)
				got := h.walk(h.mount(image(t, name)))
				report(t, compare.Diff(got, want.list, compare.DiffOptions{
					UnpackedAt: want.began, Rootless: user != 0, IgnorePaths: markers(name),
				}))
			})
		}
	}
}

// An unpacking is the listing of an image as umoci unpacked it.
type unpacking struct {
	once  sync.Once
	list  compare.Listing
	began time.Time
	root  string // where it still lies, for images that containers are run from
}

// unpackings has them by user and diff IDs: images of the same archives are unpacked once.
var unpackings sync.Map

// unpacked is what umoci makes of an image, for the host's user.
func (h *host) unpacked(name string) *unpacking {
	h.t.Helper()
	layers, err := images.ReadLayout(layout(h.t, name))
	if err != nil {
		h.t.Fatal(err)
	}
	key := fmt.Sprint(h.user)
	for _, l := range layers {
		key += " " + l.DiffID
	}
	v, _ := unpackings.LoadOrStore(key, new(unpacking))
	u := v.(*unpacking)
	u.once.Do(func() {
		u.began = time.Now()
		dir := tempDir(h.t, h.user)
		keep := h.user == 0 && slices.Contains(containers, name)
		if keep { // longer than this test
			var err error
			if dir, err = os.MkdirTemp(home, "bundle-"); err != nil {
				h.t.Fatal(err)
			}
		}
		root := h.unpack(layout(h.t, name), dir)
		l := h.walk(root)
		if keep {
			u.root = root
		} else if err := os.RemoveAll(filepath.Dir(root)); err != nil {
			h.t.Error(err)
		}
		u.list = l
	})
	if u.list == nil {
		h.t.Fatal("umoci did not unpack it, see the test that tried first")
	}
	return u
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

// unpack unpacks a layout into dir as the host's user would with umoci, and gives its root.
func (h *host) unpack(layout, dir string) string {
	h.t.Helper()
	bundle := filepath.Join(dir, "bundle")
	args := []string{"unpack", "--image", layout + ":latest", bundle}
	if h.user != 0 {
		args = slices.Insert(args, 1, "--rootless")
	}
	cmd := exec.Command("umoci", args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "HOME="+h.dir)
	if h.user != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.user, Gid: h.user}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("umoci: %v (apt-get install umoci)\n%s", err, out)
	}
	return filepath.Join(bundle, "rootfs")
}

// walkAsUser lists a tree in a process of the host's user: a user's mount is closed to everybody else,
// root included. The process may read whatever its modes are: an owner could change them in the unpacked
// tree, in the mount nobody can.
func (h *host) walkAsUser(dir string) compare.Listing {
	h.t.Helper()
	cmd := exec.Command(self())
	cmd.Dir = "/"
	cmd.Env = []string{asUser + "=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: h.user, Gid: h.user}, AmbientCaps: []uintptr{unix.CAP_DAC_READ_SEARCH},
	}
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

// self is this test binary where every user can execute it.
var self = sync.OnceValue(func() string {
	file := filepath.Join(home, "walker")
	me, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(file, me, 0o755)
	}
	if err != nil {
		panic(err)
	}
	return file
})

// walkFor is the other side of walkAsUser, and of host.inside.
func walkFor(dir string) int {
	var l compare.Listing
	var err error
	if dir == inside {
		l, err = walkContainer()
	} else {
		l, err = compare.Walk(context.Background(), dir, compare.Options{})
	}
	if err == nil {
		err = gob.NewEncoder(os.Stdout).Encode(l)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// walkContainer lists the root that this process is in, without what its runtime put there.
func walkContainer() (all compare.Listing, err error) {
	top, err := os.ReadDir("/")
	if err != nil {
		return nil, err
	}
	for _, e := range top {
		if slices.Contains(notTheImages, e.Name()) {
			continue
		}
		at := "/" + e.Name()
		if !e.IsDir() {
			// A directory is what Walk wants; the names of one level are enough for the rest.
			i, err := os.Lstat(at)
			if err != nil {
				return nil, err
			}
			target, _ := os.Readlink(at)
			all = append(all, compare.Entry{Path: at, Mode: uint32(i.Mode()), Size: i.Size(), Target: target})
			continue
		}
		l, err := compare.Walk(context.Background(), at, compare.Options{})
		if err != nil {
			return nil, err
		}
		for _, f := range l {
			f.Path = strings.TrimSuffix(at+f.Path, "/")
			if f.Link != "" {
				f.Link = at + f.Link
			}
			if f.Path == "/etc" {
				f.Sec, f.Nsec, f.Nlink = 0, 0, 0 // making resolv.conf changes it
			}
			all = append(all, f)
		}
	}
	slices.SortFunc(all, func(a, b compare.Entry) int { return strings.Compare(a.Path, b.Path) })
	return all, nil
}

// diffNames compares only what a file system above another leaves alone.
func diffNames(got, want compare.Listing) []string {
	strip := func(l compare.Listing) (out compare.Listing) {
		for _, e := range l {
			if e.Path == "/" {
				continue // it is the upper directory's
			}
			out = append(out, compare.Entry{Path: e.Path, Mode: e.Mode, UID: e.UID, GID: e.GID, Size: e.Size, Rdev: e.Rdev, Sec: e.Sec, Nsec: e.Nsec, Target: e.Target, Sum: e.Sum})
		}
		return out
	}
	return compare.Diff(strip(got), strip(want), compare.DiffOptions{})
}
