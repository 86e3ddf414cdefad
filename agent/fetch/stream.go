package fetch

import (
	"context"
	"io"

	"github.com/muster-hpc/muster/ztoc"
)

// streamRead is the most one Read of a stream waits for, in bytes.
const streamRead = 256 << 10

// A stream reads a whole blob in order.
type stream struct {
	c      *Chain
	b      *blob
	ctx    context.Context
	cancel context.CancelFunc
	want   *want
	pos    int64 // next byte to read; written by the reader under Chain.mu
}

// Stream reads the whole blob in offset order and stores it on the way. Parts that the store has are read
// from there and not fetched again; the rest comes in few, long requests that run ahead of the reader. The
// bytes are not proven: the caller hashes the whole, and calls Reject for all of it when it does not match.
// Close must be called; it or the end of ctx ends the requests.
func (c *Chain) Stream(ctx context.Context, ref ztoc.BlobRef) (io.ReadCloser, error) {
	b, err := c.blob(ref, ztoc.Range{})
	if err != nil {
		return nil, err
	}
	s := &stream{c: c, b: b, want: &want{}}
	s.ctx, s.cancel = context.WithCancel(ctx)
	context.AfterFunc(s.ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		s.want.gone = true
		c.abandon(b, ztoc.Range{End: ref.Size})
		c.pump()
	})
	// The first request goes out now, not with the first Read: its latency runs beside other layers'.
	c.mu.Lock()
	defer c.mu.Unlock()
	first := ztoc.Range{End: min(1, ref.Size)}
	if st := b.kept.get(); st != nil {
		if m := st.Missing(ztoc.Range{End: ref.Size}); len(m) > 0 {
			first = ztoc.Range{Start: m[0].Start, End: m[0].Start + 1}
		} else {
			first = ztoc.Range{}
		}
	}
	if !c.closed && first.Start < c.o.Ahead {
		c.cover(b, first, streaming, coverOptions{stream: s, want: s.want})
		c.pump()
	}
	return s, nil
}

// Read reads on, waiting until p, or the first 256 KiB of it, is filled.
func (s *stream) Read(p []byte) (int, error) {
	n := min(int64(len(p)), streamRead, s.b.ref.Size-s.pos)
	if n == 0 {
		if s.pos == s.b.ref.Size {
			return 0, io.EOF
		}
		return 0, nil
	}
	if err := s.c.read(s.ctx, s.b, reading{p[:n], s.pos}, []ztoc.Range{{Start: s.pos, End: s.pos + n}}, streaming, s); err != nil {
		return 0, err
	}
	s.c.mu.Lock()
	s.pos += n
	for _, f := range s.b.flights {
		if f.stream == s {
			f.poke()
		}
	}
	s.c.mu.Unlock()
	return int(n), nil
}

func (s *stream) Close() error {
	s.cancel()
	return nil
}
