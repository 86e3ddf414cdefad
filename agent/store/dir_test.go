package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestVersion(t *testing.T) {
	dir := t.TempDir() + "/s"
	openStore(t, dir, Options{}).Close()
	openStore(t, dir, Options{}).Close()
	write := func(text string) {
		if err := os.WriteFile(dir+"/format", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("muster store 2\n")
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a newer store: %v", err)
	}
	write("something else")
	if _, err := Open(dir, Options{}); err == nil || errors.Is(err, ErrVersion) {
		t.Errorf("a foreign version file: %v", err)
	}
	foreign := t.TempDir()
	if err := os.WriteFile(foreign+"/thesis.tex", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(foreign, Options{}); err == nil || !strings.Contains(err.Error(), "thesis.tex") {
		t.Errorf("a directory with other files: %v", err)
	}
}

func TestHosts(t *testing.T) {
	here := hostID{Boot: "b1", Machine: "m1", Node: "n1"}
	booted := hostID{Boot: "b2", Machine: "m1", Node: "n1"}
	cloned := hostID{Boot: "b3", Machine: "m1", Node: "n2"} // machine-id of one golden image
	local, shared := &FS{Type: "ext4", Holes: true, Punch: true}, &FS{Type: "lustre", Network: true, Holes: true, Punch: true}
	for _, tc := range []struct {
		name     string
		fs       *FS
		was, now hostID
		open     bool // the first one still has it open
		refused  bool
	}{
		{"same host", shared, here, here, true, false},
		{"same kernel, another container", shared, here, hostID{Boot: "b1", Machine: "m9", Node: "c9"}, true, false},
		{"booted since", shared, here, booted, false, false},
		{"another host", shared, here, cloned, false, true},
		{"another host at the same time", shared, here, cloned, true, true},
		{"disk moved, or host installed anew", local, here, cloned, false, false},
		{"two hosts on one local disk", local, here, cloned, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir() + "/s"
			first := openStore(t, dir, Options{fs: tc.fs, host: &tc.was, AllowNetwork: true})
			if !tc.open {
				first.Close()
			}
			s, err := Open(dir, Options{fs: tc.fs, host: &tc.now, AllowNetwork: true})
			if err == nil {
				s.Close()
			}
			if tc.refused != errors.Is(err, ErrHost) {
				t.Fatalf("%v", err)
			}
			if tc.refused && (!strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "n1")) {
				t.Errorf("unclear: %v", err)
			}
		})
	}
}

func TestNetworkRefused(t *testing.T) {
	dir := t.TempDir() + "/s"
	nfs := &FS{Type: "nfs4", Network: true, Holes: true, Punch: true}
	if _, err := Open(dir, Options{fs: nfs}); !errors.Is(err, ErrNetwork) || !strings.Contains(err.Error(), "nfs4") || !strings.Contains(err.Error(), dir) {
		t.Errorf("a store on NFS: %v", err)
	}
	openStore(t, dir, Options{fs: nfs, AllowNetwork: true})
	for _, typ := range []string{"nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "ceph", "beegfs", "fuse", "fuse.sshfs", "fuse.cvmfs2", "9p", "virtiofs", "gfs2", "ocfs2", "wekafs", "never-heard-of"} {
		if localTypes[typ] {
			t.Errorf("%s counts as local", typ)
		}
	}
	if _, err := probeType("/proc"); err != nil {
		t.Error(err)
	}
	if f, err := probeType("/dev/shm"); err != nil || f.Type != "tmpfs" || !f.Memory {
		t.Errorf("/dev/shm: %+v, %v", f, err)
	}
	if got := unescapeMount(`/a\040b\134c\04`); got != `/a b\c\04` {
		t.Errorf("unescaped to %q", got)
	}
}

func TestDefaultDir(t *testing.T) {
	uid := os.Geteuid()
	base := t.TempDir()
	cache, tmp, tmp2 := base+"/cache", base+"/tmp", base+"/tmp2"
	for _, d := range []string{tmp, tmp2} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	name := "/muster-" + strings.TrimPrefix(filepath.Base(mustDir(t, uid, "", tmp)), "muster-")
	if got := mustDir(t, uid, cache, tmp); got != cache+"/muster" {
		t.Errorf("a local cache: %s", got)
	}
	if got := mustDir(t, uid, "/proc/cache", tmp); got != tmp+name {
		t.Errorf("a cache that is not on a local disk: %s", got)
	}
	// Of somebody else.
	if err := os.Mkdir(tmp+name, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(tmp+name, uid+1, -1); err != nil {
		t.Fatal(err)
	}
	if got := mustDir(t, uid, "", tmp, tmp2); got != tmp2+name {
		t.Errorf("somebody else's directory: %s", got)
	}
	if _, err := Open(tmp+name, Options{}); err == nil {
		t.Error("somebody else's directory was opened")
	}
	os.Remove(tmp + name)
	// A link that leads away.
	if err := os.Symlink(tmp2, tmp+name); err != nil {
		t.Fatal(err)
	}
	if got := mustDir(t, uid, "", tmp, tmp2); got != tmp2+name {
		t.Errorf("a symbolic link: %s", got)
	}
	if err := os.Lchown(tmp+name, uid+1, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(tmp+name, Options{}); err == nil {
		t.Error("somebody else's link was followed")
	}
	os.Remove(tmp + name)
	// One that others may write to.
	os.Mkdir(tmp+name, 0o700)
	os.Chmod(tmp+name, 0o777)
	if _, err := defaultDir(uid, "", tmp); err == nil || !strings.Contains(err.Error(), "chmod") {
		t.Errorf("writable by others: %v", err)
	}
	// What is made is private.
	dir := openStore(t, base+"/new/deep", Options{}).Dir()
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode of a new store: %v, %v", st.Mode(), err)
	}
}

func mustDir(t *testing.T, uid int, cache string, tmps ...string) string {
	t.Helper()
	dir, err := defaultDir(uid, cache, tmps...)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDefaultQuota(t *testing.T) {
	dir := t.TempDir()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	disk, mem := DefaultQuota(dir, FS{}, 0), DefaultQuota(dir, FS{Memory: true}, 0)
	if disk > int64(st.Blocks)*st.Bsize || disk < 64<<20 || mem >= disk && disk > 64<<20 {
		t.Errorf("default quota %d on disk, %d in memory", disk, mem)
	}
}
