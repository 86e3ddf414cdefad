package ztoc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
)

// What callers of this package decide on. Every error of the package wraps one of them, or the
// error of the reader it was given.
var (
	// ErrMismatch: the bytes are not those the digest names. Fetch them again, from elsewhere.
	ErrMismatch = errors.New("content does not match its digest")
	// ErrIndex: the bytes are right and the index lies about them. Fetching again does not help.
	ErrIndex = errors.New("index does not describe its layer")
	// ErrNoRestart: the layer is sound but has no useful restart points: Derive a blob from it.
	ErrNoRestart = errors.New("layer has no restart points within reach")
	// ErrUnsupported: a kind of layer or table that this package does not know, or that the asked form cannot say.
	ErrUnsupported = errors.New("not supported")
	// ErrInvalid: a malformed table, table of contents or layer.
	ErrInvalid = errors.New("malformed")
)

// DefaultSpanSize is how many inflated bytes are between two checkpoints unless told otherwise; docs/spans.md has
// the measurements it comes from.
const DefaultSpanSize = 512 << 10

// MaxBlock is the largest deflate block or zstd frame, in inflated bytes, that a layer may have and
// still be served from its own blob.
const MaxBlock = 16 << 20

// The bounds of a table. They keep a hostile one from making its reader allocate without end, and
// leave room for the largest layers seen (tens of GiB, a million files).
const (
	maxSpan    = 64 << 20 // bytes of one span, compressed or inflated
	maxSpans   = 1 << 24
	maxEntries = 1 << 22
	maxTool    = 1 << 10
	windowSize = 32 << 10
)

// A Ztoc is the table of contents of one layer: where it can be restarted (spans with digests), and
// what files it has (entries). It holds its tables in the packed form of Pack, so a Ztoc unpacked
// from a mapped file costs no heap; only Entries decodes. A Ztoc is immutable apart from its public
// fields and safe for concurrent use once those are set.
type Ztoc struct {
	Tool         string // that built it, as SOCI's build_tool_identifier
	Format       Format
	Blob         Digest // of the layer's blob; empty when the index did not say (SOCI): the caller knows and sets it
	BlobSize     int64
	InflatedSize int64 // end of the last span; for a SOCI ztoc what is known of it, see TarSize
	// TarSize is where a tar reader stops: behind the two zero blocks, before what padding follows.
	// It is SOCI's uncompressed_archive_size. 0 for formats that come with their own table.
	TarSize  int64
	SpanSize int64 // inflated bytes between checkpoints that were asked for; a span may be longer

	implied bool   // the first checkpoint is not written out in the SOCI form (its version 1)
	rows    []byte // rowSize each, see row
	chunks  []byte // chunkSize each, for formats with digests over inflated chunks
	windows []byte // frames that rows point to
	toc     entryTable
}

// A row is one span of the table as it lies in the packed form: rowSize bytes, little endian.
//
//	 0 out start   8 blob start   16 out length u32   20 blob length u32
//	24 window: offset in the windows section u64   32 window length u32
//	36 first chunk u32   40 number of chunks u32   44 bits u8   45 window kind u8   46 0 u16
//	48 digest [32]   80 first 16 bytes of the SHA-256 of the window's frame
type row struct {
	out, blob             int64
	outLen, blobLen       uint32
	window                uint64
	windowLen             uint32
	firstChunk, numChunks uint32
	bits, kind            uint8
	digest                [32]byte
	windowSum             [16]byte
}

const (
	rowSize   = 96
	chunkSize = 40 // offset in the member u32, length u32, digest [32]
)

// How a window is written.
const (
	windowNone   = iota // all zero: nothing before the span is referred to
	windowZstd          // windowSize bytes as one zstd frame, bytes that are not referred to zeroed
	windowRaw           // windowSize bytes as they are
	windowSparse        // runs of referred bytes, see packWindow
	numWindowKinds
)

