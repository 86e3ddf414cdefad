package inflate

import (
	"math/bits"
	"unsafe"
)

// headerRoom is more than the header of a block with codes of its own takes: 14 bits, 19 lengths of 3
// bits and 316 lengths of at most 14 bits, bytes.
const headerRoom = 600

// findBlock looks in d.in from bit at on for what can be the start of a block with codes of its own
// that is not the last: its header is right in all respects. It returns the bit, or -1 and the bit from
// which to look on with more input. Of the code lengths' own codes at least 12 must be given, which all but
// the smallest blocks do: that leaves half as many places to try. About one false one in a billion bits of noise is to be expected.
func (d *decoder) findBlock(at int) (found, next int) {
	end := (len(d.in) - headerRoom) * 8
	in := unsafe.Pointer(unsafe.SliceData(d.in)) // what is loaded begins well before end
	for at < end {
		// The bits of a header: 0, 0, 1 and then 5 bits of each of two counts, which are below 30:
		// their upper four bits are not all set. Then 4 bits of a third count.
		x := load64(in, at>>3) >> (at & 7)
		m := ^x & ^(x >> 1) & (x >> 2) & (x >> 16)
		m &^= x >> 4 & (x >> 5) & (x >> 6) & (x >> 7)
		m &^= x >> 9 & (x >> 10) & (x >> 11) & (x >> 12)
		m &= 1<<findStep - 1
		for ; m != 0; m &= m - 1 {
			b := bits.TrailingZeros64(m)
			p := at + b
			n := x>>(b+13)&15 + 4
			lens := load64(in, (p+17)>>3) >> ((p + 17) & 7) & (1<<(3*n) - 1)
			sum := kraft[lens&0xfff] + kraft[lens>>12&0xfff] + kraft[lens>>24&0xfff] +
				kraft[lens>>36&0xfff] + kraft[lens>>48&0xfff]
			if sum != 1<<7 {
				continue
			}
			d.pos, d.bb, d.nb = p>>3+1, uint64(d.in[p>>3]>>(p&7)), uint(8-p&7)
			if d.readHeader() == isFull {
				return p, p
			}
		}
		at += findStep
	}
	return -1, at
}

// findStep is how many positions are tried at a time: of at least 57 bits at hand 17 are looked at.
const findStep = 40

// kraft has for four code lengths of 3 bits how much of all codes of 7 bits they take.
var kraft = func() (t [1 << 12]uint16) {
	for i := range t {
		for j := i; j != 0; j >>= 3 {
			if n := j & 7; n != 0 {
				t[i] += 1 << (7 - n)
			}
		}
	}
	return t
}()
