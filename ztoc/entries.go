package ztoc

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
)

// maxEntryBytes bounds the entries of one layer before compression: a million files take about 60 MB.
const maxEntryBytes = 1 << 30

// maxNameBytes bounds the names of one layer together, as they are when decoded: in the packed form
// each is written as what it does not share with the one before, so a small table could hold huge ones.
const maxNameBytes = 512 << 20

// An entryTable is the entries of a layer as they travel: the concatenation below as one zstd frame.
//
// One entry is, with varints as in encoding/binary:
//
//	type and has-flags u8, same-flags u8
//	name: length of the prefix shared with the name before, length of the rest, the rest
//	offset: difference to where it would be behind the entry before with one header block
//	size; mode, uid, gid, uname, gname, time unless the same as of the entry before
//	link name, device numbers, PAX records, sparse extents where the has-flags say so
type entryTable struct {
	packed []byte // one zstd frame
	raw    int64  // its inflated size
	n      int
	sum    [32]byte // SHA-256 of packed
}

const (
	hasLink = 1 << (iota + 3)
	hasPAX
	hasSparse
	hasDev
	hasZone // the time is written in a zone other than UTC: SOCI's form shows it
)

const (
	sameMode = 1 << iota
	sameUID
	sameGID
	sameUname
	sameGname
	sameTime
	noTime // the zero time.Time
)

// An entryWriter packs entries as they come, so that a build's memory does not grow with its layer.
type entryWriter struct {
	out  sliceWriter
	enc  *zstd.Encoder
	buf  []byte
	prev Entry
	raw  int64
	n    int
	name int64 // bytes of names
}

type sliceWriter []byte

func (w *sliceWriter) Write(p []byte) (int, error) {
	*w = append(*w, p...)
	return len(p), nil
}

func newEntryWriter() *entryWriter {
	w := &entryWriter{}
	enc, err := zstd.NewWriter(&w.out, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20),
		zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false))
	if err != nil {
		panic(err) // constant options
	}
	w.enc = enc
	return w
}

// predict is where the content of an entry usually starts: behind the one before and one header block.
func predict(prev *Entry) int64 {
	end := prev.Offset
	if prev.Type == TypeReg {
		end += prev.Size
		if prev.Sparse != nil {
			end = prev.Offset
			for _, x := range prev.Sparse {
				end = max(end, x.Offset+x.Len)
			}
		}
	}
	return alignBlock(end) + tarBlock
}

func (w *entryWriter) add(e *Entry) error {
	if w.n++; w.n > maxEntries {
		return fmt.Errorf("%w: more than %d entries", ErrUnsupported, maxEntries)
	}
	w.buf = appendEntry(w.buf[:0], e, &w.prev)
	w.raw += int64(len(w.buf))
	w.name += int64(len(e.Name))
	if w.raw > maxEntryBytes || w.name > maxNameBytes {
		return fmt.Errorf("%w: names and attributes of %d and %d bytes", ErrUnsupported, w.name, w.raw)
	}
	w.prev = *e
	if _, err := w.enc.Write(w.buf); err != nil {
		return err
	}
	return nil
}

func (w *entryWriter) finish() (entryTable, error) {
	if err := w.enc.Close(); err != nil {
		return entryTable{}, err
	}
	return entryTable{packed: w.out, raw: w.raw, n: w.n, sum: sha256.Sum256(w.out)}, nil
}

// abandon frees what the encoder holds when there will be no table.
func (w *entryWriter) abandon() { w.enc.Reset(nil) }

