package tree

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"math"
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// Open checks that b, the bytes of a table file, is whole and that every number in it that an accessor
// relies on is in bounds, and returns the table over it, which keeps b. It reads all of b once.
// Errors are ErrVersion or ErrCorrupt.
func Open(b []byte) (*Table, error) {
	if len(b) < headerSize || string(b[:len(magic)]) != magic {
		return nil, corrupt("not a table file")
	}
	if v := le.Uint32(b[headVersion:]); v != version {
		return nil, fmt.Errorf("%w: %d, this muster reads %d", ErrVersion, v, version)
	}
	var head [headerSize]byte
	copy(head[:], b)
	le.PutUint32(head[headSum:], 0)
	if crc32.Checksum(head[:], castagnoli) != le.Uint32(b[headSum:]) {
		return nil, corrupt("header does not match its checksum")
	}
	if le.Uint64(b[headSize:]) != uint64(len(b)) {
		return nil, corrupt("%d bytes instead of %d", len(b), le.Uint64(b[headSize:]))
	}
	var sec [numSections][]byte
	at := uint64(headerSize)
	for i := range sec {
		h := b[headSections+i*sectionSize:]
		off, n := le.Uint64(h), le.Uint64(h[8:])
		if off != at || n > uint64(len(b))-at || n%recordSize[i] != 0 {
			return nil, corrupt("section %d is out of place", i)
		}
		sec[i] = b[off : off+n : off+n]
		if crc32.Checksum(sec[i], castagnoli) != le.Uint32(h[16:]) {
			return nil, corrupt("section %d does not match its checksum", i)
		}
		at = align(off + n)
		if at > uint64(len(b)) {
			return nil, corrupt("section %d is cut", i)
		}
	}
	if at != uint64(len(b)) {
		return nil, corrupt("bytes behind the last section")
	}
	t := &Table{
		rows: sec[secRows], dirents: sec[secDirents], sorted: sec[secSorted],
		extents: sec[secExtents], extAttrs: sec[secXattrs], pool: sec[secPool],
	}
	if err := t.checkHeader(b, sec[secLayers]); err != nil {
		return nil, err
	}
	if err := t.checkRows(); err != nil {
		return nil, err
	}
	if err := t.checkNames(); err != nil {
		return nil, err
	}
	return t, nil
}

// recordSize is the size of a section's records.
var recordSize = [numSections]uint64{layerSize, rowSize, direntSize, sortedSize, extentSize, xattrSize, 1}

// inPool reports whether n bytes at off are in the pool.
func (t *Table) inPool(off, n uint64) bool {
	return off <= uint64(len(t.pool)) && n <= uint64(len(t.pool))-off
}

func (t *Table) checkHeader(b, layers []byte) error {
	if len(layers)/layerSize > maxLayers {
		return corrupt("too many layers")
	}
	for ; len(layers) > 0; layers = layers[layerSize:] {
		for _, at := range []int{layerDigest, layerZtoc} {
			n := uint64(le.Uint32(layers[at+4:]))
			if n > maxRef || !t.inPool(uint64(le.Uint32(layers[at:])), n) {
				return corrupt("layer %d has no name", len(t.layers))
			}
		}
		l := t.layerRef(layers)
		if l.Blob.Size < 0 || l.Size < 0 {
			return corrupt("layer %d has a negative size", len(t.layers))
		}
		t.layers = append(t.layers, l)
	}
	off, n := uint64(le.Uint32(b[headMeta:])), uint64(le.Uint32(b[headMeta+4:]))
	if n > maxMeta || !t.inPool(off, n) {
		return corrupt("meta is out of place")
	}
	t.meta = t.pool[off : off+n : off+n]
	for x := t.extAttrs; len(x) > 0; x = x[xattrSize:] {
		n, v := uint64(le.Uint32(x[xattrNameLen:])), uint64(le.Uint32(x[xattrLen:]))
		if n == 0 || n > maxName || !t.inPool(uint64(le.Uint32(x[xattrName:])), n) ||
			v > maxXattr || !t.inPool(uint64(le.Uint32(x[xattrValue:])), v) {
			return corrupt("an xattr is out of place")
		}
	}
	t.totals = Totals{
		Inodes:  int64(t.Len()),
		Dirents: int64(len(t.dirents) / direntSize),
		Bytes:   int64(le.Uint64(b[headBytes:])),
		Blocks:  int64(le.Uint64(b[headBlocks:])),
	}
	return nil
}

