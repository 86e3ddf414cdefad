package inflate

import (
	"encoding/binary"
	"hash/crc32"
)

// Flags of a gzip header (RFC 1952, section 2.3.1).
const (
	flagHeaderCRC = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
	flagReserved  = 7 << 5
)

// peek is the next byte of input without taking it, false at the end of the file or when z.err is set.
func (z *Reader) peek() (byte, bool) {
	for z.d.pos == len(z.d.in) {
		if z.eof || z.err != nil {
			return 0, false
		}
		z.fill()
	}
	return z.d.in[z.d.pos], true
}

// next takes a byte of input, false where peek is.
func (z *Reader) next() (byte, bool) {
	c, ok := z.peek()
	if ok {
		z.d.pos++
	}
	return c, ok
}

// readMember reads a member's header from next, which is false at the end of the data, and says what
// is wrong with it, "" if nothing.
func readMember(next func() (byte, bool)) Cause {
	crc, ended := uint32(0), false
	var b [1]byte
	take := func() int {
		c, ok := next()
		ended = ended || !ok
		b[0] = c
		crc = crc32.Update(crc, crc32.IEEETable, b[:])
		return int(c)
	}
	if magic := take() | take()<<8; magic != 0x8b1f && !ended {
		return BadMagic
	}
	method, flags := take(), take()
	switch {
	case ended:
		return Truncated
	case method != 8:
		return BadMethod
	case flags&flagReserved != 0:
		return BadFlags
	}
	for range 6 { // time, extra flags, operating system
		take()
	}
	if flags&flagExtra != 0 {
		for n := take() | take()<<8; n > 0 && !ended; n-- {
			take()
		}
	}
	for _, f := range []int{flagName, flagComment} {
		for flags&f != 0 && take() != 0 { // also at the end of the data
		}
	}
	want := int(crc & 0xffff)
	if flags&flagHeaderCRC != 0 && take()|take()<<8 != want && !ended {
		return BadHeaderCRC
	}
	if ended {
		return Truncated
	}
	return ""
}

// trailer reads a member's trailer and checks the data against it. On failure z.err is set.
func (z *Reader) trailer() {
	size := uint32(z.zero + int64(z.d.wp) - z.start)
	if z.expect(z.crc, BadCRC) && z.expect(size, BadLength) {
		z.phase = atNext
	}
}

// expect takes four bytes, which should be v, the lowest byte first.
func (z *Reader) expect(v uint32, otherwise Cause) bool {
	at := z.InputOffset()
	var b [4]byte
	for i := range b {
		c, ok := z.next()
		if !ok {
			z.fail(Truncated) // unless reading failed
			return false
		}
		b[i] = c
	}
	if binary.LittleEndian.Uint32(b[:]) != v {
		z.end(&Error{Offset: at, Err: otherwise})
		return false
	}
	return true
}