func packEntries(es []Entry) (entryTable, error) {
	w := newEntryWriter()
	for i := range es {
		if err := w.add(&es[i]); err != nil {
			w.abandon()
			return entryTable{}, err
		}
	}
	return w.finish()
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func sharedPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

func zoneMinutes(t time.Time) int {
	_, off := t.Zone()
	return off / 60
}

func appendEntry(b []byte, e, prev *Entry) []byte {
	kind, same := uint8(e.Type)&7, uint8(0)
	set := func(f *uint8, bit uint8, on bool) {
		if on {
			*f |= bit
		}
	}
	zone := zoneMinutes(e.ModTime)
	set(&kind, hasLink, e.Linkname != "")
	set(&kind, hasPAX, len(e.PAX) > 0)
	set(&kind, hasSparse, e.Sparse != nil)
	set(&kind, hasDev, e.Devmajor != 0 || e.Devminor != 0)
	set(&kind, hasZone, zone != 0)
	set(&same, sameMode, e.Mode == prev.Mode)
	set(&same, sameUID, e.UID == prev.UID)
	set(&same, sameGID, e.GID == prev.GID)
	set(&same, sameUname, e.Uname == prev.Uname)
	set(&same, sameGname, e.Gname == prev.Gname)
	set(&same, noTime, e.ModTime.IsZero())
	set(&same, sameTime, e.ModTime.Equal(prev.ModTime))
	b = append(b, kind, same)
	n := sharedPrefix(e.Name, prev.Name)
	b = binary.AppendUvarint(b, uint64(n))
	b = appendString(b, e.Name[n:])
	b = binary.AppendVarint(b, e.Offset-predict(prev))
	b = binary.AppendVarint(b, e.Size)
	if same&sameMode == 0 {
		b = binary.AppendVarint(b, e.Mode)
	}
	if same&sameUID == 0 {
		b = binary.AppendVarint(b, int64(e.UID))
	}
	if same&sameGID == 0 {
		b = binary.AppendVarint(b, int64(e.GID))
	}
	if same&sameUname == 0 {
		b = appendString(b, e.Uname)
	}
	if same&sameGname == 0 {
		b = appendString(b, e.Gname)
	}
	if same&(sameTime|noTime) == 0 {
		b = binary.AppendVarint(b, e.ModTime.Unix())
		b = binary.AppendUvarint(b, uint64(e.ModTime.Nanosecond()))
	}
	if kind&hasZone != 0 {
		b = binary.AppendVarint(b, int64(zone))
	}
	if kind&hasLink != 0 {
		b = appendString(b, e.Linkname)
	}
	if kind&hasDev != 0 {
		b = binary.AppendVarint(b, e.Devmajor)
		b = binary.AppendVarint(b, e.Devminor)
	}
	if kind&hasPAX != 0 {
		b = binary.AppendUvarint(b, uint64(len(e.PAX)))
		for _, r := range e.PAX {
			b = appendString(b, r.Key)
			b = appendString(b, r.Value)
		}
	}
	if kind&hasSparse != 0 {
		b = binary.AppendUvarint(b, uint64(len(e.Sparse)))
		for _, x := range e.Sparse {
			b = binary.AppendVarint(b, x.FileOff)
			b = binary.AppendVarint(b, x.Offset-e.Offset)
			b = binary.AppendVarint(b, x.Len)
		}
	}
	return b
}

// An entryReader takes entries from s. After an error it stays failed.
type entryReader struct {
	s      string
	names  int64 // bytes of names so far
	failed bool
}

func (r *entryReader) byte() uint8 {
	if len(r.s) == 0 {
		r.failed = true
		return 0
	}
	c := r.s[0]
	r.s = r.s[1:]
	return c
}

func (r *entryReader) uvarint() uint64 {
	var v uint64
	for i := 0; i < len(r.s) && i < binary.MaxVarintLen64; i++ {
		c := r.s[i]
		v |= uint64(c&0x7f) << (7 * i)
		if c < 0x80 {
			if i == binary.MaxVarintLen64-1 && c > 1 {
				break
			}
			r.s = r.s[i+1:]
			return v
		}
	}
	r.failed = true
	r.s = ""
	return 0
}

func (r *entryReader) varint() int64 {
	u := r.uvarint()
	v := int64(u >> 1)
	if u&1 != 0 {
		v = ^v
	}
	return v
}

func (r *entryReader) string() string {
	n := r.uvarint()
	if n > uint64(len(r.s)) {
		r.failed = true
		return ""
	}
	s := r.s[:n]
	r.s = r.s[n:]
	return s
}

// count reads the length of a list whose elements are at least size bytes each.
func (r *entryReader) count(size int) int {
	n := r.uvarint()
	if n > uint64(len(r.s)/size) {
		r.failed = true
		return 0
	}
	return int(n)
}

func (r *entryReader) entry(e, prev *Entry) {
	kind, same := r.byte(), r.byte()
	e.Type = EntryType(kind & 7)
	if e.Type > TypeFifo {
		r.failed = true
	}
	n := r.uvarint()
	rest := r.string()
	if n > uint64(len(prev.Name)) {
		r.failed = true
		return
	}
	if r.names += int64(n) + int64(len(rest)); r.names > maxNameBytes {
		r.failed = true
		return
	}
	switch {
	case n == 0:
		e.Name = rest
	case rest == "" && int(n) == len(prev.Name):
		e.Name = prev.Name
	default:
		e.Name = prev.Name[:n] + rest
	}
	e.Offset = r.varint() + predict(prev)
	e.Size = r.varint()
	e.Mode, e.UID, e.GID, e.Uname, e.Gname = prev.Mode, prev.UID, prev.GID, prev.Uname, prev.Gname
	if same&sameMode == 0 {
		e.Mode = r.varint()
	}
	if same&sameUID == 0 {
		e.UID = int(r.varint())
	}
	if same&sameGID == 0 {
		e.GID = int(r.varint())
	}
	if same&sameUname == 0 {
		e.Uname = r.string()
	}
	if same&sameGname == 0 {
		e.Gname = r.string()
	}
	switch {
	case same&noTime != 0:
	case same&sameTime != 0:
		e.ModTime = prev.ModTime.UTC()
	default:
		sec, nsec := r.varint(), r.uvarint()
		if nsec >= 1e9 {
			r.failed = true
		}
		e.ModTime = time.Unix(sec, int64(nsec)).UTC()
	}
	if kind&hasZone != 0 {
		m := r.varint()
		if m < -24*60 || m > 24*60 {
			r.failed = true
			return
		}
		e.ModTime = e.ModTime.In(time.FixedZone("", int(m)*60))
	}
	if kind&hasLink != 0 {
		e.Linkname = r.string()
	}
	if kind&hasDev != 0 {
		e.Devmajor, e.Devminor = r.varint(), r.varint()
	}
	if kind&hasPAX != 0 {
		e.PAX = make([]Record, r.count(2))
		for i := range e.PAX {
			e.PAX[i] = Record{r.string(), r.string()}
		}
	}
	if kind&hasSparse != 0 {
		e.Sparse = make([]Extent, r.count(3))
		for i := range e.Sparse {
			e.Sparse[i] = Extent{r.varint(), r.varint() + e.Offset, r.varint()}
		}
	}
	if e.Size < 0 || e.Offset < 0 || e.Offset > math.MaxInt64-e.Size && e.Sparse == nil {
		r.failed = true
	}
}

func (t *entryTable) decode() ([]Entry, error) {
	if t.n == 0 {
		return nil, nil
	}
	if sha256.Sum256(t.packed) != t.sum {
		return nil, fmt.Errorf("%w: entries", ErrMismatch)
	}
	raw := make([]byte, t.raw)
	if err := unzstdExact(raw, t.packed); err != nil {
		return nil, fmt.Errorf("%w: entries: %w", ErrInvalid, err)
	}
	r := entryReader{s: string(raw)}
	es := make([]Entry, 0, t.n)
	var zero Entry
	prev := &zero
	for range t.n {
		es = append(es, Entry{})
		r.entry(&es[len(es)-1], prev)
		prev = &es[len(es)-1]
		if r.failed {
			return nil, fmt.Errorf("%w: entry %d", ErrInvalid, len(es)-1)
		}
	}
	if r.s != "" {
		return nil, fmt.Errorf("%w: %d bytes behind the entries", ErrInvalid, len(r.s))
	}
	return slices.Clip(es), nil
}

// check makes sure that decode allocates no more than the table's own bounds allow.
func (t *entryTable) check() error {
	const least = 5 // bytes of the shortest entry
	if t.n < 0 || t.n > maxEntries || t.raw < 0 || t.raw > maxEntryBytes || int64(t.n) > t.raw/least ||
		t.raw > 1<<20+1<<10*int64(len(t.packed)) {
		return fmt.Errorf("%w: %d entries in %d bytes", ErrInvalid, t.n, t.raw)
	}
	return nil
}
