package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

const (
	usageMagic   = "MUSTERU\x01"
	fullDiskRoom = 32 << 20 // freed at once when the disk, not the quota, is full
	punchStep    = 1 << 20
)

// mapUsage maps the counter of allocated bytes that the processes share, and makes it if need be.
func (s *Store) mapUsage() ([]byte, error) {
	path := s.path("usage")
	for range 20 {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			if err := s.createUsage(path); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		hdr := make([]byte, 4096)
		_, err = f.ReadAt(hdr, 0)
		if err != nil || string(hdr[:8]) != usageMagic {
			f.Close()
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			continue
		}
		m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: mmap: %w", path, err)
		}
		return m, nil
	}
	return nil, fmt.Errorf("%s cannot be opened", path)
}

// counter is the counter in the mapping of mapUsage.
func counter(m []byte) *atomic.Int64 { return (*atomic.Int64)(unsafe.Pointer(&m[64])) }

func (s *Store) createUsage(path string) error {
	t, err := s.newTemp()
	if err != nil {
		return err
	}
	defer t.discard()
	b := make([]byte, 4096)
	copy(b, usageMagic)
	if _, err := t.f.WriteAt(b, 0); err != nil {
		return err
	}
	return t.link(path)
}

// reserve charges n bytes that are about to be allocated, and evicts if they take the store over its quota.
func (s *Store) reserve(n int64) error {
	if n == 0 {
		return nil
	}
	if s.degraded() {
		return fmt.Errorf("%w: %s", ErrNoSpace, s.dir)
	}
	if s.used().Add(n) <= s.quota {
		return nil
	}
	s.used().Add(-n) // or the recount would take it for a byte that is not there
	if err := s.lock.lock(); err != nil {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	defer s.lock.unlock()
	if s.used().Load()+n > s.quota { // else another evicted while we waited
		s.evict(s.lowWater()-n, false)
	}
	if s.used().Add(n) <= s.quota {
		return nil
	}
	s.used().Add(-n)
	return s.degrade(fmt.Sprintf("the quota of %d bytes is used up by pinned images and files in use", s.quota))
}

// lowWater is what eviction brings usage down to: some way below the quota, so that it runs seldom.
func (s *Store) lowWater() int64 {
	return s.quota - min(max(s.quota/20, 1<<20), 256<<20, s.quota/2)
}

// evictSome frees some n bytes of a full disk, as far as blobs and files that nobody has open go: to take
// from those in use would only move the shortage to their readers.
func (s *Store) evictSome(n int64) bool {
	if s.lock.lock() != nil {
		return false
	}
	defer s.lock.unlock()
	before := s.recount().total
	s.evict(max(0, before-n), true)
	return s.used().Load() < before
}

// An item is one file of the store as a recount found it.
type item struct {
	path  string
	kind  Kind         // empty for a blob
	key   string       // of a small file
	ref   ztoc.BlobRef // of a blob
	alloc int64        // bytes of allocated blocks
	size  int64
	used  time.Time
}

// census is what a recount found.
type census struct {
	items []item // blobs and small files
	total int64  // allocated bytes of everything in the directory
}

// recount stats every file and sets the shared counter right. The caller holds the store's lock.
func (s *Store) recount() census {
	before := s.used().Load()
	c := s.survey()
	// What others charged since then stays charged: it may or may not be in the count, so the counter errs
	// upwards. What they charged before and write only now is missed: writeSlots * writeChunk at most.
	s.used().Add(c.total - before)
	return c
}

// survey stats every file.
func (s *Store) survey() census {
	var c census
	add := func(dir, name string) (item, bool) {
		path := s.path(dir, name)
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return item{}, false // evicted by another
		}
		it := item{path: path, alloc: st.Blocks * 512, size: st.Size, used: time.Unix(st.Mtim.Sec, st.Mtim.Nsec)}
		c.total += it.alloc
		return it, st.Mode&unix.S_IFMT == unix.S_IFREG
	}
	list := func(dir string) []os.DirEntry {
		add(dir, "")
		names, err := os.ReadDir(s.path(dir))
		if err != nil {
			return nil
		}
		return names
	}
	for _, n := range list(blobsDir) {
		it, ok := add(blobsDir, n.Name())
		if ref, isBlob := parseBlobName(n.Name()); ok && isBlob {
			it.ref = ref
			c.items = append(c.items, it)
		}
	}
	for _, k := range list(filesDir) {
		if !k.IsDir() {
			add(filesDir, k.Name())
			continue
		}
		dir := filesDir + "/" + k.Name()
		for _, n := range list(dir) {
			if it, ok := add(dir, n.Name()); ok {
				it.kind, it.key = Kind(k.Name()), n.Name()
				c.items = append(c.items, it)
			}
		}
	}
	for _, d := range []string{imagesDir, pinsDir, tmpDir} {
		for _, n := range list(d) {
			add(d, n.Name())
		}
	}
	for _, n := range []string{"", "format", "host", "lock", "usage"} {
		add(n, "")
	}
	return c
}

