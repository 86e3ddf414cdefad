package inflate

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"math"
)

// readSize is how much input is asked for at a time while a crew is at work, bytes.
const readSize = 256 << 10

// littleEndian is what resolve counts on.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// A shift is the time that a crew works for a Reader. All of it belongs to the Reader's goroutine.
type shift struct {
	crew *crew
	head *chunk // the next one to hand out
	tail *chunk // the next one to give to a worker, nil behind the last
	err  error  // of the reader below, io.EOF at its end: there is no more input

	now   *chunk // being handed out, nil if none is
	done  int64  // inflated offset in now of the next piece
	first int64  // inflated offset in the data of now's start
	start int64  // and of the start of the member there
	mark  int    // next of now's marks
	last  *piece // handed out last: is d.out
}

// hire has a crew go on from here, the start of a block, with all data before it handed out, if the file
// is long enough.
func (z *Reader) hire() {
	d := &z.d
	z.hiring = false
	d.fetchWindow()
	d.unread()
	begin := z.InputOffset()
	rest := d.in[d.pos:]
	bit := begin * 8
	if d.nb > 0 {
		begin--
		bit -= int64(d.nb)
		rest = append([]byte{byte(d.bb << (8 - d.nb))}, rest...)
	}

	size := int64(chunkSize)
	if z.chunk > 0 {
		size = z.chunk
	}
	head := newChunk(0, begin, size)
	head.from = bit
	head.window.n = min(windowSize, d.wp-d.lo)
	copy(head.window.b[windowSize-head.window.n:], d.out[d.wp-head.window.n:d.wp])
	close(head.known)
	s := &shift{crew: newCrew(begin, size, z.o.Cores), head: head, tail: head, err: z.late}
	z.shift, z.late = s, nil
	for len(rest) > 0 {
		n := copy(s.crew.room(), rest)
		s.crew.add(n, false)
		rest = rest[n:]
	}
	for s.crew.have < begin+2*size && s.err == nil {
		z.pull()
	}
	if s.err != nil && s.crew.have < begin+2*size {
		z.leave(bit, &head.window, inData)
		z.hireAt = math.MaxInt64
		return
	}
	s.crew.start()
	s.dispatch()
}

// pull reads more input.
func (z *Reader) pull() {
	s := z.shift
	room := s.crew.room()
	room = room[:min(len(room), readSize)]
	n := 0
	for i := 0; n == 0 && s.err == nil; i++ {
		if i == 100 {
			s.err = io.ErrNoProgress
			break
		}
		n, s.err = z.r.Read(room)
	}
	s.crew.add(n, s.err != nil)
}

// dispatch gives the workers the chunks whose input is there, as far ahead as they may be.
func (s *shift) dispatch() {
	for s.tail != nil && s.tail.index < s.head.index+s.crew.ahead {
		c := s.tail
		switch {
		case s.err != nil && s.crew.have <= c.end:
			c.end = math.MaxInt64 / 16 // in bits it must not overflow either
			s.tail = nil
		case s.crew.have >= c.end:
			c.next = newChunk(c.index+1, c.end, s.crew.size)
			s.tail = c.next
		default:
			return
		}
		s.crew.tasks <- c // has room for so many
	}
}

// pump makes the next piece the output, or goes back to one core.
func (z *Reader) pump() {
	s := z.shift
	for {
		if s.now != nil && z.handOut() {
			if z.err != nil {
				s.crew.end()
				z.shift = nil
			}
			return
		}
		if c := s.now; c != nil {
			s.now = nil
			if c.ended {
				z.leave(c.finish, new(window), atNext)
				return
			}
			s.crew.drop()
			if s.crew.useless() {
				z.leave(s.head.from, &s.head.window, inData)
				z.hireAt = z.base + 32*s.crew.size
				return
			}
		}
		select {
		case <-s.head.done:
			if !z.take(s.head) {
				return
			}
			continue
		default:
		}
		if s.err == nil && s.crew.have < s.crew.begin+int64(s.head.index+s.crew.ahead)*s.crew.size {
			z.pull()
			s.dispatch()
			continue
		}
		<-s.head.done
	}
}

