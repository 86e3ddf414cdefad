package ztoc

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
)

// The packed form, version 1, all numbers little endian:
//
//	  0  magic "muster ztoc v1\n\x00" [16]
//	 16  format u8   flags u8   0 u16   length of tool u32
//	 24  blob size u64   inflated size u64   tar size u64   span size u64
//	 56  digest of the blob [32], zero when it is not known
//	 88  number of spans u32   number of chunks u32   number of entries u32   0 u32
//	104  bytes of entries, packed u64   inflated u64   bytes of windows u64
//	128  SHA-256 of the packed entries [32]
//	160  SHA-256 of span table and chunk table [32]
//	192  SHA-256 of tool [32]
//	224  SHA-256 of bytes 0–223 [32]
//	256  span table: 96 bytes a row (see row)
//	     chunk table: 40 bytes a row, only for formats with digests over inflated chunks
//	     entries: one zstd frame (see entryTable)
//	     tool, padded with zeros to a multiple of 8
//	     windows
//
// Every byte is covered by a digest: the header by its own, tables, entries and tool by those in the
// header, each window by the one in its row. Everything that a mount needs stands before the
// windows, so a reader may fetch a prefix first (PackedPrefix) and windows with their spans.
const (
	packMagic  = "muster ztoc v1\n\x00"
	packHeader = 256
	flagV1     = 1 << 0 // the first checkpoint is implied in the SOCI form
)

// PackedHeader is how many bytes of a packed table PackedPrefix wants to see.
const PackedHeader = packHeader

// Pack writes z in muster's own compact form: what the store keeps and what travels in the swarm.
func Pack(z *Ztoc) ([]byte, error) {
	if err := z.check(); err != nil {
		return nil, err
	}
	if err := z.toc.check(); err != nil {
		return nil, err
	}
	if len(z.Tool) > maxTool || z.NumSpans() > maxSpans || z.toc.n > maxEntries {
		return nil, fmt.Errorf("%w: %d spans, %d entries, tool of %d bytes", ErrUnsupported, z.NumSpans(), z.toc.n, len(z.Tool))
	}
	rows, windows := z.rows, z.windows
	if z.needsPacking() {
		rows, windows = z.packWindows()
	}
	var blob [32]byte
	if z.Blob != "" {
		var err error
		if blob, err = rawSum(z.Blob); err != nil {
			return nil, err
		}
	}
	le := binary.LittleEndian
	pad := -len(z.Tool) & 7
	b := make([]byte, 0, packHeader+len(rows)+len(z.chunks)+len(z.toc.packed)+len(z.Tool)+pad+len(windows))
	b = append(b, packMagic...)
	flags := byte(0)
	if z.implied {
		flags |= flagV1
	}
	b = append(b, byte(z.Format), flags, 0, 0)
	b = le.AppendUint32(b, uint32(len(z.Tool)))
	for _, n := range []int64{z.BlobSize, z.InflatedSize, z.TarSize, z.SpanSize} {
		b = le.AppendUint64(b, uint64(n))
	}
	b = append(b, blob[:]...)
	for _, n := range []int{len(rows) / rowSize, len(z.chunks) / chunkSize, z.toc.n, 0} {
		b = le.AppendUint32(b, uint32(n))
	}
	for _, n := range []int64{int64(len(z.toc.packed)), z.toc.raw, int64(len(windows))} {
		b = le.AppendUint64(b, uint64(n))
	}
	b = append(b, z.toc.sum[:]...)
	tables := tableSum(rows, z.chunks)
	b = append(b, tables[:]...)
	tool := sha256.Sum256([]byte(z.Tool))
	b = append(b, tool[:]...)
	head := sha256.Sum256(b)
	b = append(b, head[:]...)
	b = append(b, rows...)
	b = append(b, z.chunks...)
	b = append(b, z.toc.packed...)
	b = append(b, z.Tool...)
	b = append(b, make([]byte, pad)...)
	return append(b, windows...), nil
}

func tableSum(rows, chunks []byte) (sum [32]byte) {
	h := sha256.New()
	h.Write(rows)
	h.Write(chunks)
	return [32]byte(h.Sum(nil))
}

func rawSum(d Digest) (sum [32]byte, err error) {
	if _, err := ParseDigest(string(d)); err != nil {
		return sum, err
	}
	for i := range sum {
		sum[i] = unhex(d.Hex()[2*i])<<4 | unhex(d.Hex()[2*i+1])
	}
	return sum, nil
}

func unhex(c byte) byte {
	if c >= 'a' {
		return c - 'a' + 10
	}
	return c - '0'
}

// needsPacking reports whether a window is not in the form it travels in: those of a table read
// from SOCI's form are used where they lie, raw and without a sum.
func (z *Ztoc) needsPacking() bool {
	for i := range z.NumSpans() {
		if r := z.row(i); r.kind != windowNone && r.windowSum == [16]byte{} {
			return true
		}
	}
	return false
}

