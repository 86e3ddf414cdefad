package ztoc

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

const tarBlock = 512

func alignBlock(n int64) int64 { return (n + tarBlock - 1) &^ (tarBlock - 1) }

// A tape is the inflated layer as the tar reader sees it. It counts, it can skip without copying, and
// it keeps the raw bytes of the headers that the tar reader swallows.
type tape struct {
	next func() ([]byte, error) // as source.next
	end  error                  // why there is no more: io.EOF, or what next said; nil as long as there may be

	cur    []byte // what is left of next's last
	pos    int64  // its offset in the inflated layer
	header []byte
	from   int64 // bytes from this offset on are kept in header, while keep
	keep   bool
}

func (t *tape) fill() bool {
	for len(t.cur) == 0 {
		if t.end != nil {
			return false
		}
		t.cur, t.end = t.next()
	}
	return true
}

// skip passes over the first n bytes of cur.
func (t *tape) skip(n int) {
	t.cur = t.cur[n:]
	t.pos += int64(n)
}

func (t *tape) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if !t.fill() {
		return 0, io.EOF
	}
	n := copy(p, t.cur)
	if t.keep && t.pos+int64(n) > t.from {
		t.header = append(t.header, p[max(0, t.from-t.pos):n]...)
	}
	t.skip(n)
	return n, nil
}

// Seek skips ahead; it is what archive/tar asks for to get over the content of a file.
func (t *tape) Seek(n int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || n < 0 {
		return 0, fmt.Errorf("%w: seeking backwards in a stream", ErrUnsupported)
	}
	for n > 0 {
		if !t.fill() {
			return 0, io.ErrUnexpectedEOF
		}
		m := min(n, int64(len(t.cur)))
		t.skip(int(m))
		n -= m
	}
	return t.pos, nil
}

// drain reads to the end.
func (t *tape) drain() {
	for t.fill() {
		t.skip(len(t.cur))
	}
}

// walkTar reads the archive on t and gives each of its entries to add. It returns where the tar
// reader stopped; what follows there is read by t.drain.
func walkTar(t *tape, add func(*Entry) error) (end int64, err error) {
	tr := tar.NewReader(t)
	t.keep = true
	for n := 0; ; n++ {
		t.header = t.header[:0]
		hdr, err := tr.Next()
		if err == io.EOF {
			t.keep = false
			return t.pos, nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return t.pos, fmt.Errorf("%w: tar header behind entry %d, at %d of the inflated layer: %w", ErrInvalid, n, t.pos, err)
		}
		e, physical, err := tarEntry(hdr, t.header, t.pos)
		if err != nil {
			return t.pos, fmt.Errorf("tar entry %d, %.200q: %w", n, hdr.Name, err)
		}
		if e != nil {
			if err := add(e); err != nil {
				return t.pos, err
			}
		}
		// The next header starts behind this file's data. Headers are kept from there on, so the
		// bytes that the tar reader reads to get over the data are not.
		t.from = alignBlock(t.pos + physical)
	}
}

var tarTypes = map[byte]EntryType{
	tar.TypeReg: TypeReg, tar.TypeLink: TypeHardlink, tar.TypeSymlink: TypeSymlink, tar.TypeChar: TypeChar,
	tar.TypeBlock: TypeBlock, tar.TypeDir: TypeDir, tar.TypeFifo: TypeFifo,
	tar.TypeCont: TypeReg, tar.TypeGNUSparse: TypeReg,
	'D': TypeDir, // GNU's directory with a list of names, which is its content
}

// tarEntry makes an entry of a header, of the raw bytes it was read from, and of where its data
// starts. physical is how many bytes of data follow. Headers that make no file (a global PAX header, a
// volume label, the continuation of a file from another volume) give a nil entry. Types that POSIX
// leaves open are regular files, as POSIX wants it.
func tarEntry(hdr *tar.Header, raw []byte, data int64) (e *Entry, physical int64, err error) {
	switch hdr.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil, 0, nil
	case 'V', 'M', 'N':
		return nil, hdr.Size, nil
	}
	typ, known := tarTypes[hdr.Typeflag]
	if !known {
		typ = TypeReg
	}
	e = &Entry{
		Name: hdr.Name, Type: typ, Linkname: hdr.Linkname, Offset: data, Size: hdr.Size, Mode: hdr.Mode,
		UID: hdr.Uid, GID: hdr.Gid, Uname: hdr.Uname, Gname: hdr.Gname, ModTime: hdr.ModTime.UTC(),
		Devmajor: hdr.Devmajor, Devminor: hdr.Devminor, PAX: sortedRecords(hdr.PAXRecords),
	}
	switch hdr.Typeflag {
	case tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo:
		// No data follows, whatever the size says: that is how archive/tar, and so every tool of the
		// container world, reads them.
		e.Size = 0
	default:
		physical = hdr.Size
	}
	if kind := sparseKind(hdr); kind != notSparse {
		if physical, err = sparseExtents(e, kind, hdr, raw, data); err != nil {
			return nil, 0, err
		}
	}
	if e.Size < 0 || physical < 0 || physical > 1<<62 {
		return nil, 0, fmt.Errorf("%w: size %d", ErrInvalid, e.Size)
	}
	return e, physical, nil
}

func sortedRecords(m map[string]string) []Record {
	if len(m) == 0 {
		return nil
	}
	rs := make([]Record, 0, len(m))
	for k, v := range m {
		rs = append(rs, Record{k, v})
	}
	slices.SortFunc(rs, func(a, b Record) int { return strings.Compare(a.Key, b.Key) })
	return rs
}
