package compare

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DiffOptions say what two trees may differ in.
type DiffOptions struct {
	// UnpackedAt, when set, is when the unpacking of want began. A directory that no layer has an entry for
	// gets the time of the unpacking, which no other can have: a want not older than this matches any time.
	UnpackedAt time.Time
	// Rootless, for a want from `umoci unpack --rootless`, forgives a directory's user xattrs that got lacks
	// when the directory does not let its owner write: umoci cannot remove what a lower layer had set.
	Rootless bool
	// IgnoreXattrs are names that neither side need have.
	IgnoreXattrs []string
	// IgnorePaths are left out on both sides, with what is beneath them.
	IgnorePaths []string
	// IgnoreTimes leaves mtimes out.
	IgnoreTimes bool
	// Max bounds the lines of the result; 0 means 50.
	Max int
}

// Diff tells what is different in got from want, a line for each thing and file, in the order of paths;
// empty when nothing is. The last line says how many lines more there would be.
func Diff(got, want Listing, o DiffOptions) []string {
	if o.Max == 0 {
		o.Max = 50
	}
	d := differ{o: o}
	i, j := 0, 0
	for i < len(got) || j < len(want) {
		switch {
		case j == len(want) || (i < len(got) && got[i].Path < want[j].Path):
			d.say(got[i].Path, "is there and should not be: %s", describe(&got[i]))
			i++
		case i == len(got) || want[j].Path < got[i].Path:
			d.say(want[j].Path, "is missing: %s", describe(&want[j]))
			j++
		default:
			d.entry(&got[i], &want[j])
			i++
			j++
		}
	}
	if d.more > 0 {
		d.lines = append(d.lines, fmt.Sprintf("and %d more", d.more))
	}
	return d.lines
}

type differ struct {
	o     DiffOptions
	lines []string
	more  int
}

func (d *differ) say(path, format string, args ...any) {
	for _, p := range d.o.IgnorePaths {
		if path == p || strings.HasPrefix(path, strings.TrimRight(p, "/")+"/") {
			return
		}
	}
	if len(d.lines) == d.o.Max {
		d.more++
		return
	}
	d.lines = append(d.lines, fmt.Sprintf("%q %s", path, fmt.Sprintf(format, args...)))
}

func describe(e *Entry) string {
	return fmt.Sprintf("%s %#o %d:%d, %d bytes", typeName(e.Mode), e.Mode&^unix.S_IFMT, e.UID, e.GID, e.Size)
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("type %#o", mode&unix.S_IFMT)
}

// entry compares two files of one name.
func (d *differ) entry(got, want *Entry) {
	if got.Mode&unix.S_IFMT != want.Mode&unix.S_IFMT {
		d.say(got.Path, "is a %s, want a %s", typeName(got.Mode), typeName(want.Mode))
		return
	}
	d.value(got.Path, "mode", got.Mode, want.Mode, "%#o")
	d.value(got.Path, "uid", got.UID, want.UID, "%d")
	d.value(got.Path, "gid", got.GID, want.GID, "%d")
	d.value(got.Path, "nlink", got.Nlink, want.Nlink, "%d")
	d.value(got.Path, "size", got.Size, want.Size, "%d")
	d.value(got.Path, "device", got.Rdev, want.Rdev, "%#x")
	d.value(got.Path, "target", got.Target, want.Target, "%q")
	d.value(got.Path, "hard link to", got.Link, want.Link, "%q")
	d.value(got.Path, "content", got.Sum, want.Sum, "%s")
	if !slices.Equal(got.Data, want.Data) {
		d.say(got.Path, "data in %v, want %v", got.Data, want.Data)
	}
	d.times(got, want)
	d.xattrs(got, want)
}

func (d *differ) value(path, what string, got, want any, format string) {
	if got != want {
		d.say(path, what+" "+format+", want "+format, got, want)
	}
}

func (d *differ) times(got, want *Entry) {
	if d.o.IgnoreTimes || (got.Sec == want.Sec && got.Nsec == want.Nsec) {
		return
	}
	g, w := time.Unix(got.Sec, got.Nsec).UTC(), time.Unix(want.Sec, want.Nsec).UTC()
	if d.o.UnpackedAt.IsZero() || want.Mode&unix.S_IFMT != unix.S_IFDIR || w.Before(d.o.UnpackedAt) {
		d.say(got.Path, "mtime %s, want %s", g.Format(time.RFC3339Nano), w.Format(time.RFC3339Nano))
	}
}

func (d *differ) xattrs(got, want *Entry) {
	keep := func(in []Xattr) []Xattr {
		return slices.DeleteFunc(slices.Clone(in), func(x Xattr) bool { return slices.Contains(d.o.IgnoreXattrs, x.Name) })
	}
	g, w := keep(got.Xattrs), keep(want.Xattrs)
	for len(g) > 0 || len(w) > 0 {
		switch {
		case len(w) == 0 || (len(g) > 0 && g[0].Name < w[0].Name):
			d.say(got.Path, "xattr %q is there and should not be", g[0].Name)
			g = g[1:]
		case len(g) == 0 || w[0].Name < g[0].Name:
			if !d.o.Rootless || want.Mode&(unix.S_IFMT|0o200) != unix.S_IFDIR || !strings.HasPrefix(w[0].Name, "user.") {
				d.say(got.Path, "xattr %q is missing", w[0].Name)
			}
			w = w[1:]
		default:
			d.value(got.Path, fmt.Sprintf("xattr %q", g[0].Name), g[0].Value, w[0].Value, "%q")
			g, w = g[1:], w[1:]
		}
	}
}
