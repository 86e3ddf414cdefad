package inflate

import "math/bits"

// The decoding tables are indexed by the next bits of the stream, as many as the longest code that
// needs one look only; longer codes lead to a second table.
const (
	litBits  = 11 // index bits of the literal/length table
	distBits = 9  // index bits of the distance table

	// A second-level table of 2^n entries holds at least n+1 codes, so 286 codes of up to 15 bits
	// need no more than 286/5·16 entries beyond the first 2^11, and 32 distances no more than
	// 32/7·64 beyond the first 2^9.
	litSize  = 1<<litBits + 928
	distSize = 1<<distBits + 320

	litMask  = 1<<litBits - 1
	distMask = 1<<distBits - 1

	maxCode = 15  // longest code, bits
	maxLens = 320 // codes of both tables
)

// Entries of both tables have in their low byte the number of bits to drop, so that a shift by the
// entry (its low six bits) drops them.
//
// Literals, at least isLiteral in the literal/length table:
//
//	0-7 bits to drop · 8-15 literal · 16-23 second literal · 24-27 bits of the first · 30-31 how many
//
// Lengths and distances, bit 15 clear:
//
//	0-7 bits to drop, code and extra bits · 8-13 code bits alone · 16-30 base to add the extra bits to
//
// Everything else has bit 15 set: the end of the block, an invalid code, or the way to a second-level
// table (8-11 its index bits, 16-30 its first entry).
const (
	isLiteral = 1 << 30
	isOther   = 1 << 15
	isEnd     = 1<<15 | 1<<14 // end of block
	isSub     = 1<<15 | 1<<13 // second-level table
	isInvalid = 1 << 15
)

type litTable [litSize]uint32

type distTable [distSize]uint32

// codes is what a block's symbols are decoded with.
type codes struct {
	lit  litTable
	dist distTable
}

// litProto and distProto are the entries of the symbols but for their code's length.
var (
	litProto  [288]uint32
	distProto [32]uint32
	fixed     codes
)

func init() {
	for i := range 256 {
		litProto[i] = isLiteral | uint32(i)<<8
	}
	litProto[256] = isEnd
	base, extra := uint32(3), uint32(0)
	for i := 257; i < 285; i++ {
		if i >= 265 && (i-265)%4 == 0 {
			extra++
		}
		litProto[i] = base<<16 | extra
		base += 1 << extra
	}
	litProto[285] = 258 << 16
	litProto[286], litProto[287] = isInvalid, isInvalid

	base, extra = 1, 0
	for i := range 30 {
		if i >= 4 && i%2 == 0 {
			extra++
		}
		distProto[i] = base<<16 | extra
		base += 1 << extra
	}
	distProto[30], distProto[31] = isInvalid, isInvalid

	var lens [maxLens]uint8
	for i := range 288 {
		switch {
		case i < 144:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		case i < 280:
			lens[i] = 7
		default:
			lens[i] = 8
		}
	}
	for i := range 32 {
		lens[288+i] = 5
	}
	fixed.lit.build(lens[:288])
	fixed.lit.pair(&lens)
	fixed.dist.build(lens[288:])
}

// build makes t the table for literal and length codes of these lengths.
func (t *litTable) build(lens []uint8) bool {
	return construct(t[:], litBits, lens, litProto[:], 256)
}

// pair lets an entry yield two literals where both their codes fit in the index. It goes downwards
// so that the entry of what follows a literal, which has a lower index, still is that of one symbol.
// Which entries are literals cannot be foreseen, so there are no branches on it. It takes as long as
// decoding some hundred symbols.
func (t *litTable) pair(lens *[maxLens]uint8) {
	shortest := uint8(maxCode)
	for _, n := range lens[:256] {
		shortest = min(shortest, n-1) // 0, no code, becomes 255
	}
	if 2*(shortest+1) > litBits {
		return
	}
	for i := uint32(1)<<litBits - 1; i < 1<<litBits; i-- {
		e := t[i]
		f := t[i>>(e&15)&litMask]
		second := f>>8&0xff<<16 + f&15 + isLiteral
		// The sign says no: e or f is no literal, or there are too many bits.
		no := int32(e-isLiteral) | int32(f-isLiteral) | int32(litBits-e&15-f&15)
		t[i] = e + second&^uint32(no>>31)
	}
}

