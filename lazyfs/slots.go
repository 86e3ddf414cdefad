package lazyfs

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Slots is the memory that requests are read into from the device, straight, and stay in until they are
// answered. When it is shared with another process (NewSharedSlots), a server that dies leaves the
// requests it had taken from the kernel there, and its successor answers them: nothing depends on the
// kernel sending them again.
//
// A slot needs no state besides the request: its header's length is zero unless a request that has not
// been answered is in it. A server that died between answering and clearing leads to a second answer,
// which the kernel refuses (ENOENT) because uniques are never used twice.
type Slots struct {
	mem      []byte
	size     int
	private  bool
	answered *atomic.Uint64 // replies that the kernel took, of all servers
	taken    *atomic.Uint64 // slots from here on have never been used

	mu   sync.Mutex
	free []uint32 // last in, first out, so that few pages are ever touched
}

// SlotCount is how many requests a connection can have taken and not answered; those beyond are held in
// private memory and are lost with their server (a kernel that can resend still brings them back).
const SlotCount = 8192

// SlotsSize is the size in bytes of the memory that NewSharedSlots wants. Pages of it that no request
// was ever in cost nothing. The slots come first, then a page of two words of eight bytes in the order of this machine: how many
// requests have been answered, and how many slots were ever in use.
const SlotsSize = slotsBytes + 4096

// SlotsVersion changes with the layout of that memory. A server must not use memory of another version.
const SlotsVersion = 1

const (
	slotsBytes   = SlotCount * minReadBuffer
	answeredWord = slotsBytes
	takenWord    = slotsBytes + 8
)

// NewSharedSlots uses mem, which must be shared by all servers that a mount ever has: zero at first, of
// SlotsSize bytes, aligned to a page.
func NewSharedSlots(mem []byte) (*Slots, error) {
	if len(mem) != SlotsSize {
		return nil, fmt.Errorf("shared memory has %d bytes, not %d", len(mem), SlotsSize)
	}
	s := &Slots{
		mem: mem, size: minReadBuffer,
		answered: (*atomic.Uint64)(unsafe.Pointer(&mem[answeredWord])), taken: (*atomic.Uint64)(unsafe.Pointer(&mem[takenWord])),
	}
	used := s.used()
	for i := uint32(SlotCount); i > 0; i-- {
		if i > used || s.length(i-1) == 0 {
			s.free = append(s.free, i-1)
		}
	}
	return s, nil
}

// used is how many slots have ever been in use: looking at others would only cost their pages.
func (s *Slots) used() uint32 { return uint32(min(s.taken.Load(), SlotCount)) }

// AnsweredIn is how many requests have been answered by all servers that shared the slots in memory, so far.
func AnsweredIn(memory io.ReaderAt) (uint64, error) {
	var b [8]byte
	if _, err := memory.ReadAt(b[:], answeredWord); err != nil {
		return 0, fmt.Errorf("memory for requests: %w", err)
	}
	return binary.NativeEndian.Uint64(b[:]), nil
}

func newPrivateSlots() (*Slots, error) {
	mem, err := unix.Mmap(-1, 0, SlotsSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("memory for requests: %w", err)
	}
	s, err := NewSharedSlots(mem)
	if err == nil {
		s.private = true
	}
	return s, err
}

// unmap ends private slots, which nobody may use any more.
func (s *Slots) unmap() {
	if s.private {
		_ = unix.Munmap(s.mem)
		s.mem = nil
	}
}

// A slot holds one request. Index noSlot marks one in private memory.
type slot struct {
	index uint32
	buf   []byte
}

const noSlot = ^uint32(0)

func (s *Slots) at(i uint32) slot {
	off := int(i) * s.size
	return slot{index: i, buf: s.mem[off : off+s.size : off+s.size]}
}

func (s *Slots) length(i uint32) uint32 {
	b := s.mem[int(i)*s.size:]
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// take is a free slot whose header is zero.
func (s *Slots) take() slot {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.free)
	if n == 0 {
		return slot{index: noSlot, buf: make([]byte, s.size)}
	}
	i := s.free[n-1]
	s.free = s.free[:n-1]
	if s.taken.Load() <= uint64(i) {
		s.taken.Store(uint64(i) + 1)
	}
	sl := s.at(i)
	// Its page must be there when the kernel copies a request into it: finding one then would fail in a process that is
	// being killed, and the kernel would answer the request with EIO.
	sl.clear()
	return sl
}

// clear forgets the request in sl, which was answered; sl can be read into again.
func (sl slot) clear() { clear(sl.buf[:inHeaderSize]) }

// put clears sl and gives it back.
func (s *Slots) put(sl slot) {
	sl.clear()
	if sl.index == noSlot {
		return
	}
	s.mu.Lock()
	s.free = append(s.free, sl.index)
	s.mu.Unlock()
}

// left are the slots in which a server that died left requests. Called once, before any take.
func (s *Slots) left() []slot {
	var l []slot
	for i := range s.used() {
		if s.length(i) != 0 {
			l = append(l, s.at(i))
		}
	}
	return l
}
