package ztoc

import (
	"fmt"
	"io"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// How each kind of blob is inflated, and where its spans are cut meanwhile.

// A source is an inflated layer.
type source interface {
	// next returns data that stays as it is until the next call, or an error, io.EOF at the layer's end.
	next() ([]byte, error)
	// close is called when no more is wanted.
	close()
}

func (l *layer) source(f Format, blob io.Reader) source {
	switch f {
	case FormatGzip:
		return l.gzipSpans(blob)
	case FormatZstd:
		return newZstdSpans(l, blob)
	}
	return &tarSpans{l: l, r: blob, buf: make([]byte, bufferSize)}
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

func (g *gzipReader) next() ([]byte, error) {
	b, err := g.z.Next()
	if g.z.MaxBlock() > g.l.o.MaxBlock {
		g.l.giveUp()
	}
	if err != nil && err != io.EOF && !g.l.broken {
		err = fmt.Errorf("%w: gzip: %w", ErrInvalid, err)
	}
	return b, err
}

func (g *gzipReader) close() { g.z.Close() }

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
	buf []byte
	pos int64
}

func (t *tarSpans) close() {}

func (t *tarSpans) next() ([]byte, error) {
	n, err := t.r.Read(t.buf)
	t.pos += int64(n)
	open := &t.l.spans.open
	for t.pos-open.out.Start >= t.l.o.SpanSize {
		s := *open
		s.out.End = s.out.Start + t.l.o.SpanSize
		s.blob = s.out
		if err := t.l.cut(s); err != nil {
			return t.buf[:n], err
		}
		*open = cut{blob: Range{Start: s.blob.End}, out: Range{Start: s.out.End}}
	}
	return t.buf[:n], err
}
