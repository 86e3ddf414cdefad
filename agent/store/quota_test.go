package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// fill stores a whole blob, closes it, and dates its last use age ago.
func fill(t *testing.T, s *Store, data []byte, age time.Duration) ztoc.BlobRef {
	t.Helper()
	ref := refOf(data)
	b, err := s.Blob(ref)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	b.file.used.Store(1 << 62) // no later touch
	setTimes(b.file.f, time.Now().Add(-age).UnixNano())
	return ref
}

// stored reports whether a blob has a file.
func stored(s *Store, ref ztoc.BlobRef) bool {
	_, err := os.Stat(s.path(blobsDir, blobName(ref)))
	return err == nil
}

// checkUsed compares the shared counter with the disk. Between recounts it does not know of folders and of the file
// system's own tables.
func checkUsed(t *testing.T, s *Store) {
	t.Helper()
	if used, real := s.used().Load(), s.survey().total; used < real-64<<10 || used > real+128<<10 {
		t.Errorf("the counter says %d bytes, the disk %d", used, real)
	}
}

func TestEvictLeastRecentlyUsed(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 10 << 20})
	var refs []ztoc.BlobRef
	for i := range 4 {
		refs = append(refs, fill(t, s, content(uint64(i), 2<<20), time.Duration(100-i)*time.Hour))
	}
	if err := s.Pin(Key("a"), []ztoc.Digest{refs[0].Digest}); err != nil {
		t.Fatal(err)
	}
	inUse := openBlob(t, s, refs[1])
	checkUsed(t, s)
	fill(t, s, content(9, 3<<20), 0)
	// 0 is pinned, 1 is open, 2 is the oldest of the rest.
	if !stored(s, refs[0]) || !stored(s, refs[1]) || stored(s, refs[2]) || !stored(s, refs[3]) {
		t.Errorf("left: %v %v %v %v", stored(s, refs[0]), stored(s, refs[1]), stored(s, refs[2]), stored(s, refs[3]))
	}
	if !inUse.Complete() {
		t.Error("an open blob was evicted though a closed one was there")
	}
	checkUsed(t, s)
}

// TestEvictInUse: when everything is open, ranges of the least recently used blob go, beneath its readers.
func TestEvictInUse(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 8 << 20})
	data := content(1, 5<<20)
	fill(t, s, data, time.Hour)
	b := openBlob(t, s, refOf(data))
	other := content(2, 5<<20)
	b2 := openBlob(t, s, refOf(other))
	if err := b2.WriteAt(other, 0); err != nil {
		t.Fatal(err)
	}
	gone := b.Missing(ztoc.Range{End: 5 << 20})
	if len(gone) == 0 || b.Present() == 0 || !b2.Complete() {
		t.Errorf("missing of the older blob %v, of the newer %v", gone, b2.Missing(ztoc.Range{End: 5 << 20}))
	}
	if u := s.survey().total; u > 8<<20 {
		t.Errorf("%d bytes are used", u)
	}
	checkUsed(t, s)
	// What is left is right, what is gone can be stored again.
	p := make([]byte, 4096)
	for off := int64(0); off < 5<<20; off += 4096 {
		if err := b.ReadAt(p, off); err == nil && !bytes.Equal(p, data[off:off+4096]) {
			t.Fatalf("wrong bytes at %d", off)
		} else if err != nil && !errors.Is(err, ErrAbsent) {
			t.Fatal(err)
		}
	}
	if err := b.WriteAt(data[gone[0].Start:gone[0].End], gone[0].Start); err != nil {
		t.Fatal(err)
	}
	if m := b.Missing(gone[0]); len(m) > 0 {
		t.Errorf("still missing %v", m)
	}
}

// TestBlobLargerThanQuota: one blob streams through a store that it does not fit into.
func TestBlobLargerThanQuota(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 4 << 20})
	data := content(1, 20<<20)
	b := openBlob(t, s, refOf(data))
	p := make([]byte, 256<<10)
	for off := int64(0); off < int64(len(data)); off += int64(len(p)) {
		if err := b.WriteAt(data[off:off+int64(len(p))], off); err != nil {
			t.Fatal(err)
		}
		if err := b.ReadAt(p, off); err != nil || !bytes.Equal(p, data[off:off+int64(len(p))]) {
			t.Fatalf("at %d: %v", off, err)
		}
		if u := s.survey().total; u > 4<<20 {
			t.Fatalf("%d bytes are used", u)
		}
	}
}

// logTo gives options whose warnings go to b.
func logTo(b *bytes.Buffer, o Options) Options {
	o.Logger = slog.New(slog.NewTextHandler(b, nil))
	return o
}

