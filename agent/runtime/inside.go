package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Mount mounts an empty FUSE connection on dir and returns its descriptor. The stage calls it.
type Mount func(ctx context.Context, dir string, o Options) (*os.File, error)

// Inside has to be the first thing that main calls. It returns unless this process is a stage or the
// builtin runtime, and never in these.
func Inside(mount Mount) {
	switch os.Args[0] {
	case insideName:
		os.Exit(stageMain(mount))
	case execName:
		os.Exit(execMain())
	case holdName:
		os.Exit(holdMain())
	}
}

// A stage is process 1 of the namespaces.
type stage struct {
	wire  *wire
	o     Options
	user  bool   // in a user namespace
	uid   int    // who runs all this
	gid   int    //
	dir   string // the private tmpfs
	binds []*os.File
	root  string // of the command, in dir
}

// privateDir is hidden by the private tmpfs, in the stage's mount namespace only. Sources of binds
// beneath it are opened before.
const privateDir = "/tmp"

func stageMain(mount Mount) int {
	// Process 1 ends by itself, not by what a terminal or the front's group gets.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGPIPE)
	unix.CloseOnExec(3)
	w, err := newWire(os.NewFile(3, "front"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "muster:", err)
		return 1
	}
	s := &stage{wire: w, uid: os.Geteuid(), gid: os.Getegid()}
	s.user = s.uid != 0
	if err := s.serve(mount); err != nil {
		_ = w.send(message{Failed: asFailure(err)}, nil)
		return 1
	}
	return 0
}

func (s *stage) serve(mount Mount) error {
	m, _, err := s.wire.receive()
	if err != nil || m.Setup == nil {
		return fmt.Errorf("no set-up from the front: %v", err)
	}
	s.o = *m.Setup
	if err := s.prepare(); err != nil {
		return err
	}
	tree := filepath.Join(s.dir, "tree")
	device, err := mount(context.Background(), tree, s.o)
	if err != nil {
		return fmt.Errorf("mounting the image: %w", err)
	}
	err = s.wire.send(message{Mounted: true}, device)
	_ = device.Close()
	if err != nil {
		return err
	}
	m, _, err = s.wire.receive()
	if err != nil {
		return err // the front went away
	}
	if m.Command == nil {
		return errors.New("no command from the front")
	}
	// From here on files of the image are read, and they may never come.
	var pid atomic.Int64
	go s.passSignals(&pid)
	if err := s.assemble(tree); err != nil {
		return err
	}
	p, err := s.resolve(*m.Command)
	if err != nil {
		return err
	}
	name, r, err := s.launch(p)
	if err != nil {
		return err
	}
	pid.Store(int64(r.pid))
	err = s.wire.send(message{Started: &started{name}}, r.terminal)
	r.drop()
	if err != nil {
		return err
	}
	code, err := reap(r)
	if err != nil {
		return err
	}
	return s.wire.send(message{Exited: &code}, nil)
}

// passSignals sends what the front asks for to pid, and ends the process, and with it the namespaces,
// when the front closes the socket. The front has signals for it from Started on.
func (s *stage) passSignals(pid *atomic.Int64) {
	for {
		m, _, err := s.wire.receive()
		if err != nil {
			os.Exit(1)
		}
		if p := pid.Load(); p > 0 && m.Signal > 0 {
			_ = unix.Kill(int(p), unix.Signal(m.Signal))
		}
	}
}

// reap waits for children, its own and orphans, until the command has ended.
func reap(r running) (code int, err error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, os.NewSyscallError("wait", err)
		case got != r.ends:
		case ws.Signaled() && r.ends != r.pid && unix.Kill(r.pid, 0) == nil:
			// The runtime above the command was killed (Ctrl-C reaches both); the command, which may have
			// a mind to go on, is a child of this process now.
			r.ends = r.pid
		case ws.Signaled():
			return 128 + int(ws.Signal()), nil
		case ws.Exited():
			return ws.ExitStatus(), nil
		}
	}
}

// prepare takes the stage's mounts away from the host's, and makes the private tmpfs.
func (s *stage) prepare() error {
	if err := s.separate(); err != nil {
		return err
	}
	// Runtimes look up their children in /proc, so it must show this PID namespace. In a user namespace
	// beneath a container the kernel may refuse; then only runtimes that do not care will work.
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil && !s.user {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	return s.private()
}

// separate ends the sharing of mounts with the host, and opens the sources of binds.
func (s *stage) separate() error {
	// Slave, not private: what the host unmounts is not kept alive by us.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("%w: mount namespace: %w", ErrUnsupported, err)
	}
	// Open before anything is mounted over anything: paths mean what they mean to the caller.
	for _, b := range s.o.Binds {
		f, err := os.OpenFile(b.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("--bind %s: %w", b, err)
		}
		s.binds = append(s.binds, f)
	}
	return nil
}

// private mounts the private tmpfs.
func (s *stage) private() error {
	s.dir = privateDir
	options := "mode=0755"
	if s.o.WritableSize > 0 {
		options += fmt.Sprintf(",size=%d", s.o.WritableSize)
	}
	if err := unix.Mount("muster-run", s.dir, "tmpfs", unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	for _, d := range []string{"tree", "upper", "work", "root", "old", "bundle", "state"} {
		if err := os.Mkdir(filepath.Join(s.dir, d), 0o755); err != nil {
			return err
		}
	}
	s.root = filepath.Join(s.dir, "root")
	return nil
}
