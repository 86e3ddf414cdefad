package ztoc

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"math"
	"slices"

	"github.com/muster-hpc/muster/ztoc/inflate"
	"github.com/muster-hpc/muster/ztoc/twosum"
)

// A cut is a span as its source finds it.
type cut struct {
	blob, out Range
	bits      uint8
	window    *[windowSize]byte // nil: nothing before the span can be referred to
}

// A spanEvent is either bytes of the blob, in order, or the end of a span whose bytes all came before.
type spanEvent struct {
	data   *buffer
	isCut  bool
	cut    cut
	giveUp bool
}

// A spanDigester turns cuts and bytes into the rows of the table, and sums up all bytes.
type spanDigester struct {
	in   chan spanEvent
	done chan struct{}

	// Used by the caller of Build only.
	open cut   // the span that goes on
	kept int64 // blob bytes before this offset are in finished spans
	n    int

	// Used by the digester's goroutine until done is closed.
	queue   []*buffer
	layer   hash.Hash // of all bytes before summed
	summed  int64
	sum     hash.Hash // of a span
	head    []byte    // scratch: the first bytes of a span
	used    [windowSize]byte
	rows    []byte
	windows []byte
	gaveUp  bool
	err     error
}

func newSpanDigester() *spanDigester {
	d := &spanDigester{in: make(chan spanEvent, 16), done: make(chan struct{}), layer: sha256.New(), sum: sha256.New()}
	go d.run()
	return d
}

// finish waits for the rows of all cuts and the sum.
func (d *spanDigester) finish() error {
	close(d.in)
	<-d.done
	return d.err
}

func (d *spanDigester) run() {
	defer close(d.done)
	for e := range d.in {
		switch {
		case e.giveUp:
			d.gaveUp = true
			d.rows, d.windows = nil, nil
			d.drop(math.MaxInt64)
		case e.data != nil:
			d.queue = append(d.queue, e.data)
			if d.gaveUp {
				d.drop(math.MaxInt64)
			}
		case e.isCut && !d.gaveUp && d.err == nil:
			d.err = d.add(&e.cut)
		}
		if e.isCut && e.cut.window != nil {
			windowBuffers.Put(e.cut.window)
		}
	}
	d.drop(math.MaxInt64)
}

// sumTo takes the bytes before off into the layer's sum.
func (d *spanDigester) sumTo(off int64) {
	for _, b := range d.queue {
		if to := min(off, b.end()); to > d.summed {
			d.layer.Write(b.b[d.summed-b.off : to-b.off])
			d.summed = to
		}
	}
}

// drop lets go of the buffers that end at or before off.
func (d *spanDigester) drop(off int64) {
	d.sumTo(off)
	n := 0
	for n < len(d.queue) && d.queue[n].end() <= off {
		d.queue[n].release()
		n++
	}
	d.queue = slices.Delete(d.queue, 0, n)
}

// each gives f the bytes of r, piece by piece, each with its offset.
func (d *spanDigester) each(r Range, f func(at int64, b []byte)) error {
	d.drop(r.Start)
	at := r.Start
	for _, b := range d.queue {
		if at >= r.End || b.off > at {
			break
		}
		p := b.b[at-b.off : min(b.end(), r.End)-b.off]
		f(at, p)
		at += int64(len(p))
	}
	if at < r.End {
		return fmt.Errorf("%w: span %v reaches behind the blob", ErrInvalid, r)
	}
	return nil
}

// headSize is how many compressed bytes are tried to find out what of its window a span refers to. Only
// its first 32 KiB can; blocks that need more than this for them keep the whole window.
const headSize = 64 << 10

func (d *spanDigester) add(c *cut) error {
	d.sum.Reset()
	err := d.each(c.blob, func(at int64, b []byte) {
		// A span may share its first byte with the one before: that is summed already.
		known := min(d.summed-at, int64(len(b)))
		twosum.Write(d.layer, d.sum, b[known:], b)
		d.summed += int64(len(b)) - known
	})
	if err != nil {
		return err
	}
	r := row{
		out: c.out.Start, outLen: uint32(c.out.Len()), blob: c.blob.Start, blobLen: uint32(c.blob.Len()),
		bits: c.bits, window: uint64(len(d.windows)), digest: [32]byte(d.sum.Sum(nil)),
	}
	if c.window != nil {
		d.head = d.head[:0]
		head := Range{c.blob.Start, min(c.blob.End, c.blob.Start+headSize)}
		if err := d.each(head, func(_ int64, b []byte) { d.head = append(d.head, b...) }); err != nil {
			return err
		}
		used := &d.used
		if inflate.SpanUse(used, c.out.Len(), d.head, c.bits) != nil {
			used = nil
		}
		d.windows, r.kind = packWindow(d.windows, c.window[:], used)
		packed := d.windows[r.window:]
		r.windowLen = uint32(len(packed))
		if r.kind != windowNone {
			r.windowSum = windowSum(packed)
		}
	}
	d.rows = r.append(d.rows)
	d.drop(c.blob.End - 1) // the next span may share this one's last byte
	return nil
}