func TestQuotaPinnedFull(t *testing.T) {
	var log bytes.Buffer
	s := openStore(t, t.TempDir()+"/s", logTo(&log, Options{Quota: 4 << 20}))
	data := content(1, 3900<<10)
	ref := fill(t, s, data, time.Hour)
	if err := s.Pin(Key("a"), []ztoc.Digest{ref.Digest}); err != nil {
		t.Fatal(err)
	}
	more := content(2, 3<<20)
	b := openBlob(t, s, refOf(more))
	for range 3 {
		if err := b.WriteAt(more, 0); !errors.Is(err, ErrNoSpace) {
			t.Fatalf("a write beyond the quota: %v", err)
		}
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), s.Dir()) {
		t.Errorf("%d warnings:\n%s", n, log.String())
	}
	if err := openBlob(t, s, ref).Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Put(KindTable, "x", func(w io.Writer) error {
		_, err := w.Write(more)
		return err
	}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a small file beyond the quota: %v", err)
	}
	if u := s.survey().total; u > 4<<20 {
		t.Errorf("%d bytes are used", u)
	}
	// Once there is room, it is used again.
	if err := s.Unpin(Key("a")); err != nil {
		t.Fatal(err)
	}
	s.fullUntil.Store(0) // as if retryFull had passed
	if err := b.WriteAt(more, 0); err != nil || !b.Complete() {
		t.Errorf("after unpinning: %v", err)
	}
	checkUsed(t, s)
}

// TestDiskFull is F12, on a real full file system: first ours is evicted, then nothing is stored.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts a file system: run it as root")
	}
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=8m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	var log bytes.Buffer
	s, err := Open(mnt+"/s", logTo(&log, Options{Quota: 1 << 30}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if f := s.FS(); f.Type != "tmpfs" || !f.Memory || f.Network || !f.Holes || !f.Punch {
		t.Errorf("probe of tmpfs: %+v", f)
	}
	for i := range 6 { // each needs the room of an earlier one
		fill(t, s, content(uint64(i), 3<<20), 0)
	}
	if log.Len() > 0 {
		t.Errorf("warned while there was something to evict: %s", log.String())
	}
	// Now somebody else fills the disk.
	if _, err := s.GC(GCOptions{Target: 1}); err != nil {
		t.Fatal(err)
	}
	ballast, err := os.Create(mnt + "/ballast")
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(ballast, io.LimitReader(zeros{}, 6<<20))
	ballast.Close()
	data := content(50, 4<<20)
	b, err := s.Blob(refOf(data))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for range 2 {
		if err := b.WriteAt(data, 0); !errors.Is(err, ErrNoSpace) {
			t.Fatalf("write to a full disk: %v", err)
		}
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), mnt) {
		t.Errorf("%d warnings:\n%s", n, log.String())
	}
	p := make([]byte, 4096)
	right := 0
	for off := 0; off < len(data); off += 4096 {
		if b.ReadAt(p, int64(off)) == nil {
			if !bytes.Equal(p, data[off:off+4096]) {
				t.Fatalf("wrong bytes at %d", off)
			}
			right++
		}
	}
	if right == 0 {
		t.Error("nothing that fitted was kept")
	}
	// A blob that cannot even be begun.
	io.Copy(mustAppend(t, mnt+"/ballast"), zeros{})
	s.fullUntil.Store(0)
	other := content(51, 1<<20)
	if b, err := s.Blob(refOf(other)); err == nil {
		if err := b.WriteAt(other, 0); !errors.Is(err, ErrNoSpace) {
			t.Errorf("a blob on a full disk: %v", err)
		}
		b.Close()
	} else if !errors.Is(err, ErrNoSpace) {
		t.Errorf("a blob on a full disk: %v", err)
	}
}

func mustAppend(t *testing.T, name string) io.Writer {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestNoHoles: on a file system without sparse files everything is right, and counted for what it takes.
func TestNoHoles(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 8 << 20, fs: &FS{Type: "vfat"}})
	data := content(1, 3<<20)
	fill(t, s, data, time.Hour)
	b := openBlob(t, s, refOf(data))
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if u := s.used().Load(); u < 3<<20 || u > 4<<20 {
		t.Errorf("%d bytes are counted", u)
	}
}

// TestKilledEvictor: words that an evictor left seized when it was killed do not stay so.
func TestKilledEvictor(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 1<<20)
	b := openBlob(t, s, refOf(data))
	if err := b.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	b.file.table.seize(2, 5)
	if m := b.Missing(ztoc.Range{End: 1 << 20}); len(m) != 1 || m[0] != (ztoc.Range{Start: 256 << 10, End: 640 << 10}) {
		t.Fatalf("missing %v", m)
	}
	// While an evictor lives, it holds the lock and nothing is marked.
	s2 := openStore(t, s.Dir(), Options{})
	s2.lock.lock()
	if err := b.WriteAt(data, 0); err != nil || b.Complete() {
		t.Errorf("marked while being evicted: %v", err)
	}
	s2.lock.unlock()
	// The first write finds that it is dead, the next one is kept.
	b.WriteAt(data, 0)
	if err := b.WriteAt(data, 0); err != nil || !b.Complete() {
		t.Errorf("not repaired: %v, missing %v", err, b.Missing(ztoc.Range{End: 1 << 20}))
	}
}

