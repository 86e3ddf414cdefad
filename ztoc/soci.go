package ztoc

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
)

// SOCI's ztoc, version 0.9: a flatbuffer (ztoc/fbs/ztoc.fbs in awslabs/soci-snapshotter), with the
// checkpoints of gzip as a packed array in it, and those of tar as a flatbuffer of their own.

const (
	sociVersion    = "0.9"
	sociGzip       = 1
	sociTar        = 2
	sociCheckpoint = 8 + 8 + 1 + windowSize // in, out, bits, window
	sociTarVersion = 2
	maxSOCI        = 2 << 30 // of a flatbuffer: its offsets are 31 bits
)

// Fields by their number in the schema.
const (
	fbVersion, fbTool, fbBlobSize, fbTarSize, fbTOC, fbInfo = 0, 1, 2, 3, 4, 5

	fbAlgorithm, fbMaxSpan, fbDigests, fbCheckpoints = 0, 1, 2, 3

	fbName, fbType, fbOffset, fbSize, fbLink, fbMode, fbUID, fbGID = 0, 1, 2, 3, 4, 5, 6, 7
	fbUname, fbGname, fbTime, fbMajor, fbMinor, fbPAX              = 8, 9, 10, 11, 12, 13
)

var sociTypes = [...]string{
	TypeReg: "reg", TypeDir: "dir", TypeSymlink: "symlink", TypeHardlink: "hardlink",
	TypeChar: "char", TypeBlock: "block", TypeFifo: "fifo",
}

// DecodeSOCI reads a ztoc that SOCI wrote, or EncodeSOCI. It keeps b: windows are used where they lie.
// The format does not name the layer's blob; set Blob before use.
//
// It is strict: a ztoc that EncodeSOCI would not write byte for byte the same is ErrInvalid.
// ErrUnsupported says that the ztoc is of another version, or has files it cannot describe: in a
// sparse tar member the file's content is not where the ztoc says, because the format has no place
// for the map. ErrNoRestart: a span is larger than what may be inflated at once.
func DecodeSOCI(b []byte) (*Ztoc, error) {
	if len(b) > maxSOCI {
		return nil, fmt.Errorf("%w: SOCI ztoc of %d bytes", ErrInvalid, len(b))
	}
	r := &flatReader{b: b}
	root := r.root()
	if v := root.string(fbVersion); r.err == nil && v != sociVersion {
		return nil, fmt.Errorf("%w: SOCI ztoc of version %.20q", ErrUnsupported, v)
	}
	z := &Ztoc{
		Tool:     root.string(fbTool),
		BlobSize: root.int64(fbBlobSize),
		TarSize:  root.int64(fbTarSize),
	}
	if len(z.Tool) > maxTool {
		return nil, fmt.Errorf("%w: name of the build tool has %d bytes", ErrInvalid, len(z.Tool))
	}
	info, ok := root.table(fbInfo)
	toc, ok2 := root.table(fbTOC)
	if r.err != nil {
		return nil, r.err
	}
	if !ok || !ok2 || z.BlobSize <= 0 || z.TarSize < 0 {
		return nil, fmt.Errorf("%w: SOCI ztoc of a layer of %d bytes", ErrInvalid, z.BlobSize)
	}
	digests, err := sociDigests(info)
	if err != nil {
		return nil, err
	}
	checkpoints := info.byteVector(fbCheckpoints)
	switch info.int8(fbAlgorithm, sociGzip) {
	case sociGzip:
		z.Format = FormatGzip
		err = z.sociGzipRows(checkpoints, digests)
	case sociTar:
		z.Format = FormatTar
		err = z.sociTarRows(checkpoints, digests)
	default:
		err = fmt.Errorf("%w: SOCI ztoc with compression algorithm %d", ErrUnsupported, info.int8(fbAlgorithm, sociGzip))
	}
	if err != nil {
		return nil, err
	}
	es, err := z.sociEntries(toc)
	if err != nil {
		return nil, err
	}
	if err := z.check(); err != nil {
		return nil, err
	}
	// Gzip checkpoints come out as they went in: every field of them is in a row, and windows are kept raw.
	if z.Format == FormatTar {
		checkpoints = z.sociTarCheckpoints()
	}
	again, err := z.encodeSOCI(es, checkpoints)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: SOCI ztoc is not in the form SOCI writes", ErrInvalid)
	}
	return z, nil
}

