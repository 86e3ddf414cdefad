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
	"sync"
	"sync/atomic"
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
	// Cores is how many cores may inflate one gzip or zstd layer at once; hashing comes on top. 0: one.
	// More help a first pull when the layer is large and the node idle.
	Cores int
	// Progress is called from time to time with the bytes of the blob taken in and of the layer
	// inflated so far, on a goroutine of Build's.
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
// It returns ErrMismatch when Want or DiffID differ (also if the layer is malformed, as what changed on
// its way mostly is), ErrUnsupported for a kind of layer it does not know, ErrInvalid when a layer is
// malformed that has the digest Want, or none was given, and ErrNoRestart together with valid, checked Sums
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

// A buffer is a piece of the blob, or of the inflated layer, on its way through the goroutines that
// want to see it. The last one to release it gives it back.
type buffer struct {
	b    []byte
	off  int64
	refs atomic.Int32
}

// bufferSize is how much goes from one stage to the next at a time: small enough for a core's cache,
// large enough to make the handing over cheap.
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
//	reader    reads the blob ahead, hands each buffer to hasher and inflater
//	hasher    digest of the whole blob
//	inflater  inflates and finds where spans end
//	spans     digests of the spans, what their windows need, packing of the windows
//	walker    (the caller) reads the tar headers
//	diffID    digest of the inflated layer, if wanted
//
// Every channel between them is bounded, so memory is the same for any size of layer, but for the
// table itself. Inflating takes longest and waits for nobody but the slowest of the others.
type layer struct {
	o       *BuildOptions
	in      chan *buffer  // reader → inflater
	stop    chan struct{} // closed when the walker wants no more
	blobSum hash.Hash
	readErr error // of the reader, valid once in is closed
	workers sync.WaitGroup

	// Used by the inflater's goroutine until inflated is closed.
	cur       *buffer
	curAt     int
	taken     int64 // bytes of the blob
	ahead     int64 // of these, not inflated yet but taken ahead, as frames are
	pos       int64 // inflated bytes
	broken    bool  // reading failed for a reason that is not the layer's fault
	spans     *spanDigester
	noRestart bool
	framer    *framer // takes the inflated layer too, in Derive
	err       error   // why inflating ended, nil at the layer's end

	inflated chan *buffer // inflater → walker
	diff     chan *buffer // inflater → diffID, nil when that is not wanted
	diffSum  hash.Hash
}

func openLayer(r io.Reader, o *BuildOptions) *layer {
	l := &layer{
		o: o, in: make(chan *buffer, 8), stop: make(chan struct{}), inflated: make(chan *buffer, 4),
		blobSum: sha256.New(), spans: newSpanDigester(),
	}
	hashed := make(chan *buffer, 8)
	l.workers.Add(2)
	go l.read(r, hashed)
	go l.hash(l.blobSum, hashed)
	if o.DiffID != "" || o.HashInflated {
		l.diffSum = sha256.New()
		l.diff = make(chan *buffer, 4)
		l.workers.Add(1)
		go l.hash(l.diffSum, l.diff)
	}
	return l
}

func (l *layer) hash(sum hash.Hash, bs <-chan *buffer) {
	defer l.workers.Done()
	for b := range bs {
		sum.Write(b.b)
		b.release()
	}
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
			hashed <- b // the hasher takes all there is
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

// Read gives the inflater the blob, and each buffer of it to the span digester first.
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
			if l.taken-l.ahead-l.spans.kept > maxSpan {
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

// inflate fills buffers from src until it ends or the walker stops.
func (l *layer) inflate(src io.Reader) error {
	for {
		b := buffers.Get().(*buffer)
		b.b = b.b[:bufferSize]
		b.refs.Store(1)
		n := 0
		var err error
		for err == nil && n < bufferSize {
			var m int
			m, err = src.Read(b.b[n:])
			n += m
		}
		b.b = b.b[:n]
		l.pos += int64(n)
		if n == 0 {
			b.release()
		} else {
			if l.framer != nil {
				l.framer.add(b.b)
			}
			if l.diff != nil {
				b.refs.Add(1)
				l.diff <- b
			}
			select {
			case l.inflated <- b:
			case <-l.stop:
				b.release()
				return errStopped
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// errStopped is what the inflater ends with when the walker has failed.
var errStopped = errors.New("stopped")

// run is the inflater's goroutine.
func (l *layer) run(f Format, head io.Reader) {
	defer close(l.inflated)
	if l.diff != nil {
		defer close(l.diff)
	}
	src, closeSrc := l.source(f, head)
	l.err = l.inflate(src)
	closeSrc()
	if l.err == nil || l.o.Want != "" && errors.Is(l.err, ErrInvalid) {
		// What follows the compressed data is still part of the blob. And behind a fault the digest
		// tells whether the layer was made so or has changed on its way.
		if l.err != nil {
			l.giveUp()
		}
		if _, err := io.Copy(io.Discard, readerOnly{head}); err != nil {
			l.err = err
		}
	}
	if l.err == nil && !l.noRestart {
		l.err = l.lastCut(f, l.pos)
	}
	if err := l.spans.finish(); l.err == nil {
		l.err = err
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
	if sums.Format == FormatTar && l.diff != nil {
		close(l.diff) // it is the blob's digest
		l.diff, l.diffSum = nil, nil
	}
	if err == nil {
		go l.run(sums.Format, head)
		t := &tape{src: l.inflated}
		if tarEnd, err = walkTar(t, add); err == nil || o.Want != "" && errors.Is(err, ErrInvalid) {
			t.drain()
		}
		close(l.stop)
		for b := range l.inflated {
			b.release()
		}
		t.close()
		// Why there was no more to read says more than what the tar reader made of it.
		if l.err != nil && l.err != errStopped {
			err = l.err
		}
	} else {
		if o.Want != "" && errors.Is(err, ErrUnsupported) {
			l.giveUp()
			if _, rerr := io.Copy(io.Discard, readerOnly{head}); rerr != nil {
				err = rerr
			}
		}
		close(l.stop)
		if l.diff != nil {
			close(l.diff)
		}
		_ = l.spans.finish() // nothing was cut
	}
	for b := range l.in {
		b.release()
	}
	if l.cur != nil {
		l.cur.release()
	}
	l.workers.Wait()
	sums.BlobSize = l.taken
	sums.Blob = DigestFromSum([32]byte(l.blobSum.Sum(nil)))
	if err != nil {
		if o.Want != "" && o.Want != sums.Blob && (errors.Is(err, ErrInvalid) || errors.Is(err, ErrUnsupported)) {
			err = fmt.Errorf("%w: blob is %s, wanted %s; its content: %w", ErrMismatch, sums.Blob, o.Want, err)
		}
		return sums, tarEnd, err
	}
	sums.InflatedSize = l.pos
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
