package ztoc

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// How each kind of blob is inflated, and where its spans are cut meanwhile. All of this runs on the
// inflater's goroutine.

// source is the inflated layer, and what is to be called when it is not read any more.
func (l *layer) source(f Format, blob io.Reader) (io.Reader, func()) {
	switch f {
	case FormatGzip:
		z := l.gzipSpans(blob)
		return z, z.z.Close
	case FormatZstd:
		z := &zstdSpans{l: l, f: frameReader{r: bufio.NewReaderSize(blob, 64<<10), limit: l.o.MaxBlock}}
		return z, z.close
	}
	return &tarSpans{l: l, r: blob}, func() {}
}

// gzipSpans inflates gzip and cuts a span at each checkpoint.
func (l *layer) gzipSpans(blob io.Reader) *gzipReader {
	var z *inflate.Reader
	first := true
	z = inflate.NewReader(blob, inflate.Options{
		// SOCI cuts where more than its span size has been inflated since the last checkpoint.
		Interval: l.o.SpanSize + 1,
		Cores:    l.o.Cores,
		OnCheckpoint: func(c inflate.Checkpoint, window []byte) error {
			if z.MaxBlock() > l.o.MaxBlock {
				l.giveUp()
			}
			next := &l.spans.open
			if !first {
				s := *next
				s.blob.End, s.out.End = c.In, c.Out
				if err := l.cut(s); err != nil {
					return err
				}
			}
			first = false
			*next = cut{blob: Range{Start: c.In}, out: Range{Start: c.Out}, bits: c.Bits}
			if c.Bits > 0 {
				next.blob.Start--
			}
			if len(window) > 0 && !l.noRestart {
				next.window = windowBuffers.Get().(*[windowSize]byte)
				n := copy(next.window[windowSize-len(window):], window)
				clear(next.window[:windowSize-n])
			}
			return nil
		},
	})
	return &gzipReader{l, z}
}

// gzipReader looks for blocks too large to restart in.
type gzipReader struct {
	l *layer
	z *inflate.Reader
}

func (g *gzipReader) Read(p []byte) (int, error) {
	n, err := g.z.Read(p)
	if g.z.MaxBlock() > g.l.o.MaxBlock {
		g.l.giveUp()
	}
	if err != nil && err != io.EOF && !g.l.broken {
		err = fmt.Errorf("%w: gzip: %w", ErrInvalid, err)
	}
	return n, err
}

// lastCut ends the span that is open when the blob ends.
func (l *layer) lastCut(f Format, size int64) error {
	s := l.spans.open
	l.spans.open.window = nil
	switch f {
	case FormatGzip:
		s.blob.End = l.taken
	case FormatZstd:
		if s.out.Start == size {
			return nil // nothing but empty frames since the last cut
		}
	case FormatTar:
		s.blob.End = l.taken
		if s.blob.Empty() {
			return nil
		}
	}
	s.out.End = size
	return l.cut(s)
}

// tarSpans cuts a plain tar on a grid.
type tarSpans struct {
	l   *layer
	r   io.Reader
	pos int64
}

func (t *tarSpans) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.pos += int64(n)
	open := &t.l.spans.open
	for t.pos-open.out.Start >= t.l.o.SpanSize {
		s := *open
		s.out.End = s.out.Start + t.l.o.SpanSize
		s.blob = s.out
		if err := t.l.cut(s); err != nil {
			return n, err
		}
		*open = cut{blob: Range{Start: s.blob.End}, out: Range{Start: s.out.End}}
	}
	return n, err
}

// zstdSpans inflates zstd frame by frame and groups whole frames to spans. Behind a frame that is too
// large it goes on as a plain stream.
type zstdSpans struct {
	l      *layer
	f      frameReader
	out    []byte // rest of the current frame's content
	pos    int64  // inflated offset behind out
	stream *zstd.Decoder
}

func (z *zstdSpans) Read(p []byte) (int, error) {
	for len(z.out) == 0 && z.stream == nil {
		switch err := z.f.next(); {
		case err == errBigFrame:
			z.l.giveUp()
			z.stream, err = zstd.NewReader(io.MultiReader(bytes.NewReader(z.f.frame), z.f.r),
				zstd.WithDecoderConcurrency(2), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(128<<20),
				zstd.WithDecoderMaxMemory(math.MaxInt64))
			if err != nil {
				return 0, err
			}
		case err != nil:
			return 0, z.wrap(err)
		default:
			if err := z.group(); err != nil {
				return 0, err
			}
			z.out = z.f.out
		}
	}
	if z.stream != nil {
		n, err := z.stream.Read(p)
		return n, z.wrap(err)
	}
	n := copy(p, z.out)
	z.out = z.out[n:]
	return n, nil
}

// group adds the frame just read to the open span, or cuts that and starts another.
func (z *zstdSpans) group() error {
	open := &z.l.spans.open
	n := int64(len(z.f.out))
	end := z.pos + n
	if !open.blob.Empty() && (end-open.out.Start > z.l.o.SpanSize || z.f.blob.End-open.blob.Start > maxSpan) {
		s := *open
		s.out.End = z.pos
		if err := z.l.cut(s); err != nil {
			return err
		}
		*open = cut{out: Range{Start: z.pos}}
	}
	if open.blob.Empty() {
		open.blob.Start = z.f.blob.Start
	}
	open.blob.End = z.f.blob.End
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
	if z.stream != nil {
		z.stream.Close()
	}
}
