package tree

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/muster-hpc/muster/ztoc"
)

var errTooLarge = errors.New("names and xattrs of the image need more than 4 GiB")

// none marks an inode that has no row yet.
const none = math.MaxUint32

// An encoder lays a merged tree out as the sections of a table.
type encoder struct {
	m    *merge
	sec  [numSections][]byte
	have map[string]uint32 // strings of the pool
	sets map[string]uint32 // xattrs that several inodes share: encoded names and values → first xattr

	rowOf []uint32 // by inode
	order []uint64 // by name: where in the layers its data is, see keys

	dirs   []uint32 // names of directories in the order of their rows
	kids   []kid    // scratch
	sorted []uint64 // scratch
	runs   []ztoc.Extent
	totals Totals
}

type kid struct {
	order uint64
	name  uint32
}

// keys computes for each name where in the layers its data lies: for a file the place of its entry, for a
// directory that of the first data beneath it, so that walking and reading the tree goes through the
// layers from front to back. What has no data anywhere stands where its own entry stands.
func (m *merge) keys() []uint64 {
	own := func(i *inode) uint64 {
		if i.entry == nil {
			return math.MaxUint64
		}
		return uint64(i.layer)<<32 | uint64(i.seq)
	}
	order := make([]uint64, len(m.names))
	for n := range order {
		order[n] = math.MaxUint64
	}
	for n := len(m.names) - 1; n >= 0; n-- { // a directory is older than what it has
		d := &m.names[n]
		if d.inode == gone {
			continue
		}
		i := &m.inodes[d.inode]
		if i.mode&modeType == modeReg && i.entry.Size > 0 {
			order[n] = own(i)
		}
		if n > 0 {
			order[d.parent] = min(order[d.parent], order[n])
		}
	}
	for n := range order {
		if i := m.names[n].inode; i != gone && order[n] == math.MaxUint64 {
			order[n] = own(&m.inodes[i])
		}
	}
	return order
}

func (c *encoder) str(s string) (uint32, error) {
	if off, ok := c.have[s]; ok {
		return off, nil
	}
	off := len(c.sec[secPool])
	if off+len(s) > math.MaxUint32 {
		return 0, errTooLarge
	}
	c.sec[secPool] = append(c.sec[secPool], s...)
	c.have[s] = uint32(off)
	return uint32(off), nil
}

// newRow gives inode ino the next row, which fill completes later.
func (c *encoder) newRow(ino uint32) {
	c.rowOf[ino] = uint32(len(c.sec[secRows]) / rowSize)
	c.sec[secRows] = append(c.sec[secRows], make([]byte, rowSize)...)
}

// tree writes rows, names, extents and xattrs: breadth first, so that the inodes of one directory lie
// together, and the directories' names in the order of their rows.
func (c *encoder) tree() error {
	m := c.m
	c.order = m.keys()
	c.rowOf = make([]uint32, len(m.inodes))
	for i := range c.rowOf {
		c.rowOf[i] = none
	}
	c.sec[secRows] = make([]byte, 0, m.live*rowSize)
	c.sec[secDirents] = make([]byte, 0, m.live*direntSize)
	c.sec[secSorted] = make([]byte, 0, m.live*sortedSize)
	c.newRow(m.names[0].inode)
	c.dirs = append(c.dirs, 0)
	for k := 0; k < len(c.dirs); k++ {
		if err := c.directory(c.dirs[k]); err != nil {
			return err
		}
	}
	return nil
}

