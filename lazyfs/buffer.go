package lazyfs

import (
	"fmt"
	"math/bits"
	"sync"

	"golang.org/x/sys/unix"
)

// pool hands out big buffers from memory that the garbage collector does not see: their number is decided
// by budgets, not by when a collection happens to run, and what is given back beyond the keep goes back to
// the system at once.
type pool struct {
	keep int // bytes of free buffers to hold on to

	mu   sync.Mutex
	free map[int][][]byte // by capacity
	held int              // bytes in free
	out  int              // bytes handed out
}

// Capacities are multiples of this below 16 times it, then an eighth of their power of two. What is smaller comes from the
// collected heap after all: a mapping of its own for each would cost more than it saves.
const (
	bufferGrain = 64 << 10
	smallGrain  = 4 << 10
)

// class is the capacity of a buffer for n bytes: at most an eighth above n once n is past a few grains.
func class(n int) int {
	if n <= bufferGrain-smallGrain {
		return (n + smallGrain - 1) &^ (smallGrain - 1)
	}
	if n <= 16*bufferGrain {
		return (n + bufferGrain - 1) / bufferGrain * bufferGrain
	}
	grain := 1 << (bits.Len(uint(n-1)) - 4)
	return (n + grain - 1) &^ (grain - 1)
}

func newPool(keep int) *pool { return &pool{keep: keep, free: map[int][][]byte{}} }

// get is a buffer of n > 0 bytes with any content. Its capacity is class(n), or up to a quarter more.
func (p *pool) get(n int) ([]byte, error) {
	c := class(n)
	if c < bufferGrain {
		p.mu.Lock()
		p.out += c
		p.mu.Unlock()
		return make([]byte, n, c), nil
	}
	b := p.takeFree(c)
	if b != nil && (len(b) < c || len(b) > c+c/4) {
		other, err := unix.Mremap(b, c, unix.MREMAP_MAYMOVE)
		if err != nil {
			_ = unix.Munmap(b)
		}
		b = other
	}
	if b == nil {
		var err error
		if b, err = unix.Mmap(-1, 0, c, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
			return nil, fmt.Errorf("memory for %d bytes: %w", n, err)
		}
	}
	p.mu.Lock()
	p.out += len(b)
	p.mu.Unlock()
	return b[:n], nil
}

// takeFree is the free buffer whose capacity is the nearest to c, nil without. The spans of a layer differ in size, and new
// memory costs a fault for each page, so one of another size is made to fit: that moves its pages and makes only the few
// that it lacks.
func (p *pool) takeFree(c int) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	best := 0
	for k, l := range p.free {
		if len(l) > 0 && (best == 0 || abs(k-c) < abs(best-c)) {
			best = k
		}
	}
	if best == 0 {
		return nil
	}
	l := p.free[best]
	b := l[len(l)-1]
	p.free[best] = l[:len(l)-1]
	p.held -= best
	return b
}

func abs(n int) int { return max(n, -n) }

// put gives back a buffer from get, which nobody may use any more.
func (p *pool) put(b []byte) {
	if b == nil {
		return
	}
	b = b[:cap(b)]
	p.mu.Lock()
	p.out -= len(b)
	if len(b) < bufferGrain {
		p.mu.Unlock()
		return
	}
	if p.held+len(b) <= p.keep {
		p.free[len(b)] = append(p.free[len(b)], b)
		p.held += len(b)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	_ = unix.Munmap(b)
}

// trim gives all free buffers back to the system.
func (p *pool) trim() {
	p.mu.Lock()
	free := p.free
	p.free, p.held = map[int][][]byte{}, 0
	p.mu.Unlock()
	for _, l := range free {
		for _, b := range l {
			_ = unix.Munmap(b)
		}
	}
}

// zeros is memory that reads as zeros. It was written to: the kernel's zero page, which memory that was not stands for, is
// found the slow way, which fails in a process that is being killed, and its readers would get EIO.
var zeros = sync.OnceValue(func() []byte {
	b := make([]byte, 64<<10)
	for i := range b {
		b[i] = 1
	}
	clear(b)
	return b
})

// bytes is what p holds from the system.
func (p *pool) bytes() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(p.held + p.out)
}