// checkRows checks each inode by itself: its type, its numbers, and what it points at. Directories and files
// in several runs divide dirents and extents among them in the order of their rows, so that no two
// share any, and all checking is linear.
func (t *Table) checkRows() error {
	rows, names := uint64(t.Len()), uint64(len(t.dirents)/direntSize)
	if rows == 0 || rows > maxRows || !t.IsDir(Root) || len(t.sorted)/sortedSize != int(names) {
		return corrupt("no root, or names without order")
	}
	nextName, nextExtent := uint64(0), uint64(0)
	for r := uint64(0); r < rows; r++ {
		b := t.row(Row(r))
		mode := le.Uint32(b[rowMode:])
		size, data, count := le.Uint64(b[rowLength:]), le.Uint64(b[rowData:]), uint64(le.Uint32(b[rowCount:]))
		ok := mode&^(modeType|modePerm) == 0 && size <= maxSize && le.Uint64(b[rowBlocks:]) <= maxSize &&
			le.Uint32(b[rowNsec:]) < 1e9 && le.Uint16(b[rowFlags:])&^flagImplied == 0 &&
			le.Uint32(b[rowXattrs:]) <= maxXattrs &&
			uint64(le.Uint32(b[rowXattr:]))+uint64(le.Uint32(b[rowXattrs:])) <= uint64(len(t.extAttrs)/xattrSize)
		switch mode & modeType {
		case modeDir:
			ok = ok && data == nextName && count <= names-nextName
			nextName += count
		case modeLink:
			ok = ok && count > 0 && count <= maxTarget && count == size && t.inPool(data, count)
		case modeReg:
			if count == oneRun {
				ok = ok && size > 0 && t.inLayer(le.Uint32(b[rowRdev:]), data, size)
			} else {
				ok = ok && data == nextExtent && t.checkExtents(nextExtent, count, size)
				nextExtent += count
			}
		case modeChar, modeBlock:
			ok = ok && size == 0
			t.totals.Devices++
		case modeFifo:
			ok = ok && size == 0
		default:
			ok = false
		}
		if !ok {
			return corrupt("inode %d", r)
		}
		// What leads here. Parents come before their children, so every path ends at the root.
		parent, at := uint64(le.Uint32(b[rowParent:])), uint64(le.Uint32(b[rowName:]))
		if r == 0 {
			ok = parent == 0 && le.Uint16(b[rowDepth:]) == 0
		} else {
			ok = parent < r && at < names && t.IsDir(Row(parent))
			if ok {
				p := t.row(Row(parent))
				ok = at-le.Uint64(p[rowData:]) < uint64(le.Uint32(p[rowCount:])) &&
					uint64(le.Uint32(t.dirents[at*direntSize+direntRow:])) == r &&
					le.Uint16(b[rowDepth:]) == le.Uint16(p[rowDepth:])+1 && le.Uint16(b[rowDepth:]) <= maxDepth
			}
		}
		if !ok {
			return corrupt("inode %d is in no directory", r)
		}
	}
	if nextName != names || nextExtent != uint64(len(t.extents)/extentSize) {
		return corrupt("names or extents that belong to nobody")
	}
	return nil
}

// inLayer reports whether size bytes at off are in a layer.
func (t *Table) inLayer(layer uint32, off, size uint64) bool {
	if uint64(layer) >= uint64(len(t.layers)) {
		return false
	}
	end := uint64(t.layers[layer].Size)
	if end == 0 {
		end = math.MaxInt64
	}
	return off <= end && size <= end-off
}

// checkExtents checks the extents of one file: in order, apart, inside the file and their layer.
func (t *Table) checkExtents(first, count, size uint64) bool {
	if count > uint64(len(t.extents)/extentSize)-first {
		return false
	}
	at := uint64(0)
	for i := first; i < first+count; i++ {
		e := t.extent(i)
		off, n := le.Uint64(e[extentFile:]), le.Uint64(e[extentLen:])
		if off < at || off > size || n == 0 || n > size-off ||
			!t.inLayer(le.Uint32(e[extentLayer:]), le.Uint64(e[extentOffset:]), n) {
			return false
		}
		at = off + n
	}
	return true
}

// checkNames checks the names of each directory, and that the order for look-ups has each of them once.
func (t *Table) checkNames() error {
	rows := uint64(t.Len())
	for d := Row(0); uint64(d) < rows; d++ {
		if !t.IsDir(d) {
			continue
		}
		first, n := le.Uint64(t.row(d)[rowData:]), uint64(le.Uint32(t.row(d)[rowCount:]))
		for i := first; i < first+n; i++ {
			e := t.dirents[i*direntSize:]
			off, size, r := uint64(le.Uint32(e[direntName:])), uint64(le.Uint32(e[direntLen:])), uint64(le.Uint32(e[direntRow:]))
			if size == 0 || size > maxName || !t.inPool(off, size) || r == 0 || r >= rows {
				return corrupt("name %d", i)
			}
			name := t.pool[off : off+size]
			if bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0 || string(name) == "." || string(name) == ".." {
				return corrupt("name %d is none", i)
			}
			// A directory has one name, the one it knows of.
			if b := t.row(Row(r)); le.Uint32(b[rowMode:])&modeType == modeDir && uint64(le.Uint32(b[rowName:])) != i {
				return corrupt("directory %d has two names", r)
			}
		}
		var last []byte
		var lastHash uint32
		for i := first; i < first+n; i++ {
			s := t.sorted[i*sortedSize:]
			h, pos := le.Uint32(s[sortedHash:]), uint64(le.Uint32(s[sortedPos:]))
			if pos >= n {
				return corrupt("order of directory %d", d)
			}
			name, _ := t.dirent(first + pos)
			if h != hash(name) || h < lastHash || (i > first && h == lastHash && bytes.Compare(last, name) >= 0) {
				return corrupt("order of directory %d", d)
			}
			last, lastHash = name, h
		}
	}
	return nil
}
