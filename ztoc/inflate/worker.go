package inflate

import (
	"hash/crc32"
	"sync"
)

// A worker inflates one chunk after the other.
type worker struct {
	crew *crew
	d    decoder
	in   [inSize]byte // input that is copied together, see fill
	base int64        // offset in the file of d.in[0]

	// The chunk at work. Its output is first in wide, which has nwide elements behind the window once
	// that is over, then in c.pieces, then in cur.
	c     *chunk
	start int64 // bit where decoding began
	wide  []uint16
	nwide int
	cur   *piece
	sp    int // next byte of cur.buf to sum
	to    resolution
	zero  int64 // inflated offset in the chunk of element windowSize of the output
}

var wides = sync.Pool{New: func() any {
	b := make([]uint16, windowSize+wideSize+maxMatch+slack)
	markWindow(b) // for good: what is decoded stands behind it
	return &b
}}

// inflate does chunk c and closes c.done.
func (w *worker) inflate(c *chunk) {
	defer close(c.done)
	w.c = c
	c.ok = (w.speculate() || w.knowing()) && w.settle()
	if w.cur != nil {
		w.crew.free(w.cur)
		w.cur = nil
	}
	if !c.ok {
		w.crew.freeAll(c)
	}
}

// speculate decodes from where a block seems to begin, without the window as long as that is not known,
// to the end of the chunk. It returns false when that came to nothing.
func (w *worker) speculate() bool {
	c := w.c
	tried := c.begin * 8
	for !c.isKnown() && !w.crew.stopping() {
		from := w.crew.fromOf(c)
		start := from
		if start < 0 {
			if start = w.find(tried); start < 0 {
				return false
			}
		}
		tried = start + 1
		if !w.begin(start) {
			return false
		}
		w.widen()
		if w.guesswork() {
			return w.crew.await(c) && !w.astray()
		}
		if start == from {
			return false // not the fault of the guess
		}
	}
	return false
}

// knowing decodes the chunk with the window, once that is known.
func (w *worker) knowing() bool {
	c := w.c
	if !w.crew.await(c) || !w.begin(c.from) {
		return false
	}
	w.newPiece(&c.window.b)
	w.d.lo = windowSize - c.window.n
	if c.from >= c.end*8 && w.crew.hand(c, c.from) {
		c.finish = c.from // the chunk before took all of this one
		return true
	}
	return w.bytes()
}

// settle makes the outcome, all being known and decoding come to the chunk's end, and tells the next chunk its window.
func (w *worker) settle() bool {
	c, d := w.c, &w.d
	if d.wide != nil {
		w.narrow()
	}
	if !c.ended {
		n := &c.next.window
		copy(n.b[:], d.out[d.wp-windowSize:d.wp])
		n.n = min(windowSize, d.wp-d.lo)
		w.crew.settled(c)
	}
	w.endPiece()
	return w.resolveWide()
}

// begin starts decoding at bit with nothing inflated yet.
func (w *worker) begin(bit int64) bool {
	c := w.c
	w.crew.tell(c, -1)
	w.crew.freeAll(c)
	if w.cur != nil {
		w.crew.free(w.cur)
		w.cur = nil
	}
	c.marks, c.ends, c.ended = c.marks[:0], c.ends[:0], false
	w.start, w.zero, w.nwide = bit, 0, 0
	d := &w.d
	d.restart(nil, 0)
	d.in = w.in[:0]
	w.base = bit >> 3
	if n := bit & 7; n != 0 {
		if !w.fill() {
			return false
		}
		d.bb, d.nb, d.pos = uint64(d.in[0]>>n), uint(8-n), 1
	}
	return true
}

// find looks for the start of a block from bit on. It returns where the chunk before ends if that is
// known meanwhile, and -1 when there is none.
func (w *worker) find(bit int64) int64 {
	c, d := w.c, &w.d
	for bit < c.end*8 && !w.crew.stopping() {
		if from := w.crew.fromOf(c); from >= 0 {
			return from
		}
		w.base = bit >> 3
		n := 0
		for n < inSize {
			m := w.crew.read(c, w.base+int64(n), w.in[n:])
			if m == 0 {
				break
			}
			n += m
		}
		d.in = w.in[:n]
		found, next := d.findBlock(int(bit & 7))
		if found >= 0 {
			w.crew.search(true)
			return w.base*8 + int64(found)
		}
		if n < inSize {
			return -1
		}
		bit = w.base*8 + int64(next)
	}
	w.crew.search(false)
	return -1
}