func (r *row) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, uint64(r.out))
	b = le.AppendUint64(b, uint64(r.blob))
	b = le.AppendUint32(b, r.outLen)
	b = le.AppendUint32(b, r.blobLen)
	b = le.AppendUint64(b, r.window)
	b = le.AppendUint32(b, r.windowLen)
	b = le.AppendUint32(b, r.firstChunk)
	b = le.AppendUint32(b, r.numChunks)
	b = append(b, r.bits, r.kind, 0, 0)
	b = append(b, r.digest[:]...)
	return append(b, r.windowSum[:]...)
}

func (z *Ztoc) row(i int) row {
	b := z.rows[i*rowSize : (i+1)*rowSize]
	le := binary.LittleEndian
	return row{
		out:        int64(le.Uint64(b)),
		blob:       int64(le.Uint64(b[8:])),
		outLen:     le.Uint32(b[16:]),
		blobLen:    le.Uint32(b[20:]),
		window:     le.Uint64(b[24:]),
		windowLen:  le.Uint32(b[32:]),
		firstChunk: le.Uint32(b[36:]),
		numChunks:  le.Uint32(b[40:]),
		bits:       b[44],
		kind:       b[45],
		digest:     [32]byte(b[48:80]),
		windowSum:  [16]byte(b[80:96]),
	}
}

// A chunk is one digest of a span whose format has digests over inflated bytes.
type chunk struct {
	skip   uint32 // bytes of the inflated member before the chunk: headers and padding that are in no file
	len    uint32
	digest [32]byte
}

func (c *chunk) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, c.skip)
	b = binary.LittleEndian.AppendUint32(b, c.len)
	return append(b, c.digest[:]...)
}

func (z *Ztoc) chunk(i uint32) chunk {
	b := z.chunks[int(i)*chunkSize : (int(i)+1)*chunkSize]
	return chunk{
		skip:   binary.LittleEndian.Uint32(b),
		len:    binary.LittleEndian.Uint32(b[4:]),
		digest: [32]byte(b[8:40]),
	}
}

// NumSpans is the number of spans.
func (z *Ztoc) NumSpans() int { return len(z.rows) / rowSize }

// Span is span i, 0 ≤ i < NumSpans.
func (z *Ztoc) Span(i int) Span {
	b := z.rows[i*rowSize : (i+1)*rowSize]
	le := binary.LittleEndian
	out, blob := int64(le.Uint64(b)), int64(le.Uint64(b[8:]))
	return Span{
		Index: i,
		Blob:  Range{blob, blob + int64(le.Uint32(b[20:]))},
		Out:   Range{out, out + int64(le.Uint32(b[16:]))},
	}
}

// outEnd is where span i ends in the inflated layer.
func (z *Ztoc) outEnd(i int) int64 {
	b := z.rows[i*rowSize:]
	return int64(binary.LittleEndian.Uint64(b)) + int64(binary.LittleEndian.Uint32(b[16:]))
}

// SpansOf is the half-open interval [lo, hi) of the spans that hold the bytes of out, a range of the
// inflated layer. It is empty (lo == hi) when out is empty or outside of the layer. Spans that inflate
// to nothing are in it only where they lie between others.
func (z *Ztoc) SpansOf(out Range) (lo, hi int) {
	n := z.NumSpans()
	out = out.Intersect(Range{0, z.InflatedSize})
	if out.Empty() {
		return 0, 0
	}
	lo = sort.Search(n, func(i int) bool { return z.outEnd(i) > out.Start })
	hi = lo + sort.Search(n-lo, func(i int) bool { return z.Span(lo+i).Out.Start >= out.End })
	return lo, hi
}

// MemorySize is about how many bytes z holds on the heap or in the mapping it was unpacked from.
func (z *Ztoc) MemorySize() int {
	return 256 + len(z.rows) + len(z.chunks) + len(z.windows) + len(z.toc.packed)
}

