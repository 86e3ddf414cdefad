package inflate

// pairAfter is how many bytes a block inflates to before it is worth pairing the literals in its table.
const pairAfter = 2 << 10

// symbols decodes the symbols of a block with codes. blockEnd says that the end code was read.
func (d *decoder) symbols() status {
	inEnd, outEnd := len(d.in)-fastIn, min(d.end, max(len(d.out), len(d.wide))-maxMatch-slack)
	if !d.paired && d.pos <= inEnd && d.wp < outEnd {
		enough := d.wp + pairAfter
		if d.fast(inEnd, min(outEnd, enough)) == fastEnd {
			return blockEnd
		}
		if d.wp >= enough {
			d.own.lit.pair(&d.lens)
			d.paired = true
		}
	}
	if d.pos <= inEnd && d.wp < outEnd {
		if d.fast(inEnd, outEnd) == fastEnd {
			return blockEnd
		}
	}
	if d.wide != nil {
		return careful(d, d.wide)
	}
	return careful(d, d.out)
}

// fastIn is how much input beyond the current byte the fast loop may load at a time.
const fastIn = 16

// What the fast loop says.
const (
	fastStop = iota // input or output came to the limit, or something is wrong with the next symbol
	fastEnd         // the end of the block was read
)

// careful decodes up to the last bit of the input and the last byte of the output, one symbol at a
// time. A match that goes beyond the end of out is cut there.
func careful[T byte | uint16](d *decoder, out []T) status {
	lit, dist := &d.codes.lit, &d.codes.dist
	for d.wp < d.end {
		if d.nb < 48 {
			d.refill()
		}
		bb, nb := d.bb, d.nb
		e := lit[bb&(1<<litBits-1)]
		if e&isSub == isSub && e < isLiteral {
			if nb < litBits {
				return needInput
			}
			bb >>= litBits
			nb -= litBits
			e = lit[uint64(e>>16)+bb&(1<<(e>>8&15)-1)]
		}
		n := uint(e & 63)
		if e >= isLiteral {
			two := e>>30 == 2
			if two && (n > nb || d.wp+1 >= d.end) {
				n, two = uint(e>>24&15), false
			}
			if n > nb {
				return needInput
			}
			d.bb, d.nb = bb>>n, nb-n
			out[d.wp] = T(e >> 8 & 0xff)
			d.wp++
			if two {
				out[d.wp] = T(e >> 16 & 0xff)
				d.wp++
			}
			continue
		}
		if n > nb {
			return needInput
		}
		if e&isOther != 0 {
			if e&isEnd != isEnd {
				return d.bad(BadSymbol)
			}
			d.bb, d.nb = bb>>n, nb-n
			return blockEnd
		}
		length := int(e>>16) + int(bb&(1<<n-1)>>(e>>8&63))
		bb >>= n
		nb -= n

		e = dist[bb&(1<<distBits-1)]
		if e&isSub == isSub {
			if nb < distBits {
				return needInput
			}
			bb >>= distBits
			nb -= distBits
			e = dist[uint64(e>>16)+bb&(1<<(e>>8&15)-1)]
		}
		n = uint(e & 63)
		if n > nb {
			return needInput
		}
		if e&isOther != 0 {
			return d.bad(BadSymbol)
		}
		back := int(e>>16) + int(bb&(1<<n-1)>>(e>>8&63))
		if back > d.wp-d.lo {
			return d.bad(TooFar)
		}
		d.bb, d.nb = bb>>n, nb-n

		length = min(length, len(out)-d.wp)
		if back >= length {
			copy(out[d.wp:d.wp+length], out[d.wp-back:])
		} else {
			for i := d.wp; i < d.wp+length; i++ {
				out[i] = out[i-back]
			}
		}
		d.wp += length
	}
	return isFull
}
