package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/muster-hpc/muster/ztoc"
)

// content is n bytes that look random and are the same for the same seed.
func content(seed uint64, n int) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

func refOf(b []byte) ztoc.BlobRef {
	return ztoc.BlobRef{Digest: ztoc.DigestOf(b), Size: int64(len(b))}
}

func openStore(t *testing.T, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func openBlob(t *testing.T, s *Store, ref ztoc.BlobRef) *Blob {
	t.Helper()
	b, err := s.Blob(ref)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func TestBlob(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 1<<20+777)
	ref := refOf(data)
	b := openBlob(t, s, ref)
	if got := b.Missing(ztoc.Range{Start: 5000, End: 5001}); len(got) != 1 || got[0] != (ztoc.Range{Start: 4096, End: 8192}) {
		t.Fatalf("missing of an empty blob: %v", got)
	}
	p := make([]byte, 100)
	if err := b.ReadAt(p, 0); !errors.Is(err, ErrAbsent) {
		t.Fatalf("read of an absent block: %v", err)
	}
	if err := b.WriteAt(data[100:20000], 100); err != nil {
		t.Fatal(err)
	}
	if got := b.Missing(ztoc.Range{End: 24000}); len(got) != 2 || got[0] != (ztoc.Range{End: 4096}) || got[1] != (ztoc.Range{Start: 16384, End: 24576}) {
		t.Fatalf("only whole blocks are marked: %v", got)
	}
	if err := b.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if !b.Complete() {
		t.Fatalf("missing %v", b.Missing(ztoc.Range{End: ref.Size}))
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, ref.Size)
	if err := b.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read back %d bytes: %v", len(got), err)
	}
	b.Drop(ztoc.Range{Start: 10000, End: 10001})
	if got := b.Missing(ztoc.Range{End: ref.Size}); len(got) != 1 || got[0] != (ztoc.Range{Start: 8192, End: 12288}) {
		t.Fatalf("missing after drop: %v", got)
	}

	// Another handle and another open store see the same.
	s2 := openStore(t, s.Dir(), Options{})
	b2 := openBlob(t, s2, ref)
	if err := b2.WriteAt(data[8192:12288], 8192); err != nil {
		t.Fatal(err)
	}
	if !b.Complete() {
		t.Fatal("what another process wrote is not seen")
	}
	// Wrong bytes under present blocks are found, and only by hashing.
	if err := os.WriteFile("/dev/null", nil, 0); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(s.path(blobsDir, blobName(ref)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteAt(make([]byte, 4096), 40960)
	if err := b.Verify(t.Context()); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("verify of a damaged blob: %v", err)
	}
}
