package lazyfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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
	// Passthrough asks the kernel for passthrough of files (HasBacking says when that is worth it).
	Passthrough bool
	// Helper forces mounting by fusermount3 also where mount(2) would do.
	Helper bool
}

// ErrNoFUSE says that this host cannot mount FUSE file systems as it is.
var ErrNoFUSE = errors.New("FUSE is not usable here")

const helperTimeout = 20 * time.Second

// Mount mounts an empty connection on dir and returns its descriptor, on which Negotiate has to be
// called next. Whoever may mount in his user namespace (CAP_SYS_ADMIN), as root may, does it by mount(2);
// for others fusermount3 does it. The descriptor is in blocking mode and close-on-exec.
func Mount(ctx context.Context, dir string, o MountOptions) (*os.File, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if mayMount() && !o.Helper {
		return mountDirect(abs, o)
	}
	return mountHelper(ctx, abs, o)
}

// mayMount reports whether this process has CAP_SYS_ADMIN, be it root or in a user namespace of its own.
func mayMount() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
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

// A Connection is a mount as the kernel knows it.
type Connection struct {
	Major, Minor uint32 // the device number of its files; Minor also names /sys/fs/fuse/connections/Minor
	Source       string // the first column of /proc/mounts
}

// Mounted finds the mount on dir in this process's mount namespace without touching it: also when its server is
// dead. It is fs.ErrNotExist when nothing of ours is mounted there.
func Mounted(dir string) (Connection, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return Connection{}, err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Connection{}, err
	}
	found := Connection{}
	err = wrapPath("mount", abs, fs.ErrNotExist)
	for line := range strings.Lines(string(b)) {
		c, at, ok := parseMountinfo(line)
		if ok && at == abs {
			found, err = c, nil // the last one is on top
		}
	}
	return found, err
}

// parseMountinfo reads "36 35 0:53 / /mnt ro,nosuid - fuse.muster muster#name ro,user_id=0".
func parseMountinfo(line string) (c Connection, dir string, ok bool) {
	front, back, ok := strings.Cut(line, " - ")
	f, g := strings.Fields(front), strings.Fields(back)
	if !ok || len(f) < 5 || len(g) < 2 || g[0] != "fuse."+Subtype {
		return c, "", false
	}
	if _, err := fmt.Sscanf(f[2], "%d:%d", &c.Major, &c.Minor); err != nil {
		return c, "", false
	}
	c.Source = unescape(g[1])
	return c, unescape(f[4]), true
}

// unescape undoes the octal escapes of /proc/mounts.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// SetReadahead tells the kernel how many bytes to read ahead in files of c. The protocol can only lower it from
// 128 KiB. Only root of the host may; for others nothing changes.
func (c Connection) SetReadahead(bytes int) error {
	return os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", c.Major, c.Minor), []byte(strconv.Itoa(bytes>>10)), 0)
}

// Abort ends the connection of the mount on dir at once: whoever waits for it gets an error, and so does whoever uses
// it later. It is detached as well.
func Abort(dir string) error {
	return wrapPath("umount", dir, unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
}
