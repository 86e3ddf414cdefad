// Package peertest has a Source in memory and what every Source and every Network must do.
//
//  1. A Shelf holds blobs, each with the ranges that have arrived. It follows the contract of peer.Source: a range is had
//     or promised or neither, and each change is told to the watchers.
//  2. TestNetwork runs a server and clients over a network and looks at what arrives.
//  3. TestSource looks at a Source alone.
package peertest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// A Shelf is a peer.Source in memory. The zero value is empty and lets everybody have everything.
type Shelf struct {
	// Allow, if set, says who may open a blob. Set it before use.
	Allow func(from peer.Asker, d ztoc.Digest) error

	mu    sync.Mutex
	blobs map[ztoc.Digest]*blob
}

// A blob is guarded by Shelf.mu.
type blob struct {
	data     []byte
	here     []ztoc.Range // sorted, merged
	promise  func(from peer.Asker, r ztoc.Range) bool
	watchers map[*handle]func(ztoc.Range)
	open     int
}

func (s *Shelf) blob(d ztoc.Digest) *blob {
	if s.blobs == nil {
		s.blobs = map[ztoc.Digest]*blob{}
	}
	b := s.blobs[d]
	if b == nil {
		b = &blob{watchers: map[*handle]func(ztoc.Range){}}
		s.blobs[d] = b
	}
	return b
}

// Put adds a whole blob.
func (s *Shelf) Put(data []byte) ztoc.Digest {
	d := ztoc.DigestOf(data)
	s.Write(d, 0, data)
	return d
}

// Write adds a range of a blob.
func (s *Shelf) Write(d ztoc.Digest, off int64, p []byte) {
	r := ztoc.Range{Start: off, End: off + int64(len(p))}
	s.mu.Lock()
	b := s.blob(d)
	if int64(len(b.data)) < r.End {
		b.data = append(b.data, make([]byte, r.End-int64(len(b.data)))...)
	}
	copy(b.data[off:], p)
	b.here = merge(append(b.here, r))
	s.tell(b, r)
}

// Drop forgets a range of a blob, as an eviction does: nobody is told.
func (s *Shelf) Drop(d ztoc.Digest, r ztoc.Range) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blob(d)
	var rest []ztoc.Range
	for _, h := range b.here {
		rest = append(rest, ztoc.Range{Start: h.Start, End: min(h.End, r.Start)}, ztoc.Range{Start: max(h.Start, r.End), End: h.End})
	}
	b.here = merge(rest)
}

// Promise says from now on who may wait for which range of a blob; nil: nobody.
func (s *Shelf) Promise(d ztoc.Digest, f func(from peer.Asker, r ztoc.Range) bool) {
	s.mu.Lock()
	b := s.blob(d)
	b.promise = f
	s.tell(b, ztoc.Range{Start: 0, End: 1 << 50})
}

// Has is what has arrived of a blob.
func (s *Shelf) Has(d ztoc.Digest) []ztoc.Range {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.blob(d).here)
}

// Bytes is the bytes of a blob, as far as they have arrived; zeros between.
func (s *Shelf) Bytes(d ztoc.Digest) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.blob(d).data)
}

// OpenBlobs is how many opened blobs have not been closed.
func (s *Shelf) OpenBlobs() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.blobs {
		n += b.open
	}
	return n
}

// tell unlocks s.mu and calls the watchers.
func (s *Shelf) tell(b *blob, r ztoc.Range) {
	var all []func(ztoc.Range)
	for _, f := range b.watchers {
		all = append(all, f)
	}
	s.mu.Unlock()
	for _, f := range all {
		f(r)
	}
}

// Open opens a blob of which something is here or promised.
func (s *Shelf) Open(_ context.Context, from peer.Asker, d ztoc.Digest) (peer.Blob, error) {
	if s.Allow != nil {
		if err := s.Allow(from, d); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	if b == nil || (len(b.here) == 0 && b.promise == nil) {
		return nil, peer.ErrNotHere
	}
	b.open++
	return &handle{s: s, b: b, from: from}, nil
}

type handle struct {
	s      *Shelf
	b      *blob
	from   peer.Asker
	closed bool
}

func (h *handle) Have(r ztoc.Range) bool {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.have(r)
}

func (h *handle) have(r ztoc.Range) bool {
	return slices.ContainsFunc(h.b.here, func(x ztoc.Range) bool { return x.Contains(r) })
}

func (h *handle) Promised(r ztoc.Range) bool {
	h.s.mu.Lock()
	f := h.b.promise
	h.s.mu.Unlock()
	return f != nil && f(h.from, r)
}

func (h *handle) ReadAt(p []byte, off int64) error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.closed {
		return fmt.Errorf("read of a closed blob")
	}
	if r := (ztoc.Range{Start: off, End: off + int64(len(p))}); !h.have(r) {
		return fmt.Errorf("%v: %w", r, peer.ErrNotHere)
	}
	copy(p, h.b.data[off:])
	return nil
}

func (h *handle) Watch(f func(r ztoc.Range)) (stop func()) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	key := &handle{}
	h.b.watchers[key] = f
	return func() {
		h.s.mu.Lock()
		defer h.s.mu.Unlock()
		delete(h.b.watchers, key)
	}
}

func (h *handle) Close() error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.closed {
		return fmt.Errorf("closed twice")
	}
	h.closed = true
	h.b.open--
	return nil
}

func merge(ranges []ztoc.Range) []ztoc.Range {
	ranges = slices.DeleteFunc(ranges, ztoc.Range.Empty)
	slices.SortFunc(ranges, func(a, b ztoc.Range) int { return int(a.Start - b.Start) })
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && r.Start <= out[n-1].End {
			out[n-1].End = max(out[n-1].End, r.End)
		} else {
			out = append(out, r)
		}
	}
	return out
}
