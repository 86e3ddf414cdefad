package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A Bind shows a file or directory of the host in the image.
type Bind struct {
	Source   string // absolute
	Target   string // absolute, in the image; made when missing
	ReadOnly bool
}

// ParseBind reads SRC[:DST[:ro|rw]]. A relative SRC is taken from the working directory; DST is SRC
// when left out.
func ParseBind(s string) (Bind, error) {
	parts := strings.Split(s, ":")
	var b Bind
	if len(parts) > 3 || parts[0] == "" {
		return b, fmt.Errorf("bind %q is not SRC[:DST[:ro]]", s)
	}
	src, err := filepath.Abs(parts[0])
	if err != nil {
		return b, err
	}
	b.Source, b.Target = src, src
	if len(parts) > 1 {
		b.Target = parts[1]
	}
	if len(parts) > 2 {
		switch parts[2] {
		case "ro":
			b.ReadOnly = true
		case "rw", "":
		default:
			return b, fmt.Errorf("bind %q: %q is neither ro nor rw", s, parts[2])
		}
	}
	if !filepath.IsAbs(b.Target) || filepath.Clean(b.Target) == "/" {
		return b, fmt.Errorf("bind %q: the target must be an absolute path beneath /", s)
	}
	return b, nil
}

func (b Bind) String() string {
	s := b.Source + ":" + b.Target
	if b.ReadOnly {
		s += ":ro"
	}
	return s
}

// maxLinks bounds the symbolic links followed in one path, as the kernel does.
const maxLinks = 40

// beneath opens path as a process whose root is root would, with O_PATH: symbolic links and ".." never
// lead out. With missing set the last element, and directories on the way, are made when they are not
// there: a directory, or an empty file.
//
// openat2(2) would do most of this from Linux 5.6 on; RHEL 8 has 4.18.
func beneath(root, path string, missing missing) (*os.File, error) {
	top, err := openPath(unix.AT_FDCWD, root, 0)
	if err != nil {
		return nil, err
	}
	stack := []*os.File{top}
	defer func() {
		for _, f := range stack {
			_ = f.Close()
		}
	}()
	todo := split(path)
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			if len(stack) > 1 {
				_ = stack[len(stack)-1].Close()
				stack = stack[:len(stack)-1]
			}
			continue
		}
		at := int(stack[len(stack)-1].Fd())
		f, err := openPath(at, name, unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) && missing != missingFails {
			if len(todo) > 0 || missing == missingDir {
				err = unix.Mkdirat(at, name, 0o755)
			} else {
				err = makeFile(at, name)
			}
			if err == nil {
				f, err = openPath(at, name, unix.O_NOFOLLOW)
			}
		}
		if err != nil {
			return nil, &os.PathError{Op: "open in the image", Path: path, Err: err}
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			_ = f.Close()
			return nil, &os.PathError{Op: "stat in the image", Path: path, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			stack = append(stack, f)
			continue
		}
		_ = f.Close()
		if links++; links > maxLinks {
			return nil, &os.PathError{Op: "open in the image", Path: path, Err: unix.ELOOP}
		}
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(at, name, buf)
		if err != nil {
			return nil, &os.PathError{Op: "readlink in the image", Path: path, Err: err}
		}
		target := string(buf[:n])
		if strings.HasPrefix(target, "/") {
			for _, f := range stack[1:] {
				_ = f.Close()
			}
			stack = stack[:1]
		}
		todo = append(split(target), todo...)
	}
	last := stack[len(stack)-1]
	stack = stack[:len(stack)-1]
	return last, nil
}

// missing says what beneath makes of a last element that is not there.
type missing int

const (
	missingFails missing = iota
	missingDir
	missingFile
)

func openPath(at int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func makeFile(at int, name string) error {
	fd, err := unix.Openat(at, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func split(path string) (names []string) {
	for name := range strings.SplitSeq(path, "/") {
		if name != "" && name != "." {
			names = append(names, name)
		}
	}
	return names
}

// proc is the name of an open file that any call taking a path understands.
func proc(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// readBeneath reads at most limit bytes of a regular file of the image.
func readBeneath(root, path string, limit int64) ([]byte, error) {
	at, err := beneath(root, path, missingFails)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if st, err := at.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, &os.PathError{Op: "read in the image", Path: path, Err: unix.EINVAL}
	}
	f, err := os.Open(proc(at))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// bindInto binds the open file src, and what is mounted below it, to target beneath root.
func bindInto(root string, src *os.File, target string, readOnly bool) error {
	st, err := os.Stat(proc(src))
	if err != nil {
		return err
	}
	kind := missingFile
	if st.IsDir() {
		kind = missingDir
	}
	at, err := beneath(root, target, kind)
	if err != nil {
		return err
	}
	defer at.Close()
	if err := unix.Mount(proc(src), proc(at), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return &os.PathError{Op: "bind mount on", Path: target, Err: err}
	}
	if !readOnly {
		return nil
	}
	// What is there now is the bind, not what at opened.
	on, err := beneath(root, target, missingFails)
	if err != nil {
		return err
	}
	defer on.Close()
	return makeReadOnly(on)
}

// makeReadOnly makes the mount at f read-only, and those below it where the kernel can (5.12).
func makeReadOnly(f *os.File) error {
	err := unix.MountSetattr(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err == nil {
		return nil
	}
	// Flags that came with the mount must be named again, or a user namespace may not remount.
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return err
	}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY)
	for _, same := range []struct{ st, ms uintptr }{
		{unix.ST_NOSUID, unix.MS_NOSUID},
		{unix.ST_NODEV, unix.MS_NODEV},
		{unix.ST_NOEXEC, unix.MS_NOEXEC},
		{unix.ST_NOATIME, unix.MS_NOATIME},
		{unix.ST_NODIRATIME, unix.MS_NODIRATIME},
		{unix.ST_RELATIME, unix.MS_RELATIME},
	} {
		if uintptr(fs.Flags)&same.st != 0 {
			flags |= same.ms
		}
	}
	return unix.Mount("", proc(f), "", flags, "")
}
