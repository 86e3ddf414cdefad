package mountd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// A message goes between the three processes, one packet each, with descriptors beside it.
type message struct {
	Kind kind `json:"kind"`

	// start: command → parent → server
	Dir     string        `json:"dir,omitempty"`
	Request []byte        `json:"request,omitempty"`
	Linger  time.Duration `json:"linger,omitempty"`
	State   []byte        `json:"state,omitempty"` // also of built
	Again   bool          `json:"again,omitempty"` // a predecessor built State; the table file comes along

	Mount lazyfs.MountOptions `json:"mount,omitzero"` // built: server → parent
	Ahead int                 `json:"ahead,omitempty"`

	Init lazyfs.Init `json:"init,omitzero"` // serve: parent → server, with the device

	Event []byte `json:"event,omitempty"` // event: server → parent → command

	Error string `json:"error,omitempty"` // failed: server → parent → command
	Code  int    `json:"code,omitempty"`
	PID   int    `json:"pid,omitempty"` // ready: parent → command, the parent's
}

type kind string

const (
	kindStart   kind = "start"
	kindBuilt   kind = "built"
	kindServe   kind = "serve"
	kindServing kind = "serving"
	kindEvent   kind = "event"
	kindFailed  kind = "failed"
	kindReady   kind = "ready"
)

// maxMessage bounds a packet; the socket's buffer holds it whole.
const maxMessage = 96 << 10

// pipe is one end of a socket that keeps packets apart.
type pipe struct {
	f    *os.File
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
		fds = append(fds, int(f.Fd()))
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

// read is the next packet; io.EOF when the other end is gone.
func (p *pipe) read() (m message, files []*os.File, err error) {
	buf, oob := make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(4*4))
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
			return m, nil, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return m, files, json.Unmarshal(buf[:n], &m)
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

func (p *pipe) Close() error { return p.f.Close() }
