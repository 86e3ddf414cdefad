package store

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

const (
	// MaxBlob is the largest blob the store takes, in bytes; its presence table takes 64 MiB.
	MaxBlob = 1 << 40

	mapAlign   = 64 << 10 // the largest page size in use, so that a store can be read by any kernel
	mapHeader  = 4 << 10
	blobMagic  = "MUSTERB\x01"
	handOffset = 48 // of the eviction hand in the header
	touchEvery = int64(time.Second)
)

// A Blob is a handle on the stored part of one blob. While it is open the blob is evicted last. Its methods
// may be called from several goroutines.
type Blob struct {
	file   *file
	closed atomic.Bool
}

// A file is one blob's file, opened once in a process however many handles there are.
type file struct {
	s     *Store
	ref   ztoc.BlobRef
	name  string
	f     *os.File // shared flock held until closed
	used  atomic.Int64
	refs  int // guarded by s.mu
	mu    sync.RWMutex
	m     []byte // mapping of header and words; nil after the last handle was closed; guarded by mu
	table presence
}

// blobName is the file name of a blob. The size is part of it: a manifest that lies about it must not spoil
// the blob for honest ones.
func blobName(ref ztoc.BlobRef) string {
	return ref.Digest.Hex() + "-" + strconv.FormatInt(ref.Size, 10)
}

// parseBlobName is the blob that a file name stands for.
func parseBlobName(name string) (ztoc.BlobRef, bool) {
	h, n, ok := strings.Cut(name, "-")
	if !ok {
		return ztoc.BlobRef{}, false
	}
	d, err := ztoc.ParseDigest("sha256:" + h)
	if err != nil {
		return ztoc.BlobRef{}, false
	}
	size, err := strconv.ParseInt(n, 10, 64)
	if err != nil || size < 0 || strconv.FormatInt(size, 10) != n {
		return ztoc.BlobRef{}, false
	}
	return ztoc.BlobRef{Digest: d, Size: size}, true
}

func mapOffset(size int64) int64 { return (size + mapAlign - 1) / mapAlign * mapAlign }
func mapLen(size int64) int64    { return mapHeader + (wordsFor(size)*8+4095)/4096*4096 }

// Blob opens the stored part of a blob, and makes an empty one if there is none. ErrNoSpace when even that does
// not fit.
func (s *Store) Blob(ref ztoc.BlobRef) (*Blob, error) {
	if _, err := ztoc.ParseDigest(string(ref.Digest)); err != nil {
		return nil, err
	}
	if ref.Size < 0 || ref.Size > MaxBlob {
		return nil, fmt.Errorf("blob %s: size %d is out of bounds", ref.Digest, ref.Size)
	}
	name := blobName(ref)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	f := s.open[name]
	if f == nil {
		var err error
		if f, err = s.openFile(name, ref, true); err != nil {
			return nil, fmt.Errorf("store %s: blob %s: %w", s.dir, ref.Digest, err)
		}
		s.open[name] = f
	}
	f.refs++
	return &Blob{file: f}, nil
}

// openFile opens the file of a blob. With create it makes one if need be; without, it is fs.ErrNotExist.
func (s *Store) openFile(name string, ref ztoc.BlobRef, create bool) (*file, error) {
	path := s.path(blobsDir, name)
	for try := 0; ; try++ {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) && create && try < 20 {
			if err := s.createFile(path, ref); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		out, err := s.mapFile(f, name, ref)
		if err == nil {
			return out, nil
		}
		f.Close()
		// An evictor unlinked it between our open and our lock, or it is damaged and was removed.
		if !errors.Is(err, errStale) || try >= 20 {
			return nil, err
		}
	}
}

var errStale = errors.New("file was replaced")

