package store

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

func put(t *testing.T, s *Store, kind Kind, key string, data []byte) {
	t.Helper()
	if err := s.Put(kind, key, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func has(s *Store, kind Kind, key string) bool {
	f, err := s.Get(kind, key)
	if err == nil {
		f.Close()
	}
	return err == nil
}

func TestFiles(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	if _, err := s.Get(KindZtoc, "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	data := content(1, 700_000)
	put(t, s, KindZtoc, "sha256:abc", data)
	f, err := s.Get(KindZtoc, "sha256:abc")
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, KindZtoc, "sha256:abc", []byte("new"))
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, data) {
		t.Errorf("an open file changed: %v", err)
	}
	f.Close()
	failed := errors.New("failed")
	if err := s.Put(KindZtoc, "sha256:abc", func(w io.Writer) error {
		w.Write(data)
		return failed
	}); !errors.Is(err, failed) {
		t.Errorf("a failed put: %v", err)
	}
	f, _ = s.Get(KindZtoc, "sha256:abc")
	if got, _ := io.ReadAll(f); string(got) != "new" {
		t.Errorf("a failed put left %d bytes", len(got))
	}
	f.Close()
	if left, _ := os.ReadDir(s.path(tmpDir)); len(left) > 0 {
		t.Errorf("%d temporary files are left", len(left))
	}
	checkUsed(t, s)
	for _, key := range []string{"", ".", "..", ".x", "../x", "a/b", "a\x00b", "a\nb", string(bytes.Repeat([]byte("x"), 201))} {
		if err := s.Put(KindZtoc, key, nil); !errors.Is(err, ErrKey) {
			t.Errorf("key %q: %v", key, err)
		}
		if err := s.Pin(key, nil); !errors.Is(err, ErrKey) {
			t.Errorf("pin of key %q: %v", key, err)
		}
	}
	if err := s.Put("../../etc", "passwd", nil); !errors.Is(err, ErrKey) {
		t.Errorf("an unknown kind: %v", err)
	}
	if err := s.Delete(KindZtoc, "sha256:abc"); err != nil || has(s, KindZtoc, "sha256:abc") {
		t.Errorf("delete: %v", err)
	}
	if err := s.Delete(KindZtoc, "sha256:abc"); err != nil {
		t.Errorf("delete of nothing: %v", err)
	}
	checkUsed(t, s)
}

// TestSeal: a small file that a crash has torn is as good as none.
func TestSeal(t *testing.T) {
	dir := t.TempDir() + "/s"
	s := openStore(t, dir, Options{host: &hostID{Boot: "before", Machine: "m", Node: "n"}})
	data := content(1, 300_000)
	for _, key := range []string{"good", "short", "zeros", "empty"} {
		put(t, s, KindTable, key, data)
	}
	put(t, s, KindTable, "nothing", nil)
	path := func(key string) string { return s.path(filesDir, "table", key) }
	f, err := os.OpenFile(path("zeros"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteAt(make([]byte, 4096), 8192)
	os.Truncate(path("short"), 200_000)
	os.Truncate(path("empty"), 0)
	s.Close()

	s = openStore(t, dir, Options{host: &hostID{Boot: "after", Machine: "m", Node: "n"}})
	for range 2 {
		for key, want := range map[string]bool{"good": true, "nothing": true, "short": false, "zeros": false, "empty": false} {
			if has(s, KindTable, key) != want {
				t.Errorf("%s: %v", key, !want)
			}
		}
	}
	if names, _ := os.ReadDir(s.path(filesDir, "table")); len(names) != 2 {
		t.Errorf("%d files are left", len(names))
	}
	// Known to be good in this boot, it is not read again.
	var b [64]byte
	if n, err := unix.Getxattr(path("good"), sealAttr, b[:]); err != nil || n != sealLen || !bytes.HasPrefix(b[:], seal("after", 300_000, 0)[:25]) {
		t.Errorf("seal of %d bytes, %v", n, err)
	}
}

// TestTempOfTheDead: temporary files of killed processes are swept, those of living ones are not.
func TestTempOfTheDead(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	alive, err := s.newTemp()
	if err != nil {
		t.Fatal(err)
	}
	defer alive.discard()
	if err := os.WriteFile(s.path(tmpDir, "4711-1"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	openStore(t, s.Dir(), Options{})
	names, _ := os.ReadDir(s.path(tmpDir))
	if len(names) != 1 || s.path(tmpDir, names[0].Name()) != alive.name {
		t.Errorf("temporary files left: %v", names)
	}
}

func TestImages(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	var refs []ztoc.BlobRef
	for i := range 4 {
		refs = append(refs, fill(t, s, content(uint64(i), 1<<20), time.Duration(i+1)*24*time.Hour))
	}
	loose := fill(t, s, content(9, 1<<20), 2*time.Hour)
	for _, k := range []string{"a", "b", "shared", "loose"} {
		put(t, s, KindTable, k, content(3, 20000))
		old := time.Now().Add(-2 * time.Hour)
		os.Chtimes(s.path(filesDir, "table", k), old, old)
	}
	keyA, keyB := string(ztoc.DigestOf([]byte("a"))), string(ztoc.DigestOf([]byte("b")))
	for _, im := range []Image{
		{Key: keyA, Reference: "example.org/a:1", Blobs: refs[:3], Files: []File{{KindTable, "a"}, {KindTable, "shared"}}},
		{Key: keyB, Reference: "example.org/b:1", Blobs: refs[2:], Files: []File{{KindTable, "b"}, {KindTable, "shared"}}},
	} {
		if err := s.PutImage(im); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Pin(keyB, []ztoc.Digest{refs[3].Digest}); err != nil {
		t.Fatal(err)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 {
		t.Fatalf("list: %v, %v", list, err)
	}
	if b := list[0]; b.Key != keyB || !b.Pinned || b.InUse || b.Size != 2<<20 || b.Present != 2<<20 || b.Unique >= b.Alloc || b.Created.IsZero() {
		t.Errorf("image b: %+v", b)
	}
	u, err := s.Usage()
	if err != nil || u.Blobs != 5 || u.Files != 4 || u.Loose < 1<<20 || u.Used < 5<<20 {
		t.Errorf("usage %+v, %v", u, err)
	}

	// GC takes what nobody refers to, after its grace.
	if r, err := s.GC(GCOptions{Grace: 3 * time.Hour}); err != nil || r.Files != 0 {
		t.Errorf("gc within the grace: %+v, %v", r, err)
	}
	if r, err := s.GC(GCOptions{}); err != nil || r.Files != 2 || stored(s, loose) || has(s, KindTable, "loose") || r.Freed < 1<<20 {
		t.Errorf("gc: %+v, %v", r, err)
	}

	// Remove takes what no other image refers to. A blob in use loses its bytes at once.
	inUse := openBlob(t, s, refs[0])
	freed, err := s.Remove(keyA)
	if err != nil || freed < 2<<20 || freed > 2<<20+200<<10 {
		t.Errorf("removing a freed %d bytes: %v", freed, err)
	}
	if inUse.Present() != 0 || stored(s, refs[1]) || !stored(s, refs[2]) || !stored(s, refs[3]) {
		t.Errorf("after removing a: %d, %v %v %v", inUse.Present(), stored(s, refs[1]), stored(s, refs[2]), stored(s, refs[3]))
	}
	if has(s, KindTable, "a") || !has(s, KindTable, "b") || !has(s, KindTable, "shared") {
		t.Error("files after removing a")
	}
	if _, err := s.Remove(keyA); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing it again: %v", err)
	}
	// A reader that goes on stores again.
	if err := inUse.WriteAt(content(0, 1<<20), 0); err != nil || inUse.Verify(t.Context()) != nil {
		t.Errorf("after removal: %v", err)
	}
	if _, err := s.Remove(keyB); err != nil || stored(s, refs[3]) {
		t.Errorf("removing the pinned b: %v", err)
	}
	if pins, err := s.Pins(); err != nil || len(pins) != 0 {
		t.Errorf("pins left: %v, %v", pins, err)
	}
	checkUsed(t, s)
}

// TestPinnedFiles: a pinned image's small files stay too; profiles and references go last.
func TestPinnedFiles(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 4 << 20})
	put(t, s, KindTable, "kept", content(1, 300_000))
	put(t, s, KindTable, "other", content(1, 300_000))
	put(t, s, KindProfile, "p", content(1, 300))
	if err := s.PutImage(Image{Key: "im", Files: []File{{KindTable, "kept"}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Pin("im", nil); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		fill(t, s, content(uint64(i), 3<<20), 0)
	}
	if !has(s, KindTable, "kept") || has(s, KindTable, "other") || !has(s, KindProfile, "p") {
		t.Errorf("left: %v %v %v", has(s, KindTable, "kept"), has(s, KindTable, "other"), has(s, KindProfile, "p"))
	}
}

func TestDamagedRecords(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	if err := s.PutImage(Image{Key: "good"}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"torn": "", "zeros": "\x00\x00\x00", "moved": `{"key":"good"}`} {
		if err := os.WriteFile(s.path(imagesDir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if images, err := s.Images(); err != nil || len(images) != 1 || images[0].Key != "good" {
		t.Errorf("images: %v, %v", images, err)
	}
	if names, _ := os.ReadDir(s.path(imagesDir)); len(names) != 1 {
		t.Errorf("%d records are left", len(names))
	}
}

// TestHostileRefs: what a manifest says about a blob makes no trouble.
func TestHostileRefs(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 64 << 20})
	data := content(1, 100_000)
	ref := refOf(data)
	for _, bad := range []ztoc.BlobRef{
		{Digest: "sha256:../../../../etc/passwd", Size: 1},
		{Digest: "", Size: 1},
		{Digest: ref.Digest, Size: -1},
		{Digest: ref.Digest, Size: 1 << 62},
	} {
		if b, err := s.Blob(bad); err == nil {
			b.Close()
			t.Errorf("%v was opened", bad)
		}
	}
	lie := openBlob(t, s, ztoc.BlobRef{Digest: ref.Digest, Size: 5})
	lie.WriteAt(data[:5], 0)
	b := openBlob(t, s, ref)
	if err := b.WriteAt(data, 0); err != nil || b.Verify(t.Context()) != nil {
		t.Errorf("a lie about the size spoils the blob: %v", err)
	}
	if err := lie.Verify(t.Context()); !errors.Is(err, ErrCorrupt) {
		t.Errorf("the lie: %v", err)
	}
	// A table for a terabyte does not fit this quota.
	if b, err := s.Blob(ztoc.BlobRef{Digest: ref.Digest, Size: MaxBlob}); err == nil {
		b.Close()
		t.Error("a table beyond the quota was made")
	} else if !errors.Is(err, ErrNoSpace) {
		t.Error(err)
	}
}

// TestHandles: handles of one blob share a file; after the last is closed nothing is left open.
func TestHandles(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 100_000)
	a, b := openBlob(t, s, refOf(data)), openBlob(t, s, refOf(data))
	if a.file != b.file {
		t.Error("two files")
	}
	a.Close()
	a.Close()
	if err := a.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrClosed) {
		t.Errorf("read of a closed handle: %v", err)
	}
	if err := b.WriteAt(data, 0); err != nil {
		t.Error(err)
	}
	s.Close()
	if err := b.Verify(t.Context()); err != nil {
		t.Errorf("a handle that outlives its store: %v", err)
	}
	if _, err := s.Blob(refOf(data)); !errors.Is(err, ErrClosed) {
		t.Errorf("blob of a closed store: %v", err)
	}
	b.Close()
	if s.usage != nil || len(s.open) != 0 {
		t.Error("something is left mapped")
	}
}

// TestRealFileSystems runs a blob's life on every local file system that can be made here.
func TestRealFileSystems(t *testing.T) {
	for _, typ := range []string{"ext4", "xfs", "btrfs", "vfat"} {
		mkfs, err := exec.LookPath("mkfs." + typ)
		if err != nil {
			if typ == "ext4" {
				t.Fatal("mkfs.ext4 is missing: install e2fsprogs")
			}
			continue // only what every Debian has is required
		}
		t.Run(typ, func(t *testing.T) {
			img := t.TempDir() + "/img"
			if err := os.WriteFile(img, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(img, 320<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(mkfs, img).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			mnt := t.TempDir()
			if out, err := exec.Command("mount", "-o", "loop", img, mnt).CombinedOutput(); err != nil {
				if typ == "ext4" {
					t.Fatalf("mount: %v: %s", err, out)
				}
				t.Logf("this kernel has no %s: %s", typ, out)
				return
			}
			t.Cleanup(func() {
				if err := unix.Unmount(mnt, 0); err != nil {
					t.Error(err)
				}
			})
			os.Chmod(mnt, 0o755)
			s := openStore(t, mnt+"/s", Options{Quota: 16 << 20})
			t.Logf("%+v", s.FS())
			if s.FS().Network || s.FS().Type != typ {
				t.Errorf("probe: %+v", s.FS())
			}
			for i := range 6 {
				data := content(uint64(i), 5<<20+i)
				b, err := s.Blob(refOf(data))
				if err != nil {
					t.Fatal(err)
				}
				if err := b.WriteAt(data, 0); err != nil {
					t.Error(err)
				}
				if err := b.Verify(t.Context()); err != nil {
					t.Error(err)
				}
				b.Close()
				if u := s.survey().total; u > 17<<20 {
					t.Errorf("%d bytes are used", u)
				}
			}
			put(t, s, KindTable, "x", []byte("x"))
			put(t, s, KindTable, "x", []byte("y"))
		})
	}
}