// NumEntries is the number of entries, known without decoding them.
func (z *Ztoc) NumEntries() int { return z.toc.n }

// Entries decodes the entries, in archive order. Each call decodes anew and gives the caller its
// own slice; the strings share memory with each other, not with z.
func (z *Ztoc) Entries() ([]Entry, error) { return z.toc.decode() }

// check makes sure of everything that indexing into the tables relies on.
func (z *Ztoc) check() error {
	if int(z.Format) >= len(formatNames) || z.Format == 0 {
		return fmt.Errorf("%w: unknown format %d", ErrInvalid, z.Format)
	}
	if len(z.rows)%rowSize != 0 || len(z.chunks)%chunkSize != 0 || len(z.rows)/rowSize > maxSpans {
		return fmt.Errorf("%w: span table of %d bytes", ErrInvalid, len(z.rows))
	}
	if z.BlobSize < 0 || z.InflatedSize < 0 || z.TarSize < 0 || z.SpanSize < 0 {
		return fmt.Errorf("%w: negative size", ErrInvalid)
	}
	chunked := z.Format.Chunked()
	var out int64
	chunks := uint32(len(z.chunks) / chunkSize)
	for i := range z.NumSpans() {
		r := z.row(i)
		switch {
		case r.out != out:
			return fmt.Errorf("%w: span %d starts at %d, not %d", ErrInvalid, i, r.out, out)
		case r.outLen > maxSpan || r.blobLen > maxSpan:
			return fmt.Errorf("%w: span %d of %d bytes", ErrInvalid, i, max(r.outLen, r.blobLen))
		case r.blob < 0 || r.blob > z.BlobSize || int64(r.blobLen) > z.BlobSize-r.blob:
			return fmt.Errorf("%w: span %d is outside of its blob", ErrInvalid, i)
		case r.bits > 7 || r.kind >= numWindowKinds:
			return fmt.Errorf("%w: span %d has %d bits and window kind %d", ErrInvalid, i, r.bits, r.kind)
		case r.bits > 0 && (z.Format != FormatGzip || r.blobLen == 0):
			return fmt.Errorf("%w: span %d has bits and no byte they are in", ErrInvalid, i)
		case r.kind == windowNone && r.windowLen != 0 || r.kind == windowRaw && r.windowLen != windowSize:
			return fmt.Errorf("%w: window %d of %d bytes", ErrInvalid, i, r.windowLen)
		case r.window > uint64(len(z.windows)) || uint64(r.windowLen) > uint64(len(z.windows))-r.window:
			return fmt.Errorf("%w: window %d is outside of its section", ErrInvalid, i)
		case z.Format == FormatTar && r.outLen != r.blobLen:
			return fmt.Errorf("%w: span %d is %d bytes in the blob and %d in the layer", ErrInvalid, i, r.blobLen, r.outLen)
		case chunked && (r.numChunks == 0 || r.firstChunk > chunks || r.numChunks > chunks-r.firstChunk):
			return fmt.Errorf("%w: chunks of span %d", ErrInvalid, i)
		}
		if chunked {
			var sum, skip uint64
			for c := range r.numChunks {
				ch := z.chunk(r.firstChunk + c)
				if uint64(ch.skip) < skip {
					return fmt.Errorf("%w: chunks of span %d overlap", ErrInvalid, i)
				}
				sum += uint64(ch.len)
				skip = uint64(ch.skip) + uint64(ch.len)
			}
			if sum != uint64(r.outLen) || skip > maxSpan {
				return fmt.Errorf("%w: chunks of span %d are %d bytes of %d", ErrInvalid, i, sum, r.outLen)
			}
		}
		out += int64(r.outLen)
	}
	if out != z.InflatedSize {
		return fmt.Errorf("%w: spans end at %d of %d", ErrInvalid, out, z.InflatedSize)
	}
	return nil
}

// readerOnly hides every method but Read.
type readerOnly struct{ io.Reader }
