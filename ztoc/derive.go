package ztoc

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// DerivedFrame is how many inflated bytes each frame of a derived blob holds.
const DerivedFrame = 1 << 20

// deriveWorkers is how many frames are compressed at once. Two are enough to keep up with one core
// that inflates, and leave a node with a running job its other cores.
const deriveWorkers = 2

// deriveEncoder compresses the frames of derived blobs. Its options are part of what a derived blob
// is: the same layer gives the same bytes, for one version of the encoder.
var deriveEncoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(deriveWorkers), zstd.WithEncoderCRC(false),
		zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(DerivedFrame), zstd.WithSingleSegment(true),
		zstd.WithZeroFrames(true))
	if err != nil {
		panic(err) // constant options
	}
	return e
})

// Derive reads a layer as Build does and writes it to w again as independent zstd frames of
// DerivedFrame bytes: the derived blob, for layers that Build says ErrNoRestart to. The table is that of
// the derived blob, whose digest and size it has; Sums are those of the layer read.
//
// What w was given is of no use unless Derive returned without error.
func Derive(r io.Reader, w io.Writer, o BuildOptions) (*Ztoc, Sums, error) {
	if len(o.Tool) > maxTool {
		return nil, Sums{}, fmt.Errorf("%w: tool of %d bytes", ErrInvalid, len(o.Tool))
	}
	o.SpanSize, o.MaxBlock = DerivedFrame, MaxBlock
	entries := newEntryWriter()
	f := newFramer(w)
	l := openLayer(r, &o)
	l.giveUp() // on spans of the blob that is read
	l.framer = f
	sums, tarEnd, err := l.walk(&o, entries.add)
	ferr := f.finish()
	if err == nil {
		err = ferr
	}
	if err != nil {
		entries.abandon()
		return nil, sums, err
	}
	toc, err := entries.finish()
	if err != nil {
		return nil, sums, err
	}
	z := &Ztoc{
		Tool: o.Tool, Format: FormatZstd, Blob: DigestFromSum([32]byte(f.sum.Sum(nil))), BlobSize: f.size,
		InflatedSize: sums.InflatedSize, TarSize: tarEnd, SpanSize: DerivedFrame,
		rows: f.rows, toc: toc,
	}
	if err := z.check(); err != nil {
		return nil, sums, err
	}
	return z, sums, nil
}

// A framer cuts what it is given into frames, compresses several at once and writes them in order.
type framer struct {
	w    io.Writer
	cur  *frame
	any  bool        // something was added
	free chan *frame // bounds the frames under way
	todo chan *frame // in order
	done chan struct{}

	failed chan struct{} // closed at the first error of w
	err    error         // valid when failed or done is closed
	sum    hash.Hash     // these are valid when done is closed
	size   int64
	out    int64
	rows   []byte
}

type frame struct {
	in, out []byte
	ready   chan struct{}
}

func newFramer(w io.Writer) *framer {
	f := &framer{
		w: w, free: make(chan *frame, deriveWorkers+2), todo: make(chan *frame, deriveWorkers+2),
		done: make(chan struct{}), failed: make(chan struct{}), sum: sha256.New(),
	}
	for range cap(f.free) {
		f.free <- &frame{in: make([]byte, 0, DerivedFrame), ready: make(chan struct{}, 1)}
	}
	go f.write()
	return f
}

// add takes the next bytes of the inflated layer.
func (f *framer) add(b []byte) {
	for len(b) > 0 {
		f.any = true
		if f.cur == nil {
			f.cur = <-f.free
		}
		n := copy(f.cur.in[len(f.cur.in):DerivedFrame], b)
		f.cur.in = f.cur.in[:len(f.cur.in)+n]
		b = b[n:]
		if len(f.cur.in) == DerivedFrame {
			f.submit()
		}
	}
}

func (f *framer) submit() {
	c := f.cur
	f.cur = nil
	go func() {
		c.out = deriveEncoder().EncodeAll(c.in, c.out[:0])
		c.ready <- struct{}{}
	}()
	f.todo <- c
}

func (f *framer) write() {
	defer close(f.done)
	for c := range f.todo {
		<-c.ready
		if f.err == nil {
			f.sum.Write(c.out)
			if _, err := f.w.Write(c.out); err != nil {
				f.err = fmt.Errorf("writing the derived blob: %w", err)
				close(f.failed)
			}
			if len(c.in) > 0 {
				r := row{
					out: f.out, outLen: uint32(len(c.in)), blob: f.size, blobLen: uint32(len(c.out)),
					digest: sha256.Sum256(c.out),
				}
				f.rows = r.append(f.rows)
			}
			f.out += int64(len(c.in))
			f.size += int64(len(c.out))
		}
		c.in = c.in[:0]
		f.free <- c
	}
}

// broken is the error of w, if there was one.
func (f *framer) broken() error {
	select {
	case <-f.failed:
		return f.err
	default:
		return nil
	}
}

func (f *framer) finish() error {
	if !f.any {
		f.cur = <-f.free // an empty layer is one empty frame
	}
	if f.cur != nil {
		f.submit()
	}
	close(f.todo)
	<-f.done
	return f.err
}
