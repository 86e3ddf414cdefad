package ztoc

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"time"
)

// Tables of contents that came with a layer: eStargz's JSON and that of zstd:chunked, in the dialects
// of stargz-snapshotter and of containers/storage. The three differ in how they are found and in a few
// fields; what follows reads the union.
//
// The tar archive inside such a layer is not looked at, so there are no offsets in it. The inflated
// coordinates are virtual instead: the chunks of all files one behind the other, in the order they
// have in the blob. Runs of zeros that are not in the table as data are holes.

// The bounds of a JSON table of contents, bytes. containers/storage has the same one.
const maxTOC = 150 << 20

// landmarks are files that eStargz puts into a layer for itself.
var landmarks = map[string]bool{".prefetch.landmark": true, ".no.prefetch.landmark": true, "stargz.index.json": true}

// A tocEntry is one entry as JSON has it.
type tocEntry struct {
	Name        string            `json:"name"`
	Type        string            `json:"type"`
	Size        int64             `json:"size"`
	ModTime     string            `json:"modtime"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	UID         int               `json:"uid"`
	GID         int               `json:"gid"`
	UserName    string            `json:"userName"`
	GroupName   string            `json:"groupName"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	EndOffset   int64             `json:"endOffset"`
	InnerOffset int64             `json:"innerOffset"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"`
}

// readTOC reads {"version":1,"entries":[…]} entry by entry, so that the JSON is never in memory as a
// tree, and gives each to add.
func readTOC(r io.Reader, add func(*tocEntry) error) error {
	d := json.NewDecoder(r)
	malformed := func(err error) error { return fmt.Errorf("%w: table of contents: %w", ErrInvalid, err) }
	want := func(delim json.Delim) error {
		t, err := d.Token()
		if err == nil && t != delim {
			err = fmt.Errorf("%v where %v should be", t, delim)
		}
		return err
	}
	if err := want('{'); err != nil {
		return malformed(err)
	}
	version := 0
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return malformed(err)
		}
		switch key {
		case "version":
			if err := d.Decode(&version); err != nil {
				return malformed(err)
			}
		case "entries":
			if t, err := d.Token(); err != nil {
				return malformed(err)
			} else if t == nil {
				continue // null: a layer without files
			} else if t != json.Delim('[') {
				return malformed(fmt.Errorf("%v where the entries should be", t))
			}
			for d.More() {
				var e tocEntry
				if err := d.Decode(&e); err != nil {
					return malformed(err)
				}
				if err := add(&e); err != nil {
					return err
				}
			}
			if err := want(']'); err != nil {
				return malformed(err)
			}
		default:
			var skip json.RawMessage
			if err := d.Decode(&skip); err != nil {
				return malformed(err)
			}
		}
	}
	if err := want('}'); err != nil {
		return malformed(err)
	}
	if version != 1 {
		return fmt.Errorf("%w: table of contents of version %d", ErrUnsupported, version)
	}
	return nil
}

// A tocChunk is a chunk of a file while the table is put together.
type tocChunk struct {
	entry   int   // index of its file's entry
	fileOff int64 // in the file
	size    int64
	offset  int64 // of its member or frame in the blob
	inner   int64 // in the inflated member
	end     int64 // of the member, 0 when the table does not say
	digest  [32]byte
	out     int64 // virtual inflated offset
}

// A tocBuilder makes a Ztoc of entries as they come.
type tocBuilder struct {
	format         Format
	payload        int64 // chunks end before this offset of the blob
	entries        []Entry
	chunks         []tocChunk
	file           int   // entry that chunks belong to, -1: none
	fileEnd        int64 // end offset of the file, if the table says it
	unames, gnames map[int]string
}

var tocTypes = map[string]EntryType{
	"reg": TypeReg, "dir": TypeDir, "symlink": TypeSymlink, "hardlink": TypeHardlink,
	"char": TypeChar, "block": TypeBlock, "fifo": TypeFifo,
}

