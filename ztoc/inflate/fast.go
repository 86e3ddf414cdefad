package inflate

import (
	"encoding/binary"
	"unsafe"
)

// fastGo is fast in Go, the twin of the assembly: the same steps in the same order.
//
// Indices stay in bounds because the caller promises room behind inEnd and outEnd, a pass takes at
// most 14 bytes of input and makes at most 6 literals and a match, no distance passes d.lo, and the
// tables' entries lead into the tables.
func fastGo[T byte | uint16](d *decoder, out []T, inEnd, outEnd int) (how int) {
	size := int(unsafe.Sizeof(T(0))) // known where this is compiled for T
	lit, dist := &d.codes.lit, &d.codes.dist
	inp, outp := unsafe.Pointer(unsafe.SliceData(d.in)), unsafe.Pointer(unsafe.SliceData(out))
	pos, wp, lo := d.pos, d.wp*size, d.lo*size // in bytes
	outEnd *= size
	bb, nb := d.bb, uint64(d.nb)
	for pos <= inEnd && wp < outEnd {
		bb |= load64(inp, pos) << (nb & 63)
		pos += int(63-nb) >> 3
		nb |= 56

		e := lit[bb&litMask]
		if e >= isLiteral {
			bb >>= e & 63
			nb -= uint64(e & 63)
			store(outp, wp, size, e)
			wp += int(e>>30) * size
			e = lit[bb&litMask]
			if e >= isLiteral {
				bb >>= e & 63
				nb -= uint64(e & 63)
				store(outp, wp, size, e)
				wp += int(e>>30) * size
				e = lit[bb&litMask]
				if e >= isLiteral {
					bb >>= e & 63
					nb -= uint64(e & 63)
					store(outp, wp, size, e)
					wp += int(e>>30) * size
					continue
				}
			}
			bb |= load64(inp, pos) << (nb & 63)
			pos += int(63-nb) >> 3
			nb |= 56
		}
		wrong, wrongBits := bb, nb // in case something is wrong: left to the careful loop
		if e&isOther != 0 {
			if e&isSub == isSub {
				bb >>= litBits
				nb -= litBits
				e = lit[uint64(e>>16)+bb&(1<<(e>>8&15)-1)]
				if e >= isLiteral {
					bb >>= e & 63
					nb -= uint64(e & 63)
					store(outp, wp, size, e)
					wp += size
					continue
				}
			}
			if e&isOther != 0 {
				if e&isEnd == isEnd {
					bb >>= e & 63
					nb -= uint64(e & 63)
					how = fastEnd
				} else {
					bb, nb = wrong, wrongBits
				}
				break
			}
		}
		length := int(e>>16) + int(bb&(1<<(e&63)-1)>>(e>>8&63))
		bb >>= e & 63
		nb -= uint64(e & 63)
		e = dist[bb&distMask]
		if e&isOther != 0 {
			if e&isSub == isSub {
				bb >>= distBits
				nb -= distBits
				e = dist[uint64(e>>16)+bb&(1<<(e>>8&15)-1)]
			}
			if e&isOther != 0 {
				bb, nb = wrong, wrongBits
				break
			}
		}
		back := int(e>>16) + int(bb&(1<<(e&63)-1)>>(e>>8&63))
		bb >>= e & 63
		nb -= uint64(e & 63)
		length, back = length*size, back*size
		if back > wp-lo {
			bb, nb = wrong, wrongBits
			break
		}
		end := wp + length
		switch {
		case back >= 8:
			for from := wp - back; wp < end; wp, from = wp+8, from+8 {
				store64(outp, wp, load64(outp, from))
			}
		case back == 1: // never with size 2, where the pattern below does as well
			v := uint64(*(*byte)(unsafe.Add(outp, wp-1))) * 0x0101010101010101
			for ; wp < end; wp += 8 {
				store64(outp, wp, v)
			}
		default: // the first 8 bytes one by one, then copies from a distance that is a multiple
			from := wp - back
			for i := range 8 {
				*(*byte)(unsafe.Add(outp, wp+i)) = *(*byte)(unsafe.Add(outp, from+i))
			}
			from = wp - back
			for wp += 8 - 8%back; wp < end; wp += 8 - 8%back {
				store64(outp, wp, load64(outp, from))
			}
		}
		wp = end
	}
	d.pos, d.wp = pos, wp/size
	d.bb, d.nb = bb&(1<<nb-1), uint(nb)
	return how
}

func load64(p unsafe.Pointer, i int) uint64 {
	return binary.LittleEndian.Uint64((*[8]byte)(unsafe.Add(p, i))[:])
}

func store64(p unsafe.Pointer, i int, v uint64) {
	binary.LittleEndian.PutUint64((*[8]byte)(unsafe.Add(p, i))[:], v)
}

// store writes the literals of e, room for two, in size bytes each.
func store(p unsafe.Pointer, i, size int, e uint32) {
	if size == 1 {
		binary.LittleEndian.PutUint16((*[2]byte)(unsafe.Add(p, i))[:], uint16(e>>8))
		return
	}
	*(*[2]uint16)(unsafe.Add(p, i)) = [2]uint16{uint16(e >> 8 & 0xff), uint16(e >> 16 & 0xff)}
}
