package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// An Image is the record of what belongs to an image, so that it can be listed, pinned and removed as one.
type Image struct {
	Key       string         `json:"key"`       // the digest of its manifest
	Reference string         `json:"reference"` // as it was last asked for
	Blobs     []ztoc.BlobRef `json:"blobs"`     // its layers, derived ones too
	Files     []File         `json:"files"`     // its small files
	Created   time.Time      `json:"created"`   // first put; filled in by PutImage
}

// A File names a small file.
type File struct {
	Kind Kind   `json:"kind"`
	Key  string `json:"key"`
}

// A Pin keeps blobs from being evicted or collected.
type Pin struct {
	Key   string        `json:"key"`
	Blobs []ztoc.Digest `json:"blobs"`
}

const maxRecord = 16 << 20 // bytes of an image or pin record

// PutImage records an image, replacing an earlier record of the same key.
func (s *Store) PutImage(im Image) error {
	if err := checkKey(im.Key); err != nil {
		return err
	}
	for _, b := range im.Blobs {
		if _, err := ztoc.ParseDigest(string(b.Digest)); err != nil {
			return err
		}
	}
	for _, f := range im.Files {
		if _, err := s.filePath(f.Kind, f.Key); err != nil {
			return err
		}
	}
	if old, err := s.image(im.Key); err == nil && !old.Created.IsZero() {
		im.Created = old.Created
	}
	if im.Created.IsZero() {
		im.Created = time.Now().UTC()
	}
	return s.putRecord(imagesDir, im.Key, im)
}

// Images is the recorded images, by key.
func (s *Store) Images() ([]Image, error) {
	return readRecords(s, imagesDir, func(im Image) string { return im.Key })
}

// Pin keeps an image's blobs and, if it is recorded under the same key, its small files, until Unpin. It
// survives restarts.
func (s *Store) Pin(key string, blobs []ztoc.Digest) error {
	if err := checkKey(key); err != nil {
		return err
	}
	for _, d := range blobs {
		if _, err := ztoc.ParseDigest(string(d)); err != nil {
			return err
		}
	}
	return s.putRecord(pinsDir, key, Pin{Key: key, Blobs: blobs})
}

// Unpin ends a pin; none is not an error.
func (s *Store) Unpin(key string) error {
	if err := checkKey(key); err != nil {
		return err
	}
	_, err := s.removeCounted(s.path(pinsDir, key))
	return err
}

// Pins is what is pinned, by key.
func (s *Store) Pins() ([]Pin, error) {
	return readRecords(s, pinsDir, func(p Pin) string { return p.Key })
}