// TestGarbagePresence: after a power loss the words may be anything. Reading, hashing, dropping and writing again
// still ends in right bytes.
func TestGarbagePresence(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 3<<20+7)
	b := openBlob(t, s, refOf(data))
	garbage := content(2, 8*len(b.file.table.words))
	if _, err := b.file.f.WriteAt(garbage, mapOffset(int64(len(data)))+mapHeader); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100_000)
	for at := 0; at < len(data); at += len(p) {
		r := ztoc.Range{Start: int64(at), End: int64(min(at+len(p), len(data)))}
		for try := 0; ; try++ {
			err := b.ReadAt(p[:r.Len()], r.Start)
			if err == nil && bytes.Equal(p[:r.Len()], data[r.Start:r.End]) {
				break
			}
			if try == 4 {
				t.Fatalf("%v does not come right: %v", r, err)
			}
			if err == nil {
				b.Drop(r)
			}
			for _, m := range b.Missing(r) {
				if err := b.WriteAt(data[m.Start:m.End], m.Start); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestInterleavings are the ones that the counts in the words are there for.
func TestInterleavings(t *testing.T) {
	m := presence{words: make([]uint64, 4), size: 4 * wordBytes}
	lo, hi := int64(0), int64(4*wordBlocks)
	t.Run("writer, evictor, mark", func(t *testing.T) {
		snap := m.snapshot(nil, lo, hi)
		m.seize(1, 2)
		m.release(1, 2)
		if n := m.mark(snap, lo, hi); n != 3*wordBlocks {
			t.Errorf("%d blocks marked", n)
		}
		if got := m.missing(ztoc.Range{End: m.size}); len(got) != 1 || got[0] != (ztoc.Range{Start: wordBytes, End: 2 * wordBytes}) {
			t.Errorf("missing %v", got)
		}
	})
	t.Run("reader, evictor, writer", func(t *testing.T) {
		m.mark(m.snapshot(nil, lo, hi), lo, hi)
		snap := m.snapshot(nil, lo, hi)
		m.seize(1, 2)
		m.release(1, 2)
		m.mark(m.snapshot(nil, lo, hi), lo, hi)
		if !allPresent(m.snapshot(nil, lo, hi), lo, hi) {
			t.Fatal("not all present")
		}
		if m.unchanged(snap, lo, hi) {
			t.Error("the reader does not notice")
		}
	})
	t.Run("writer, drop, mark", func(t *testing.T) {
		snap := m.snapshot(nil, lo, hi)
		m.drop(0, 1)
		m.mark(snap, lo, hi)
		if got := m.missing(ztoc.Range{End: m.size}); len(got) != 1 || got[0].Len() != BlockSize {
			t.Errorf("missing %v", got)
		}
	})
	t.Run("seized is not marked", func(t *testing.T) {
		m.seize(0, 4)
		m.mark(m.snapshot(nil, lo, hi), lo, hi)
		if got := m.missing(ztoc.Range{End: m.size}); len(got) != 1 || got[0].Len() != m.size {
			t.Errorf("missing %v", got)
		}
		m.release(0, 4)
	})
}

// TestTruncatedUnderneath: somebody cuts a blob's file short. That is an error, not the end of the process.
func TestTruncatedUnderneath(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 1<<20)
	b := openBlob(t, s, refOf(data))
	if err := b.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	path := s.path(blobsDir, blobName(refOf(data)))
	if err := os.Truncate(path, 1000); err != nil {
		t.Fatal(err)
	}
	if err := b.ReadAt(make([]byte, 10), 0); err == nil {
		t.Error("read from a blob without presence")
	}
	if b.Complete() {
		t.Error("complete without presence")
	}
	b.Drop(ztoc.Range{End: 1 << 20})
	b.WriteAt(data, 0)
	b.Close()
	// The next one to open it makes it new.
	b = openBlob(t, s, refOf(data))
	if b.Present() != 0 {
		t.Error("a damaged file was taken over")
	}
	if err := b.WriteAt(data, 0); err != nil || b.Verify(t.Context()) != nil {
		t.Errorf("after damage: %v", err)
	}
}

func BenchmarkReadAt(b *testing.B) {
	s, err := Open(b.TempDir()+"/s", Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := content(1, 16<<20)
	bl, err := s.Blob(refOf(data))
	if err != nil {
		b.Fatal(err)
	}
	defer bl.Close()
	if err := bl.WriteAt(data, 0); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{4 << 10, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := make([]byte, n)
			b.SetBytes(int64(n))
			for b.Loop() {
				if err := bl.ReadAt(p, 1<<20); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