func sociDigests(info flatTable) ([][32]byte, error) {
	r := info.r
	at, n := info.vector(fbDigests, 4)
	if r.err != nil {
		return nil, r.err
	}
	if last := int64(int32(info.uint32(fbMaxSpan))); last != int64(n)-1 || n > maxSpans {
		return nil, fmt.Errorf("%w: SOCI ztoc with %d digests, last span %d", ErrInvalid, n, last)
	}
	digests := make([][32]byte, n)
	for i := range digests {
		d, err := rawSum(Digest(r.stringAt(r.element(at, i))))
		if r.err != nil {
			return nil, r.err
		}
		if err != nil {
			return nil, fmt.Errorf("%w: digest of span %d: %w", ErrInvalid, i, err)
		}
		digests[i] = d
	}
	return digests, nil
}

// sociGzipRows reads the checkpoints of a gzip layer. Their first version left out the first one and
// meant a gzip header of 10 bytes.
func (z *Ztoc) sociGzipRows(b []byte, digests [][32]byte) error {
	n := len(digests)
	if n == 0 || len(b) < 12 || int64(int32(binary.LittleEndian.Uint32(b))) != int64(n) {
		return fmt.Errorf("%w: %d bytes of checkpoints for %d spans", ErrInvalid, len(b), n)
	}
	switch len(b) - 12 {
	case n * sociCheckpoint:
	case (n - 1) * sociCheckpoint:
		z.implied = true
	default:
		return fmt.Errorf("%w: %d bytes of checkpoints for %d spans", ErrInvalid, len(b), n)
	}
	z.SpanSize = int64(binary.LittleEndian.Uint64(b[4:]))
	z.windows = b
	at := 12
	in, out, rows := make([]int64, n+1), make([]int64, n+1), make([]row, n)
	for i := range n {
		r := &rows[i]
		r.digest = digests[i]
		if i == 0 && z.implied {
			in[0] = 10
			continue
		}
		in[i] = int64(binary.LittleEndian.Uint64(b[at:]))
		out[i] = int64(binary.LittleEndian.Uint64(b[at+8:]))
		r.bits = b[at+16]
		if out[i] > 0 || !allZero(b[at+17:at+sociCheckpoint]) {
			r.kind, r.window, r.windowLen = windowRaw, uint64(at+17), windowSize
		}
		at += sociCheckpoint
	}
	// Where the inflated layer ends is not said. It goes on at least to where the tar reader stopped.
	in[n], out[n] = z.BlobSize, max(z.TarSize, out[n-1])
	z.InflatedSize = out[n]
	z.rows = make([]byte, 0, n*rowSize)
	for i := range rows {
		r := &rows[i]
		r.out, r.blob = out[i], in[i]
		if r.bits > 0 {
			r.blob--
		}
		if r.out < 0 || r.blob < 0 || in[i+1] < in[i] || out[i+1] < out[i] || in[i] > z.BlobSize {
			return fmt.Errorf("%w: checkpoint %d is out of order", ErrInvalid, i)
		}
		outLen, blobLen := out[i+1]-out[i], in[i+1]-r.blob
		if outLen > maxSpan || blobLen > maxSpan {
			return fmt.Errorf("%w: span %d of %d bytes inflates to %d", ErrNoRestart, i, blobLen, outLen)
		}
		r.outLen, r.blobLen = uint32(outLen), uint32(blobLen)
		z.rows = r.append(z.rows)
	}
	return nil
}

