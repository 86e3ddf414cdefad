package lazyfs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

func small(t testing.TB) *image {
	dir := func(name string) member {
		return member{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: time.Unix(2e9, 0)}, nil}
	}
	x := file("etc/withattrs", []byte("x"))
	x.PAXRecords = map[string]string{"SCHILY.xattr.user.one": "1", "SCHILY.xattr.user.two": strings.Repeat("2", 300)}
	return build(t, testSpan, true,
		[]member{
			dir("etc"), dir("usr"), dir("usr/bin"),
			file("etc/hostname", []byte("localhost\n")), x,
			file("usr/big", text(1, 3<<20)),
			{tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/link", Linkname: "../etc/hostname"}, nil},
			{tar.Header{Typeflag: tar.TypeLink, Name: "usr/hard", Linkname: "usr/big"}, nil},
			file("empty", nil),
		},
		[]member{file("usr/bin/tool", text(2, 700_000)), file("usr/bin/.wh.none", nil)},
	)
}

func TestTreeThroughTheMount(t *testing.T) {
	img := small(t)
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		m := mount(t, img, c, nil)
		for _, name := range []string{"etc/hostname", "usr/big", "usr/bin/tool", "empty"} {
			got, err := os.ReadFile(m.path(name))
			if err != nil || !bytes.Equal(got, img.files[name]) {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		}
		if b, err := os.ReadFile(m.path("usr/link")); err != nil || string(b) != "localhost\n" {
			t.Errorf("through a link: %q, %v", b, err)
		}
		var names []string
		err := filepath.WalkDir(m.dir, func(p string, _ os.DirEntry, err error) error {
			names = append(names, strings.TrimPrefix(p, m.dir))
			return err
		})
		if want := "|/empty|/etc|/etc/hostname|/etc/withattrs|/usr|/usr/big|/usr/bin|/usr/bin/tool|/usr/hard|/usr/link"; err != nil || strings.Join(names, "|") != want {
			t.Errorf("walk: %v, %v", names, err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(m.path("usr/hard"), &st); err != nil || st.Nlink != 2 || st.Size != 3<<20 || st.Mtim.Nsec != 5 {
			t.Errorf("stat: %+v, %v", st, err)
		}
		if _, err := os.Stat(m.path("none")); !os.IsNotExist(err) {
			t.Errorf("a name that is not there: %v", err)
		}
		for _, err := range []error{
			os.WriteFile(m.path("new"), nil, 0o644), os.Remove(m.path("empty")), os.Mkdir(m.path("d"), 0o755),
			os.Chmod(m.path("empty"), 0o600), os.Symlink("a", m.path("b")), os.Truncate(m.path("usr/big"), 0),
		} {
			if !isErrno(err, unix.EROFS) {
				t.Errorf("a change of a read-only tree: %v", err)
			}
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(m.dir, &fs); err != nil || fs.Files != uint64(img.table.Totals().Inodes) || fs.Namelen != 255 {
			t.Errorf("statfs: %+v, %v", fs, err)
		}
		line := ""
		for _, l := range mounts() {
			if strings.Contains(l, m.dir) {
				line = l
			}
		}
		for _, want := range []string{`muster\043Test`, "fuse.muster", "ro,", "nosuid", "nodev", "default_permissions", "allow_other"} {
			if !strings.Contains(line, want) {
				t.Errorf("%q is missing in %q", want, line)
			}
		}
	})
}

// fusermount3 mounts for those who may not do it themselves.
func TestMountByHelper(t *testing.T) {
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Fatal("this test needs fusermount3 (package fuse3)")
	}
	img := small(t)
	dir := t.TempDir()
	dev, err := lazyfs.Mount(t.Context(), dir, lazyfs.MountOptions{Name: "Test,with\\ odd name", AllowOther: true, Helper: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	s, err := lazyfs.New(lazyfs.Config{Table: img.table, Layers: img.layers, Blobs: &memory{blobs: img.blobs}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), dev) }()
	out, err := exec.Command("cat", filepath.Join(dir, "etc/hostname")).Output()
	if err != nil || string(out) != "localhost\n" {
		t.Errorf("%q, %v", out, err)
	}
	if c, err := lazyfs.Mounted(dir); err != nil || c.Source != "muster#Test_with__odd_name" {
		t.Errorf("%+v, %v", c, err)
	}
	if busy, err := lazyfs.Unmount(t.Context(), dir); busy || err != nil {
		t.Errorf("busy %v, %v", busy, err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("serve did not end")
	}
}

func TestMountFails(t *testing.T) {
	f := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(f, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := lazyfs.Mount(t.Context(), f, lazyfs.MountOptions{}); !isErrno(err, unix.ENOTDIR) {
		t.Error(err)
	}
	if _, err := lazyfs.Mount(t.Context(), f+"none", lazyfs.MountOptions{}); !os.IsNotExist(err) {
		t.Error(err)
	}
	if _, err := lazyfs.Mounted(f); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func isErrno(err error, want syscall.Errno) bool {
	for err != nil {
		if e, ok := err.(syscall.Errno); ok {
			return e == want
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			return false
		}
		err = u.Unwrap()
	}
	return false
}