// take makes c, which is done, the chunk to hand out. If it did not come out right it is left to one
// core, and false returned.
func (z *Reader) take(c *chunk) bool {
	s := z.shift
	s.start = z.start
	s.first = z.zero + int64(z.d.wp)
	if !c.ok || !z.check(c) {
		z.leave(c.from, &c.window, inData)
		z.hireAt = z.base + 4*s.crew.size
		return false
	}
	s.now, s.head = c, c.next
	s.done, s.mark = 0, 0
	if s.head != nil {
		s.dispatch()
	}
	return true
}

// check takes c's data into the member's checksum and compares where members end.
func (z *Reader) check(c *chunk) bool {
	crc, start, at := z.crc, z.start, int64(0)
	first := z.zero + int64(z.d.wp)
	for _, e := range c.ends {
		crc = c.sum(crc, at, e.out)
		if crc != e.crc || e.size != uint32(first+e.out-start) {
			return false
		}
		crc, start, at = 0, first+e.out, e.out
	}
	z.crc, z.start = c.sum(crc, at, math.MaxInt64), start
	return true
}

// sum is crc with c's data from one inflated offset to another added.
func (c *chunk) sum(crc uint32, from, to int64) uint32 {
	at := int64(0)
	for _, p := range c.pieces {
		lo, hi := max(from-at, 0), min(to-at, int64(p.n))
		switch {
		case lo == 0 && hi == int64(p.n):
			crc = combine(crc, p.crc, hi)
		case lo < hi:
			crc = crc32.Update(crc, crc32.IEEETable, p.buf[windowSize+lo:windowSize+hi])
		}
		at += int64(p.n)
	}
	return crc
}

// handOut makes the next piece of the chunk the output. It returns false when there is none left.
func (z *Reader) handOut() bool {
	s, d := z.shift, &z.d
	c := s.now
	if len(c.pieces) == 0 {
		return false
	}
	p := c.pieces[0]
	c.pieces = c.pieces[1:]
	if s.last != nil {
		s.crew.free(s.last)
	}
	s.last = p
	z.zero = s.first + s.done - windowSize
	d.out, z.rp, z.sp = p.buf[:], windowSize, windowSize+p.n
	for ; s.mark < len(c.marks) && z.err == nil; s.mark++ {
		m := c.marks[s.mark]
		if m.out > s.done+int64(p.n) {
			break
		}
		start := s.start
		if m.ends > 0 {
			start = s.first + c.ends[m.ends-1].out
		}
		d.wp = windowSize + int(m.out-s.done)
		d.lo = int(max(0, start-z.zero))
		z.base = (m.bit + 7) / 8
		z.restart(Checkpoint{In: z.base, Out: s.first + m.out, Bits: uint8(-m.bit & 7)})
	}
	if z.err == nil {
		d.wp = windowSize + p.n
	}
	s.done += int64(p.n)
	return true
}

// leave ends the shift: one core goes on from bit, with this window.
func (z *Reader) leave(bit int64, before *window, p phase) {
	s, d := z.shift, &z.d
	z.shift = nil
	s.crew.end()
	for c := s.head; c != nil; c = c.next {
		s.crew.freeAll(c)
	}
	out := z.zero + int64(d.wp)
	d.restart(z.out[:], outSize)
	copy(d.out, before.b[:])
	d.wp, d.lo = windowSize, windowSize-before.n
	z.rp, z.sp = d.wp, d.wp
	z.zero = out - windowSize
	if s.last != nil {
		s.crew.free(s.last)
	}
	z.phase = p
	z.base = bit >> 3
	z.r = s.crew.rest(z.base, z.r, s.err)
	d.in = z.buf[:0]
	if n := bit & 7; n != 0 {
		if z.fill(); z.err == nil {
			d.bb, d.nb, d.pos = uint64(d.in[0]>>n), uint(8-n), 1
		}
	}
}

// Close ends the workers of a Reader with more than one core. It is not needed once Read or WriteTo
// returned an error or io.EOF.
func (z *Reader) Close() {
	if z.shift != nil {
		z.shift.crew.end()
		z.shift = nil
		z.rp, z.d.wp = 0, 0
		z.end(io.ErrClosedPipe)
	}
}
