package tree

import (
	"errors"
	"fmt"
	"math"
	"sort"
	"strings"

	"github.com/muster-hpc/muster/ztoc"
)

// ErrEntries says that a layer's entries cannot be true: content outside of the layer, or a sparse map
// that overlaps itself. The index they came from is broken; another one, or our own, has to be used.
var ErrEntries = errors.New("entries do not fit their layer")

// errTooMany says that an image has more inodes than the caller allows.
func errTooMany(n int) error {
	return fmt.Errorf("image has more than %d files", n)
}

// checkContent checks that the content of a regular file is within its layer.
func (m *merge) checkContent(e *ztoc.Entry) error {
	end := int64(math.MaxInt64)
	if m.layerEnd > 0 {
		end = m.layerEnd
	}
	inside := func(off, n int64) bool { return off >= 0 && n >= 0 && off <= end && n <= end-off }
	ok := e.Size >= 0 && e.Size <= maxSize
	if e.Sparse == nil {
		ok = ok && (e.Size == 0 || inside(e.Offset, e.Size))
	}
	at := int64(0)
	for _, x := range e.Sparse {
		ok = ok && x.FileOff >= at && inside(x.Offset, x.Len) && x.FileOff <= e.Size && x.Len <= e.Size-x.FileOff
		if !ok {
			break
		}
		at = x.FileOff + x.Len
	}
	if !ok {
		return fmt.Errorf("%w: layer %d: %.200q", ErrEntries, m.layer, e.Name)
	}
	return nil
}

// extents are the data of a regular file, by offset in it, neighbours merged.
func extents(dst []ztoc.Extent, e *ztoc.Entry) []ztoc.Extent {
	if e.Sparse == nil {
		if e.Size == 0 {
			return dst
		}
		return append(dst, ztoc.Extent{Offset: e.Offset, Len: e.Size})
	}
	for _, x := range e.Sparse {
		if x.Len == 0 {
			continue
		}
		if n := len(dst); n > 0 && dst[n-1].FileOff+dst[n-1].Len == x.FileOff && dst[n-1].Offset+dst[n-1].Len == x.Offset {
			dst[n-1].Len += x.Len
			continue
		}
		dst = append(dst, x)
	}
	return dst
}

// An xattr is one extended attribute of an entry.
type xattr struct{ name, value string }

// foreign are xattrs that describe the machine an image was made on, not the image. umoci does not unpack
// the first three either, and overlayfs would take any of the others for its own.
var foreign = map[string]bool{"security.selinux": true, "system.nfs4_acl": true, "trusted.overlay.opaque": true}

// refuseXattr says why a file of the given type cannot have x; "" when it can, "-" when nobody misses it.
func refuseXattr(x xattr, typ uint32) string {
	switch {
	case foreign[x.name], x.value == "": // the tar readers of umoci and containerd drop empty values
		return "-"
	case strings.HasPrefix(x.name, "trusted.overlay."), strings.HasPrefix(x.name, "user.overlay."):
		return "belongs to overlayfs"
	case len(x.name) > maxName, x.name == "", strings.IndexByte(x.name, 0) >= 0:
		return "has no possible name"
	case len(x.value) > maxXattr:
		return "is larger than 64 KiB"
	case strings.HasPrefix(x.name, "user."):
		if typ != modeReg && typ != modeDir {
			return "is not possible on this type of file"
		}
	case !strings.HasPrefix(x.name, "security.") && !strings.HasPrefix(x.name, "trusted.") && !strings.HasPrefix(x.name, "system."):
		return "is in no name space of Linux"
	}
	return ""
}

// eachXattr calls f for every xattr of e in the order of the archive, with the reason to leave it out.
func eachXattr(e *ztoc.Entry, typ uint32, f func(x xattr, why string)) {
	for _, r := range e.PAX {
		if n, ok := strings.CutPrefix(r.Key, ztoc.XattrPrefix); ok {
			x := xattr{n, r.Value}
			f(x, refuseXattr(x, typ))
		}
	}
}

func (m *merge) noteXattrs(e *ztoc.Entry, typ uint32) {
	if len(e.PAX) == 0 {
		return
	}
	kept := 0
	eachXattr(e, typ, func(x xattr, why string) {
		if why == "" {
			if kept++; kept == maxXattrs+1 {
				m.note(e, fmt.Sprintf("has more than %d xattrs", maxXattrs))
			}
		} else if why != "-" {
			m.note(e, fmt.Sprintf("xattr %.80q %s", x.name, why))
		}
	})
}

// xattrsOf are the xattrs an inode keeps, sorted by name; the last of several of one name counts.
func xattrsOf(e *ztoc.Entry, typ uint32) []xattr {
	if e == nil || len(e.PAX) == 0 {
		return nil
	}
	var xs []xattr
	eachXattr(e, typ, func(x xattr, why string) {
		if why == "" {
			xs = append(xs, x)
		}
	})
	sort.SliceStable(xs, func(i, j int) bool { return xs[i].name < xs[j].name })
	out := xs[:0]
	for i, x := range xs {
		if i+1 < len(xs) && xs[i+1].name == x.name {
			continue
		}
		out = append(out, x)
	}
	return out[:min(len(out), maxXattrs)]
}

// device is a device number in 32 bits as the kernel keeps it (new_encode_dev): 12 bits of major, 20 of
// minor. mknod(2) drops what is above.
func device(major, minor int64) uint32 {
	return uint32(major&0xfff)<<8 | uint32(minor&0xff) | uint32(minor&0xfff00)<<12
}
