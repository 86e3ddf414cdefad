package mountd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// A message goes between processes, one packet each, with descriptors beside it. A program of another version may be at
// the other end: fields may be added, and what is there keeps its meaning.
type message struct {
	Kind kind `json:"kind"`

	// start: command → parent → server
	Dir     string        `json:"dir,omitempty"`
	Request []byte        `json:"request,omitempty"`
	Linger  time.Duration `json:"linger,omitempty"`
	Ahead   int           `json:"ahead,omitempty"`

	State   []byte `json:"state,omitempty"`   // of start again and of built
	Again   bool   `json:"again,omitempty"`   // a predecessor built State; the mount's kit comes along
	Standby bool   `json:"standby,omitempty"` // of start again and adopt: get ready, and go on only when told to: another still does

	Mount lazyfs.MountOptions `json:"mount,omitzero"` // built: server → parent

	PID int `json:"pid,omitempty"` // adopt: the server's that serves; ready, here: the parent's

	Event []byte `json:"event,omitempty"` // event: server → parent → command

	Error string `json:"error,omitempty"` // failed, ended, refused
	Code  int    `json:"code,omitempty"`

	Files []string `json:"files,omitempty"` // what the descriptors are, in their order
}

type kind string

const (
	kindStart   kind = "start"   // build and, when Again, serve
	kindBuilt   kind = "built"   // server → parent
	kindServe   kind = "serve"   // parent → server, with the kit; and between parents: it is yours
	kindServing kind = "serving" // server → parent; and between parents
	kindReady   kind = "ready"   // parent → command and server: the root answers
	kindEvent   kind = "event"
	kindFailed  kind = "failed"
	kindEnd     kind = "end"   // parent → server: the mount is over
	kindEnded   kind = "ended" // server → parent, its last word

	kindAdopt kind = "adopt" // server, keeper or parent → new parent, with the kit
	kindHere  kind = "here"  // new parent → server or keeper

	// Over a mount's control socket.
	kindUpgrade kind = "upgrade" // with the new program
	kindKeep    kind = "keep"    // asks for the kit
	kindKit     kind = "kit"
	kindRefused kind = "refused"
)

// maxMessage bounds a packet; the socket's buffer holds it whole.
const maxMessage = 96 << 10

// maxFiles bounds the descriptors of a packet.
const maxFiles = 16

// pipe is one end of a socket that keeps packets apart.
type pipe struct {
	f interface { // *os.File or *net.UnixConn
		syscall.Conn
		SetDeadline(time.Time) error
		Close() error
	}
	send sync.Mutex
}

func newPipe() (ours *pipe, theirs *os.File, err error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	for _, d := range fd {
		_ = unix.SetsockoptInt(d, unix.SOL_SOCKET, unix.SO_SNDBUF, 2*maxMessage)
	}
	if err := unix.SetNonblock(fd[0], true); err != nil {
		return nil, nil, os.NewSyscallError("setnonblock", err)
	}
	return &pipe{f: os.NewFile(uintptr(fd[0]), "mountd")}, os.NewFile(uintptr(fd[1]), "mountd"), nil
}

// inherited is the end that this process was started with.
func inherited(fd uintptr) (*pipe, error) {
	unix.CloseOnExec(int(fd))
	if err := unix.SetNonblock(int(fd), true); err != nil {
		return nil, fmt.Errorf("this process is started by muster mount, not by hand: %w", err)
	}
	return &pipe{f: os.NewFile(fd, "mountd")}, nil
}

func (p *pipe) write(m message, files ...*os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("%s message of %d bytes, %d at most", m.Kind, len(b), maxMessage)
	}
	var fds []int
	for _, f := range files {
		// Not Fd, which would make it blocking for everybody who has it.
		c, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := c.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return err
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	p.send.Lock()
	defer p.send.Unlock()
	return p.do(true, func(fd int) error {
		return unix.Sendmsg(fd, b, oob, nil, unix.MSG_NOSIGNAL)
	})
}

// read is the next packet; io.EOF when the other end is gone. The files are the caller's to close.
func (p *pipe) read() (m message, files []*os.File, err error) {
	buf, oob := make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(maxFiles*4))
	var n, on int
	err = p.do(false, func(fd int) (err error) {
		n, on, _, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err == nil && n == 0 || errors.Is(err, unix.ECONNRESET) {
		return m, nil, io.EOF
	}
	if err != nil {
		return m, nil, err
	}
	cms, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return m, nil, err
	}
	for _, c := range cms {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	if err := json.Unmarshal(buf[:n], &m); err != nil {
		closeAll(files)
		return m, nil, err
	}
	return m, files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// do runs a system call on the socket, waiting for it to be ready.
func (p *pipe) do(write bool, f func(fd int) error) error {
	c, err := p.f.SyscallConn()
	if err != nil {
		return err
	}
	var got error
	try := func(fd uintptr) bool {
		got = f(int(fd))
		return !errors.Is(got, unix.EAGAIN) && !errors.Is(got, unix.EINTR)
	}
	if write {
		err = c.Write(try)
	} else {
		err = c.Read(try)
	}
	return errors.Join(err, got)
}

// wait bounds what is read and written from now on; zero: no bound.
func (p *pipe) wait(d time.Duration) {
	if d <= 0 {
		_ = p.f.SetDeadline(time.Time{})
		return
	}
	_ = p.f.SetDeadline(time.Now().Add(d))
}

func (p *pipe) Close() error { return p.f.Close() }
