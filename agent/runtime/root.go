package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// assemble makes the command's root from the tree: overlay, /dev, /proc, /sys, host files, binds.
func (s *stage) assemble(tree string) error {
	if err := s.overlay(tree); err != nil {
		return err
	}
	steps := []func() error{s.tmp, s.dev, s.proc, s.sys, s.hostFiles}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("preparing the root: %w", err)
		}
	}
	for i, b := range s.o.Binds {
		if err := bindInto(s.root, s.binds[i], b.Target, b.ReadOnly); err != nil {
			return fmt.Errorf("--bind %s: %w", b, err)
		}
	}
	return nil
}

// overlay puts a writable layer over the tree. Which options work is found out by trying: kernels
// differ, and so do vendors' kernels of the same version. A FUSE lower has no UUID, which makes index
// and xino impossible; saying so keeps the kernel's log clean.
func (s *stage) overlay(tree string) error {
	base := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", tree, filepath.Join(s.dir, "upper"), filepath.Join(s.dir, "work"))
	variants := []string{",index=off,xino=off", ""}
	if s.user {
		// trusted.* attributes are not for user namespaces; user.* on tmpfs exist since 6.6. Without them
		// a directory of the image cannot be removed and made again.
		variants = []string{",userxattr,index=off,xino=off", ",userxattr", ",index=off,xino=off", ""}
	}
	var err error
	for _, v := range variants {
		// nodev: devices come from /dev, never from the image.
		if err = unix.Mount("muster-root", s.root, "overlay", unix.MS_NODEV, base+v); err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENODEV) {
			break
		}
	}
	if !s.user || !(errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV)) {
		return fmt.Errorf("overlay over the image: %w", err)
	}
	// Before 5.11 user namespaces have no overlay: then the tree itself, which nobody can write.
	if err := unix.Mount(tree, s.root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount of the image: %w", err)
	}
	s.o.ReadOnly = true
	return nil
}

// seal makes the root read-only, once everything has its place in it. Mounts below stay as they are.
func (s *stage) seal() error {
	if !s.o.ReadOnly {
		return nil
	}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NODEV)
	if s.user {
		flags |= unix.MS_NOSUID
	}
	if err := unix.Mount("", s.root, "", flags, ""); err != nil {
		return fmt.Errorf("making the root read-only: %w", err)
	}
	return nil
}

// at mounts something on path of the root, which is made when missing.
func (s *stage) at(path, source, kind string, flags uintptr, data string) error {
	on, err := beneath(s.root, path, missingDir)
	if err != nil {
		return err
	}
	defer on.Close()
	if err := unix.Mount(source, proc(on), kind, flags, data); err != nil {
		return &os.PathError{Op: "mount " + kind + " on", Path: path, Err: err}
	}
	return nil
}

// tmp makes /tmp when the image has none: nearly every program expects it.
func (s *stage) tmp() error {
	if f, err := beneath(s.root, "/tmp", missingFails); err == nil {
		return f.Close()
	}
	f, err := beneath(s.root, "/tmp", missingDir)
	if err != nil {
		return nil // a root that cannot be written
	}
	defer f.Close()
	return os.Chmod(proc(f), 0o777|os.ModeSticky)
}

// devices are the usual nodes: name and minor number; the major number is 1 but for tty.
var devices = []struct {
	name         string
	major, minor uint32
}{
	{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0},
}

// dev makes a small /dev: the usual nodes, terminals of its own, and the host's /dev/shm, since ranks of
// one MPI job are in several containers of one host.
func (s *stage) dev() error {
	if err := s.at("/dev", "muster-dev", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=1m"); err != nil {
		return err
	}
	for _, d := range devices {
		path := filepath.Join(s.root, "dev", d.name)
		if !s.user {
			// Chmod, because mknod obeys the umask.
			err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor)))
			if err = errors.Join(err, os.Chmod(path, 0o666)); err != nil {
				return err
			}
			continue
		}
		src, err := os.OpenFile("/dev/"+d.name, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = bindInto(s.root, src, "/dev/"+d.name, false)
		_ = src.Close()
		if err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, filepath.Join(s.root, "dev", link)); err != nil {
			return err
		}
	}
	if s.o.Terminal {
		// A runtime may mount the terminal here, too.
		if err := os.WriteFile(filepath.Join(s.root, "dev/console"), nil, 0o600); err != nil {
			return err
		}
	}
	options := "newinstance,ptmxmode=0666,mode=0620"
	if !s.user {
		options += ",gid=5" // tty, in every distribution
	}
	if err := s.at("/dev/pts", "devpts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, options); err != nil {
		return err
	}
	for _, shared := range []string{"/dev/shm", "/dev/mqueue"} {
		src, err := os.OpenFile(shared, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
		if err != nil {
			continue // the host has none
		}
		err = bindInto(s.root, src, shared, false)
		_ = src.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) proc() error {
	err := s.at("/proc", "proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if err != nil && s.user && errors.Is(err, unix.EPERM) {
		// Parts of the host's /proc are hidden from us, so a new one would show too much.
		return s.at("/proc", "/proc", "", unix.MS_BIND|unix.MS_REC, "")
	}
	return err
}

// sys is the host's, read-only: the network namespace is the host's too. Control groups come with it.
func (s *stage) sys() error {
	src, err := os.OpenFile("/sys", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	return bindInto(s.root, src, "/sys", true)
}

// hostFiles lets names resolve as on the host. An image where the place cannot be made (read-only, or
// a link to nowhere) goes without.
func (s *stage) hostFiles() error {
	for _, path := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		src, err := os.OpenFile(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		_ = bindInto(s.root, src, path, true)
		_ = src.Close()
	}
	return nil
}
