package ztoc

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// One decoder and one encoder serve all callers: both keep a pool of states inside, one per CPU in
// use at a time, and are safe for concurrent use in their All forms.
var (
	decoders = sync.OnceValue(func() *zstd.Decoder {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true),
			zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			panic(err) // constant options
		}
		return d
	})
	windowEncoder = sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(2), zstd.WithEncoderCRC(false),
			zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(windowSize),
			zstd.WithLowerEncoderMem(true), zstd.WithSingleSegment(true))
		if err != nil {
			panic(err) // constant options
		}
		return e
	})
)

// unzstd appends what src inflates to, never beyond dst's capacity: the caller's buffer is the bound.
func unzstd(dst, src []byte) ([]byte, error) { return decoders().DecodeAll(src, dst) }

// unzstdExact inflates src to exactly len(dst) bytes.
func unzstdExact(dst, src []byte) error {
	b, err := unzstd(dst[:0:len(dst)], src)
	if err == nil && len(b) != len(dst) {
		err = fmt.Errorf("%d bytes of %d", len(b), len(dst))
	}
	return err
}

// inflateStream inflates the first len(dst) bytes of zstd frames that may hold more.
func inflateStream(dst, blob []byte) error {
	n, err := readStream(dst, blob)
	if err == nil && n < len(dst) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// readStream inflates frames until dst is full or they end, which is no error.
func readStream(dst, blob []byte) (n int, err error) {
	d := streamDecoders.Get().(*zstd.Decoder)
	defer streamDecoders.Put(d)
	if err := d.Reset(bytes.NewReader(blob)); err != nil {
		return 0, err
	}
	defer func() { _ = d.Reset(nil) }() // let go of blob
	for n < len(dst) {
		m, err := d.Read(dst[n:])
		n += m
		if err == io.EOF {
			break
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

var streamDecoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxSpan))
	if err != nil {
		panic(err) // constant options
	}
	return d
}}

// Inflating a span allocates nothing.
var (
	windowBuffers = sync.Pool{New: func() any { return new([windowSize]byte) }}
	sparseBuffers = sync.Pool{New: func() any { return new([maxSparseWindow]byte) }}
)

// packWindow appends the smallest form of window w to b and says which that is. used is 1 for each byte of
// w that its span refers to and 0 for the others; nil: all of them.
//
// The sparse form is the runs that are used, as varints (gap, length, gap, length, …, 0, 0), then the
// bytes of all runs; the whole as one zstd frame. It wins because a span refers to its window here
// and there only, and the bytes between would have to be written as matches of zeros.
func packWindow(b, w []byte, used *[windowSize]byte) ([]byte, uint8) {
	if used == nil {
		if allZero(w) {
			return b, windowNone
		}
		start := len(b)
		b = windowEncoder().EncodeAll(w, b)
		if len(b)-start >= windowSize {
			return append(b[:start], w...), windowRaw
		}
		return b, windowZstd
	}
	scratch := sparseBuffers.Get().(*[maxSparseWindow]byte)
	defer sparseBuffers.Put(scratch)
	sparse := scratch[:0]
	end := 0
	for start, to := range runs(used[:]) {
		sparse = binary.AppendUvarint(sparse, uint64(start-end))
		sparse = binary.AppendUvarint(sparse, uint64(to-start))
		end = to
	}
	if end == 0 {
		return b, windowNone
	}
	sparse = append(sparse, 0, 0)
	for start, to := range runs(used[:]) {
		sparse = append(sparse, w[start:to]...)
	}
	return windowEncoder().EncodeAll(sparse, b), windowSparse
}

// runs yields where each run of used bytes starts and ends.
func runs(used []byte) iter.Seq2[int, int] {
	return func(yield func(start, end int) bool) {
		for at := 0; ; {
			n := bytes.IndexByte(used[at:], 1)
			if n < 0 {
				return
			}
			start := at + n
			if n = bytes.IndexByte(used[start:], 0); n < 0 {
				n = len(used) - start
			}
			if at = start + n; !yield(start, at) {
				return
			}
		}
	}
}

// maxSparseWindow bounds the inflated sparse form: every other byte used makes 32 Ki varints.
const maxSparseWindow = 2*windowSize + 16

// unpackWindow restores a window into w, which it overwrites.
func unpackWindow(w *[windowSize]byte, kind uint8, packed []byte) error {
	switch kind {
	case windowNone:
		clear(w[:])
		return nil
	case windowRaw:
		if copy(w[:], packed) != windowSize {
			return fmt.Errorf("%w: window of %d bytes", ErrIndex, len(packed))
		}
		return nil
	case windowZstd:
		if err := unzstdExact(w[:], packed); err != nil {
			return fmt.Errorf("%w: window: %w", ErrIndex, err)
		}
		return nil
	}
	scratch := sparseBuffers.Get().(*[maxSparseWindow]byte)
	defer sparseBuffers.Put(scratch)
	buf, err := unzstd(scratch[:0], packed)
	if err != nil {
		return fmt.Errorf("%w: sparse window: %w", ErrIndex, err)
	}
	// The runs end with a zero length; find it, so that runs and data can be walked side by side.
	data := buf
	for {
		_, n := binary.Uvarint(data)
		length, m := binary.Uvarint(data[max(n, 0):])
		if n <= 0 || m <= 0 {
			return fmt.Errorf("%w: runs of a sparse window do not end", ErrIndex)
		}
		data = data[n+m:]
		if length == 0 {
			break
		}
	}
	clear(w[:])
	for at := uint64(0); ; {
		gap, n := binary.Uvarint(buf)
		length, m := binary.Uvarint(buf[n:])
		buf = buf[n+m:]
		if length == 0 {
			break
		}
		if gap > windowSize || length > windowSize || at+gap+length > windowSize || length > uint64(len(data)) {
			return fmt.Errorf("%w: run of a sparse window", ErrIndex)
		}
		at += gap
		copy(w[at:], data[:length])
		data = data[length:]
		at += length
	}
	if len(data) != 0 {
		return fmt.Errorf("%w: %d bytes behind a sparse window", ErrIndex, len(data))
	}
	return nil
}

// window restores the window of r into w, whose bytes are proven against the table first: a window
// may have come from a peer, or lain in a store that does not sync.
func (z *Ztoc) window(w *[windowSize]byte, r *row) error {
	packed := z.windows[r.window : r.window+uint64(r.windowLen)]
	if r.kind != windowNone && r.windowSum != [16]byte{} && windowSum(packed) != r.windowSum {
		return fmt.Errorf("%w: window does not match its digest", ErrIndex)
	}
	return unpackWindow(w, r.kind, packed)
}

func windowSum(packed []byte) [16]byte {
	sum := sha256.Sum256(packed)
	return [16]byte(sum[:16])
}
