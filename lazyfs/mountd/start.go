package mountd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	Parent int    // process id of the first
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
	before, _ := lazyfs.Mounted(dir)
	cmd := process(roleParent, dir, "", o.Log, theirs)
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("start the mount's process: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the first parent
	m := &Mount{Dir: dir, Parent: cmd.Process.Pid}

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
	<-ended
	if now, e := lazyfs.Mounted(dir); e == nil && now.Minor != before.Minor {
		// The parent was killed when it had mounted, and its server too or before it knew.
		un, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmountWait)
		_, _ = Unmount(un, dir)
		cancel()
	}
	if c := context.Cause(ctx); c != nil {
		return nil, c
	}
	if e := (*Error)(nil); errors.As(err, &e) {
		return nil, err
	}
	return nil, fmt.Errorf("the mount's process ended without a word (its log may say why): %w", err)
}

// Unmount is Unmount of the mount's directory.
func (m *Mount) Unmount(ctx context.Context) (busy bool, err error) { return Unmount(ctx, m.Dir) }

// Unmount unmounts dir and waits until the processes of the mount have ended, so that nothing is left when it
// returns. busy says that something was still inside: then it is detached and ends by itself. A mount that is not ours
// is refused.
func Unmount(ctx context.Context, dir string) (busy bool, err error) {
	if dir, err = resolve(dir); err != nil {
		return false, err
	}
	if _, err := lazyfs.Mounted(dir); err != nil {
		return false, fmt.Errorf("nothing of muster is mounted there: %w", err)
	}
	fds := processesOf(dir, "")
	defer func() { closeFDs(fds) }()
	if busy, err = lazyfs.Unmount(ctx, dir); err != nil || busy {
		return busy, err
	}
	fds = append(fds, processesOf(dir, "")...) // one may just have been replaced
	for _, p := range fds {
		for ctx.Err() == nil {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(p), Events: unix.POLLIN}}, 50)
			if n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
				break
			}
		}
	}
	return false, context.Cause(ctx)
}

// resolve is dir as the mount table has it, without touching what is mounted there: its server may be dead.
func resolve(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(real, filepath.Base(dir))
	}
	return dir, nil
}

// processesOf are pidfds of the processes of the mount on dir, of one role or, when that is empty, of all.
func processesOf(dir, role string) (fds []int) {
	eachProcess(func(pid int, r, d string) {
		if d != dir || role != "" && r != role {
			return
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds = append(fds, fd)
		}
	})
	return fds
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Mounts are the directories on which there are mounts of this user (of everybody for root) whose processes can be seen
// from here, sorted.
func Mounts() []string {
	var dirs []string
	eachProcess(func(pid int, _, dir string) {
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil || os.Geteuid() != 0 && int(st.Uid) != os.Geteuid() {
			return
		}
		if _, err := lazyfs.Mounted(dir); err == nil {
			dirs = append(dirs, dir)
		}
	})
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// eachProcess calls f for every process of a mount in this mount namespace that can be seen: the same directory in a container is
// another.
func eachProcess(f func(pid int, role, dir string)) {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	here, hereErr := os.Readlink("/proc/self/ns/mnt")
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// Whose namespace cannot be told (another user's) counts as here.
		if ns, err := os.Readlink("/proc/" + e.Name() + "/ns/mnt"); err == nil && hereErr == nil && ns != here {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if err == nil && len(args) == 3 && args[0] == processName {
			f(pid, args[1], args[2])
		}
	}
}