func (b *tocBuilder) add(j *tocEntry) error {
	if len(b.entries) >= maxEntries || len(b.chunks) >= maxEntries {
		return fmt.Errorf("%w: more than %d entries", ErrUnsupported, maxEntries)
	}
	if j.Type == "chunk" {
		if b.file < 0 {
			return fmt.Errorf("%w: chunk that belongs to no file", ErrInvalid)
		}
		return b.chunk(j)
	}
	b.file = -1
	if landmarks[strings.TrimPrefix(path.Clean("/"+j.Name), "/")] {
		b.file = len(b.entries) // its chunks are taken and then belong to nobody
		b.entries = append(b.entries, Entry{Type: numTypes, Size: j.Size})
		return b.fileChunk(j)
	}
	typ, ok := tocTypes[j.Type]
	if !ok {
		return fmt.Errorf("%w: entry of type %.20q", ErrUnsupported, j.Type)
	}
	if j.Size < 0 || j.Size > 1<<60 {
		return fmt.Errorf("%w: %.200q has %d bytes", ErrInvalid, j.Name, j.Size)
	}
	e := Entry{
		Name: j.Name, Type: typ, Linkname: j.LinkName, Mode: j.Mode, UID: j.UID, GID: j.GID,
		Uname: name(b.unames, j.UID, j.UserName), Gname: name(b.gnames, j.GID, j.GroupName),
		Devmajor: j.DevMajor, Devminor: j.DevMinor,
	}
	if j.ModTime != "" {
		t, err := time.Parse(time.RFC3339Nano, j.ModTime)
		if err != nil {
			return fmt.Errorf("%w: time %.40q of %.200q", ErrInvalid, j.ModTime, j.Name)
		}
		e.ModTime = t.UTC()
	}
	for k, v := range j.Xattrs {
		e.PAX = append(e.PAX, Record{XattrPrefix + k, string(v)})
	}
	slices.SortFunc(e.PAX, func(a, b Record) int { return strings.Compare(a.Key, b.Key) })
	if typ == TypeReg {
		e.Size = j.Size
		b.file = len(b.entries)
	}
	b.entries = append(b.entries, e)
	if typ == TypeReg {
		return b.fileChunk(j)
	}
	return nil
}

// name is a user's or group's name, which eStargz writes with the first entry of each ID only.
func name(seen map[int]string, id int, s string) string {
	if s != "" {
		seen[id] = s
		return s
	}
	return seen[id]
}

// fileChunk takes the chunk that a file's own entry describes.
func (b *tocBuilder) fileChunk(j *tocEntry) error {
	b.fileEnd = j.EndOffset
	if j.Size == 0 {
		return nil
	}
	if j.ChunkDigest == "" && (j.ChunkSize == 0 || j.ChunkSize == j.Size) {
		j.ChunkDigest = j.Digest
	}
	return b.chunk(j)
}

func (b *tocBuilder) chunk(j *tocEntry) error {
	e := &b.entries[b.file]
	size := j.ChunkSize
	if size == 0 {
		size = e.Size - j.ChunkOffset // up to the end of the file
	}
	bad := func(what string) error {
		return fmt.Errorf("%w: %s of the chunk at %d of %.200q", ErrInvalid, what, j.ChunkOffset, e.Name)
	}
	if j.ChunkOffset < 0 || size < 0 || size > e.Size || j.ChunkOffset > e.Size-size {
		return bad("size")
	}
	if size == 0 {
		return nil
	}
	switch j.ChunkType {
	case "":
	case "zeros":
		return nil // a hole
	default:
		return fmt.Errorf("%w: chunk of type %.20q", ErrUnsupported, j.ChunkType)
	}
	if j.Offset <= 0 || j.Offset >= b.payload || j.InnerOffset < 0 || j.EndOffset < 0 {
		return bad("offset")
	}
	if size+j.InnerOffset > maxSpan || j.InnerOffset > maxSpan {
		return fmt.Errorf("%w: chunk of %d bytes in %.200q", ErrNoRestart, size, e.Name)
	}
	sum, err := rawSum(Digest(j.ChunkDigest))
	if err != nil {
		return bad("digest")
	}
	b.chunks = append(b.chunks, tocChunk{
		entry: b.file, fileOff: j.ChunkOffset, size: size,
		offset: j.Offset, inner: j.InnerOffset, end: b.fileEnd, digest: sum,
	})
	return nil
}

// finish puts the chunks in blob order, makes a span of each member, and tells the entries where their
// content is.
func (b *tocBuilder) finish(tool string, blobSize int64) (*Ztoc, error) {
	z := &Ztoc{Tool: tool, Format: b.format, BlobSize: blobSize, SpanSize: DefaultSpanSize}
	order := make([]*tocChunk, len(b.chunks))
	for i := range b.chunks {
		order[i] = &b.chunks[i]
	}
	slices.SortStableFunc(order, func(x, y *tocChunk) int {
		switch {
		case x.offset != y.offset:
			return cmpInt(x.offset, y.offset)
		default:
			return cmpInt(x.inner, y.inner)
		}
	})
	if err := b.spans(z, order); err != nil {
		return nil, err
	}
	if err := b.place(); err != nil {
		return nil, err
	}
	entries := slices.DeleteFunc(b.entries, func(e Entry) bool { return e.Type == numTypes })
	toc, err := packEntries(entries)
	if err != nil {
		return nil, err
	}
	z.toc = toc
	if err := z.check(); err != nil {
		return nil, err
	}
	return z, nil
}

