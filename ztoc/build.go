package ztoc

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// BuildOptions say how a table is built from a layer.
type BuildOptions struct {
	// SpanSize is how many inflated bytes lie between two checkpoints, at least. Small spans cost
	// less to read one file from and more table: a checkpoint is 1–8 KiB when packed. 0: DefaultSpanSize.
	SpanSize int64
	// Tool goes into the table as the program that built it. At most 1 KiB.
	Tool string
	// Want is the digest the blob must have, ErrMismatch otherwise. Empty: not checked.
	Want Digest
	// DiffID is the digest the inflated layer must have. Empty: not checked.
	DiffID Digest
	// HashInflated asks for Sums.DiffID also where there is no DiffID to check against. It costs
	// about a third as much CPU as inflating.
	HashInflated bool
	// MaxBlock is the largest deflate block or zstd frame that may be in one span. 0: MaxBlock.
	MaxBlock int64
	// Progress is called from time to time with the bytes of the blob taken in and of the layer
	// inflated so far, from the goroutine that called Build.
	Progress func(blob, inflated int64)
}

// Sums is what one pass over a layer has established.
type Sums struct {
	Format   Format
	Blob     Digest
	BlobSize int64
	// DiffID is the digest of the inflated layer, empty unless asked for (or known at no cost).
	DiffID       Digest
	InflatedSize int64
}

// Build reads a layer once, from any reader, to its end, and makes its table. What kind of layer it
// is shows in its first bytes: gzip, zstd or plain tar.
//
// It returns ErrMismatch when Want or DiffID differ, ErrUnsupported for a kind of layer it does not
// know, ErrInvalid when the layer is malformed, and ErrNoRestart together with valid, checked Sums
// when the layer is sound but a deflate block or zstd frame is larger than MaxBlock. Errors of r are
// wrapped. Build reads ahead on a goroutine of its own, and returns only after that has ended: a
// reader that may hang must be one that its owner can end.
func Build(r io.Reader, o BuildOptions) (*Ztoc, Sums, error) {
	if o.SpanSize == 0 {
		o.SpanSize = DefaultSpanSize
	}
	if o.MaxBlock == 0 {
		o.MaxBlock = MaxBlock
	}
	if o.SpanSize < 4<<10 || o.MaxBlock < zstdMaxBlock || o.SpanSize+o.MaxBlock > maxSpan || len(o.Tool) > maxTool {
		return nil, Sums{}, fmt.Errorf("%w: span size %d, largest block %d, tool %d bytes",
			ErrInvalid, o.SpanSize, o.MaxBlock, len(o.Tool))
	}
	entries := newEntryWriter()
	l := openLayer(r, &o)
	sums, tarEnd, err := l.walk(&o, entries.add)
	if err != nil {
		entries.abandon()
		return nil, sums, err
	}
	toc, err := entries.finish()
	if err != nil {
		return nil, sums, err
	}
	if l.noRestart {
		return nil, sums, fmt.Errorf("%w: %s layer %s", ErrNoRestart, sums.Format, sums.Blob)
	}
	z := &Ztoc{
		Tool: o.Tool, Format: sums.Format, Blob: sums.Blob, BlobSize: sums.BlobSize,
		InflatedSize: sums.InflatedSize, TarSize: tarEnd, SpanSize: o.SpanSize,
		rows: l.spans.rows, windows: l.spans.windows, toc: toc,
	}
	if err := z.check(); err != nil {
		return nil, sums, err
	}
	return z, sums, nil
}

// A buffer is a piece of the blob on its way through the goroutines that want to see it.
type buffer struct {
	b    []byte
	off  int64
	refs atomic.Int32
}

const bufferSize = 256 << 10

var buffers = sync.Pool{New: func() any { return &buffer{b: make([]byte, bufferSize)} }}

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		b.b = b.b[:bufferSize]
		buffers.Put(b)
	}
}

// A layer is one pass over a blob. These goroutines work on it at once:
//
//	reader   reads the blob ahead, hands each buffer to hasher and walker
//	hasher   digest of the whole blob
//	walker   (the caller) inflates, reads the tar headers, finds where spans end
//	spans    digests of the spans, what their windows need, packing of the windows
//	diffID   digest of the inflated layer, if wanted
//
// Every channel between them is bounded, so memory is the same for any size of layer, but for the
// table itself.
type layer struct {
	o         *BuildOptions
	in        chan *buffer // reader → walker
	stop      chan struct{}
	readErr   error // of the reader, valid once in is closed
	blobSum   hash.Hash
	workers   sync.WaitGroup
	cur       *buffer
	curAt     int
	taken     int64 // bytes of the blob given to the walker
	broken    bool  // the walker was given an error that is not the layer's fault
	spans     *spanDigester
	noRestart bool

	diff    chan []byte
	free    chan []byte
	diffSum hash.Hash
	framer  *framer // takes the inflated layer too, in Derive
	pos     int64   // inflated bytes passed on
}

