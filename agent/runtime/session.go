package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What callers decide on.
var (
	// ErrUnsupported says that this host lacks what running needs: namespaces, FUSE, a runtime.
	ErrUnsupported = errors.New("not supported on this host")
	// ErrNoSpace says that the private tmpfs is full.
	ErrNoSpace = errors.New("no memory left for what the command writes; a larger --run-writable-size may help")
)

// A CommandError says that the command is to blame, with the exit code that docker gives.
type CommandError struct {
	Code int // 126: cannot be executed, 127: not found
	Text string
}

func (e *CommandError) Error() string { return e.Text }

// Options are what is known before the image is.
type Options struct {
	Name         string // of the image, for /proc/mounts
	Binds        []Bind
	ReadOnly     bool  // the root cannot be written
	WritableSize int64 // bytes of memory for what the command writes; 0 is half of the memory
	Terminal     bool  // give the command a terminal of its own, joined to the caller's
	Runtime      string
	Context      string // SELinux context of the tree's files
}

// A Command is what to run. Paths and users are the image's.
type Command struct {
	Args []string
	Env  []string // KEY=VALUE, later ones win; HOME and PATH are added when missing
	Dir  string   // "" is /; made when missing
	User string   // "" is root for root; names are looked up in the image. For others only themselves
}

// A Session is one stage. It serves one command.
type Session struct {
	wire   *wire
	device *os.File
	term   bool
	done   chan struct{} // closed when the stage has ended
	status error         // of the stage, once done is closed
}

// insideName and execName as os.Args[0] make this program the stage, or the builtin runtime.
const (
	insideName = "muster-inside"
	execName   = "muster-exec"
)

// closeWait bounds how long the kernel may take to end a PID namespace.
const closeWait = 10 * time.Second

// Start makes the namespaces and mounts an empty FUSE connection in them; the caller serves Device.
// ctx bounds Start only.
func Start(ctx context.Context, o Options) (*Session, error) {
	front, stage, err := pair()
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{insideName}, Env: os.Environ(),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: []*os.File{stage},
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
			Pdeathsig:  syscall.SIGKILL,
			// Out of the terminal's process group: the front passes signals on, once.
			Setsid: true,
		},
	}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		a := cmd.SysProcAttr
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		a.AmbientCaps = stageCapabilities
	}
	s := &Session{wire: front, term: o.Terminal, done: make(chan struct{})}
	err = s.start(cmd)
	_ = stage.Close()
	if err != nil {
		_ = front.Close()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w: making namespaces: %w (user namespaces may be switched off: see sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone)", ErrUnsupported, err)
		}
		return nil, err
	}
	// Whoever cancels ends the stage, which ends the wait below.
	stop := context.AfterFunc(ctx, func() { _ = front.conn.Close() })
	err = s.setup(o)
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// start runs the stage and waits for it on one locked thread: the stage's death signal comes when
// the thread that cloned it ends, not the process.
func (s *Session) start(cmd *exec.Cmd) error {
	begun := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, after the stage
		err := cmd.Start()
		begun <- err
		if err != nil {
			return
		}
		s.status = cmd.Wait()
		close(s.done)
	}()
	return <-begun
}

func (s *Session) setup(o Options) error {
	if err := s.wire.send(message{Setup: &o}, nil); err != nil {
		return s.lost(err)
	}
	m, f, err := s.wire.receive()
	switch {
	case err != nil:
		return s.lost(err)
	case m.Failed != nil:
		return m.Failed.asError()
	case !m.Mounted || f == nil:
		return errors.New("the stage did not mount the tree")
	}
	// FUSE's readers block in read(2): the poller knows nothing of it.
	if err := syscall.SetNonblock(int(f.Fd()), false); err != nil {
		return os.NewSyscallError("setnonblock", err)
	}
	s.device = f
	return nil
}

// Device is the descriptor of the mounted tree. The caller closes it.
func (s *Session) Device() *os.File { return s.device }

// Run runs c and returns its exit code, 128 + N when signal N ended it. Signals that arrive are passed
// on; with a terminal SIGWINCH sets its size. ctx bounds only the time until the command runs; then started is called, so that
// the caller can send to signals from there on what has cancelled ctx until then.
func (s *Session) Run(ctx context.Context, c Command, signals <-chan os.Signal, started func()) (int, error) {
	stop := context.AfterFunc(ctx, func() { _ = s.wire.conn.Close() })
	defer stop()
	if err := s.wire.send(message{Command: &c}, nil); err != nil {
		return 0, s.lost(err)
	}
	m, master, err := s.wire.receive()
	if err == nil && m.Started != nil {
		started() // before ctx is let go, so that a signal goes one way or the other
	}
	if !stop() && ctx.Err() != nil {
		return 0, ctx.Err()
	}
	switch {
	case err != nil:
		return 0, s.lost(err)
	case m.Failed != nil:
		return 0, m.Failed.asError()
	case m.Started == nil:
		return 0, errors.New("the stage did not start the command")
	}
	var t *terminal
	if s.term && master != nil {
		if t, err = joinTerminal(master, os.Stdin, os.Stdout); err != nil {
			return 0, err
		}
		defer t.Close()
	}
	// The only sender from here on.
	ended := make(chan struct{})
	quiet := make(chan struct{})
	go func() {
		defer close(quiet)
		for {
			select {
			case sig := <-signals:
				n, ok := sig.(syscall.Signal)
				switch {
				case !ok:
				case n == syscall.SIGWINCH && t != nil:
					t.resize()
				default:
					_ = s.wire.send(message{Signal: int(n)}, nil)
				}
			case <-ended:
				return
			}
		}
	}()
	m, _, err = s.wire.receive()
	close(ended)
	<-quiet
	switch {
	case err != nil:
		return 0, s.lost(err)
	case m.Failed != nil:
		return 0, m.Failed.asError()
	case m.Exited == nil:
		return 0, errors.New("the stage did not say how the command ended")
	}
	return *m.Exited, nil
}

// lost explains a broken socket: the stage has ended without a word.
func (s *Session) lost(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return err
	}
	select {
	case <-s.done:
		if s.status != nil {
			return fmt.Errorf("the process that holds the container ended: %w", s.status)
		}
	case <-time.After(closeWait):
	}
	return errors.New("the process that holds the container ended without a word")
}

// Close ends the stage and everything in its namespaces, and waits for that. It may be called at any
// time, more than once.
func (s *Session) Close() error {
	_ = s.wire.Close()
	select {
	case <-s.done:
		return nil
	case <-time.After(closeWait):
		return fmt.Errorf("the container's processes did not end within %s", closeWait)
	}
}

func (f *failure) asError() error {
	switch {
	case f.Code != 0:
		return &CommandError{f.Code, f.Text}
	case f.Unsupported:
		return fmt.Errorf("%w: %s", ErrUnsupported, f.Text)
	case f.NoSpace:
		return fmt.Errorf("%w: %s", ErrNoSpace, f.Text)
	}
	return errors.New(f.Text)
}

func asFailure(err error) *failure {
	f := &failure{Text: err.Error(), Unsupported: errors.Is(err, ErrUnsupported), NoSpace: errors.Is(err, unix.ENOSPC)}
	var c *CommandError
	if errors.As(err, &c) {
		f.Code = c.Code
	}
	return f
}
