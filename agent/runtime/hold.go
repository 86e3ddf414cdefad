package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// holdName as os.Args[0] makes this program hold namespaces for others to join.
const holdName = "muster-hold"

// A Holding is a root that other processes enter: user and mount namespaces of the caller's own, in which a tree that is mounted already is
// the root. They exist while a process is in them, or somebody has opened /proc/PID/ns/user and mnt of Pid, and leave nothing behind.
type Holding struct {
	Pid  int
	wire *wire
	done chan error
}

// HoldOptions say what the root is made of, besides the host's /dev, /proc and /sys.
type HoldOptions struct {
	Tree         string   // a mounted tree
	Binds        []Bind   // shown in it, those beneath others after these
	Optional     []string // paths of the host shown at the same place where they are there
	ReadOnly     bool
	WritableSize int64
}

// Hold makes a Holding for the calling user, who is not root. It sees the host's processes, network and devices; what is written outside of
// binds goes into memory. ctx bounds Hold only.
func Hold(ctx context.Context, o HoldOptions) (*Holding, error) {
	uid, gid := os.Geteuid(), os.Getegid()
	front, stage, err := pair()
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{holdName}, Env: os.Environ(), Stderr: os.Stderr, ExtraFiles: []*os.File{stage},
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}},
			AmbientCaps: stageCapabilities,
		},
	}
	if err := cmd.Start(); err != nil {
		_ = stage.Close()
		_ = front.Close()
		return nil, fmt.Errorf("%w: making namespaces: %w (user namespaces may be switched off: see sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone)", ErrUnsupported, err)
	}
	_ = stage.Close()
	h := &Holding{Pid: cmd.Process.Pid, wire: front, done: make(chan error, 1)}
	go func() { h.done <- cmd.Wait() }()
	stop := context.AfterFunc(ctx, func() { _ = front.conn.Close() })
	err = h.setup(o)
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

func (h *Holding) setup(o HoldOptions) error {
	if err := h.wire.send(message{Hold: &o}, nil); err != nil {
		return err
	}
	m, _, err := h.wire.receive()
	switch {
	case err != nil:
		return fmt.Errorf("the process that holds the root ended: %w", err)
	case m.Failed != nil:
		return m.Failed.asError()
	}
	return nil
}

// Close ends the process that holds. Whoever has joined stays.
func (h *Holding) Close() {
	_ = h.wire.Close()
	<-h.done
}

func holdMain() int {
	unix.CloseOnExec(3)
	w, err := newWire(os.NewFile(3, "front"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "muster:", err)
		return 1
	}
	m, _, err := w.receive()
	if err != nil || m.Hold == nil {
		return 1
	}
	s := &stage{wire: w, uid: os.Geteuid(), gid: os.Getegid(), user: true}
	if err := s.hold(*m.Hold); err != nil {
		_ = w.send(message{Failed: asFailure(err)}, nil)
		return 1
	}
	if w.send(message{Mounted: true}, nil) == nil {
		_, _, _ = w.receive() // until the front goes
	}
	return 0
}

// hold makes the root and moves into it.
func (s *stage) hold(o HoldOptions) error {
	s.o.ReadOnly, s.o.WritableSize = o.ReadOnly, o.WritableSize
	tree, err := openPath(unix.AT_FDCWD, o.Tree, unix.O_DIRECTORY)
	if err != nil {
		return &os.PathError{Op: "open the image", Path: o.Tree, Err: err}
	}
	defer tree.Close()
	// Opened before anything is mounted over anything; see separate, which opens the binds.
	type show struct {
		from *os.File
		to   string
	}
	var shown []show
	for _, p := range append([]string{"/dev", "/proc", "/sys", "/etc/resolv.conf", "/etc/hosts", "/etc/passwd", "/etc/group"}, o.Optional...) {
		f, err := os.OpenFile(p, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // this host has none, or not for this user
		}
		shown = append(shown, show{f, p})
	}
	s.o.Binds = o.Binds
	if err := errors.Join(s.separate(), s.private()); err != nil {
		return err
	}
	at := filepath.Join(s.dir, "tree")
	if err := unix.Mount(proc(tree), at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount of the image: %w", err)
	}
	if err := s.overlay(at); err != nil {
		return err
	}
	// What is shown of the host from around it must not bring it along. An overlay could not be made of it any more.
	if err := unix.Mount("", s.dir, "", unix.MS_UNBINDABLE, ""); err != nil {
		return os.NewSyscallError("make unbindable", err)
	}
	// What is beneath another comes after it.
	slices.SortStableFunc(shown, func(a, b show) int { return strings.Count(a.to, "/") - strings.Count(b.to, "/") })
	var seen []string
	for _, b := range shown {
		if slices.ContainsFunc(seen, func(p string) bool { return b.to == p || strings.HasPrefix(b.to, p+"/") }) {
			continue // it came with what it is beneath
		}
		if err := bindInto(s.root, b.from, b.to, false); err != nil {
			if strings.HasPrefix(b.to, "/etc/") {
				continue // an image where that place cannot be made goes without
			}
			return fmt.Errorf("showing %s: %w", b.to, err)
		}
		seen = append(seen, b.to)
		_ = b.from.Close()
	}
	for i, b := range o.Binds {
		if err := bindInto(s.root, s.binds[i], b.Target, b.ReadOnly); err != nil {
			return fmt.Errorf("bind %s: %w", b, err)
		}
	}
	if err := s.tmp(); err != nil {
		return err
	}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NODEV | unix.MS_NOSUID)
	if s.o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", s.root, "", flags, ""); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("closing the root: %w", err)
	}
	return s.pivot()
}