func openLayer(r io.Reader, o *BuildOptions) *layer {
	l := &layer{
		o: o, in: make(chan *buffer, 8), stop: make(chan struct{}),
		blobSum: sha256.New(),
	}
	l.spans = newSpanDigester()
	hashed := make(chan *buffer, 8)
	l.workers.Add(2)
	go l.read(r, hashed)
	go func() {
		defer l.workers.Done()
		for b := range hashed {
			l.blobSum.Write(b.b)
			b.release()
		}
	}()
	if o.DiffID != "" || o.HashInflated {
		l.diffSum = sha256.New()
		l.diff = make(chan []byte, 4)
		l.free = make(chan []byte, 5)
		for range cap(l.free) {
			l.free <- make([]byte, 0, inflatedSize)
		}
		l.workers.Add(1)
		go func() {
			defer l.workers.Done()
			for b := range l.diff {
				l.diffSum.Write(b)
				l.free <- b
			}
		}()
	}
	return l
}

func (l *layer) read(r io.Reader, hashed chan<- *buffer) {
	defer l.workers.Done()
	defer close(l.in)
	defer close(hashed)
	var off int64
	for {
		b := buffers.Get().(*buffer)
		n, err := io.ReadAtLeast(r, b.b, bufferSize/4)
		b.b, b.off = b.b[:n], off
		off += int64(n)
		b.refs.Store(1)
		if n > 0 {
			b.refs.Store(2)
			// Order matters only for stop: the walker gives up on its channel, the hasher never.
			hashed <- b
			select {
			case l.in <- b:
			case <-l.stop:
				b.release()
				return
			}
		} else {
			b.release()
		}
		if err != nil {
			if err != io.EOF && err != io.ErrUnexpectedEOF {
				l.readErr = err
			}
			return
		}
	}
}

// Read gives the walker the blob, and each buffer of it to the span digester first.
func (l *layer) Read(p []byte) (int, error) {
	for l.cur == nil || l.curAt == len(l.cur.b) {
		if l.cur != nil {
			l.cur.release()
			l.cur = nil
		}
		b, ok := <-l.in
		if !ok {
			if l.readErr != nil {
				l.broken = true
				return 0, fmt.Errorf("reading the layer at %d: %w", l.taken, l.readErr)
			}
			return 0, io.EOF
		}
		l.cur, l.curAt = b, 0
		if l.framer != nil {
			if err := l.framer.broken(); err != nil {
				l.broken = true
				return 0, err
			}
		}
		l.taken += int64(len(b.b))
		if !l.noRestart {
			b.refs.Add(1)
			l.spans.in <- spanEvent{data: b}
			if l.taken-l.spans.kept > maxSpan {
				l.giveUp()
			}
		}
		if l.o.Progress != nil {
			l.o.Progress(l.taken, l.pos)
		}
	}
	n := copy(p, l.cur.b[l.curAt:])
	l.curAt += n
	return n, nil
}

// giveUp stops collecting spans: the layer has no restart points within reach.
func (l *layer) giveUp() {
	if !l.noRestart {
		l.noRestart = true
		l.spans.in <- spanEvent{giveUp: true}
	}
}

// cut records a finished span.
func (l *layer) cut(s cut) error {
	if l.noRestart {
		return nil
	}
	if s.out.Len() > l.o.SpanSize+l.o.MaxBlock || s.blob.Len() > maxSpan {
		l.giveUp()
		return nil
	}
	l.spans.kept = s.blob.End
	if l.spans.n++; l.spans.n > maxSpans {
		return fmt.Errorf("%w: more than %d spans", ErrUnsupported, maxSpans)
	}
	l.spans.in <- spanEvent{cut: s, isCut: true}
	return nil
}

// passInflated hands a piece of the inflated layer to whoever hashes it.
func (l *layer) passInflated(b []byte) {
	l.pos += int64(len(b))
	if l.framer != nil {
		l.framer.add(b)
	}
	if l.diff != nil {
		l.diff <- append((<-l.free)[:0], b...)
	}
}

