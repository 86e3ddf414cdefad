package store

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/muster-hpc/muster/ztoc"
)

// Spare files take only room that is free, go first, and stay readable for whoever has them open.
func TestSpare(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{Quota: 16 << 20})
	body := bytes.Repeat([]byte("spare "), 1<<20/6)
	put := func(key string, size int64) error {
		return s.PutSpare(KindBacking, key, size, func(w io.Writer) error {
			_, err := w.Write(body)
			return err
		})
	}
	if err := put("short", int64(len(body))+1); err == nil {
		t.Error("a file of another size was kept")
	}
	if err := put("a", int64(len(body))); err != nil {
		t.Fatal(err)
	}
	if err := put("huge", 16<<20); !errors.Is(err, ErrNoSpace) {
		t.Errorf("no room: %v", err)
	}
	f, err := s.Spare(KindBacking, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := s.Spare(KindBacking, "b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	// More than there is room for.
	for i := range 17 {
		err := s.Put(KindWarm, string(rune('a'+i)), func(w io.Writer) error {
			_, err := w.Write(body)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Spare(KindBacking, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("not evicted: %v", err)
	}
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// One of an earlier boot is given out only when it was read as a whole.
func TestSpareOfAnEarlierBoot(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	for _, key := range []string{"good", "bad"} {
		if err := s.PutSpare(KindBacking, key, 5, func(w io.Writer) error {
			_, err := w.Write([]byte("hello"))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	s.boot = "after"
	if err := os.WriteFile(filepath.Join(dir, "files/backing/bad"), []byte("hellO"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"good", "bad"} {
		if _, err := s.Spare(KindBacking, key); !errors.Is(err, ErrUnchecked) {
			t.Errorf("%s before it was checked: %v", key, err)
		}
		if err := s.Check(KindBacking, key); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
	f, err := s.Spare(KindBacking, "good")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := s.Spare(KindBacking, "bad"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged copy: %v", err)
	}
	if err := s.Check(KindBacking, "none"); err != nil {
		t.Errorf("none: %v", err)
	}
}

// A copy goes with the last image that has what it is a copy of.
func TestCopiesGoWithTheirBlob(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	blob := refOf(content(1, 5000))
	for _, key := range []string{"one", "two"} {
		if err := s.PutImage(Image{Key: key, Reference: key, Blobs: []ztoc.BlobRef{blob}}); err != nil {
			t.Fatal(err)
		}
	}
	key := BackingKey(blob.Digest, "all of it")
	if err := s.PutSpare(KindBacking, key, 5, func(w io.Writer) error {
		_, err := w.Write([]byte("hello"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for i, image := range []string{"one", "two"} {
		if _, err := s.Remove(image); err != nil {
			t.Fatal(err)
		}
		if got := has(s, KindBacking, key); got != (i == 0) {
			t.Errorf("after %s was removed: there %v", image, got)
		}
	}
	if s.Any(KindBacking) {
		t.Error("something is left")
	}
}
