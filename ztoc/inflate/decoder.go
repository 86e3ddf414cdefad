package inflate

import "encoding/binary"

// windowSize is how far back a match can reach, bytes.
const windowSize = 32 << 10

// maxMatch is the longest match, bytes.
const maxMatch = 258

// slack is how many bytes the fast loop may write past the end of what it decodes.
const slack = 64

// A status says why decoding stopped.
type status uint8

const (
	needInput status = iota // more of the stream is needed
	isFull                  // the output is full
	blockEnd                // at the end of a block that is not the last
	lastEnd                 // at the end of the last block of the deflate stream
	isBad                   // malformed: decoder.cause says how
)

// A stage is what comes next in the deflate stream.
type stage uint8

const (
	atBlock stage = iota // block header
	inStored
	inCodes
)

// A decoder inflates raw deflate data block by block. It stops and goes on anywhere: every step is
// done whole or, when its input is not all there, not at all.
type decoder struct {
	in  []byte
	pos int    // next byte of in
	bb  uint64 // bits taken from in but not used: the next one lowest, zero above nb
	nb  uint

	out  []byte
	wide []uint16 // instead of out when what comes before is not known: see marker
	wp   int      // next element of out to write
	end  int      // decode up to here; out goes on for at least maxMatch+slack more, unless this is its end
	// What is below windowSize of out is still so far up, 0 if not: it was not needed yet.
	away int

	lo int // matches reach back to here and not beyond

	plain  bool // never in assembly: tests compare
	stage  stage
	last   bool // the current block is the last one
	left   int  // of a stored block, bytes
	cause  Cause
	codes  *codes // of the current block: &own or &fixed
	own    codes
	paired bool           // codes.lit has pairs of literals
	lens   [maxLens]uint8 // of own's codes
	clen   [1 << 7]uint8  // code length code: symbol<<3 | bits
}

// restart makes d new but for its tables, with this output.
func (d *decoder) restart(out []byte, end int) {
	d.in, d.pos, d.bb, d.nb = nil, 0, 0, 0
	d.out, d.wide, d.wp, d.end, d.lo, d.away = out, nil, 0, end, 0, 0
	d.reset()
}

// reset makes d ready for the start of a deflate stream.
func (d *decoder) reset() {
	d.stage, d.last, d.left = atBlock, false, 0
}

// consumed is the position in d.in of the first byte of which no bit was used.
func (d *decoder) consumed() int { return d.pos - int(d.nb>>3) }

// refill takes bytes from the input until there are at least 56 bits, or no more bytes.
func (d *decoder) refill() {
	if d.pos+8 <= len(d.in) {
		d.bb |= binary.LittleEndian.Uint64(d.in[d.pos:]) << d.nb
		n := (63 - d.nb) >> 3
		d.pos += int(n)
		d.nb += n << 3
		d.bb &= 1<<d.nb - 1 // nb is at most 63
		return
	}
	for d.nb < 56 && d.pos < len(d.in) {
		d.bb |= uint64(d.in[d.pos]) << d.nb
		d.pos++
		d.nb += 8
	}
}

func (d *decoder) drop(n uint) {
	d.bb >>= n
	d.nb -= n
}

// unread gives the whole bytes in the bit buffer back to the input.
func (d *decoder) unread() {
	d.pos -= int(d.nb >> 3)
	d.nb &= 7
	d.bb &= 1<<d.nb - 1
}

// align drops the bits up to the next byte.
func (d *decoder) align() {
	d.unread()
	d.bb, d.nb = 0, 0
}

func (d *decoder) bad(c Cause) status {
	d.cause = c
	return isBad
}

// run decodes until a block ends, the output is full or the input is used up.
func (d *decoder) run() status {
	for {
		switch d.stage {
		case atBlock:
			if s := d.header(); s != isFull {
				return s
			}
			if d.stage == inCodes {
				d.fetchWindow()
			}
		case inStored:
			from := d.in[d.pos:min(len(d.in), d.pos+d.left)]
			var n int
			if d.wide != nil {
				n = min(len(from), max(0, d.end-d.wp))
				for i, b := range from[:n] {
					d.wide[d.wp+i] = uint16(b)
				}
			} else {
				n = copy(d.out[d.wp:max(d.end, d.wp)], from)
			}
			d.wp += n
			d.pos += n
			d.left -= n
			switch {
			case d.left == 0:
				return d.closeBlock()
			case d.wp >= d.end:
				return isFull
			}
			return needInput
		case inCodes:
			s := d.symbols()
			if s == blockEnd {
				return d.closeBlock()
			}
			return s
		}
	}
}

// fetchWindow moves the window to where it belongs if it is away.
func (d *decoder) fetchWindow() {
	if d.away == 0 {
		return
	}
	if lo := d.wp - windowSize; lo < windowSize {
		copy(d.out[lo:windowSize], d.out[d.away+lo:])
	}
	d.away = 0
}