// directory writes the names of directory d, and the rows of what they lead to.
func (c *encoder) directory(d uint32) error {
	m := c.m
	c.kids = c.kids[:0]
	for n := m.names[d].child; n != 0; n = m.names[n].next {
		c.kids = append(c.kids, kid{c.order[n], n})
	}
	slices.SortFunc(c.kids, func(a, b kid) int {
		switch {
		case a.order < b.order:
			return -1
		case a.order > b.order:
			return 1
		}
		return strings.Compare(m.names[a.name].text, m.names[b.name].text)
	})
	first := len(c.sec[secDirents]) / direntSize
	c.sorted = c.sorted[:0]
	subdirs := uint32(0)
	for pos, k := range c.kids {
		n := &m.names[k.name]
		if c.rowOf[n.inode] == none {
			c.newRow(n.inode)
			if err := c.fill(n, c.rowOf[m.names[d].inode], uint32(first+pos)); err != nil {
				return err
			}
		}
		if m.inodes[n.inode].mode&modeType == modeDir {
			subdirs++
			c.dirs = append(c.dirs, k.name)
		}
		off, err := c.str(n.text)
		if err != nil {
			return err
		}
		c.sec[secDirents] = le.AppendUint32(c.sec[secDirents], off)
		c.sec[secDirents] = le.AppendUint32(c.sec[secDirents], c.rowOf[n.inode])
		c.sec[secDirents] = le.AppendUint32(c.sec[secDirents], uint32(len(n.text)))
		c.sorted = append(c.sorted, uint64(hash(n.text))<<32|uint64(pos))
	}
	slices.SortFunc(c.sorted, func(a, b uint64) int {
		if a>>32 != b>>32 {
			if a < b {
				return -1
			}
			return 1
		}
		return strings.Compare(m.names[c.kids[uint32(a)].name].text, m.names[c.kids[uint32(b)].name].text)
	})
	for _, s := range c.sorted {
		c.sec[secSorted] = le.AppendUint32(c.sec[secSorted], uint32(s>>32))
		c.sec[secSorted] = le.AppendUint32(c.sec[secSorted], uint32(s))
	}
	if d == 0 {
		if err := c.fill(&m.names[0], 0, 0); err != nil {
			return err
		}
	}
	row := c.sec[secRows][int(c.rowOf[m.names[d].inode])*rowSize:]
	le.PutUint32(row[rowNlink:], 2+subdirs)
	le.PutUint64(row[rowData:], uint64(first))
	le.PutUint32(row[rowCount:], uint32(len(c.kids)))
	c.totals.Dirents += int64(len(c.kids))
	return nil
}

// fill completes the row of n's inode; a directory's names and link count come when it is its turn.
func (c *encoder) fill(n *name, parent, dirent uint32) error {
	i := &c.m.inodes[n.inode]
	e := i.entry
	r := c.sec[secRows][int(c.rowOf[n.inode])*rowSize:][:rowSize]
	le.PutUint32(r[rowMode:], i.mode)
	le.PutUint32(r[rowNlink:], i.links)
	le.PutUint32(r[rowGID:], i.group())
	le.PutUint32(r[rowParent:], parent)
	le.PutUint32(r[rowName:], dirent)
	le.PutUint16(r[rowDepth:], n.depth)
	if e == nil {
		le.PutUint16(r[rowFlags:], flagImplied)
	} else {
		le.PutUint32(r[rowUID:], id(e.UID))
		if !e.ModTime.IsZero() {
			le.PutUint64(r[rowMtime:], uint64(e.ModTime.Unix()))
			le.PutUint32(r[rowNsec:], uint32(e.ModTime.Nanosecond()))
		}
		first, count, err := c.xattrs(xattrsOf(e, i.mode&modeType))
		if err != nil {
			return err
		}
		le.PutUint32(r[rowXattr:], first)
		le.PutUint32(r[rowXattrs:], count)
	}
	size, blocks := int64(0), int64(0)
	switch i.mode & modeType {
	case modeDir:
		size, blocks = dirBytes, dirBytes/blockUnit
	case modeLink:
		off, err := c.str(e.Linkname)
		if err != nil {
			return err
		}
		size = int64(len(e.Linkname))
		le.PutUint64(r[rowData:], uint64(off))
		le.PutUint32(r[rowCount:], uint32(size))
	case modeChar, modeBlock:
		le.PutUint32(r[rowRdev:], device(e.Devmajor, e.Devminor))
		c.totals.Devices++
	case modeReg:
		size, blocks = e.Size, c.content(r, i)
		c.totals.Bytes += size
	}
	le.PutUint64(r[rowLength:], uint64(size))
	le.PutUint64(r[rowBlocks:], uint64(blocks))
	c.totals.Inodes++
	c.totals.Blocks += blocks
	return nil
}