// mapFile locks and maps an opened blob file and checks its header.
func (s *Store) mapFile(f *os.File, name string, ref ztoc.BlobRef) (*file, error) {
	if err := waitFlock(f, unix.LOCK_SH); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Nlink == 0 {
		return nil, errStale
	}
	off, n := mapOffset(ref.Size), mapLen(ref.Size)
	hdr := make([]byte, mapHeader)
	if _, err := f.ReadAt(hdr, off); st.Size != off+n || err != nil || !headerOK(hdr, ref) {
		// Not a file we made, or power was lost while it was made. Nobody can be using it.
		if err := tryFlock(f, unix.LOCK_EX); err != nil {
			return nil, fmt.Errorf("%s is damaged: %w", f.Name(), err)
		}
		if err := os.Remove(f.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return nil, errStale
	}
	m, err := unix.Mmap(int(f.Fd()), off, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%s: mmap: %w", f.Name(), err)
	}
	var words []uint64
	if ref.Size > 0 {
		words = unsafe.Slice((*uint64)(unsafe.Pointer(&m[mapHeader])), wordsFor(ref.Size))
	}
	return &file{s: s, ref: ref, name: name, f: f, m: m, table: presence{words: words, size: ref.Size}}, nil
}

func header(ref ztoc.BlobRef) []byte {
	b := make([]byte, mapHeader)
	copy(b, blobMagic)
	binary.LittleEndian.PutUint64(b[8:], uint64(ref.Size))
	copy(b[64:], ref.Digest.Hex())
	return b
}

func headerOK(b []byte, ref ztoc.BlobRef) bool {
	return string(b[:8]) == blobMagic &&
		binary.LittleEndian.Uint64(b[8:]) == uint64(ref.Size) &&
		string(b[64:64+2*sha256.Size]) == ref.Digest.Hex()
}

// createFile makes an empty blob file: under a temporary name, complete, and then linked, so that nobody
// ever sees half of one. The table's blocks are allocated now: a hole below a mapping would kill the process
// that stores to it when the disk is full.
func (s *Store) createFile(path string, ref ztoc.BlobRef) error {
	n := mapLen(ref.Size)
	charge := n
	if !s.fs.Holes {
		charge += mapOffset(ref.Size) // such a file system allocates everything at once
	}
	if charge > s.quota { // not worth emptying the store and a warning: the size is anybody's claim
		return fmt.Errorf("%w: blob of %d bytes, quota of %d", ErrNoSpace, ref.Size, s.quota)
	}
	if err := s.reserve(charge); err != nil {
		return err
	}
	t, err := s.newTemp()
	if err != nil {
		s.used().Add(-charge)
		return s.spaceError(err)
	}
	defer t.discard()
	off := mapOffset(ref.Size)
	if err = t.f.Truncate(off + n); err == nil {
		err = allocate(t.f, off, n)
	}
	if err == nil {
		_, err = t.f.WriteAt(header(ref), off)
	}
	if err == nil {
		err = t.link(path)
	}
	if err != nil {
		s.used().Add(-charge)
		if errors.Is(err, fs.ErrExist) {
			return nil // another process was first
		}
		return s.spaceError(err)
	}
	return nil
}

// allocate makes the kernel find blocks for [off, off+n) of f now, all zero.
func allocate(f *os.File, off, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, off, n)
		if err == unix.EINTR {
			continue
		}
		if err != unix.EOPNOTSUPP && err != unix.ENOSYS {
			return err
		}
		break
	}
	zeros := make([]byte, 64<<10)
	for n > 0 {
		k, err := f.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// spaceError turns "disk full" into ErrNoSpace with its warning.
func (s *Store) spaceError(err error) error {
	if isFull(err) {
		return s.degrade(err.Error())
	}
	return err
}

// enter keeps the mapping in place until exit; false when the handle or the file was closed.
func (b *Blob) enter() bool {
	if b.closed.Load() {
		return false
	}
	b.file.mu.RLock()
	if b.file.m == nil {
		b.file.mu.RUnlock()
		return false
	}
	return true
}

func (b *Blob) exit() { b.file.mu.RUnlock() }

// Ref is the blob's digest and size.
func (b *Blob) Ref() ztoc.BlobRef { return b.file.ref }

// whole is the range of the whole blob.
func (b *Blob) whole() ztoc.Range { return ztoc.Range{End: b.file.ref.Size} }

// clip cuts r to the blob.
func (b *Blob) clip(r ztoc.Range) ztoc.Range {
	return b.whole().Intersect(r)
}

// Missing is what has to be fetched before ReadAt can give r: ranges of whole blocks (or up to the
// blob's end), merged, in order. Nil when all is here.
func (b *Blob) Missing(r ztoc.Range) []ztoc.Range {
	r = b.clip(r)
	if r.Empty() {
		return nil
	}
	all := []ztoc.Range{{Start: r.Start / BlockSize * BlockSize, End: min((r.End+BlockSize-1)/BlockSize*BlockSize, b.file.ref.Size)}}
	if !b.enter() {
		return all
	}
	defer b.exit()
	var out []ztoc.Range
	if guard(func() { out = b.file.table.missing(r) }) != nil {
		return all
	}
	return out
}

// Complete reports whether every block is here. It does not say that they are right: see Verify.
func (b *Blob) Complete() bool { return len(b.Missing(b.whole())) == 0 }

// Present is the number of bytes that are here.
func (b *Blob) Present() int64 {
	n := b.file.ref.Size
	for _, r := range b.Missing(b.whole()) {
		n -= r.Len()
	}
	return n
}

// ReadAt fills p from off, or fails with ErrAbsent when any of it was not here before or after reading. The
// bytes are what was stored, if nothing happened to them: hash them.
func (b *Blob) ReadAt(p []byte, off int64) error {
	r := ztoc.Range{Start: off, End: off + int64(len(p))}
	if off < 0 || r.End > b.file.ref.Size || r.End < off {
		return fmt.Errorf("blob %s: read of %v beyond its size %d", b.file.ref.Digest, r, b.file.ref.Size)
	}
	if len(p) == 0 {
		return nil
	}
	if !b.enter() {
		return ErrClosed
	}
	defer b.exit()
	var buf [40]uint64 // words of a read of 4 MiB, and a few
	var rerr error
	err := guard(func() {
		lo, hi := b.file.table.outer(r)
		snap := b.file.table.snapshot(buf[:0], lo, hi)
		if !allPresent(snap, lo, hi) {
			rerr = ErrAbsent
			return
		}
		if _, err := b.file.f.ReadAt(p, off); err != nil {
			rerr = fmt.Errorf("%s: %w", b.file.f.Name(), err)
			return
		}
		if !b.file.table.unchanged(snap, lo, hi) {
			rerr = ErrAbsent
		}
	})
	if err != nil {
		return err
	}
	if rerr == nil {
		b.file.touch()
	}
	return rerr
}

// WriteAt stores p at off: those blocks that p covers wholly and that are absent. What is here already is
// not written again, so that wrong bytes cannot replace right ones; Drop it first. ErrNoSpace when the
// store does not keep it (some of p may have been kept). A write that meets an eviction may be forgotten
// without error.
func (b *Blob) WriteAt(p []byte, off int64) error {
	r := ztoc.Range{Start: off, End: off + int64(len(p))}
	if off < 0 || r.End > b.file.ref.Size || r.End < off {
		return fmt.Errorf("blob %s: write of %v beyond its size %d", b.file.ref.Digest, r, b.file.ref.Size)
	}
	lo, hi := b.file.table.inner(r)
	if lo >= hi {
		return nil
	}
	inner := ztoc.Range{Start: lo * BlockSize, End: min(hi*BlockSize, b.file.ref.Size)}
	for _, miss := range b.Missing(inner) {
		for at := miss.Start; at < miss.End; at += writeChunk {
			part := ztoc.Range{Start: at, End: min(at+writeChunk, miss.End)}
			if err := b.writeBlocks(p[part.Start-off:part.End-off], part); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeBlocks writes and marks one chunk: whole blocks that were absent a moment ago.
func (b *Blob) writeBlocks(p []byte, r ztoc.Range) error {
	f, s := b.file, b.file.s
	if s.degraded() {
		return ErrNoSpace
	}
	charge := (r.Len() + BlockSize - 1) / BlockSize * BlockSize
	if !s.fs.Holes {
		charge = 0 // charged when the file was made
	}
	s.slots <- struct{}{} // held for one pwrite, and for an eviction if the quota asks for one
	defer func() { <-s.slots }()
	if err := s.reserve(charge); err != nil {
		return err
	}
	if !b.enter() {
		s.used().Add(-charge)
		return ErrClosed
	}
	defer b.exit()
	var buf [4]uint64
	var fresh int64
	var werr error
	held := false
	err := guard(func() {
		lo, hi := f.table.inner(r)
		snap := f.table.snapshot(buf[:0], lo, hi)
		if held = seized(snap); held {
			return
		}
		if werr = f.pwrite(p, r.Start); werr == nil {
			fresh = f.table.mark(snap, lo, hi)
		}
	})
	// Blocks that another writer marked first were charged by it.
	s.used().Add(min(0, fresh*BlockSize-charge))
	switch {
	case err != nil:
		return err
	case held:
		f.repair()
	case werr != nil:
		return s.spaceError(werr)
	}
	f.touch()
	return nil
}

// pwrite writes p. On a full disk it evicts, once, and tries again.
func (f *file) pwrite(p []byte, off int64) error {
	_, err := f.f.WriteAt(p, off)
	if err != nil && isFull(err) && f.s.evictSome(fullDiskRoom) {
		_, err = f.f.WriteAt(p, off)
	}
	return err
}

// repair releases words that an evictor left seized when it was killed. If the lock is taken, one is at work.
func (f *file) repair() {
	if !f.s.lock.try() {
		return
	}
	defer f.s.lock.unlock()
	guard(func() { f.table.release(0, int64(len(f.table.words))) }) //nolint:errcheck // nothing to release where nothing can be read
}

// Drop forgets the blocks that r touches, because they were found to be wrong. They are written again by the
// next WriteAt.
func (b *Blob) Drop(r ztoc.Range) {
	r = b.clip(r)
	if r.Empty() || !b.enter() {
		return
	}
	defer b.exit()
	lo, hi := b.file.table.outer(r)
	guard(func() { b.file.table.drop(lo, hi) }) //nolint:errcheck // what cannot be read counts as absent
}

// Verify hashes a complete blob: nil when it matches its digest, ErrCorrupt when it does not, ErrAbsent when
// it is not complete. It changes nothing: dropping is the caller's decision.
func (b *Blob) Verify(ctx context.Context) error {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < b.file.ref.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(buf)), b.file.ref.Size-off)
		if err := b.ReadAt(buf[:n], off); err != nil {
			return err
		}
		h.Write(buf[:n])
		off += n
	}
	if got := ztoc.DigestFromSum([sha256.Size]byte(h.Sum(nil))); got != b.file.ref.Digest {
		return fmt.Errorf("%w: blob %s in %s hashes to %s", ErrCorrupt, b.file.ref.Digest, b.file.f.Name(), got)
	}
	return nil
}

// touch notes the time of use, at most once a second.
func (f *file) touch() {
	now := time.Now().UnixNano()
	last := f.used.Load()
	if now-last < touchEvery || !f.used.CompareAndSwap(last, now) {
		return
	}
	setTimes(f.f, now)
}

// setTimes sets the modification time, by which eviction orders, to now.
func setTimes(f *os.File, now int64) {
	tv := unix.NsecToTimeval(now)
	unix.Futimes(int(f.Fd()), []unix.Timeval{tv, tv}) //nolint:errcheck // only the order of eviction depends on it
}

// Close releases the handle. The blob may be evicted like any other once no process has it open.
func (b *Blob) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	f := b.file
	f.s.mu.Lock()
	f.refs--
	last := f.refs == 0
	if last && f.s.open[f.name] == f {
		delete(f.s.open, f.name)
	}
	f.s.mu.Unlock()
	if !last {
		return nil
	}
	err := f.unmap() // waits for those who are using it
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	f.s.unmapUsage()
	return err
}

// unmap ends the use of the file by this process.
func (f *file) unmap() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.m == nil {
		return nil
	}
	m := f.m
	f.m, f.table.words = nil, nil
	return errors.Join(unix.Munmap(m), f.f.Close())
}

// hand is where the next eviction from within this blob starts, in bytes. It lies in the shared header.
func (f *file) hand() *uint64 { return (*uint64)(unsafe.Pointer(&f.m[handOffset])) }
