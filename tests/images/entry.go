package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"time"
)

// Epoch is the time of everything that has no better one: 2023-11-14 22:13:20 UTC.
var Epoch = time.Unix(1_700_000_000, 0).UTC()

// An Entry is one member of a layer: a tar header and the bytes behind it. Header.Size is ignored,
// the body counts. Raw, when set, is written instead of both, for what archive/tar does not write:
// it must be whole 512-byte blocks.
type Entry struct {
	tar.Header
	Body []byte
	Raw  []byte
}

// File is a regular file of mode 0644.
func File(name, body string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: Epoch}, Body: []byte(body)}
}

// Dir is a directory of mode 0755.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: Epoch}}
}

// Symlink is a symbolic link to target.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: Epoch}}
}

// Hardlink is another name of the file target, which is named as the archive names it.
func Hardlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644, ModTime: Epoch}}
}

// Whiteout hides name of the layers below.
func Whiteout(name string) Entry {
	dir, base := splitName(name)
	return File(dir+".wh."+base, "")
}

// Opaque hides everything that the layers below have in directory name.
func Opaque(name string) Entry { return File(name+"/.wh..wh..opq", "") }

// splitName cuts a name behind its last slash; path.Split would do but for a trailing one.
func splitName(name string) (dir, base string) {
	for i := len(name) - 2; i >= 0; i-- {
		if name[i] == '/' {
			return name[:i+1], name[i+1:]
		}
	}
	return "", name
}

// With is e with its mode and owner replaced.
func (e Entry) With(mode int64, uid, gid int) Entry {
	e.Mode, e.Uid, e.Gid = mode, uid, gid
	return e
}

// Xattr is e with an extended attribute set.
func (e Entry) Xattr(key, value string) Entry {
	e.PAXRecords = maps.Clone(e.PAXRecords)
	if e.PAXRecords == nil {
		e.PAXRecords = map[string]string{}
	}
	e.PAXRecords["SCHILY.xattr."+key] = value
	return e
}

// Tar is the archive of entries, ended by two zero blocks. It panics on a header that archive/tar
// cannot write: entries are written by hand and a test cannot go on without them.
func Tar(entries ...Entry) []byte {
	var b bytes.Buffer
	if err := WriteTar(&b, entries...); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// WriteTar writes the archive of entries to w.
func WriteTar(w io.Writer, entries ...Entry) error {
	tw := tar.NewWriter(w)
	for i := range entries {
		e := &entries[i]
		if e.Raw != nil {
			if len(e.Raw)%512 != 0 {
				return fmt.Errorf("raw entry %d has %d bytes, not whole blocks", i, len(e.Raw))
			}
			// The writer holds nothing back between entries but padding, which Flush writes.
			if err := tw.Flush(); err != nil {
				return fmt.Errorf("before raw entry %d: %w", i, err)
			}
			if _, err := w.Write(e.Raw); err != nil {
				return err
			}
			continue
		}
		h := e.Header
		h.Size = int64(len(e.Body))
		if err := tw.WriteHeader(&h); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
		if _, err := tw.Write(e.Body); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	return tw.Close()
}
