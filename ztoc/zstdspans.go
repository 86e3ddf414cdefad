package ztoc

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// batchSize is how many inflated bytes are inflated by one goroutine at a time, at least, where frames
// are small: handing over costs some microseconds.
const batchSize = 1 << 20

// zstdSpans inflates zstd frame by frame, several at once with Options.Cores above 1, and groups whole
// frames to spans, in order. Behind a frame that is too large it goes on as a plain stream.
//
// Frames are taken ahead in batches, each of which is inflated on a goroutine of its own, unless there is
// one core only: up to Cores+1 of them, and of no more than MaxBlock inflated bytes if more than one.
// How large a frame may become shows in its blocks, whatever its header says.
type zstdSpans struct {
	l     *layer
	f     frameReader
	err   error    // why no more frames can be taken
	queue []*batch // in order
	idle  []*batch // to be used again
	slots chan struct{}
	work  sync.WaitGroup

	cur    *batch // being read, nil if none
	frame  int    // next of its frames
	out    []byte // the current frame's content
	done   int64  // offset in the blob behind the current frame
	pos    int64  // inflated offset behind out
	stream *zstd.Decoder
	buf    []byte // what was read from stream
}

// A batch is some frames, one behind the other, but for skippable ones.
type batch struct {
	data   []byte // compressed
	out    []byte // inflated
	frames []zstdFrame
	bound  int64 // inflated bytes at most
	ready  chan struct{}
}

func newZstdSpans(l *layer, blob io.Reader) *zstdSpans {
	return &zstdSpans{
		l: l, f: frameReader{r: bufio.NewReaderSize(blob, 64<<10), limit: l.o.MaxBlock},
		slots: make(chan struct{}, max(1, l.o.Cores)),
	}
}

func (z *zstdSpans) next() ([]byte, error) {
	if z.stream == nil {
		if err := z.advance(); err != nil {
			return nil, err
		}
	}
	if z.stream != nil {
		n, err := z.stream.Read(z.buf)
		return z.buf[:n], z.wrap(err)
	}
	return z.out, nil
}

// advance makes the next frame's content out, or the rest of the blob a stream.
func (z *zstdSpans) advance() error {
	if z.cur == nil || z.frame == len(z.cur.frames) {
		if z.cur != nil {
			z.idle = append(z.idle, z.cur)
			z.cur = nil
		}
		z.ahead()
		if len(z.queue) == 0 {
			if z.err == errBigFrame {
				return z.asStream(z.f.frame)
			}
			return z.wrap(z.err)
		}
		z.cur, z.frame = z.queue[0], 0
		z.queue = slices.Delete(z.queue, 0, 1)
		<-z.cur.ready
	}
	f := &z.cur.frames[z.frame]
	z.frame++
	if f.err == errBigFrame {
		return z.asStream(f.data(z.cur))
	}
	if f.err != nil {
		return z.wrap(f.err)
	}
	z.out = z.cur.out[f.out.Start:f.out.End]
	z.done = f.blob.End
	return z.group(f.blob, f.out.Len())
}

// asStream goes on with frame, of which the rest has not been read yet.
func (z *zstdSpans) asStream(frame []byte) (err error) {
	z.l.giveUp()
	z.buf = make([]byte, bufferSize)
	z.stream, err = zstd.NewReader(io.MultiReader(bytes.NewReader(frame), z.f.r),
		zstd.WithDecoderConcurrency(max(1, z.l.o.Cores)), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderMaxMemory(math.MaxInt64))
	return err
}

// ahead takes as many batches as may be under way. It stops behind a frame that does not say its size
// and may be too large.
func (z *zstdSpans) ahead() {
	cores := z.l.o.Cores
	var bound int64
	for _, b := range z.queue {
		bound += b.bound
	}
	for len(z.queue) == 0 || len(z.queue) <= cores && cores > 1 && bound < z.f.limit {
		b := z.take()
		if len(b.frames) == 0 {
			z.idle = append(z.idle, b)
			return
		}
		z.queue = append(z.queue, b)
		bound += b.bound
		if cores <= 1 {
			b.inflate(z.f.limit)
			continue
		}
		z.work.Go(func() {
			z.slots <- struct{}{}
			b.inflate(z.f.limit)
			<-z.slots
		})
	}
}

// take reads a batch. It is empty when there is nothing to take: err says why.
func (z *zstdSpans) take() *batch {
	b := &batch{ready: make(chan struct{}, 1)}
	if n := len(z.idle); n > 0 {
		b = z.idle[n-1]
		z.idle = z.idle[:n-1]
	}
	b.data, b.frames, b.bound = b.data[:0], b.frames[:0], 0
	if n := len(z.queue); n > 0 && z.queue[n-1].bound > z.f.limit {
		return b // that frame may yet turn out to be too large, and then what follows is for the stream
	}
	for z.err == nil && b.bound < min(batchSize, z.f.limit) {
		z.l.ahead = z.f.at - z.done
		var f zstdFrame
		if f, z.err = z.f.next(); z.err != nil {
			break
		}
		if f.bound > z.f.limit && len(b.frames) > 0 {
			z.f.again = true // it gets a batch of its own
			break
		}
		f.at = len(b.data)
		b.data = append(b.data, z.f.frame...)
		b.frames = append(b.frames, f)
		b.bound += f.bound
	}
	return b
}

// group adds a frame to the open span, or cuts that and starts another.
func (z *zstdSpans) group(blob Range, size int64) error {
	open := &z.l.spans.open
	end := z.pos + size
	if !open.blob.Empty() && (end-open.out.Start > z.l.o.SpanSize || blob.End-open.blob.Start > maxSpan) {
		s := *open
		s.out.End = z.pos
		if err := z.l.cut(s); err != nil {
			return err
		}
		*open = cut{out: Range{Start: z.pos}}
	}
	if open.blob.Empty() {
		open.blob.Start = blob.Start
	}
	open.blob.End = blob.End
	z.pos = end
	return nil
}

func (z *zstdSpans) wrap(err error) error {
	if err == nil || err == io.EOF || z.l.broken || errors.Is(err, ErrInvalid) {
		return err
	}
	return fmt.Errorf("%w: zstd: %w", ErrInvalid, err)
}

func (z *zstdSpans) close() {
	z.work.Wait()
	if z.stream != nil {
		z.stream.Close()
	}
}

// inflate inflates all frames up to the first that is malformed or comes to more than limit.
func (b *batch) inflate(limit int64) {
	b.out = slices.Grow(b.out[:0], int(min(b.bound, limit)))
	for i := range b.frames {
		f := &b.frames[i]
		start := len(b.out)
		room := int(min(f.bound, limit))
		b.out = slices.Grow(b.out, room)
		out, err := unzstd(b.out[start:start:start+room], f.data(b))
		switch {
		case errors.Is(err, zstd.ErrDecoderSizeExceeded) && f.bound > limit:
			f.err = errBigFrame
		case err == nil && f.content >= 0 && int64(len(out)) != f.content:
			err = fmt.Errorf("%d bytes of %d", len(out), f.content)
		}
		if err != nil && f.err == nil {
			f.err = fmt.Errorf("%w: zstd frame at %d: %w", ErrInvalid, f.blob.Start, err)
		}
		if f.err != nil {
			break
		}
		b.out = b.out[:start+len(out)]
		f.out = Range{int64(start), int64(len(b.out))}
	}
	b.ready <- struct{}{}
}
