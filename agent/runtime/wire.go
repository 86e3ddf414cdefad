package runtime

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// A message is one line of JSON on the socket pair between front and stage; a descriptor may ride on
// it. Exactly one field is set.
type message struct {
	Setup   *Options     `json:",omitempty"` // front: first of all
	Hold    *HoldOptions `json:",omitempty"` // the same, to a process that holds namespaces
	Mounted bool         `json:",omitempty"` // stage: the tree is mounted; carries the FUSE descriptor
	Command *Command     `json:",omitempty"` // front: run this
	Started *started     `json:",omitempty"` // stage: the command runs; carries the terminal's master, if any
	Signal  int          `json:",omitempty"` // front: pass this signal on
	Failed  *failure     `json:",omitempty"` // stage: last message, nothing was run
	Exited  *int         `json:",omitempty"` // stage: last message, the exit code
}

type started struct{ Runtime string }

// A failure is an error on its way through the socket.
type failure struct {
	Code        int // 126 or 127 when the command is to blame, 0 when muster is
	Text        string
	Unsupported bool
	NoSpace     bool
}

const maxMessage = 8 << 20 // an environment is at most 2 MiB or so; JSON may quote it

// A wire is one end of the socket pair. Each direction has one user.
type wire struct {
	conn    *net.UnixConn
	pending []byte
	files   []*os.File
}

func newWire(f *os.File) (*wire, error) {
	c, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a unix socket")
	}
	return &wire{conn: u}, nil
}

func (w *wire) send(m message, f *os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	// The rights ride on the first byte; a stream may take the rest in several writes.
	b = append(b, '\n')
	n, _, err := w.conn.WriteMsgUnix(b, rights, nil)
	if err == nil && n < len(b) {
		_, err = w.conn.Write(b[n:])
	}
	return err
}

// receive waits for the next message, and for its descriptor if it has one, which the caller closes.
func (w *wire) receive() (message, *os.File, error) {
	var m message
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	for {
		if line, rest, ok := bytes.Cut(w.pending, []byte{'\n'}); ok {
			w.pending = rest
			if err := json.Unmarshal(line, &m); err != nil {
				return m, nil, fmt.Errorf("message of the other side: %w", err)
			}
			var f *os.File
			if (m.Mounted || m.Started != nil) && len(w.files) > 0 {
				f, w.files = w.files[0], w.files[1:]
			}
			return m, f, nil
		}
		if len(w.pending) > maxMessage {
			return m, nil, errors.New("message of the other side is too long")
		}
		n, oobn, _, _, err := w.conn.ReadMsgUnix(buf, oob)
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return m, nil, err
		}
		w.pending = append(w.pending, buf[:n]...)
		control, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return m, nil, err
		}
		for _, c := range control {
			fds, err := unix.ParseUnixRights(&c)
			if err != nil {
				continue
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				w.files = append(w.files, os.NewFile(uintptr(fd), "received"))
			}
		}
	}
}

func (w *wire) Close() error {
	for _, f := range w.files {
		_ = f.Close()
	}
	return w.conn.Close()
}

// pair makes the two ends.
func pair() (front *wire, stage *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	stage = os.NewFile(uintptr(fds[1]), "stage")
	front, err = newWire(os.NewFile(uintptr(fds[0]), "front"))
	if err != nil {
		_ = stage.Close()
		return nil, nil, err
	}
	return front, stage, nil
}