func cmpInt(a, b int64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// spans makes a row of each run of chunks in one member.
func (b *tocBuilder) spans(z *Ztoc, order []*tocChunk) error {
	n := 0
	for i := 0; i < len(order); {
		first := order[i]
		end := b.payload
		j := i
		for ; j < len(order) && order[j].offset == first.offset; j++ {
			if e := order[j].end; e > first.offset {
				end = min(end, e)
			}
		}
		if j < len(order) {
			end = min(end, order[j].offset)
		}
		r := row{out: z.InflatedSize, blob: first.offset, firstChunk: uint32(n)}
		if end-r.blob > maxSpan {
			return fmt.Errorf("%w: member of %d bytes at %d", ErrNoRestart, end-r.blob, r.blob)
		}
		r.blobLen = uint32(end - r.blob)
		var last *tocChunk
		for ; i < j; i++ {
			c := order[i]
			if last != nil && c.inner < last.inner+last.size {
				// Two files may name the same chunk, but no two chunks may overlap.
				if c.inner != last.inner || c.size != last.size || c.digest != last.digest {
					return fmt.Errorf("%w: chunks of %.200q and %.200q overlap", ErrInvalid,
						b.entries[last.entry].Name, b.entries[c.entry].Name)
				}
				c.out = last.out
				continue
			}
			c.out = z.InflatedSize
			z.InflatedSize += c.size
			ch := chunk{skip: uint32(c.inner), len: uint32(c.size), digest: c.digest}
			z.chunks = ch.append(z.chunks)
			n++
			r.numChunks++
			last = c
		}
		if z.InflatedSize-r.out > maxSpan {
			return fmt.Errorf("%w: member with %d bytes of files at %d", ErrNoRestart, z.InflatedSize-r.out, r.blob)
		}
		r.outLen = uint32(z.InflatedSize - r.out)
		z.rows = r.append(z.rows)
		if len(z.rows)/rowSize > maxSpans {
			return fmt.Errorf("%w: more than %d members", ErrUnsupported, maxSpans)
		}
	}
	return nil
}

// place sets the offsets of the entries' content. A file whose chunks do not lie one behind the other,
// or that has holes, gets extents.
func (b *tocBuilder) place() error {
	slices.SortStableFunc(b.chunks, func(x, y tocChunk) int {
		if x.entry != y.entry {
			return x.entry - y.entry
		}
		return cmpInt(x.fileOff, y.fileOff)
	})
	at := 0
	for i := range b.entries {
		e := &b.entries[i]
		if e.Type != TypeReg || e.Size == 0 {
			for at < len(b.chunks) && b.chunks[at].entry == i {
				at++
			}
			continue
		}
		var extents []Extent
		end := int64(0)
		for ; at < len(b.chunks) && b.chunks[at].entry == i; at++ {
			c := &b.chunks[at]
			if c.fileOff < end {
				return fmt.Errorf("%w: chunks of %.200q overlap", ErrInvalid, e.Name)
			}
			end = c.fileOff + c.size
			if n := len(extents); n > 0 {
				if x := &extents[n-1]; x.FileOff+x.Len == c.fileOff && x.Offset+x.Len == c.out {
					x.Len += c.size
					continue
				}
			}
			extents = append(extents, Extent{FileOff: c.fileOff, Offset: c.out, Len: c.size})
		}
		if len(extents) == 1 && extents[0].FileOff == 0 && extents[0].Len == e.Size {
			e.Offset = extents[0].Offset
			continue
		}
		if extents == nil {
			extents = []Extent{}
		}
		e.Sparse = extents
	}
	return nil
}

// numTypes marks entries that are dropped.
const numTypes = TypeFifo + 1

// parseTOC reads a table of contents whose digest has been checked.
func parseTOC(json []byte, format Format, tool string, payload, blobSize int64) (*Ztoc, error) {
	b := &tocBuilder{
		format: format, payload: payload, file: -1,
		unames: make(map[int]string), gnames: make(map[int]string),
	}
	if err := readTOC(bytes.NewReader(json), b.add); err != nil {
		return nil, err
	}
	return b.finish(tool, blobSize)
}

// readRange reads r of a blob.
func readRange(blob io.ReaderAt, r Range) ([]byte, error) {
	if r.Len() < 0 || r.Len() > math.MaxInt32 {
		return nil, fmt.Errorf("%w: range %v", ErrInvalid, r)
	}
	b := make([]byte, r.Len())
	if n, err := blob.ReadAt(b, r.Start); n < len(b) {
		return nil, fmt.Errorf("reading %v: %w", r, ended(err))
	}
	return b, nil
}
