package runtime

import (
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// A terminal joins the master of the command's terminal to the caller's: raw, both ways, same size.
type terminal struct {
	master *os.File
	in     *os.File
	saved  *term.State
	drain  chan struct{} // closed when the command's side has nothing more to say
	once   sync.Once
}

// drainWait bounds how long output is read after the command has ended; the kernel ends the rest of
// its processes, and with them the last user of the terminal, much sooner.
const drainWait = 2 * time.Second

func joinTerminal(master, in, out *os.File) (*terminal, error) {
	saved, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, err
	}
	t := &terminal{master: master, in: in, saved: saved, drain: make(chan struct{})}
	t.resize()
	// This copy ends with the process: a read of a terminal cannot be called off.
	go func() { _, _ = io.Copy(master, in) }()
	go func() {
		defer close(t.drain)
		_, _ = io.Copy(out, master) // ends with EIO when the last user of the other side is gone
	}()
	return t, nil
}

// resize gives the command's terminal the size of the caller's.
func (t *terminal) resize() { copySize(t.master, t.in) }

func copySize(to, from *os.File) {
	if ws, err := unix.IoctlGetWinsize(int(from.Fd()), unix.TIOCGWINSZ); err == nil {
		_ = unix.IoctlSetWinsize(int(to.Fd()), unix.TIOCSWINSZ, ws)
	}
}

// Close waits for the last output and gives the caller's terminal back as it was.
func (t *terminal) Close() {
	t.once.Do(func() {
		select {
		case <-t.drain:
		case <-time.After(drainWait):
		}
		_ = term.Restore(int(t.in.Fd()), t.saved)
		_ = t.master.Close()
	})
}

// openTerminal makes a terminal in the devpts file system below root and returns its two ends.
func openTerminal(root string) (master, slave *os.File, err error) {
	m, err := os.OpenFile(root+"/dev/pts/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	copySize(m, os.Stdin) // now, because the command may ask before the session joins the two
	if err := unix.IoctlSetPointerInt(int(m.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		_ = m.Close()
		return nil, nil, os.NewSyscallError("unlockpt", err)
	}
	n, err := unix.IoctlGetInt(int(m.Fd()), unix.TIOCGPTN)
	if err == nil {
		slave, err = os.OpenFile(root+"/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		_ = m.Close()
		return nil, nil, err
	}
	return m, slave, nil
}