// build makes t the table for distance codes of these lengths.
func (t *distTable) build(lens []uint8) bool {
	return construct(t[:], distBits, lens, distProto[:], 0)
}

// construct fills t, with 2^tb entries at the first level, for the canonical prefix code with these
// lengths. It reports whether they make one: complete, or else a single code of one bit or none, both
// of which leave invalid entries. The first symbols, so many of them, are literals.
func construct(t []uint32, tb uint, lens []uint8, proto []uint32, literals uint16) bool {
	var count [maxCode + 1]uint16
	for _, n := range lens {
		count[n&15]++
	}
	used := len(lens) - int(count[0])
	count[0] = 0
	left := 1
	longest := uint(0)
	for n := uint(1); n <= maxCode; n++ {
		left = left<<1 - int(count[n])
		if left < 0 {
			return false
		}
		if count[n] != 0 {
			longest = n
		}
	}
	if left > 0 {
		if used > 1 || longest > 1 {
			return false
		}
		for i := range 1 << tb {
			t[i] = isInvalid | 1
		}
		if used == 0 {
			return true
		}
	}

	var next [maxCode + 2]uint16
	for n := 1; n <= maxCode; n++ {
		next[n+1] = next[n] + count[n]
	}
	var sorted [288]uint16
	for s, n := range lens {
		if n &= 15; n != 0 {
			sorted[next[n]] = uint16(s)
			next[n]++
		}
	}

	// Codes come in order of length, as their bits appear in the stream: the first bit lowest. A
	// table of 2^n entries that is right for all codes of up to n bits becomes one of 2^(n+1) by
	// being written twice.
	k, code := 0, uint(0)
	top := min(longest, tb)
	size := uint(1)
	for n := uint(1); n <= top; n++ {
		copy(t[size:2*size], t[:size])
		size *= 2
		for c := count[n]; c > 0; c-- {
			s := sorted[k]
			k++
			t[code] = proto[s] + uint32(n)*per(s < literals)
			code = successor(code, n)
		}
	}
	if left > 0 { // the single code: the other bit is invalid
		for i := uint(2); i < 1<<tb; i += 2 {
			t[i] = t[0]
		}
		return true
	}
	for ; size < 1<<tb; size *= 2 {
		copy(t[size:2*size], t[:size])
	}

	prefix, start, end, sb := ^uint(0), uint(0), uint(1)<<tb, uint(0)
	for n := tb + 1; n <= longest; n++ {
		for ; count[n] > 0; count[n]-- {
			s := sorted[k]
			k++
			if low := code & (1<<tb - 1); low != prefix {
				// The second-level table is as large as it takes for the codes that follow
				// to fill it.
				prefix, start, sb = low, end, n-tb
				for left := 1<<sb - int(count[n]); left > 0; {
					sb++
					left = left<<1 - int(count[tb+sb])
				}
				end += 1 << sb
				t[low] = uint32(start)<<16 | isSub | uint32(sb)<<8 | uint32(tb)
			}
			e := proto[s] + uint32(n-tb)*per(s < literals)
			for i := code >> tb; i < 1<<sb; i += 1 << (n - tb) {
				t[start+i] = e
			}
			code = successor(code, n)
		}
	}
	return true
}

// per is what each bit of a symbol's code, or of what the first-level index left of it, adds to its
// entry: one bit to drop, and one in the field for the code's bits.
func per(literal bool) uint32 {
	if literal {
		return 1 | 1<<24
	}
	return 1 | 1<<8
}

// successor is the code after c among those of n bits, both with the first bit lowest.
func successor(c, n uint) uint {
	free := c ^ (1<<n - 1)
	if free == 0 {
		return 0 // that was the last code
	}
	bit := uint(1) << (bits.Len(free) - 1)
	return c&(bit-1) | bit
}