// widen makes the output elements of 16 bits behind a window of markers.
func (w *worker) widen() {
	if w.wide == nil {
		w.wide = *wides.Get().(*[]uint16)
	}
	d := &w.d
	d.wide, d.wp, d.lo, d.end = w.wide, windowSize, 0, windowSize+stepSize
}

// guesswork decodes to the end of the chunk, in bytes from where the last 32 KiB are known to be such.
// It returns false when the guess was wrong.
func (w *worker) guesswork() bool {
	c, d := w.c, &w.d
	told := false
	for {
		how := w.decode()
		if how == broken || w.astray() {
			return false
		}
		if how == complete {
			return true
		}
		if how == blockDone && !told {
			w.crew.tell(c, w.start)
			told = true
		}
		if c.isKnown() {
			break
		}
		if d.wp < d.end {
			continue
		}
		if !marked(d.wide[d.wp-windowSize : d.wp]) {
			break
		}
		if d.end = min(d.wp+stepSize, windowSize+wideSize); d.wp >= d.end {
			if !w.crew.await(c) || c.from != w.start {
				return false
			}
			break
		}
	}
	w.narrow()
	return w.bytes()
}

// astray reports that the chunk before ends somewhere else than where this was begun.
func (w *worker) astray() bool {
	from := w.crew.fromOf(w.c)
	return from >= 0 && from != w.start
}

// narrow ends decoding in 16 bits and goes on in bytes: either the window is known or the last 32 KiB are
// bytes.
func (w *worker) narrow() {
	d := &w.d
	w.nwide = d.wp - windowSize
	w.zero = int64(w.nwide)
	var front, blank window
	before := &blank
	if w.c.isKnown() {
		before = &w.c.window
		d.lo = max(d.lo, windowSize-before.n)
	}
	w.to.set(before)
	w.to.resolve(front.b[:], d.wide[w.nwide:d.wp])
	d.wide = nil
	d.lo = max(0, d.lo-w.nwide)
	w.newPiece(&front.b)
}

// bytes decodes to the end of the chunk with a window of bytes.
func (w *worker) bytes() bool {
	d := &w.d
	for {
		how := w.decode()
		w.cur.crc = crc32.Update(w.cur.crc, crc32.IEEETable, d.out[w.sp:d.wp])
		w.sp = d.wp
		if how == broken || how == complete {
			return how == complete
		}
		if d.wp < d.end {
			continue
		}
		if w.crew.stopping() || w.astray() {
			return false
		}
		if d.end = d.wp + stepSize; d.end <= windowSize+pieceSize {
			continue
		}
		if w.crew.pieces.Load() >= w.crew.most {
			return false
		}
		n := d.wp - windowSize
		front := (*[windowSize]byte)(d.out[n:d.wp])
		w.endPiece()
		w.zero += int64(n)
		d.lo = max(0, d.lo-n)
		w.newPiece(front)
	}
}

// newPiece makes cur a piece behind this window, and the output.
func (w *worker) newPiece(front *[windowSize]byte) {
	w.cur = w.crew.newPiece()
	copy(w.cur.buf[:], front[:])
	w.sp = windowSize
	d := &w.d
	d.out, d.wp, d.end = w.cur.buf[:], windowSize, windowSize+stepSize
}

// endPiece adds cur to the chunk's pieces.
func (w *worker) endPiece() {
	if w.cur.n = w.d.wp - windowSize; w.cur.n == 0 {
		return
	}
	w.c.pieces = append(w.c.pieces, w.cur)
	w.cur = nil
}