// content writes where the data of regular file i lies and returns its blocks.
func (c *encoder) content(r []byte, i *inode) int64 {
	c.runs = extents(c.runs[:0], i.entry)
	le.PutUint64(r[rowData:], uint64(len(c.sec[secExtents])/extentSize))
	if len(c.runs) == 1 && c.runs[0].Len == i.entry.Size {
		le.PutUint64(r[rowData:], uint64(c.runs[0].Offset))
		le.PutUint32(r[rowRdev:], uint32(i.layer))
		le.PutUint32(r[rowCount:], oneRun)
		return blocks(i.entry.Size)
	}
	data := int64(0)
	for _, x := range c.runs {
		b := c.sec[secExtents]
		b = le.AppendUint64(b, uint64(x.FileOff))
		b = le.AppendUint64(b, uint64(x.Offset))
		b = le.AppendUint64(b, uint64(x.Len))
		b = le.AppendUint64(b, uint64(i.layer))
		c.sec[secExtents] = b
		data += x.Len
	}
	le.PutUint32(r[rowCount:], uint32(len(c.runs)))
	return blocks(data)
}

// blocks is how many units of 512 bytes n bytes of data take on a file system with 4 KiB blocks.
func blocks(n int64) int64 { return (n + clusterSize - 1) / clusterSize * (clusterSize / blockUnit) }

// xattrs writes a set of xattrs, or finds the same one written before.
func (c *encoder) xattrs(xs []xattr) (first, count uint32, err error) {
	if len(xs) == 0 {
		return 0, 0, nil
	}
	var b []byte
	for _, x := range xs {
		for _, s := range []string{x.name, x.value} {
			off, err := c.str(s)
			if err != nil {
				return 0, 0, err
			}
			b = le.AppendUint32(b, off)
			b = le.AppendUint32(b, uint32(len(s)))
		}
	}
	if first, ok := c.sets[string(b)]; ok { // equal strings have equal offsets
		return first, uint32(len(xs)), nil
	}
	first = uint32(len(c.sec[secXattrs]) / xattrSize)
	c.sets[string(b)] = first
	c.sec[secXattrs] = append(c.sec[secXattrs], b...)
	return first, uint32(len(xs)), nil
}

// layers writes what the table says of its layers.
func (c *encoder) layers(layers []Layer) error {
	for i, l := range layers {
		if l.Size < 0 || l.Blob.Size < 0 || len(l.Blob.Digest) > maxRef || len(l.Ztoc) > maxRef {
			return fmt.Errorf("layer %d: no possible reference", i)
		}
		b := c.sec[secLayers]
		for _, s := range []string{string(l.Blob.Digest), l.Ztoc} {
			off, err := c.str(s)
			if err != nil {
				return err
			}
			b = le.AppendUint32(b, off)
			b = le.AppendUint32(b, uint32(len(s)))
		}
		b = le.AppendUint64(b, uint64(l.Blob.Size))
		b = le.AppendUint64(b, uint64(l.Size))
		c.sec[secLayers] = b
	}
	return nil
}

// write puts the header in front of the sections and writes all of it.
func (c *encoder) write(w io.Writer, meta []byte) (int64, error) {
	off, err := c.str(string(meta))
	if err != nil {
		return 0, err
	}
	head := make([]byte, headerSize)
	copy(head, magic)
	le.PutUint32(head[headVersion:], version)
	le.PutUint32(head[headMeta:], off)
	le.PutUint32(head[headMeta+4:], uint32(len(meta)))
	le.PutUint64(head[headBytes:], uint64(c.totals.Bytes))
	le.PutUint64(head[headBlocks:], uint64(c.totals.Blocks))
	at := uint64(headerSize)
	for i, s := range c.sec {
		h := head[headSections+i*sectionSize:]
		le.PutUint64(h, at)
		le.PutUint64(h[8:], uint64(len(s)))
		le.PutUint32(h[16:], crc32.Checksum(s, castagnoli))
		at = align(at + uint64(len(s)))
	}
	le.PutUint64(head[headSize:], at)
	le.PutUint32(head[headSum:], crc32.Checksum(head, castagnoli))
	if _, err := w.Write(head); err != nil {
		return 0, err
	}
	for _, s := range c.sec {
		if _, err := w.Write(s); err != nil {
			return 0, err
		}
		if n := align(uint64(len(s))) - uint64(len(s)); n > 0 {
			if _, err := w.Write(bytes.Repeat([]byte{0}, int(n))); err != nil {
				return 0, err
			}
		}
	}
	return int64(at), nil
}

// align rounds up to where a section may begin.
func align(n uint64) uint64 { return (n + 7) &^ 7 }
