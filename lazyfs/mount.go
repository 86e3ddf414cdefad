package lazyfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Subtype is how the file systems of muster are called in /proc/mounts: "fuse.muster".
const Subtype = "muster"

// MountOptions say how a tree is mounted. Every mount is read-only, nosuid, nodev, and checks
// permissions in the kernel (default_permissions), whoever mounts.
type MountOptions struct {
	// Name is shown as "muster#Name" in the first column of /proc/mounts; usually the image's reference.
	Name string
	// AllowOther lets other users than the one who mounts in. Root wants it; fusermount3 allows it to
	// users only with user_allow_other in /etc/fuse.conf.
	AllowOther bool
	// Context is an SELinux context for every file, passed to the kernel as it is; empty for none.
	Context string
	// Helper forces mounting by fusermount3 also where mount(2) would do.
	Helper bool
}

// ErrNoFUSE says that this host cannot mount FUSE file systems as it is.
var ErrNoFUSE = errors.New("FUSE is not usable here")

const helperTimeout = 20 * time.Second

// Mount mounts an empty connection on dir and returns its descriptor, on which Negotiate has to be
// called next. As root, or as root of a user namespace that has its own mount namespace, it is mount(2);
// otherwise fusermount3 does it. The descriptor is in blocking mode and close-on-exec.
func Mount(ctx context.Context, dir string, o MountOptions) (*os.File, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 && !o.Helper {
		return mountDirect(abs, o)
	}
	return mountHelper(ctx, abs, o)
}

func (o MountOptions) source() string {
	// A control character would break /proc/mounts' readers, a comma or backslash fusermount3's parser.
	clean := strings.Map(func(r rune) rune {
		if r <= ' ' || r == ',' || r == '\\' || r == 0x7f {
			return '_'
		}
		return r
	}, o.Name)
	return "muster#" + clean
}

func mountDirect(dir string, o MountOptions) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, &os.PathError{Op: "mount", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, &os.PathError{Op: "mount", Path: dir, Err: unix.ENOTDIR}
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: open /dev/fuse: %w (is the fuse module loaded?)", ErrNoFUSE, err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,default_permissions", fd, st.Mode&unix.S_IFMT, os.Geteuid(), os.Getegid())
	if o.AllowOther {
		data += ",allow_other"
	}
	if o.Context != "" {
		data += `,context="` + o.Context + `"`
	}
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount(o.source(), dir, "fuse."+Subtype, flags, data); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w: %w", ErrNoFUSE, err)
		}
		return nil, &os.PathError{Op: "mount", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// mountHelper lets fusermount3 mount and receives the descriptor from it over a socket whose number it
// finds in _FUSE_COMMFD.
func mountHelper(ctx context.Context, dir string, o MountOptions) (*os.File, error) {
	bin, err := helper()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	defer ours.Close()
	opts := "ro,nosuid,nodev,default_permissions,subtype=" + Subtype + ",fsname=" + o.source()
	if o.AllowOther {
		opts += ",allow_other"
	}
	if o.Context != "" {
		opts += `,context="` + o.Context + `"`
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "-o", opts, "--", dir)
	cmd.Env = []string{"_FUSE_COMMFD=3", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.ExtraFiles = []*os.File{theirs}
	var said bytes.Buffer
	cmd.Stderr = &said
	err = cmd.Run()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("%w: mount %s: %s: %w", ErrNoFUSE, dir, strings.TrimSpace(said.String()), err)
	}
	buf, oob := make([]byte, 4), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive descriptor from fusermount3: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("fusermount3 sent no descriptor: %v", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("fusermount3 sent no descriptor: %v", err)
	}
	if err := syscall.SetNonblock(fds[0], false); err != nil {
		unix.Close(fds[0])
		return nil, os.NewSyscallError("setnonblock", err)
	}
	return os.NewFile(uintptr(fds[0]), "/dev/fuse"), nil
}

func helper() (string, error) {
	for _, name := range []string{"fusermount3", "fusermount"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: neither root nor fusermount3 (package fuse3) there", ErrNoFUSE)
}

// Unmount takes the mount on dir away. When something inside is still in use it is detached instead:
// nobody new finds it, and it ends with its last user; busy says so.
func Unmount(ctx context.Context, dir string) (busy bool, err error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return false, err
	}
	if os.Geteuid() == 0 {
		err = unix.Unmount(abs, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			busy = true
			err = unix.Unmount(abs, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if err == nil || !errors.Is(err, unix.EPERM) {
			return busy, wrapPath("umount", abs, err)
		}
	}
	bin, err := helper()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	run := func(args ...string) error {
		cmd := exec.CommandContext(ctx, bin, args...)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("umount %s: %s: %w", abs, strings.TrimSpace(string(out)), err)
		}
		return nil
	}
	if err := run("-u", "--", abs); err == nil {
		return false, nil
	}
	return true, run("-u", "-z", "--", abs)
}

func wrapPath(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}
