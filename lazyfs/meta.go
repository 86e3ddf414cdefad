package lazyfs

import (
	"encoding/binary"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs/tree"
)

// Everything here is arithmetic on the mapped table: no lock, no wait, no allocation.

func (s *Server) attr(a *fuse.Attr, row tree.Row) {
	t := s.table.Attr(row, s.look)
	*a = fuse.Attr{
		Ino:  row.Node(),
		Size: uint64(t.Size), Blocks: uint64(t.Blocks),
		Atime: uint64(t.Mtime), Mtime: uint64(t.Mtime), Ctime: uint64(t.Mtime),
		Atimensec: t.Nsec, Mtimensec: t.Nsec, Ctimensec: t.Nsec,
		Mode: t.Mode, Nlink: t.Nlink,
		Owner:   fuse.Owner{Uid: t.UID, Gid: t.GID},
		Rdev:    t.Rdev,
		Blksize: 4096,
	}
}

func (s *Server) entry(e *fuse.EntryOut, row tree.Row) {
	e.NodeId, e.Generation = row.Node(), 0
	e.EntryValid, e.AttrValid = forever, forever
	e.EntryValidNsec, e.AttrValidNsec = 0, 0
	s.attr(&e.Attr, row)
}

// grow is room for n bytes in w.buf.
func (w *scratch) grow(n int) []byte {
	if cap(w.buf) < n {
		w.buf = make([]byte, n)
	}
	w.buf = w.buf[:n]
	return w.buf
}

func (s *Server) lookup(w *scratch, dir tree.Row, name []byte) ([]byte, syscall.Errno) {
	b := w.grow(entryOutSize)
	e := (*fuse.EntryOut)(unsafe.Pointer(unsafe.SliceData(b)))
	row, ok := s.table.Lookup(dir, name)
	if !ok {
		switch string(name) { // what an NFS server asks for
		case ".":
			row, ok = dir, true
		case "..":
			row, ok = s.table.Parent(dir), true
		}
	}
	if ok {
		s.entry(e, row)
		return b, 0
	}
	if len(name) > 255 {
		return nil, syscall.ENAMETOOLONG
	}
	if !s.table.IsDir(dir) {
		return nil, syscall.ENOTDIR
	}
	*e = fuse.EntryOut{EntryValid: forever} // node 0: the kernel may remember that there is none
	return b, 0
}

func (s *Server) getattr(w *scratch, row tree.Row) ([]byte, syscall.Errno) {
	b := w.grow(int(unsafe.Sizeof(fuse.AttrOut{})))
	a := (*fuse.AttrOut)(unsafe.Pointer(unsafe.SliceData(b)))
	*a = fuse.AttrOut{AttrValid: forever}
	s.attr(&a.Attr, row)
	return b, 0
}

// readdir fills size bytes with names from offset off on. Offset 0 is ".", 1 "..", 2+i the name at
// position i of the table, so an offset is good for ever, with any server of this table.
func (s *Server) readdir(w *scratch, dir tree.Row, off uint64, size int, plus bool) ([]byte, syscall.Errno) {
	if !s.table.IsDir(dir) {
		return nil, syscall.ENOTDIR
	}
	size = min(size, 1<<20)
	if cap(w.buf) < size {
		w.buf = make([]byte, 0, size)
	}
	b := w.buf[:0]
	head := 0
	if plus {
		head = entryOutSize
	}
	n := uint64(s.table.Dirents(dir))
	for ; off < n+2; off++ {
		var d tree.Dirent
		switch off {
		case 0:
			d = tree.Dirent{Name: dot, Row: dir, Mode: unix.S_IFDIR}
		case 1:
			d = tree.Dirent{Name: dotdot, Row: s.table.Parent(dir), Mode: unix.S_IFDIR}
		default:
			d = s.table.Dirent(dir, int(off-2), s.look)
		}
		if len(b)+head+direntLen(d.Name) > size {
			break
		}
		if plus {
			var e fuse.EntryOut
			if off >= 2 {
				s.entry(&e, d.Row)
			}
			b = append(b, bytesOf(&e)...)
		}
		b = appendDirent(b, d.Row.Node(), off+1, d.Mode, d.Name)
	}
	w.buf = b
	return b, 0
}

var dot, dotdot = []byte("."), []byte("..")

func (s *Server) getxattr(w *scratch, row tree.Row, name []byte, size int) ([]byte, syscall.Errno) {
	v, ok := s.table.Getxattr(row, name, s.look)
	if !ok {
		return nil, syscall.ENODATA
	}
	return w.sized(v, size)
}

func (s *Server) listxattr(w *scratch, row tree.Row, size int) ([]byte, syscall.Errno) {
	return w.sized(s.table.AppendXattrNames(nil, row, s.look), size)
}

// sized answers an xattr request: the length alone when the caller has no room yet, or the bytes.
func (w *scratch) sized(v []byte, size int) ([]byte, syscall.Errno) {
	switch {
	case size == 0:
		b := w.grow(8)
		binary.NativeEndian.PutUint64(b, uint64(len(v))) // length, padding
		if len(v) > 1<<31 {
			return nil, syscall.E2BIG
		}
		return b, 0
	case len(v) > size:
		return nil, syscall.ERANGE
	}
	return v, 0
}

func (s *Server) lseek(w *scratch, row tree.Row, off int64, whence uint32) ([]byte, syscall.Errno) {
	var at int64
	var err error
	switch whence {
	case unix.SEEK_DATA:
		at, err = s.table.SeekData(row, off)
	case unix.SEEK_HOLE:
		at, err = s.table.SeekHole(row, off)
	default:
		return nil, syscall.EINVAL
	}
	if err != nil {
		return nil, syscall.ENXIO
	}
	b := w.grow(8)
	binary.NativeEndian.PutUint64(b, uint64(at))
	return b, 0
}

func (s *Server) statfs(w *scratch) ([]byte, syscall.Errno) {
	t := s.table.Totals()
	out := fuse.StatfsOut{
		Blocks: uint64(t.Blocks+7) / 8, Files: uint64(t.Inodes),
		Bsize: 4096, Frsize: 4096, NameLen: 255,
	}
	return append(w.buf[:0], bytesOf(&out)...), 0
}