// closeBlock ends the current block.
func (d *decoder) closeBlock() status {
	d.stage = atBlock
	if d.last {
		return lastEnd
	}
	return blockEnd
}

// header reads a block's header. It returns isFull, which it has no other use for, when all is well;
// with needInput nothing was consumed.
func (d *decoder) header() status {
	pos, bb, nb := d.pos, d.bb, d.nb
	s := d.readHeader()
	if s == needInput {
		d.pos, d.bb, d.nb = pos, bb, nb
	}
	return s
}

func (d *decoder) readHeader() status {
	d.refill()
	if d.nb < 3 {
		return needInput
	}
	last, kind := d.bb&1 != 0, d.bb>>1&3
	d.drop(3)
	switch kind {
	case 0:
		d.align()
		if len(d.in)-d.pos < 4 {
			return needInput
		}
		n := binary.LittleEndian.Uint32(d.in[d.pos:])
		if n>>16 != ^n&0xffff {
			return d.bad(BadStored)
		}
		d.pos += 4
		d.left = int(n & 0xffff)
		d.stage = inStored
	case 1:
		d.codes, d.paired = &fixed, true
		d.stage = inCodes
	case 2:
		if s := d.readCodes(); s != isFull {
			return s
		}
		d.codes, d.paired = &d.own, false
		d.stage = inCodes
	default:
		return d.bad(BadBlockType)
	}
	d.last = last
	return isFull
}

// clenOrder is the order in which the lengths of the code length code are sent.
var clenOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readCodes reads the header of a block with codes of its own and makes its tables.
func (d *decoder) readCodes() status {
	d.refill()
	if d.nb < 14 {
		return needInput
	}
	nlit, ndist, nclen := int(d.bb&31)+257, int(d.bb>>5&31)+1, int(d.bb>>10&15)+4
	if nlit > 286 || ndist > 30 {
		return d.bad(BadCounts)
	}
	d.drop(14)
	var clens [19]uint8
	for i := range nclen {
		if d.nb < 3 {
			if d.refill(); d.nb < 3 {
				return needInput
			}
		}
		clens[clenOrder[i]] = uint8(d.bb & 7)
		d.drop(3)
	}
	if !d.codeLengthCode(&clens) {
		return d.bad(BadCodes)
	}
	n := nlit + ndist
	for i := 0; i < n; {
		if d.nb < 14 {
			d.refill()
		}
		e := d.clen[d.bb&127]
		bits := uint(e & 7)
		sym := e >> 3
		if sym < 16 {
			if bits > d.nb {
				return needInput
			}
			d.drop(bits)
			d.lens[i] = sym
			i++
			continue
		}
		extra, repeat := uint(7), 11
		switch sym {
		case 16:
			extra, repeat = 2, 3
		case 17:
			extra, repeat = 3, 3
		}
		if bits+extra > d.nb {
			return needInput
		}
		var value uint8
		if sym == 16 {
			if i == 0 {
				return d.bad(BadRepeat)
			}
			value = d.lens[i-1]
		}
		repeat += int(d.bb >> bits & (1<<extra - 1))
		d.drop(bits + extra)
		if i+repeat > n {
			return d.bad(BadRepeat)
		}
		for ; repeat > 0; repeat-- {
			d.lens[i] = value
			i++
		}
	}
	if d.lens[256] == 0 {
		return d.bad(NoBlockEnd)
	}
	if !d.own.lit.build(d.lens[:nlit]) || !d.own.dist.build(d.lens[nlit:n]) {
		return d.bad(BadCodes)
	}
	return isFull
}

// codeLengthCode makes d.clen of the lengths of the code length code. As with zlib, one without any
// code makes every bit stand for length 0.
func (d *decoder) codeLengthCode(clens *[19]uint8) bool {
	var count [8]int
	for _, n := range clens {
		count[n]++
	}
	left := 1
	var next [8]uint
	code := uint(0)
	for n := 1; n < 8; n++ {
		left = left<<1 - count[n]
		code <<= 1
		next[n] = code
		code += uint(count[n])
	}
	if count[0] == len(clens) {
		for i := range d.clen {
			d.clen[i] = 1
		}
		return true
	}
	if left != 0 {
		return false
	}
	for s, n := range clens {
		if n == 0 {
			continue
		}
		c := reverse7[next[n]<<(7-n)&127]
		next[n]++
		for i := uint(c); i < 128; i += 1 << n {
			d.clen[i] = uint8(s)<<3 | n
		}
	}
	return true
}

// reverse7 is every number of seven bits with its bits in the other order.
var reverse7 = func() (t [128]uint8) {
	for i := range t {
		for b := range 7 {
			t[i] |= uint8(i>>b&1) << (6 - b)
		}
	}
	return t
}()