// sociTarRows reads what SOCI says about a plain tar: a grid.
func (z *Ztoc) sociTarRows(b []byte, digests [][32]byte) error {
	r := &flatReader{b: b}
	t := r.root()
	version, span, size := int32(t.uint32(0)), t.int64(1), t.int64(2)
	if r.err != nil {
		return r.err
	}
	if version != sociTarVersion {
		return fmt.Errorf("%w: SOCI tar checkpoints of version %d", ErrUnsupported, version)
	}
	if span <= 0 || size != z.BlobSize || int64(len(digests)) != (size-1)/span+1 {
		return fmt.Errorf("%w: %d spans of %d bytes for a tar of %d", ErrInvalid, len(digests), span, size)
	}
	if min(span, size) > maxSpan {
		return fmt.Errorf("%w: spans of %d bytes", ErrNoRestart, span)
	}
	z.SpanSize, z.InflatedSize = span, size
	z.rows = make([]byte, 0, len(digests)*rowSize)
	for i, d := range digests {
		at := int64(i) * span
		n := uint32(min(span, size-at))
		row := row{out: at, blob: at, outLen: n, blobLen: n, digest: d}
		z.rows = row.append(z.rows)
	}
	return nil
}

func (z *Ztoc) sociEntries(toc flatTable) (es []Entry, err error) {
	r := toc.r
	at, n := toc.vector(0, 4)
	if r.err != nil {
		return nil, r.err
	}
	if n > maxEntries {
		return nil, fmt.Errorf("%w: SOCI ztoc with %d entries", ErrUnsupported, n)
	}
	es = make([]Entry, n)
	w := newEntryWriter()
	var next int64 // where the next header is, at least
	for i := range n {
		e, err := sociEntry(r.table(r.element(at, i)))
		if err == nil && (e.Offset < next || e.Size < 0 || e.Offset > z.InflatedSize || e.Size > z.InflatedSize-e.Offset) {
			err = fmt.Errorf("%w: content at %d, %d bytes, does not fit behind %d", ErrInvalid, e.Offset, e.Size, next)
		}
		if err == nil {
			next = alignBlock(e.Offset + e.Size)
			err = w.add(&e)
		}
		if err != nil {
			w.abandon()
			return nil, fmt.Errorf("entry %d, %.200q: %w", i, e.Name, err)
		}
		es[i] = e
	}
	z.toc, err = w.finish()
	return es, err
}

func sociEntry(t flatTable) (e Entry, err error) {
	r := t.r
	e = Entry{
		Name: t.string(fbName), Linkname: t.string(fbLink), Offset: t.int64(fbOffset), Size: t.int64(fbSize),
		Mode: t.int64(fbMode), UID: int(t.uint32(fbUID)), GID: int(t.uint32(fbGID)),
		Uname: t.string(fbUname), Gname: t.string(fbGname),
		Devmajor: t.int64(fbMajor), Devminor: t.int64(fbMinor),
	}
	typ, known := t.string(fbType), false
	for i, name := range sociTypes {
		if typ == name {
			e.Type, known = EntryType(i), true
		}
	}
	if text := t.byteVector(fbTime); len(text) > 0 {
		if err := e.ModTime.UnmarshalText(text); err != nil {
			return e, fmt.Errorf("%w: time %.40q", ErrInvalid, text)
		}
		// The zone as it is written, whatever the zone of this machine.
		_, off := e.ModTime.Zone()
		e.ModTime = e.ModTime.In(time.FixedZone("", off))
	}
	at, n := t.vector(fbPAX, 4)
	if r.err != nil {
		return e, r.err
	}
	if !known {
		return e, fmt.Errorf("%w: file type %.20q", ErrUnsupported, typ)
	}
	if n > 0 {
		e.PAX = make([]Record, n)
	}
	for i := range e.PAX {
		x := r.table(r.element(at, i))
		e.PAX[i] = Record{x.string(0), x.string(1)}
		if strings.HasPrefix(e.PAX[i].Key, paxSparse) {
			return e, fmt.Errorf("%w: a sparse file, whose holes SOCI's ztoc cannot say", ErrUnsupported)
		}
	}
	return e, r.err
}
