package compare

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plant makes a tree with one of everything.
func plant(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(dir+"/d", 0o755))
	must(os.WriteFile(dir+"/d/\xff\xfe", []byte("not UTF-8"), 0o644))
	must(os.WriteFile(dir+"/f", []byte("hello"), 0o600))
	must(os.Link(dir+"/f", dir+"/d/g"))
	must(os.Symlink("../f", dir+"/d/l"))
	must(unix.Mkfifo(dir+"/p", 0o640))
	must(unix.Mknod(dir+"/c", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(unix.Setxattr(dir+"/f", "user.x", []byte("1"), 0))
	sparse, err := os.Create(dir + "/sparse")
	must(err)
	must(sparse.Truncate(1 << 20))
	_, err = sparse.WriteAt([]byte("data"), 512<<10)
	must(err)
	must(sparse.Close())
	when := time.Unix(1e9, 123456789)
	must(filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		ts := unix.NsecToTimespec(when.UnixNano())
		must(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
		return err
	}))
	return dir
}

func list(t *testing.T, dir string) Listing {
	t.Helper()
	l, err := Walk(t.Context(), dir, Options{Data: true})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestWalkListsEverything(t *testing.T) {
	l := list(t, plant(t))
	var paths []string
	for _, e := range l {
		paths = append(paths, e.Path)
	}
	if want := []string{"/", "/c", "/d", "/d/g", "/d/l", "/d/\xff\xfe", "/f", "/p", "/sparse"}; !slices.Equal(paths, want) {
		t.Fatalf("got %q, want %q", paths, want)
	}
	f := l[6]
	if f.Link != "/d/g" || f.Nlink != 2 || f.Size != 5 || len(f.Xattrs) != 1 || f.Nsec != 123456789 ||
		f.Sum != "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" {
		t.Errorf("file: %+v", f)
	}
	if l[3].Sum != f.Sum {
		t.Errorf("the other name of a file has content %s", l[3].Sum)
	}
	if d := l[8].Data; len(d) != 1 || d[0].Start != 512<<10 {
		t.Errorf("data of the sparse file in %v", d)
	}
}

func TestEqualTreesDoNotDiffer(t *testing.T) {
	if d := Diff(list(t, plant(t)), list(t, plant(t)), DiffOptions{}); len(d) > 0 {
		t.Errorf("two equal trees differ:\n%s", strings.Join(d, "\n"))
	}
}

func TestDiffSeesEachChange(t *testing.T) {
	for what, change := range map[string]func(dir string) error{
		`"/d" mode`:                func(dir string) error { return os.Chmod(dir+"/d", 0o700) },
		`"/f" uid`:                 func(dir string) error { return os.Chown(dir+"/f", 5, 0) },
		`"/d/l" gid`:               func(dir string) error { return os.Lchown(dir+"/d/l", 0, 7) },
		`"/f" nlink`:               func(dir string) error { return os.Remove(dir + "/d/g") },
		`"/d/g" is missing`:        func(dir string) error { return os.Remove(dir + "/d/g") },
		`"/new" is there`:          func(dir string) error { return os.WriteFile(dir+"/new", nil, 0o644) },
		`"/f" content`:             func(dir string) error { return os.WriteFile(dir+"/f", []byte("hellO"), 0o644) },
		`"/f" size`:                func(dir string) error { return os.WriteFile(dir+"/f", []byte("hello!"), 0o644) },
		`"/f" mtime`:               func(dir string) error { return os.Chtimes(dir+"/f", time.Unix(1, 0), time.Unix(1, 0)) },
		`"/f" xattr "user.x" "2"`:  func(dir string) error { return unix.Setxattr(dir+"/f", "user.x", []byte("2"), 0) },
		`"/f" xattr "user.y" is t`: func(dir string) error { return unix.Setxattr(dir+"/f", "user.y", []byte("2"), 0) },
		`"/f" xattr "user.x" is m`: func(dir string) error { return unix.Removexattr(dir+"/f", "user.x") },
		`"/sparse" data in`:        func(dir string) error { return os.WriteFile(dir+"/sparse", make([]byte, 1<<20), 0o644) },
		`"/d/l" target`: func(dir string) error {
			os.Remove(dir + "/d/l")
			return os.Symlink("../x", dir+"/d/l")
		},
		`"/c" device`: func(dir string) error {
			os.Remove(dir + "/c")
			return unix.Mknod(dir+"/c", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5)))
		},
		`"/p" is a file, want a fifo`: func(dir string) error {
			os.Remove(dir + "/p")
			return os.WriteFile(dir+"/p", nil, 0o640)
		},
		`"/f" hard link to`: func(dir string) error {
			os.Remove(dir + "/d/g")
			return os.Link(dir+"/f", dir+"/z")
		},
	} {
		t.Run(what, func(t *testing.T) {
			want, dir := list(t, plant(t)), plant(t)
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
			d := Diff(list(t, dir), want, DiffOptions{})
			if !slices.ContainsFunc(d, func(s string) bool { return strings.HasPrefix(s, what) }) {
				t.Errorf("not seen; only\n%s", strings.Join(d, "\n"))
			}
		})
	}
}

func TestDiffForgives(t *testing.T) {
	want := list(t, plant(t))
	start := time.Unix(2e9, 0)
	for i := range want {
		if want[i].Path == "/d" {
			want[i].Sec = start.Unix()
		}
	}
	got := list(t, plant(t))
	if d := Diff(got, want, DiffOptions{}); len(d) != 1 {
		t.Errorf("a changed time makes %q", d)
	}
	if d := Diff(got, want, DiffOptions{UnpackedAt: start}); len(d) != 0 {
		t.Errorf("a directory with the time of unpacking makes %q", d)
	}
	if d := Diff(got, nil, DiffOptions{IgnorePaths: []string{"/d"}, Max: 2}); len(d) != 3 || d[2] != "and 3 more" {
		t.Errorf("nothing to compare with makes %q", d)
	}
	locked := Entry{Path: "/d", Mode: unix.S_IFDIR | 0o555}
	stale := locked
	stale.Xattrs = []Xattr{{"user.old", "1"}}
	if d := Diff(Listing{locked}, Listing{stale}, DiffOptions{}); len(d) != 1 {
		t.Errorf("a missing xattr makes %q", d)
	}
	if d := Diff(Listing{locked}, Listing{stale}, DiffOptions{Rootless: true}); len(d) != 0 {
		t.Errorf("an xattr that umoci could not remove makes %q", d)
	}
	if d := Diff(Listing{stale}, Listing{locked}, DiffOptions{Rootless: true}); len(d) != 1 {
		t.Errorf("an xattr too many makes %q", d)
	}
	if d := Diff(want[6:7], got[6:7], DiffOptions{IgnoreXattrs: []string{"user.x"}}); len(d) != 0 {
		t.Errorf("an equal file makes %q", d)
	}
}

func TestWalkStops(t *testing.T) {
	if _, err := Walk(t.Context(), "/does/not/exist", Options{}); err == nil {
		t.Error("a missing tree is listed")
	}
}
