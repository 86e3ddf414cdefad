package mountd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// Options say what to mount where.
type Options struct {
	// Dir is an existing directory.
	Dir string
	// Request is what the Builder gets: whatever it needs to know, at most 64 KiB. It goes over a socket and
	// is in no environment, argument or file, so it may hold credentials.
	Request []byte
	// Log is where the mount's processes write what goes wrong; nil: nowhere.
	Log *os.File
	// Linger is how long processes that were inside at the time of unmounting are served on. Zero: DefaultLinger.
	Linger time.Duration
	// Readahead is how far the kernel reads ahead in files, in bytes, where it may be set (root). Zero: DefaultReadahead.
	Readahead int
	// OnEvent gets what the Builder reports while it builds, in the goroutine of Start.
	OnEvent func([]byte)
}

// Defaults of Options.
const (
	DefaultLinger    = 10 * time.Second
	DefaultReadahead = 512 << 10
)

// An Error is why a mount failed, as the Builder's process told it.
type Error struct {
	Text string
	Code int // exit code for the command, from Main's function
}

func (e *Error) Error() string { return e.Text }

// A Mount is a running mount, as its maker sees it.
type Mount struct {
	Dir    string // absolute
	Parent int    // process id
	wait   func() error
}

// processName is argv[0] of the processes of a mount, by which they know themselves.
const processName = "muster-mountd"

// Start mounts, and returns when the tree answers. When ctx ends before, nothing is left of it.
func Start(ctx context.Context, o Options) (*Mount, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	ours, theirs, err := newPipe()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	cmd := process("parent", dir, o.Log, theirs)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("start the mount's process: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the mount
	m := &Mount{Dir: dir, Parent: cmd.Process.Pid, wait: func() error { err := <-ended; ended <- err; return err }}

	stop := context.AfterFunc(ctx, func() { ours.f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if o.Linger <= 0 {
		o.Linger = DefaultLinger
	}
	if o.Readahead <= 0 {
		o.Readahead = DefaultReadahead
	}
	err = ours.write(message{Kind: kindStart, Dir: dir, Request: o.Request, Linger: o.Linger, Ahead: o.Readahead})
	for err == nil {
		var got message
		if got, _, err = ours.read(); err != nil {
			break
		}
		switch got.Kind {
		case kindReady:
			return m, nil
		case kindFailed:
			err = &Error{got.Error, got.Code}
		case kindEvent:
			if o.OnEvent != nil {
				o.OnEvent(got.Event)
			}
		}
	}
	ours.Close() // the parent sees it and clears up
	_ = m.wait()
	if c := context.Cause(ctx); c != nil {
		return nil, c
	}
	if e := (*Error)(nil); errors.As(err, &e) {
		return nil, err
	}
	return nil, fmt.Errorf("the mount's process ended without a word (its log may say why): %w", err)
}

// Unmount unmounts and waits until the processes of the mount have ended. busy says that something was still inside: then
// the mount is detached, the processes end by themselves within the linger, and nobody waits.
func (m *Mount) Unmount(ctx context.Context) (busy bool, err error) {
	if busy, err = lazyfs.Unmount(ctx, m.Dir); err != nil || busy {
		return busy, err
	}
	done := make(chan struct{})
	go func() { _ = m.wait(); close(done) }()
	select {
	case <-done:
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

// process is this executable as one of the processes of a mount; conn becomes its descriptor 3, files those from 4 on.
func process(role, dir string, log *os.File, conn *os.File, files ...*os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{processName, role, dir}
	if log != nil {
		cmd.Stdout, cmd.Stderr = log, log
	}
	cmd.ExtraFiles = append([]*os.File{conn}, files...)
	return cmd
}

// Unmount unmounts dir and waits until the processes of the mount have ended, so that nothing is left when it
// returns. busy says that something was still inside: then it is detached and ends by itself. A mount that is not ours
// is refused.
func Unmount(ctx context.Context, dir string) (busy bool, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return false, err
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(real, filepath.Base(dir)) // not the last element: its server may be dead
	}
	if _, err := lazyfs.Mounted(dir); err != nil {
		return false, fmt.Errorf("nothing of muster is mounted there: %w", err)
	}
	parents := processesOf(dir)
	defer func() {
		for _, p := range parents {
			unix.Close(p)
		}
	}()
	if busy, err = lazyfs.Unmount(ctx, dir); err != nil || busy {
		return busy, err
	}
	for _, p := range parents {
		for ctx.Err() == nil {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(p), Events: unix.POLLIN}}, 50)
			if n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
				break
			}
		}
	}
	return false, context.Cause(ctx)
}

// processesOf are pidfds of the processes that serve dir.
func processesOf(dir string) (fds []int) {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	want := []string{processName, "", dir}
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if err != nil || len(args) != len(want) || args[0] != want[0] || args[2] != want[2] {
			continue
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}
