package inflate

import "sync"

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
	return span(dst, src, bits, window, nil)
}

// SpanUse is Span and sets bit i%8 of used[i/8] where byte i of the window is referred to, the window
// taken as the last of 32 KiB: bits before its start stay clear. used has 4096 bytes and is overwritten.
// Only the first 32 KiB of a span can refer to the window, so a dst of that length will do.
func SpanUse(dst, src []byte, bits uint8, window []byte, used []byte) error {
	return span(dst, src, bits, window, (*[windowSize / 8]byte)(used))
}

func span(dst, src []byte, bits uint8, window []byte, used *[windowSize / 8]byte) error {
	if used != nil {
		clear(used[:])
	}
	window = window[max(0, len(window)-windowSize):]
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	d := &s.d
	d.reset()
	d.in, d.pos, d.bb, d.nb = src, 0, 0, 0
	if bits > 0 {
		if bits > 7 || len(src) == 0 {
			return &Error{Offset: 0, Err: BadBits}
		}
		d.bb, d.nb, d.pos = uint64(src[0]>>(8-bits)), uint(bits), 1
	}
	defer func() { d.in, d.out = nil, nil }()

	// The first 32 KiB behind the window, whatever comes after in place.
	d.out = s.buf[:windowSize+min(len(dst), windowSize+maxMatch+slack)]
	copy(d.out[windowSize-len(window):], window)
	d.wp, d.lo, d.end = windowSize, windowSize-len(window), windowSize+min(len(dst), windowSize)
	d.used = used
	err := d.fillSpan()
	d.used = nil
	n := copy(dst, d.out[windowSize:d.wp])
	if err != nil || n == len(dst) {
		return err
	}
	d.lo = max(0, d.lo-windowSize)
	d.out, d.wp, d.end = dst, n, len(dst)
	return d.fillSpan()
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
	c := readMember(func() (byte, bool) {
		if d.pos == len(d.in) {
			return 0, false
		}
		d.pos++
		return d.in[d.pos-1], true
	})
	d.reset()
	d.lo = d.wp
	return c
}