func (s *Store) putRecord(dir, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.putFile(s.path(dir, key), func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

func (s *Store) image(key string) (Image, error) {
	return readRecord[Image](s.path(imagesDir, key))
}

func readRecord[T any](path string) (v T, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return v, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return v, fmt.Errorf("%w: %s: %w", errDamaged, path, err)
	}
	return v, nil
}

// errDamaged says that what lies in the place of a record is none.
var errDamaged = errors.New("damaged")

// readRecords reads every record of a folder. One that is none (power was lost while it was written) is removed: it must not
// stand in the way of the others. One that cannot be read now is an error, because what it refers to would look unused.
func readRecords[T any](s *Store, dir string, key func(T) string) ([]T, error) {
	names, err := os.ReadDir(s.path(dir))
	if err != nil {
		return nil, err
	}
	var out []T
	for _, n := range names {
		v, err := readRecord[T](s.path(dir, n.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil && !errors.Is(err, errDamaged) && n.Type().IsRegular():
			return nil, err
		case err != nil || key(v) != n.Name():
			s.log.Warn("muster: a damaged record is removed", "path", s.path(dir, n.Name()), "cause", err)
			s.removeCounted(s.path(dir, n.Name())) //nolint:errcheck // tried again next time
		default:
			out = append(out, v)
		}
	}
	return out, nil
}

// A set is blobs and small files.
type set struct {
	blobs map[ztoc.Digest]bool
	files map[File]bool
}

func newSet() set { return set{map[ztoc.Digest]bool{}, map[File]bool{}} }

func (t set) add(im Image) {
	for _, b := range im.Blobs {
		t.blobs[b.Digest] = true
	}
	for _, f := range im.Files {
		t.files[f] = true
	}
}

func (t set) has(it item) bool {
	if it.kind == "" {
		return t.blobs[it.ref.Digest]
	}
	return t.files[File{it.kind, it.key}]
}

// hasOrigin reports whether it is a copy (BackingKey) of a part of one of t's blobs.
func (t set) hasOrigin(it item) bool {
	of, _, ok := strings.Cut(it.key, "-")
	return ok && it.kind == KindBacking && t.blobs[ztoc.Digest("sha256:"+of)]
}

// pinned is everything that pins keep.
func (s *Store) pinned() (set, error) {
	keep := newSet()
	pins, err := s.Pins()
	if err != nil {
		return keep, fmt.Errorf("what is pinned: %w", err)
	}
	for _, p := range pins {
		for _, d := range p.Blobs {
			keep.blobs[d] = true
		}
		switch im, err := s.image(p.Key); {
		case err == nil:
			keep.add(im)
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errDamaged):
			return keep, fmt.Errorf("what is pinned: %w", err)
		}
	}
	return keep, nil
}

// Remove removes an image: its record, its pin, and what of its blobs and files no other image or pin refers
// to. Blobs that a live mount has open lose their bytes at once and their file later. Freed is in bytes. An
// image that is not recorded is fs.ErrNotExist.
func (s *Store) Remove(key string) (freed int64, err error) {
	if err := checkKey(key); err != nil {
		return 0, err
	}
	if err := s.lock.lock(); err != nil {
		return 0, err
	}
	defer s.lock.unlock()
	im, err := s.image(key)
	if err != nil {
		return 0, err
	}
	if _, err := s.removeCounted(s.path(pinsDir, key)); err != nil {
		return 0, err
	}
	if freed, err = s.removeCounted(s.path(imagesDir, key)); err != nil {
		return freed, err
	}
	gone := newSet()
	gone.add(im)
	keep, err := s.referred()
	if err != nil {
		return freed, err
	}
	for _, it := range s.recount().items {
		if gone.has(it) && !keep.has(it) || gone.hasOrigin(it) && !keep.hasOrigin(it) {
			freed += s.take(it)
		}
	}
	return freed, nil
}

// referred is everything that images and pins refer to.
func (s *Store) referred() (set, error) {
	keep, err := s.pinned()
	if err != nil {
		return keep, err
	}
	images, err := s.Images()
	if err != nil {
		return keep, fmt.Errorf("what images refer to: %w", err)
	}
	for _, im := range images {
		keep.add(im)
	}
	return keep, nil
}

// take frees an item whether or not it is in use. The caller holds the store's lock.
func (s *Store) take(it item) int64 {
	before := s.used().Load()
	if !s.unlinkIdle(it) {
		if it.kind == "" {
			s.punch(it, -1<<62)
		} else {
			s.removeCounted(it.path) //nolint:errcheck // still there: found by the next collection
		}
	}
	return max(0, before-s.used().Load())
}

// GCOptions say what GC removes.
type GCOptions struct {
	// Grace is how long what no image refers to may lie unused. Too short and it takes away what a pull
	// that is under way has not recorded yet.
	Grace time.Duration
	// Target brings usage down to so many bytes, evicting recorded images too. Zero means the quota.
	Target int64
}

// DefaultGrace is the grace of GC when none is given.
const DefaultGrace = time.Hour

// graceOfNotes is the grace of references and profiles, which are a few KB, and worth having when
// the image comes back.
const graceOfNotes = 90 * 24 * time.Hour

// GCReport is what GC did.
type GCReport struct {
	Temp  int   // temporary files of dead processes removed
	Files int   // blobs and small files removed
	Freed int64 // bytes of allocated blocks
	Used  int64 // bytes in use afterwards
}

// GC sweeps what dead processes left, removes what no image or pin refers to and nobody has used for the
// grace, and brings usage down to the target. The zero GCOptions are the usual ones.
func (s *Store) GC(o GCOptions) (GCReport, error) {
	var r GCReport
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.Target <= 0 || o.Target > s.quota {
		o.Target = s.quota
	}
	if err := s.lock.lock(); err != nil {
		return r, err
	}
	defer s.lock.unlock()
	start := s.survey()
	r.Temp = s.sweepTemp()
	keep, err := s.referred()
	if err != nil {
		return r, err
	}
	for _, it := range s.recount().items {
		grace := o.Grace
		if it.kind == KindRef || it.kind == KindProfile {
			grace = max(grace, graceOfNotes)
		}
		if !keep.has(it) && time.Since(it.used) > grace {
			s.unlinkIdle(it)
		}
	}
	s.evict(o.Target, false)
	end := s.recount()
	r.Files = max(0, len(start.items)-len(end.items))
	r.Used = end.total
	r.Freed = max(0, start.total-end.total)
	return r, nil
}

// ImageInfo is an image as List shows it.
type ImageInfo struct {
	Image
	Pinned  bool      `json:"pinned"`
	InUse   bool      `json:"in_use"`   // some process has one of its blobs open
	Size    int64     `json:"size"`     // of its blobs when complete, bytes
	Present int64     `json:"present"`  // of Size, bytes that are here
	Alloc   int64     `json:"alloc"`    // bytes of disk taken by its blobs and files, shared ones too
	Unique  int64     `json:"unique"`   // of Alloc, what Remove would free
	Used    time.Time `json:"last_use"` // of any of its blobs or files
}

// Usage is how full a store is, in bytes.
type Usage struct {
	Used  int64 `json:"used"` // allocated blocks of everything
	Quota int64 `json:"quota"`
	Free  int64 `json:"free"` // of the file system below
	// Type is the file system below; with Memory what is stored takes the host's memory.
	Type   string `json:"type"`
	Memory bool   `json:"memory"`
	Blobs  int    `json:"blobs"`
	Files  int    `json:"files"`
	// Loose is bytes of blobs and files that no recorded image refers to.
	Loose int64 `json:"loose"`
}

// Usage counts the store.
func (s *Store) Usage() (Usage, error) {
	c := s.survey()
	u := Usage{Used: c.total, Quota: s.quota, Type: s.fs.Type, Memory: s.fs.Memory}
	keep, err := s.referred()
	if err != nil {
		return u, err
	}
	for _, it := range c.items {
		if it.kind == "" {
			u.Blobs++
		} else {
			u.Files++
		}
		if !keep.has(it) {
			u.Loose += it.alloc
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return u, fmt.Errorf("%s: %w", s.dir, err)
	}
	u.Free = int64(st.Bavail) * st.Bsize
	return u, nil
}

// List is the recorded images with what they take, least recently used first.
func (s *Store) List() ([]ImageInfo, error) {
	images, err := s.Images()
	if err != nil {
		return nil, err
	}
	pins, err := s.Pins()
	if err != nil {
		return nil, err
	}
	c := s.survey()
	sets := make([]set, len(images))
	for i, im := range images {
		sets[i] = newSet()
		sets[i].add(im)
	}
	out := make([]ImageInfo, len(images))
	for i, im := range images {
		info := ImageInfo{Image: im, Pinned: slices.ContainsFunc(pins, func(p Pin) bool { return p.Key == im.Key })}
		for _, b := range im.Blobs {
			info.Size += b.Size
		}
		for _, it := range c.items {
			if !sets[i].has(it) {
				continue
			}
			info.Alloc += it.alloc
			if it.used.After(info.Used) {
				info.Used = it.used
			}
			if it.kind == "" {
				present, inUse := s.inspect(it)
				info.Present += present
				info.InUse = info.InUse || inUse
			}
			shared := false
			for j := range sets {
				shared = shared || j != i && sets[j].has(it)
			}
			if !shared {
				info.Unique += it.alloc
			}
		}
		out[i] = info
	}
	slices.SortStableFunc(out, func(a, b ImageInfo) int {
		if c := a.Used.Compare(b.Used); c != 0 {
			return c
		}
		return strings.Compare(a.Key, b.Key)
	})
	return out, nil
}

// inspect says how much of a stored blob is here and whether somebody has it open.
func (s *Store) inspect(it item) (present int64, inUse bool) {
	g, err := os.OpenFile(it.path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, false
	}
	inUse = tryFlock(g, unix.LOCK_EX) == errBusy
	g.Close()
	f, err := s.openFile(blobName(it.ref), it.ref, false)
	if err != nil {
		return 0, inUse
	}
	b := &Blob{file: f}
	present = b.Present()
	f.unmap() //nolint:errcheck // nothing was written through it
	return present, inUse
}

// Find is the blob with this digest that the store has something of, false if there is none. Manifests lie about sizes, so there may be
// several; the first is as good as any.
func (s *Store) Find(d ztoc.Digest) (ztoc.BlobRef, bool) {
	if _, err := ztoc.ParseDigest(string(d)); err != nil {
		return ztoc.BlobRef{}, false
	}
	names, err := filepath.Glob(s.path(blobsDir, d.Hex()+"-*"))
	if err != nil {
		return ztoc.BlobRef{}, false
	}
	for _, n := range names {
		if ref, ok := parseBlobName(filepath.Base(n)); ok {
			return ref, true
		}
	}
	return ztoc.BlobRef{}, false
}
