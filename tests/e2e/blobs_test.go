package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/images"
)

// storedBlob is the store's file of a blob.
func (h *host) storedBlob(digest string) string {
	h.t.Helper()
	var found string
	filepath.WalkDir(h.store, func(path string, d os.DirEntry, err error) error { //nolint:errcheck // nothing found is told
		if err == nil && d.Type().IsRegular() && strings.HasPrefix(filepath.Base(path), strings.TrimPrefix(digest, "sha256:")) {
			if i, err := d.Info(); err == nil && i.Size() > 4096 && (found == "" || strings.Contains(path, "blob")) {
				found = path
			}
		}
		return nil
	})
	if found == "" {
		h.t.Fatalf("the store has no file for %s", digest)
	}
	return found
}

// TestTwoTables: one layer is read through SOCI's table of 4 MiB spans and then through our own; every byte of it came
// from the registry once, and the store has it once, as the registry has it.
func TestTwoTables(t *testing.T) {
	ref := made(t, "two-tables", bigImage(7))
	layer := bigImage(7).Layers[1].Descriptor
	newHost(t, 0).must("index", "push", "--plain-soci", ref) // spans of 4 MiB
	p, h := front(t), newHost(t, 0)
	read := func(mode string, spans func(n int) bool, args ...string) {
		t.Helper()
		dir := h.mountPoint()
		out := h.must(append(append([]string{"mount", "--json"}, args...), through(p, ref), dir)...).stdout
		var s struct {
			Layers []struct {
				Mode, Reason string
				Spans        int
			}
		}
		unmarshal(t, out, &s)
		if l := s.Layers[1]; l.Mode != mode || !spans(l.Spans) {
			t.Errorf("the layer is %s with %d spans (%s), want %s", l.Mode, l.Spans, l.Reason, mode)
		}
		for n := range bigFiles {
			if err := readBig(dir, 7, n); err != nil {
				t.Error(err)
			}
		}
		h.must("umount", dir)
	}
	read("index", func(n int) bool { return n <= 7 })
	tables, _ := filepath.Glob(filepath.Join(h.store, "files", "ztoc", "*"))
	if len(tables) == 0 {
		t.Fatal("no tables are kept in the store")
	}
	for _, f := range tables {
		if err := os.RemoveAll(f); err != nil {
			t.Fatal(err)
		}
	}
	read("pulled", func(n int) bool { return n > 7 }, "--index-use=false", "--index-span-size", "1MiB")
	if n := p.Bytes(blobs(layer.Digest)); n != layer.Size {
		t.Errorf("%d bytes were fetched of a layer of %d", n, layer.Size)
	}
	once(t, p, layer)

	stored, err := os.ReadFile(h.storedBlob(layer.Digest))
	if err != nil {
		t.Fatal(err)
	}
	// What is behind the blob's own bytes says which of them are here.
	if got := hash(t, bytes.NewReader(stored[:min(layer.Size, int64(len(stored)))])); got != layer.Digest {
		t.Errorf("the blob in the store has digest %s, want %s", got, layer.Digest)
	}
	var st unix.Stat_t
	if err := unix.Stat(h.storedBlob(layer.Digest), &st); err != nil || st.Blocks*512 > layer.Size+1<<20 {
		t.Errorf("it takes %d bytes on disk", st.Blocks*512)
	}
}

func hash(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// TestManyChunks: an eStargz layer of 50,000 chunks, read file by file, makes requests in the order of its MiB, and few
// files in the store.
func TestManyChunks(t *testing.T) {
	p, h := front(t), newHost(t, 0)
	dir := h.mount(through(p, image(t, "estargz-50k")))
	layers, err := images.ReadLayout(layout(t, "estargz-50k"))
	if err != nil {
		t.Fatal(err)
	}
	layer := layers[1].Descriptor
	files, total := 0, int64(0)
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		files, total = files+1, total+int64(len(b))
		return err
	})
	if err != nil || files < 50_000 {
		t.Fatalf("%d files, %v", files, err)
	}
	mib := int(layer.Size>>20) + 1
	if n := p.Count(blobs(layer.Digest)); n > 2*mib+4 {
		t.Errorf("%d requests for a layer of %d MiB", n, mib)
	}
	if n := p.Bytes(blobs(layer.Digest)); n > layer.Size+1<<20 {
		t.Errorf("%d bytes for a layer of %d", n, layer.Size)
	}
	stored := 0
	filepath.WalkDir(h.store, func(path string, d os.DirEntry, err error) error { //nolint:errcheck // only counted
		if err == nil && !d.IsDir() {
			stored++
		}
		return nil
	})
	if stored > 40 {
		t.Errorf("%d files in the store", stored)
	}
	t.Logf("%d files of %d bytes by %d requests, %d files in the store", files, total, p.Count(blobs(layer.Digest)), stored)
}
