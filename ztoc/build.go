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
	// inflated so far, from within Build.
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

// newBuffer is a buffer of bufferSize with one reference.
func newBuffer() *buffer {
	b := buffers.Get().(*buffer)
	b.refs.Store(1)
	return b
}

// end is the offset behind b.
func (b *buffer) end() int64 { return b.off + int64(len(b.b)) }

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		b.b = b.b[:bufferSize]
		buffers.Put(b)
	}
}

// A layer is one pass over a blob. These goroutines work on it at once:
//
//	reader    reads the blob ahead
//	digester  digests of the blob and of its spans, what their windows need, packing of the windows
//	(caller)  inflates, or has others inflate, finds where spans end and reads the tar headers
//	diffID    digest of the inflated layer, if wanted
//
// Every channel between them is bounded, so memory is the same for any size of layer, but for the
// table itself. Inflating takes longest and waits for nobody but the slowest of the others.
type layer struct {
	o       *BuildOptions
	in      chan *buffer  // reader → caller
	stop    chan struct{} // closed when the caller wants no more
	readErr error         // of the reader, valid once in is closed
	workers sync.WaitGroup

	cur       *buffer
	curAt     int
	taken     int64 // bytes of the blob
	ahead     int64 // of these, not inflated yet but taken ahead, as frames are
	pos       int64 // inflated bytes
	broken    bool  // reading failed for a reason that is not the layer's fault
	spans     *spanDigester
	noRestart bool
	framer    *framer      // takes the inflated layer too, in Derive
	diff      chan *buffer // caller → diffID, nil when that is not wanted
	diffSum   hash.Hash
}

func openLayer(r io.Reader, o *BuildOptions) *layer {
	l := &layer{o: o, in: make(chan *buffer, 8), stop: make(chan struct{}), spans: newSpanDigester()}
	l.workers.Go(func() { l.read(r) })
	return l
}

// hashInflated starts the diffID goroutine.
func (l *layer) hashInflated() {
	l.diffSum = sha256.New()
	l.diff = make(chan *buffer, 8)
	l.workers.Go(func() {
		for b := range l.diff {
			l.diffSum.Write(b.b)
			b.release()
		}
	})
}

func (l *layer) read(r io.Reader) {
	defer close(l.in)
	var off int64
	for {
		b := newBuffer()
		n, err := io.ReadAtLeast(r, b.b, bufferSize/4)
		b.b, b.off = b.b[:n], off
		off += int64(n)
		if n > 0 {
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

// Read is the blob for those who inflate it. The digester gets each buffer of it first.
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
		b.refs.Add(1)
		l.spans.in <- spanEvent{data: b}
		if l.taken-l.ahead-l.spans.kept > maxSpan {
			l.giveUp()
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

// next is the next of src's data, which the others who want it have been given.
func (l *layer) next(src source) ([]byte, error) {
	b, err := src.next()
	l.pos += int64(len(b))
	if l.framer != nil {
		l.framer.add(b)
	}
	if l.diff != nil {
		for rest := b; len(rest) > 0; {
			to := newBuffer()
			to.b = to.b[:copy(to.b, rest)]
			rest = rest[len(to.b):]
			l.diff <- to
		}
	}
	return b, err
}

// walk does the pass. After it, no goroutine is left.
func (l *layer) walk(o *BuildOptions, add func(*Entry) error) (sums Sums, tarEnd int64, err error) {
	sums.Format, tarEnd, err = l.inflate(o, add)
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
	if serr := l.spans.finish(); err == nil {
		err = serr
	}
	l.workers.Wait()
	sums.BlobSize = l.taken
	sums.Blob = DigestFromSum([32]byte(l.spans.layer.Sum(nil)))
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

// inflate reads the blob to its end, or to a fault: to its end nevertheless when its digest will tell whether
// it was made so or has changed on its way.
func (l *layer) inflate(o *BuildOptions, add func(*Entry) error) (f Format, tarEnd int64, err error) {
	head := bufio.NewReaderSize(l, 4<<10)
	rest := func(err error) error {
		if err != nil {
			l.giveUp()
		}
		if _, rerr := io.Copy(io.Discard, readerOnly{head}); rerr != nil {
			return rerr
		}
		return err
	}
	magic, err := head.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return 0, 0, err
	}
	if f, err = detect(magic); err != nil {
		if o.Want != "" && errors.Is(err, ErrUnsupported) {
			err = rest(err)
		}
		return f, 0, err
	}
	if (o.DiffID != "" || o.HashInflated) && f != FormatTar { // there it is the blob's digest
		l.hashInflated()
	}
	src := l.source(f, head)
	t := &tape{next: func() ([]byte, error) { return l.next(src) }}
	if tarEnd, err = walkTar(t, add); err == nil || o.Want != "" && errors.Is(err, ErrInvalid) {
		t.drain()
	}
	src.close()
	switch {
	case t.end == nil: // the tar reader could not go on
	case t.end != io.EOF: // this says more than what the tar reader made of it
		if err = t.end; o.Want != "" && errors.Is(err, ErrInvalid) {
			err = rest(err)
		}
	default:
		// What follows the compressed data is still part of the blob.
		if rerr := rest(nil); rerr != nil {
			return f, tarEnd, rerr
		}
		if !l.noRestart {
			if cerr := l.lastCut(f, l.pos); cerr != nil {
				err = cerr
			}
		}
	}
	return f, tarEnd, err
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
