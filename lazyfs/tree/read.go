package tree

import (
	"bytes"

	"github.com/muster-hpc/muster/ztoc"
)

// A Table is a table file in memory, usually mapped. All methods are safe for concurrent use, allocate
// nothing unless they say so, and take only rows that Row or another method gave.
type Table struct {
	rows     []byte
	dirents  []byte
	sorted   []byte
	extents  []byte
	extAttrs []byte
	pool     []byte
	layers   []LayerRef // the only part decoded by Open
	meta     []byte
	totals   Totals
}

// Layers are the layers that extents count on, in the order Build got them. Not to be changed.
func (t *Table) Layers() []LayerRef { return t.layers }

// Meta is what Options.Meta was.
func (t *Table) Meta() []byte { return t.meta }

// Totals counts what the table holds.
func (t *Table) Totals() Totals { return t.totals }

// Len is the number of rows.
func (t *Table) Len() int { return len(t.rows) / rowSize }

// Row is the row of a FUSE node ID, false when this table has no such inode.
func (t *Table) Row(node uint64) (Row, bool) {
	if node == 0 || node > uint64(t.Len()) {
		return 0, false
	}
	return Row(node - 1), true
}

func (t *Table) row(r Row) []byte {
	return t.rows[int(r)*rowSize : int(r)*rowSize+rowSize : int(r)*rowSize+rowSize]
}

// Mode is the mode of r with its type bits.
func (t *Table) Mode(r Row, p Presentation) uint32 { return p.mode(le.Uint32(t.row(r)[rowMode:])) }

// IsDir reports whether r is a directory.
func (t *Table) IsDir(r Row) bool { return le.Uint32(t.row(r)[rowMode:])&modeType == modeDir }

// IsReg reports whether r is a regular file. A device that is shown as an empty file is not.
func (t *Table) IsReg(r Row) bool { return le.Uint32(t.row(r)[rowMode:])&modeType == modeReg }

// Size is st_size of r.
func (t *Table) Size(r Row) int64 { return int64(le.Uint64(t.row(r)[rowLength:])) }

// Parent is the directory that has r's first name; the root's is the root. For directories it is "..".
func (t *Table) Parent(r Row) Row { return Row(le.Uint32(t.row(r)[rowParent:])) }

// Attr is what stat tells of r.
func (t *Table) Attr(r Row, p Presentation) Attr {
	b := t.row(r)
	a := Attr{
		Mode:   le.Uint32(b[rowMode:]),
		Nlink:  le.Uint32(b[rowNlink:]),
		UID:    le.Uint32(b[rowUID:]),
		GID:    le.Uint32(b[rowGID:]),
		Size:   int64(le.Uint64(b[rowLength:])),
		Blocks: int64(le.Uint64(b[rowBlocks:])),
		Mtime:  int64(le.Uint64(b[rowMtime:])),
		Nsec:   le.Uint32(b[rowNsec:]),
	}
	if k := a.Mode & modeType; k == modeChar || k == modeBlock {
		a.Rdev = le.Uint32(b[rowRdev:])
	}
	return p.apply(a)
}

// Dirents is the number of names in directory dir, without . and ..; 0 for anything else.
func (t *Table) Dirents(dir Row) int {
	if !t.IsDir(dir) {
		return 0
	}
	return int(le.Uint32(t.row(dir)[rowCount:]))
}

// Dirent is the name at position pos of directory dir, 0 ≤ pos < Dirents(dir), in readdir order. A
// position never changes, so it can be (part of) the offset that readdir hands out.
func (t *Table) Dirent(dir Row, pos int, p Presentation) Dirent {
	name, r := t.dirent(uint64(le.Uint64(t.row(dir)[rowData:])) + uint64(pos))
	return Dirent{Name: name, Row: r, Mode: p.mode(le.Uint32(t.row(r)[rowMode:])) & modeType}
}

func (t *Table) dirent(i uint64) ([]byte, Row) {
	d := t.dirents[i*direntSize : i*direntSize+direntSize]
	off, n := uint64(le.Uint32(d[direntName:])), uint64(le.Uint32(d[direntLen:]))
	return t.pool[off : off+n : off+n], Row(le.Uint32(d[direntRow:]))
}

