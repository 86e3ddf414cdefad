package fetchtest

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/ztoc"
)

// BlockSize is the unit of presence of every store, in bytes.
const BlockSize = 4096

// ErrAbsent is what MemoryStore's blobs say when they have not all of what is read.
var ErrAbsent = errors.New("absent")

// ErrFull is what they say when they are told to keep nothing.
var ErrFull = errors.New("full")

// A MemoryStore is a fetch.Store in memory.
type MemoryStore struct {
	mu    sync.Mutex
	blobs map[ztoc.BlobRef]*MemoryBlob
	full  bool
}

// NewStore makes an empty store.
func NewStore() *MemoryStore { return &MemoryStore{blobs: map[ztoc.BlobRef]*MemoryBlob{}} }

// SetFull makes the store refuse everything from now on, or not.
func (s *MemoryStore) SetFull(full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full = full
}

// Blob opens a blob.
func (s *MemoryStore) Blob(ref ztoc.BlobRef) (fetch.Blob, error) { return s.Open(ref) }

// Open is Blob with its own type.
func (s *MemoryStore) Open(ref ztoc.BlobRef) (*MemoryBlob, error) {
	if ref.Size < 0 || ref.Size > 1<<30 {
		return nil, fmt.Errorf("blob of %d bytes", ref.Size)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[ref]
	if b == nil {
		b = &MemoryBlob{s: s, data: make([]byte, ref.Size), here: make([]bool, (ref.Size+BlockSize-1)/BlockSize)}
		s.blobs[ref] = b
	}
	return b, nil
}

// A MemoryBlob is a blob of a MemoryStore.
type MemoryBlob struct {
	s    *MemoryStore
	data []byte
	here []bool
}

func (b *MemoryBlob) size() int64 { return int64(len(b.data)) }

// Missing is fetch.Blob's.
func (b *MemoryBlob) Missing(r ztoc.Range) (out []ztoc.Range) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	r = ztoc.Range{End: b.size()}.Intersect(r)
	if r.Empty() {
		return nil
	}
	for i := r.Start / BlockSize; i*BlockSize < r.End; i++ {
		if b.here[i] {
			continue
		}
		blk := ztoc.Range{Start: i * BlockSize, End: min((i+1)*BlockSize, b.size())}
		if n := len(out); n > 0 && out[n-1].End == blk.Start {
			out[n-1].End = blk.End
		} else {
			out = append(out, blk)
		}
	}
	return out
}

// ReadAt is fetch.Blob's.
func (b *MemoryBlob) ReadAt(p []byte, off int64) error {
	r := ztoc.Range{Start: off, End: off + int64(len(p))}
	if off < 0 || r.End > b.size() {
		return fmt.Errorf("%v is out of bounds", r)
	}
	if len(b.Missing(r)) > 0 {
		return ErrAbsent
	}
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	copy(p, b.data[off:])
	return nil
}

// WriteAt is fetch.Blob's.
func (b *MemoryBlob) WriteAt(p []byte, off int64) error {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	end := off + int64(len(p))
	if off < 0 || end > b.size() {
		return fmt.Errorf("[%d, %d) is out of bounds", off, end)
	}
	if b.s.full {
		return ErrFull
	}
	for i := (off + BlockSize - 1) / BlockSize; i < int64(len(b.here)); i++ {
		blk := ztoc.Range{Start: i * BlockSize, End: min((i+1)*BlockSize, b.size())}
		if blk.End > end {
			break
		}
		if !b.here[i] {
			copy(b.data[blk.Start:blk.End], p[blk.Start-off:])
			b.here[i] = true
		}
	}
	return nil
}

// Drop is fetch.Blob's.
func (b *MemoryBlob) Drop(r ztoc.Range) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	r = ztoc.Range{End: b.size()}.Intersect(r)
	for i := r.Start / BlockSize; !r.Empty() && i*BlockSize < r.End; i++ {
		b.here[i] = false
	}
}

// Evict forgets everything.
func (s *MemoryStore) Evict() {
	s.mu.Lock()
	blobs := make([]*MemoryBlob, 0, len(s.blobs))
	for _, b := range s.blobs {
		blobs = append(blobs, b)
	}
	s.mu.Unlock()
	for _, b := range slices.All(blobs) {
		b.Drop(ztoc.Range{End: b.size()})
	}
}

// Close is fetch.Blob's.
func (b *MemoryBlob) Close() error { return nil }
