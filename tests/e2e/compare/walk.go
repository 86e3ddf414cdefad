package compare

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// An Xattr is one extended attribute.
type Xattr struct{ Name, Value string }

// A Run is a run of bytes with data in a sparse file.
type Run struct{ Start, End int64 }

// An Entry is one name of a tree.
type Entry struct {
	Path   string // from the root of the tree, which is "/"; raw bytes
	Mode   uint32 // as st_mode, with type bits
	Nlink  uint64
	UID    uint32
	GID    uint32
	Size   int64  // of regular files and symbolic links, else 0
	Rdev   uint64 // of devices, else 0
	Sec    int64  // mtime
	Nsec   int64
	Target string  // of a symbolic link
	Xattrs []Xattr // by name
	Sum    string  // SHA-256 of the content of a regular file, in hex
	Link   string  // first path in this tree of a file with several names
	Data   []Run   // where a regular file has data, when asked for
}

// A Listing is a tree, sorted by path.
type Listing []Entry

// Options of Walk.
type Options struct {
	NoContent bool // leave Sum empty
	Data      bool // fill Data
}

// Walk lists the tree at dir.
func Walk(ctx context.Context, dir string, o Options) (Listing, error) {
	w := &walker{root: strings.TrimRight(dir, "/"), o: o, first: map[inode]string{}}
	if err := w.entry(ctx, "", unix.DT_DIR); err != nil {
		return nil, err
	}
	sort.Slice(w.list, func(i, j int) bool { return w.list[i].Path < w.list[j].Path })
	w.links()
	if err := w.hash(ctx); err != nil {
		return nil, err
	}
	return w.list, nil
}

type inode struct{ dev, ino uint64 }

type walker struct {
	root  string
	o     Options
	list  Listing
	ids   map[string]inode // of files with several names and regular files, by path
	first map[inode]string // first path of an inode
}

// entry lists path and what is beneath it. kind is what readdir said it is.
func (w *walker) entry(ctx context.Context, path string, kind uint8) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	full := w.root + path
	if path == "" {
		full = w.root + "/"
	}
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: full, Err: err}
	}
	typ := st.Mode & unix.S_IFMT
	if kind != unix.DT_UNKNOWN && uint32(kind) != typ>>12 {
		return fmt.Errorf("%q: readdir says type %d, lstat %d", full, kind, typ>>12)
	}
	e := Entry{
		Path: path, Mode: st.Mode, Nlink: uint64(st.Nlink), UID: st.Uid, GID: st.Gid,
		Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec,
	}
	if path == "" {
		e.Path = "/"
	}
	switch typ {
	case unix.S_IFREG:
		e.Size = st.Size
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = st.Rdev
	case unix.S_IFLNK:
		e.Size = st.Size
		var err error
		if e.Target, err = os.Readlink(full); err != nil {
			return err
		}
	}
	if typ != unix.S_IFDIR {
		if w.ids == nil {
			w.ids = map[string]inode{}
		}
		w.ids[e.Path] = inode{st.Dev, st.Ino}
	}
	var err error
	if e.Xattrs, err = xattrs(full); err != nil {
		return err
	}
	w.list = append(w.list, e)
	if typ != unix.S_IFDIR {
		return nil
	}
	names, err := readdir(full)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := w.entry(ctx, path+"/"+n.name, n.kind); err != nil {
			return err
		}
	}
	return nil
}

type dirent struct {
	name string
	kind uint8
}

// readdir lists a directory as getdents64 gives it, without . and .., and insists on having each name once.
func readdir(dir string) ([]dirent, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var out []dirent
	seen := map[string]bool{}
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "getdents", Path: dir, Err: err}
		}
		if n == 0 {
			return out, nil
		}
		for b := buf[:n]; len(b) > 0; { // ino 8, off 8, reclen 2, type 1, name
			size := int(b[16]) | int(b[17])<<8
			name, _, _ := strings.Cut(string(b[19:size]), "\x00")
			if name != "." && name != ".." {
				if seen[name] {
					return nil, fmt.Errorf("%q has %q twice", dir, name)
				}
				seen[name] = true
				out = append(out, dirent{name, b[18]})
			}
			b = b[size:]
		}
	}
}

// xattrs reads all extended attributes that the caller may see. Not supporting them is not having any.
func xattrs(path string) ([]Xattr, error) {
	get := func(what string, call func(b []byte) (int, error)) (string, error) {
		for {
			n, err := call(nil)
			if err == nil && n > 0 {
				b := make([]byte, n)
				if n, err = call(b); err == nil {
					return string(b[:n]), nil
				}
			}
			if err == unix.ERANGE || err == unix.EINTR {
				continue
			}
			if err != nil {
				return "", &os.PathError{Op: what, Path: path, Err: err}
			}
			return "", nil
		}
	}
	names, err := get("llistxattr", func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil || names == "" {
		return nil, err
	}
	var out []Xattr
	for _, n := range strings.Split(strings.TrimSuffix(names, "\x00"), "\x00") {
		v, err := get("lgetxattr "+n, func(b []byte) (int, error) { return unix.Lgetxattr(path, n, b) })
		if err != nil {
			return nil, err
		}
		out = append(out, Xattr{n, v})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// links names for each inode with several names the first of them.
func (w *walker) links() {
	for i := range w.list {
		e := &w.list[i]
		id, ok := w.ids[e.Path]
		if !ok || e.Nlink < 2 {
			continue
		}
		if w.first[id] == "" {
			w.first[id] = e.Path
		}
		e.Link = w.first[id]
	}
}

// hash fills in content sums, and runs of data.
func (w *walker) hash(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	jobs := make(chan *Entry)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			buf := make([]byte, 1<<20)
			for e := range jobs {
				if err := w.content(ctx, e, buf); err != nil {
					cancel(err)
				}
			}
		})
	}
	byLink := map[string]*Entry{}
	for i := range w.list {
		e := &w.list[i]
		if e.Mode&unix.S_IFMT != unix.S_IFREG || ctx.Err() != nil {
			continue
		}
		if e.Link != "" && e.Link != e.Path {
			continue
		}
		byLink[e.Path] = e
		jobs <- e
	}
	close(jobs)
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	for i := range w.list {
		if e := &w.list[i]; e.Link != "" && e.Link != e.Path && byLink[e.Link] != nil {
			e.Sum, e.Data = byLink[e.Link].Sum, byLink[e.Link].Data
		}
	}
	return nil
}

func (w *walker) content(ctx context.Context, e *Entry, buf []byte) error {
	if w.o.NoContent && !w.o.Data {
		return nil
	}
	f, err := os.OpenFile(w.root+e.Path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if w.o.Data {
		if e.Data, err = runs(f); err != nil {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	if w.o.NoContent {
		return nil
	}
	h, total := sha256.New(), int64(0)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		total += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if total != e.Size {
		return fmt.Errorf("%q: read %d bytes of %d", f.Name(), total, e.Size)
	}
	e.Sum = hex.EncodeToString(h.Sum(nil))
	return nil
}

// runs finds where f has data, with SEEK_DATA and SEEK_HOLE.
func runs(f *os.File) ([]Run, error) {
	var out []Run
	for at := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return out, nil
		}
		if err != nil {
			return nil, &os.PathError{Op: "lseek", Path: f.Name(), Err: err}
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, &os.PathError{Op: "lseek", Path: f.Name(), Err: err}
		}
		out = append(out, Run{start, end})
		at = end
	}
}