// walk does the pass. After it, no goroutine is left.
func (l *layer) walk(o *BuildOptions, add func(*Entry) error) (sums Sums, tarEnd int64, err error) {
	head := bufio.NewReaderSize(l, 4<<10)
	magic, peekErr := head.Peek(tarBlock)
	sums.Format, err = detect(magic)
	if peekErr != nil && peekErr != io.EOF {
		err = peekErr
	}
	if err == nil {
		sums.InflatedSize, tarEnd, err = l.inflateAndWalk(sums.Format, head, add)
	}
	if err == nil {
		// What follows the compressed data is still part of the blob.
		_, err = io.Copy(io.Discard, readerOnly{head})
	}
	close(l.stop)
	for b := range l.in {
		b.release()
	}
	if l.cur != nil {
		l.cur.release()
	}
	if l.diff != nil {
		close(l.diff)
	}
	if err == nil && !l.noRestart {
		err = l.lastCut(sums.Format, sums.InflatedSize)
	}
	spanErr := l.spans.finish()
	l.workers.Wait()
	if err == nil {
		err = spanErr
	}
	if err != nil {
		return sums, tarEnd, err
	}
	sums.BlobSize = l.taken
	sums.Blob = DigestFromSum([32]byte(l.blobSum.Sum(nil)))
	switch {
	case l.diffSum != nil:
		sums.DiffID = DigestFromSum([32]byte(l.diffSum.Sum(nil)))
	case sums.Format == FormatTar:
		sums.DiffID = sums.Blob
	}
	if o.Want != "" && o.Want != sums.Blob {
		return sums, tarEnd, fmt.Errorf("%w: blob is %s, wanted %s", ErrMismatch, sums.Blob, o.Want)
	}
	if o.DiffID != "" && o.DiffID != sums.DiffID {
		return sums, tarEnd, fmt.Errorf("%w: inflated layer is %s, wanted diff ID %s", ErrMismatch, sums.DiffID, o.DiffID)
	}
	return sums, tarEnd, nil
}

// detect tells the kind of a layer from its first 512 bytes.
func detect(b []byte) (Format, error) {
	switch {
	case len(b) >= 2 && b[0] == 0x1f && b[1] == 0x8b:
		return FormatGzip, nil
	case len(b) >= 4 && binary.LittleEndian.Uint32(b) == zstdMagic,
		len(b) >= 4 && binary.LittleEndian.Uint32(b)&skippableMask == skippableBits:
		return FormatZstd, nil
	case len(b) == tarBlock && (allZero(b) || tarChecksum(b)):
		return FormatTar, nil
	case bytes.HasPrefix(b, []byte("BZh")):
		return 0, fmt.Errorf("%w: layer compressed with bzip2", ErrUnsupported)
	case bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")):
		return 0, fmt.Errorf("%w: layer compressed with xz", ErrUnsupported)
	}
	return 0, fmt.Errorf("%w: layer is neither gzip, zstd nor tar: it starts with % x", ErrUnsupported, b[:min(len(b), 8)])
}

// tarChecksum reports whether a block is a tar header, by its checksum. Old programs summed signed bytes.
func tarChecksum(b []byte) bool {
	want, err := tarNumber(b[148:156])
	if err != nil {
		return false
	}
	var unsigned, signed int64
	for i, c := range b {
		if 148 <= i && i < 156 {
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c))
	}
	return want == unsigned || want == signed
}

func (l *layer) inflateAndWalk(f Format, blob io.Reader, add func(*Entry) error) (size, tarEnd int64, err error) {
	var src io.Reader
	switch f {
	case FormatGzip:
		src = l.gzipSpans(blob)
	case FormatZstd:
		z := &zstdSpans{l: l, f: frameReader{r: bufio.NewReaderSize(blob, 64<<10), limit: l.o.MaxBlock}}
		defer z.close()
		src = z
	default:
		src = &tarSpans{l: l, r: blob}
	}
	t := newTape(src, l.passInflated)
	if tarEnd, err = walkTar(t, add); err != nil {
		return t.pos, tarEnd, err
	}
	size, err = t.drain()
	return size, tarEnd, err
}

// gzipSpans inflates gzip and cuts a span at each checkpoint.
func (l *layer) gzipSpans(blob io.Reader) io.Reader {
	var z *inflate.Reader
	first := true
	z = inflate.NewReader(blob, inflate.Options{
		// SOCI cuts where more than its span size has been inflated since the last checkpoint.
		Interval: l.o.SpanSize + 1,
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
