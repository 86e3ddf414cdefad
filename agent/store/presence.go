package store

import (
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"runtime/debug"
	"sync/atomic"

	"github.com/muster-hpc/muster/ztoc"
)

// BlockSize is the unit of presence, in bytes. The last block of a blob is cut at the blob's end.
const BlockSize = 4 << 10

const (
	wordBlocks = 32                     // blocks of one word
	wordBytes  = wordBlocks * BlockSize // 128 KiB of a blob
)

// presence is the table of words of one blob, in memory that all processes share.
//
// A word is gen<<32 | bits. gen is even in rest; it is odd, and bits are zero, while an evictor takes
// away the bytes below. An evictor that is killed leaves it odd, which release puts right.
type presence struct {
	words []uint64
	size  int64 // of the blob
}

// wordsFor is the number of words for a blob of size bytes.
func wordsFor(size int64) int64 { return (size + wordBytes - 1) / wordBytes }

// blocks is the number of blocks of a blob of size bytes.
func blocks(size int64) int64 { return (size + BlockSize - 1) / BlockSize }

// inner is the blocks [lo, hi) that r covers wholly.
func (m presence) inner(r ztoc.Range) (lo, hi int64) {
	lo = (r.Start + BlockSize - 1) / BlockSize
	hi = r.End / BlockSize
	if r.End >= m.size {
		hi = blocks(m.size)
	}
	return lo, max(lo, hi)
}

// outer is the blocks [lo, hi) that r touches.
func (m presence) outer(r ztoc.Range) (lo, hi int64) {
	lo = r.Start / BlockSize
	hi = blocks(min(r.End, m.size))
	return lo, max(lo, hi)
}

// mask is the bits of word w that stand for blocks [lo, hi).
func mask(w, lo, hi int64) uint32 {
	a := max(lo-w*wordBlocks, 0)
	b := min(hi-w*wordBlocks, wordBlocks)
	if a >= b {
		return 0
	}
	return uint32((uint64(1)<<b - 1) &^ (uint64(1)<<a - 1))
}

// load is word w at this moment.
func (m presence) load(w int64) uint64 { return atomic.LoadUint64(&m.words[w]) }

// missing is the ranges of absent blocks among those that r touches, merged, cut at the blob's end.
func (m presence) missing(r ztoc.Range) []ztoc.Range {
	lo, hi := m.outer(r)
	var out []ztoc.Range
	add := func(a, b int64) { // blocks
		ra := ztoc.Range{Start: a * BlockSize, End: min(b*BlockSize, m.size)}
		if n := len(out); n > 0 && out[n-1].End == ra.Start {
			out[n-1].End = ra.End
			return
		}
		out = append(out, ra)
	}
	for b := lo; b < hi; {
		w := b / wordBlocks
		end := min(hi, (w+1)*wordBlocks)
		absent := mask(w, b, end) &^ uint32(m.load(w))
		for absent != 0 {
			first := bits.TrailingZeros32(absent)
			n := bits.TrailingZeros32(^(absent >> first)) // length of the run
			add(w*wordBlocks+int64(first), w*wordBlocks+int64(first+n))
			if first+n >= 32 {
				break
			}
			absent &^= 1<<(first+n) - 1
		}
		b = end
	}
	return out
}

// snapshot appends the words under blocks [lo, hi) to buf.
func (m presence) snapshot(buf []uint64, lo, hi int64) []uint64 {
	for w := lo / wordBlocks; w*wordBlocks < hi; w++ {
		buf = append(buf, m.load(w))
	}
	return buf
}

// allPresent reports whether snapshot snap of blocks [lo, hi) has all of them.
func allPresent(snap []uint64, lo, hi int64) bool {
	w := lo / wordBlocks
	for i, v := range snap {
		mk := mask(w+int64(i), lo, hi)
		if uint32(v)&mk != mk {
			return false
		}
	}
	return true
}

// unchanged reports whether blocks [lo, hi) are still present and were so ever since snap was taken.
//
// Without the counts: a reader sees the bit, an evictor clears it and punches, the reader reads zeros, a
// writer writes and sets the bit again, the reader sees the bit.
func (m presence) unchanged(snap []uint64, lo, hi int64) bool {
	w := lo / wordBlocks
	for i, v := range snap {
		now := m.load(w + int64(i))
		mk := mask(w+int64(i), lo, hi)
		if now>>32 != v>>32 || uint32(now)&mk != mk {
			return false
		}
	}
	return true
}

// mark sets blocks [lo, hi) whose words still have the counts of snap, and returns how many were not set before.
// An odd count is never marked: the bytes are being taken away.
func (m presence) mark(snap []uint64, lo, hi int64) (fresh int64) {
	w := lo / wordBlocks
	for i, v := range snap {
		mk := mask(w+int64(i), lo, hi)
		for {
			now := m.load(w + int64(i))
			if now>>32 != v>>32 || now>>32&1 == 1 {
				break
			}
			if atomic.CompareAndSwapUint64(&m.words[w+int64(i)], now, now|uint64(mk)) {
				fresh += int64(bits.OnesCount32(mk &^ uint32(now)))
				break
			}
		}
	}
	return fresh
}

// drop clears blocks [lo, hi). The count moves on too (by two, so that it stays even or odd): a writer that is
// at work now must not mark bytes which this call was to forget.
func (m presence) drop(lo, hi int64) {
	for w := lo / wordBlocks; w*wordBlocks < hi; w++ {
		for {
			now := m.load(w)
			next := (now>>32+2)<<32 | uint64(uint32(now)&^mask(w, lo, hi))
			if atomic.CompareAndSwapUint64(&m.words[w], now, next) {
				break
			}
		}
	}
}

// seize empties words [lo, hi) and keeps anybody from marking them until release. Only the holder of
// the store's lock may call it.
func (m presence) seize(lo, hi int64) {
	for w := lo; w < hi; w++ {
		for {
			now := m.load(w)
			if atomic.CompareAndSwapUint64(&m.words[w], now, (now>>32|1)<<32) {
				break
			}
		}
	}
}

// release ends seize, also that of an evictor that was killed. Only the holder of the store's lock may call it.
func (m presence) release(lo, hi int64) {
	for w := lo; w < hi; w++ {
		for {
			now := m.load(w)
			if now>>32&1 == 0 {
				break
			}
			if atomic.CompareAndSwapUint64(&m.words[w], now, (now>>32+1)<<32) {
				break
			}
		}
	}
}

// seized reports whether a word of snap is held by an evictor.
func seized(snap []uint64) bool {
	for _, v := range snap {
		if v>>32&1 == 1 {
			return true
		}
	}
	return false
}

var errMap = errors.New("presence cannot be read")

// guard runs f, which touches mapped memory, and turns a fault into an error: the kernel raises one where the disk
// fails below a mapping or somebody cut the file short. Without it the process would die.
func guard(f func()) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		switch r := recover().(type) {
		case nil:
		case interface {
			runtime.Error
			Addr() uintptr
		}:
			err = fmt.Errorf("%w: %w", errMap, r)
		default:
			panic(r)
		}
	}()
	f()
	return nil
}
