package inflate

import (
	"errors"
	"sync"
)

// A scratch is what inflating a span takes: 12 KiB of tables, and room for the window and the first
// 32 KiB of the span in one piece, so that matches into the window are like any other.
type scratch struct {
	d   decoder
	buf [2*windowSize + maxMatch + slack]byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// Span inflates from a checkpoint until dst is full: src is the compressed data, from byte In on, or
// from byte In-1 when bits, the checkpoint's, is not 0; window is what comes before dst in the inflated
// data, as much as is there, of which only the last 32 KiB matter. A span may go on in the next gzip
// member: trailer and header between them are in src. Checksums are not checked and src may end
// anywhere once dst is full. An *Error has offsets in src.
//
// It never writes outside dst; after an error dst may hold anything. Any number of goroutines may call it.
func Span(dst, src []byte, bits uint8, window []byte) error {
	window = window[max(0, len(window)-windowSize):]
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	d := &s.d
	if err := d.openSpan(src, bits); err != nil {
		return err
	}
	defer func() { d.in, d.out = nil, nil }()

	// The first 32 KiB behind the window, whatever comes after in place.
	d.out = s.buf[:windowSize+min(len(dst), windowSize+maxMatch+slack)]
	copy(d.out[windowSize-len(window):], window)
	d.wp, d.lo, d.end = windowSize, windowSize-len(window), windowSize+min(len(dst), windowSize)
	err := d.fillSpan()
	n := copy(dst, d.out[windowSize:d.wp])
	if err != nil || n == len(dst) {
		return err
	}
	d.lo = max(0, d.lo-windowSize)
	d.out, d.wp, d.end = dst, n, len(dst)
	return d.fillSpan()
}

// Member inflates the start of the gzip member that src begins with until dst is full, as Span would.
func Member(dst, src []byte) error {
	pos := 0
	if c := readMember(from(src, &pos)); c != "" {
		return &Error{Offset: int64(pos), Err: c}
	}
	err := Span(dst, src[pos:], 0, nil)
	if e := (*Error)(nil); errors.As(err, &e) {
		e.Offset += int64(pos)
	}
	return err
}

// A trial is what SpanUse takes.
type trial struct {
	d    decoder
	wide [2*windowSize + maxMatch + slack]uint16
	seen [1 << 16]byte // by element of wide: 1 if there is such a one
}

var trials = sync.Pool{New: func() any {
	t := new(trial)
	markWindow(t.wide[:]) // for good: what is decoded stands behind it
	return t
}}

// SpanUse finds out which of the 32 KiB before a span of n inflated bytes are referred to, for which it need
// not know them: used[i] is 1 for such a byte i of them, and else 0. src and bits are as for Span, and so are errors, but for
// what is wrong only with the bytes behind the first 32 KiB or with references to before the start of the
// data.
func SpanUse(used *[32 << 10]byte, n int64, src []byte, bits uint8) error {
	t := trials.Get().(*trial)
	defer trials.Put(t)
	d := &t.d
	if err := d.openSpan(src, bits); err != nil {
		return err
	}
	defer func() { d.in, d.wide = nil, nil }()
	d.wide, d.wp, d.lo, d.end = t.wide[:], windowSize, 0, windowSize+int(min(n, windowSize))
	if err := d.fillSpan(); err != nil {
		return err
	}
	clear(t.seen[marker:])
	for rest := t.wide[windowSize:d.end]; len(rest) > 0; { // a match may go on behind d.end
		some := rest[:min(len(rest), 16)]
		if len(some) < 16 || marked(some) {
			for _, v := range some {
				t.seen[v] = 1 // bytes as well: there is nothing to decide
			}
		}
		rest = rest[len(some):]
	}
	copy(used[:], t.seen[marker:])
	return nil
}

// openSpan makes d ready to inflate a span.
func (d *decoder) openSpan(src []byte, bits uint8) error {
	d.restart(nil, 0)
	d.in = src
	if bits > 0 {
		if bits > 7 || len(src) == 0 {
			return &Error{Offset: 0, Err: BadBits}
		}
		d.bb, d.nb, d.pos = uint64(src[0]>>(8-bits)), uint(bits), 1
	}
	return nil
}

// fillSpan decodes until d.wp reaches d.end, across the ends of members.
func (d *decoder) fillSpan() error {
	for d.wp < d.end {
		if d.stage == atBlock && d.last {
			d.align()
			at := min(len(d.in), d.pos+8)
			if c := d.nextMember(); c != "" {
				return &Error{Offset: int64(at), Err: c}
			}
		}
		switch d.run() {
		case needInput:
			return &Error{Offset: int64(len(d.in)), Err: Truncated}
		case isBad:
			return &Error{Offset: int64(d.consumed()), Err: d.cause}
		case blockEnd, lastEnd, isFull:
		}
	}
	return nil
}

// nextMember takes, from the byte after a member's data, its trailer and the next one's header.
func (d *decoder) nextMember() Cause {
	d.pos = min(len(d.in), d.pos+8)
	c := readMember(from(d.in, &d.pos))
	d.reset()
	d.lo = d.wp
	return c
}

// from is the bytes of b one after the other from *pos on.
func from(b []byte, pos *int) func() (byte, bool) {
	return func() (byte, bool) {
		if *pos == len(b) {
			return 0, false
		}
		*pos++
		return b[*pos-1], true
	}
}