// lastKinds are small, dear to make again, and so evicted only when nothing else is left.
func lastKind(k Kind) bool { return k == KindProfile || k == KindRef || k == KindManifest }

// firstKind is 1 for what only saves time and can be made from what else is here.
func firstKind(k Kind) int {
	if k == KindBacking {
		return 1
	}
	return 0
}

// evict brings usage down to target if it can, with idleOnly as far as nobody has the files open. The
// caller holds the store's lock.
func (s *Store) evict(target int64, idleOnly bool) {
	c := s.recount()
	if s.used().Load() <= target {
		return
	}
	keep, err := s.pinned()
	if err != nil {
		s.log.Warn("muster: nothing is evicted", "cause", err)
		return
	}
	slices.SortFunc(c.items, func(a, b item) int {
		return cmp.Or(-cmp.Compare(firstKind(a.kind), firstKind(b.kind)), a.used.Compare(b.used), cmp.Compare(a.path, b.path))
	})
	enough := func() bool { return s.used().Load() <= target }

	// Whole blobs and files that nobody has open.
	var busy, last []item
	for _, it := range c.items {
		if enough() {
			return
		}
		switch {
		case keep.has(it):
		case lastKind(it.kind):
			last = append(last, it)
		case !s.unlinkIdle(it):
			busy = append(busy, it)
		}
	}
	// Ranges of blobs that are in use.
	for _, it := range busy {
		if enough() || idleOnly {
			break
		}
		if it.kind == "" {
			s.punch(it, target)
		}
	}
	for _, it := range last {
		if enough() {
			return
		}
		s.unlinkIdle(it)
	}
}

// unlinkIdle removes the file unless somebody has it open, and says whether it is gone.
func (s *Store) unlinkIdle(it item) bool {
	f, err := os.OpenFile(it.path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	// Whoever opens it from now on waits for this lock, and then finds a file without a name (mapFile).
	if tryFlock(f, unix.LOCK_EX) != nil {
		return false
	}
	var st, there unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || unix.Lstat(it.path, &there) != nil || st.Ino != there.Ino {
		return false
	}
	if os.Remove(it.path) != nil {
		return false
	}
	s.used().Add(-st.Blocks * 512)
	return true
}

// punch takes ranges away from a blob that is in use, from where the last punch ended, until usage is down to
// target or the blob is empty.
func (s *Store) punch(it item, target int64) {
	if !s.fs.Punch {
		return
	}
	f, err := s.openFile(blobName(it.ref), it.ref, false)
	if err != nil {
		return
	}
	defer f.unmap() //nolint:errcheck // nothing was written through it
	guard(func() {  //nolint:errcheck // a blob that cannot be read is left alone
		hand := min(int64(atomic.LoadUint64(f.hand()))/punchStep*punchStep, it.ref.Size)
		end := f.punchFrom(hand, it.ref.Size, target)
		if end >= it.ref.Size && s.used().Load() > target {
			end = f.punchFrom(0, hand, target)
		}
		atomic.StoreUint64(f.hand(), uint64(end))
	})
	setTimes(f.f, it.used.UnixNano()) // punching is not using
}

// punchFrom punches allocated steps of [from, to) and returns where it stopped.
func (f *file) punchFrom(from, to, target int64) int64 {
	s, fd := f.s, int(f.f.Fd())
	for at := from; at < to; at += punchStep {
		if s.used().Load() <= target {
			return at
		}
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return to
		}
		if err == nil {
			if at = max(at, data/punchStep*punchStep); at >= to {
				return to
			}
		}
		f.punchRange(ztoc.Range{Start: at, End: min(at+punchStep, f.ref.Size)})
	}
	return to
}

// punchRange empties the words of r, which starts at a multiple of punchStep, and gives its blocks back.
func (f *file) punchRange(r ztoc.Range) {
	var before, after unix.Stat_t
	lo, hi := r.Start/wordBytes, wordsFor(r.End)
	fd := int(f.f.Fd())
	f.table.seize(lo, hi)
	unix.Fstat(fd, &before)                                           //nolint:errcheck // an open file
	punchHole(fd, r.Start, (r.Len()+BlockSize-1)/BlockSize*BlockSize) //nolint:errcheck // what is not freed is not counted as freed
	unix.Fstat(fd, &after)                                            //nolint:errcheck // an open file
	f.table.release(lo, hi)
	// Another writer may have allocated blocks elsewhere in this file between the two looks; it has charged them.
	f.s.used().Add(-max(0, (before.Blocks-after.Blocks)*512))
}