// Lookup finds name in directory dir; false when dir is no directory or has no such name. It knows
// nothing of "." and "..".
func (t *Table) Lookup(dir Row, name []byte) (Row, bool) {
	b := t.row(dir)
	if le.Uint32(b[rowMode:])&modeType != modeDir {
		return 0, false
	}
	first, n := le.Uint64(b[rowData:]), uint64(le.Uint32(b[rowCount:]))
	s := t.sorted[first*sortedSize : (first+n)*sortedSize]
	h := hash(name)
	lo, hi := uint64(0), n
	for lo < hi {
		m := (lo + hi) / 2
		e := s[m*sortedSize : m*sortedSize+sortedSize]
		eh := le.Uint32(e[sortedHash:])
		if eh < h {
			lo = m + 1
			continue
		}
		if eh > h {
			hi = m
			continue
		}
		got, r := t.dirent(first + uint64(le.Uint32(e[sortedPos:])))
		switch bytes.Compare(got, name) {
		case 0:
			return r, true
		case -1:
			lo = m + 1
		default:
			hi = m
		}
	}
	return 0, false
}

// Readlink is the target of symbolic link r, nil for anything else. Bytes of the table.
func (t *Table) Readlink(r Row) []byte {
	b := t.row(r)
	if le.Uint32(b[rowMode:])&modeType != modeLink {
		return nil
	}
	off, n := le.Uint64(b[rowData:]), uint64(le.Uint32(b[rowCount:]))
	return t.pool[off : off+n : off+n]
}

// Extent is the run of regular file r that off is in, from off on. A reader of n bytes calls it until
// it has n bytes or gets an Extent of length 0, which is the end of the file.
func (t *Table) Extent(r Row, off int64) Extent {
	b := t.row(r)
	size := int64(le.Uint64(b[rowLength:]))
	if le.Uint32(b[rowMode:])&modeType != modeReg || off < 0 || off >= size {
		return Extent{Layer: -1}
	}
	data, n := le.Uint64(b[rowData:]), le.Uint32(b[rowCount:])
	if n == oneRun {
		return Extent{Layer: int(le.Uint32(b[rowRdev:])), Offset: int64(data) + off, Len: size - off}
	}
	i := t.extentAfter(data, n, off)
	if i == n {
		return Extent{Layer: -1, Len: size - off}
	}
	e := t.extent(data + uint64(i))
	start, length := int64(le.Uint64(e[extentFile:])), int64(le.Uint64(e[extentLen:]))
	if off < start {
		return Extent{Layer: -1, Len: start - off}
	}
	return Extent{
		Layer:  int(le.Uint32(e[extentLayer:])),
		Offset: int64(le.Uint64(e[extentOffset:])) + off - start,
		Len:    start + length - off,
	}
}

func (t *Table) extent(i uint64) []byte { return t.extents[i*extentSize : i*extentSize+extentSize] }

// extentAfter is the first of n extents from first on that ends behind off.
func (t *Table) extentAfter(first uint64, n uint32, off int64) uint32 {
	lo, hi := uint32(0), n
	for lo < hi {
		m := lo + (hi-lo)/2
		e := t.extent(first + uint64(m))
		if int64(le.Uint64(e[extentFile:]))+int64(le.Uint64(e[extentLen:])) > off {
			hi = m
		} else {
			lo = m + 1
		}
	}
	return lo
}

// SeekData is the first offset of r at or behind off that has data (SEEK_DATA), ErrNoData when there is
// none, in particular when off is at or behind the end of the file.
func (t *Table) SeekData(r Row, off int64) (int64, error) {
	for {
		e := t.Extent(r, off)
		switch {
		case e.Len == 0:
			return 0, ErrNoData
		case e.Layer >= 0:
			return off, nil
		}
		off += e.Len
	}
}