func (z *Ztoc) packWindows() (rows, windows []byte) {
	rows = make([]byte, 0, len(z.rows))
	for i := range z.NumSpans() {
		r := z.row(i)
		packed := z.windows[r.window : r.window+uint64(r.windowLen)]
		r.window = uint64(len(windows))
		if r.kind == windowRaw {
			windows, r.kind = packWindow(windows, packed, nil)
		} else {
			windows = append(windows, packed...)
		}
		packed = windows[r.window:]
		r.windowLen = uint32(len(packed))
		r.windowSum = [16]byte{}
		if r.kind != windowNone {
			r.windowSum = windowSum(packed)
		}
		rows = r.append(rows)
	}
	return rows, windows
}

// sections is where the parts of a packed table are.
type sections struct {
	rows, chunks, entries, tool, windows Range
}

// parseHeader reads and proves the header.
func parseHeader(b []byte) (z *Ztoc, s sections, err error) {
	if len(b) < packHeader || !bytes.HasPrefix(b, []byte("muster ztoc ")) {
		return nil, s, fmt.Errorf("%w: not a packed ztoc", ErrInvalid)
	}
	if string(b[:16]) != packMagic {
		return nil, s, fmt.Errorf("%w: packed ztoc of another version: %q", ErrUnsupported, b[:16])
	}
	if [32]byte(b[224:256]) != sha256.Sum256(b[:224]) {
		return nil, s, fmt.Errorf("%w: header of a packed ztoc", ErrMismatch)
	}
	le := binary.LittleEndian
	z = &Ztoc{
		Format: Format(b[16]), implied: b[17]&flagV1 != 0,
		BlobSize: int64(le.Uint64(b[24:])), InflatedSize: int64(le.Uint64(b[32:])),
		TarSize: int64(le.Uint64(b[40:])), SpanSize: int64(le.Uint64(b[48:])),
	}
	if blob := [32]byte(b[56:88]); blob != [32]byte{} {
		z.Blob = DigestFromSum(blob)
	}
	tool := int64(le.Uint32(b[20:]))
	spans, chunks, entries := le.Uint32(b[88:]), le.Uint32(b[92:]), le.Uint32(b[96:])
	packed, raw, windows := le.Uint64(b[104:]), le.Uint64(b[112:]), le.Uint64(b[120:])
	if b[17]&^flagV1 != 0 || tool > maxTool || spans > maxSpans || entries > maxEntries || chunks > maxEntries*4 ||
		packed > maxEntryBytes || raw > maxEntryBytes || windows > math.MaxInt32*64 {
		return nil, s, fmt.Errorf("%w: sizes in a packed ztoc", ErrInvalid)
	}
	z.toc = entryTable{raw: int64(raw), n: int(entries), sum: [32]byte(b[128:160])}
	at := int64(packHeader)
	section := func(n int64) Range {
		r := Range{at, at + n}
		at = r.End
		return r
	}
	s.rows = section(int64(spans) * rowSize)
	s.chunks = section(int64(chunks) * chunkSize)
	s.entries = section(int64(packed))
	s.tool = section(tool)
	at = s.tool.Start + (tool+7)&^7
	s.windows = section(int64(windows))
	return z, s, nil
}

// PackedPrefix says how many bytes of a packed table are needed for everything but Inflate on gzip
// spans, and how large it is, given its first PackedHeader bytes.
func PackedPrefix(header []byte) (prefix, size int64, err error) {
	_, s, err := parseHeader(header)
	if err != nil {
		return 0, 0, err
	}
	return s.windows.Start, s.windows.End, nil
}

// Unpack reads a packed table. It keeps b, which may be a mapped file and must not change; apart from
// the public fields nothing is copied to the heap. All it takes is a pass over the span table.
//
// A bit that has flipped is found here (ErrMismatch), in Entries, or, in a window, by the Inflate
// that needs it (ErrIndex).
func Unpack(b []byte) (*Ztoc, error) {
	z, s, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	if s.windows.End != int64(len(b)) {
		return nil, fmt.Errorf("%w: packed ztoc of %d bytes, should be %d", ErrInvalid, len(b), s.windows.End)
	}
	part := func(r Range) []byte { return b[r.Start:r.End:r.End] }
	z.rows, z.chunks, z.toc.packed, z.windows = part(s.rows), part(s.chunks), part(s.entries), part(s.windows)
	z.Tool = string(part(s.tool))
	if [32]byte(b[160:192]) != tableSum(z.rows, z.chunks) || [32]byte(b[192:224]) != sha256.Sum256(part(s.tool)) {
		return nil, fmt.Errorf("%w: span table of a packed ztoc", ErrMismatch)
	}
	if !allZero(part(Range{s.tool.End, s.windows.Start})) {
		return nil, fmt.Errorf("%w: padding of a packed ztoc", ErrInvalid)
	}
	if err := z.toc.check(); err != nil {
		return nil, err
	}
	if err := z.check(); err != nil {
		return nil, err
	}
	return z, nil
}