// resolveWide makes pieces of what was decoded without the window. It reports whether that refers to
// nothing before the window.
func (w *worker) resolveWide() bool {
	c := w.c
	w.to.set(&c.window)
	var done []*piece
	for at := 0; at < w.nwide; at += pieceSize {
		p := w.crew.newPiece()
		p.n = min(pieceSize, w.nwide-at)
		if at == 0 {
			copy(p.buf[:], c.window.b[:])
		} else {
			copy(p.buf[:windowSize], done[len(done)-1].buf[pieceSize:])
		}
		for i := 0; i < p.n; i += stepSize { // and sum it while it is near
			n := min(stepSize, p.n-i)
			to := p.buf[windowSize+i:][:n]
			w.to.resolve(to, w.wide[windowSize+at+i:][:n])
			p.crc = crc32.Update(p.crc, crc32.IEEETable, to)
		}
		done = append(done, p)
	}
	c.pieces = append(done, c.pieces...)
	return w.nwide == 0 || c.window.n == windowSize || !reaches(w.wide[windowSize:][:w.nwide], c.window.n)
}

// outcome is what became of a stretch of decoding.
type outcome uint8

const (
	goOn      outcome = iota // as far as there is room
	blockDone                // at the end of a block
	complete                 // the chunk is done
	broken                   // malformed, out of input, or stopped
)

// decode goes on to the end of a block or of the room there is.
func (w *worker) decode() outcome {
	c, d := w.c, &w.d
	for {
		switch d.run() {
		case needInput:
			if !w.fill() {
				return broken
			}
		case isFull:
			return goOn
		case isBad:
			return broken
		case blockEnd:
			w.mark()
			if w.bit() >= c.end*8 && w.crew.hand(c, w.bit()) {
				c.finish = w.bit()
				return complete
			}
			return blockDone
		case lastEnd:
			if !w.member() {
				return broken
			}
			if c.ended {
				return complete
			}
			w.mark()
		}
	}
}

// mark notes that inflating can be taken up again here. The first of several such places without
// anything in between is enough.
func (w *worker) mark() {
	c, at := w.c, w.at()
	if n := len(c.marks); n == 0 || c.marks[n-1].out != at {
		c.marks = append(c.marks, mark{bit: w.bit(), out: at, ends: len(c.ends)})
	}
}

// member takes a trailer and, if there is one, the next header.
func (w *worker) member() bool {
	c, d := w.c, &w.d
	d.align()
	e := memberEnd{out: w.at()}
	for i := range 8 {
		b, ok := w.next()
		if !ok {
			return false
		}
		if i < 4 {
			e.crc |= uint32(b) << (8 * i)
		} else {
			e.size |= uint32(b) << (8 * (i - 4))
		}
	}
	c.ends = append(c.ends, e)
	c.finish = w.bit()
	if readMember(w.next) != "" {
		c.ended = true // whatever there is, it is for one core to look at
		return true
	}
	d.reset()
	d.lo = d.wp
	return true
}

// at is the inflated offset in the chunk.
func (w *worker) at() int64 { return w.zero + int64(w.d.wp) - windowSize }

// bit is the offset in the file of the next bit.
func (w *worker) bit() int64 { return (w.base+int64(w.d.pos))*8 - int64(w.d.nb) }

// next takes a byte of input; false as fill.
func (w *worker) next() (byte, bool) {
	d := &w.d
	if d.pos == len(d.in) && !w.fill() {
		return 0, false
	}
	d.pos++
	return d.in[d.pos-1], true
}

// fill brings more input; false when there is none. It is looked at where it is, but copied together where
// one chunk's ends and the next one's begins.
func (w *worker) fill() bool {
	d := &w.d
	d.unread()
	w.base += int64(d.pos)
	rest := len(d.in) - d.pos
	s := w.crew.input(w.c, w.base)
	if len(s) > max(rest, bridge) {
		d.pos, d.in = 0, s
		return true
	}
	n := copy(w.in[:], d.in[d.pos:])
	m := copy(w.in[n:n+bridge], w.crew.input(w.c, w.base+int64(n)))
	d.pos, d.in = 0, w.in[:n+m]
	return m > 0
}

// bridge is how much is copied at a time around the end of a chunk's input: more than what is read whole.
const bridge = 4 << 10