// SeekHole is the first offset of r at or behind off that is in a hole (SEEK_HOLE); the end of the file
// counts as one. ErrNoData when off is at or behind the end of the file.
func (t *Table) SeekHole(r Row, off int64) (int64, error) {
	if off < 0 || off >= t.Size(r) || !t.IsReg(r) {
		return 0, ErrNoData
	}
	for {
		e := t.Extent(r, off)
		if e.Len == 0 || e.Layer < 0 {
			return off, nil
		}
		off += e.Len
	}
}

// HasXattrs reports whether r has extended attributes under p; nearly always false, and cheap. False means
// that listxattr is empty and every getxattr ENODATA.
func (t *Table) HasXattrs(r Row, p Presentation) bool {
	if le.Uint32(t.row(r)[rowXattrs:]) > 0 {
		for i := range t.xattrs(r) {
			if n, _ := t.xattr(r, i); t.shows(r, n, p) {
				return true
			}
		}
	}
	return t.hasOwner(r, p)
}

// Getxattr is the value of extended attribute name of r, false when it has none (ENODATA). Bytes of the
// table, but for user.rootlesscontainers under a user's presentation, which is allocated.
func (t *Table) Getxattr(r Row, name []byte, p Presentation) ([]byte, bool) {
	for i := range t.xattrs(r) {
		if n, v := t.xattr(r, i); bytes.Equal(n, name) && t.shows(r, n, p) {
			return v, true
		}
	}
	if t.hasOwner(r, p) && bytes.Equal(name, ownerXattr) {
		return t.owner(r), true
	}
	return nil, false
}

// AppendXattrNames appends the names of r's extended attributes, each ended by a NUL, as listxattr
// returns them.
func (t *Table) AppendXattrNames(dst []byte, r Row, p Presentation) []byte {
	for i := range t.xattrs(r) {
		if n, _ := t.xattr(r, i); t.shows(r, n, p) {
			dst = append(append(dst, n...), 0)
		}
	}
	if t.hasOwner(r, p) {
		dst = append(append(dst, ownerXattr...), 0)
	}
	return dst
}

func (t *Table) xattrs(r Row) int { return int(le.Uint32(t.row(r)[rowXattrs:])) }

// xattr is extended attribute i of r, whoever looks.
func (t *Table) xattr(r Row, i int) (name, value []byte) {
	x := t.extAttrs[(uint64(le.Uint32(t.row(r)[rowXattr:]))+uint64(i))*xattrSize:]
	n, nl := uint64(le.Uint32(x[xattrName:])), uint64(le.Uint32(x[xattrNameLen:]))
	v, vl := uint64(le.Uint32(x[xattrValue:])), uint64(le.Uint32(x[xattrLen:]))
	return t.pool[n : n+nl : n+nl], t.pool[v : v+vl : v+vl]
}

// AppendPath appends the path of r's first name, from the root, beginning with "/".
func (t *Table) AppendPath(dst []byte, r Row) []byte {
	if r == Root {
		return append(dst, '/')
	}
	n := 0
	for at := r; at != Root; at = t.Parent(at) {
		n += 1 + int(le.Uint32(t.dirents[uint64(le.Uint32(t.row(at)[rowName:]))*direntSize+direntLen:]))
	}
	dst = append(dst, make([]byte, n)...)
	end := len(dst)
	for at := r; at != Root; at = t.Parent(at) {
		name, _ := t.dirent(uint64(le.Uint32(t.row(at)[rowName:])))
		end -= copy(dst[end-len(name):], name) + 1
		dst[end] = '/'
	}
	return dst
}

// layerRef is what the caller of Build said of layer i.
func (t *Table) layerRef(b []byte) LayerRef {
	str := func(at int) string {
		off, n := le.Uint32(b[at:]), le.Uint32(b[at+4:])
		return string(t.pool[off : off+n])
	}
	return LayerRef{
		Blob: ztoc.BlobRef{Digest: ztoc.Digest(str(layerDigest)), Size: int64(le.Uint64(b[layerBlobSize:]))},
		Ztoc: str(layerZtoc),
		Size: int64(le.Uint64(b[layerInflated:])),
	}
}
