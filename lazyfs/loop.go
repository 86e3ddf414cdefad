package lazyfs

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs/tree"
)

// conn is the device. Its reads block in the kernel, so a loop that waits for a request costs a thread;
// there are few.
type conn struct {
	fd  int
	dev *os.File // keeps fd open: an *os.File that nobody refers to closes itself
}

// read takes the next request; io.EOF is spelled errUnmounted.
func (c conn) read(p []byte) (int, error) {
	for {
		n, err := syscall.Read(c.fd, p)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, syscall.ENODEV):
			return 0, errUnmounted
		case errors.Is(err, syscall.EINTR), errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOENT):
			// ENOENT: the request was taken back while we read it.
		default:
			return 0, fmt.Errorf("read from /dev/fuse: %w", err)
		}
	}
}

var errUnmounted = errors.New("unmounted")

// scratch is what one goroutine needs to answer requests, kept so that answering allocates nothing.
type scratch struct {
	head  fuse.OutHeader
	iov   []unix.Iovec
	buf   []byte // replies that are made up, not read
	plan  []run  // of the read at hand: see Server.plan
	where []stretch
	pins  []*unit
	moved bool // the read reached a unit that nobody had read before
}

func newScratch() *scratch {
	return &scratch{iov: make([]unix.Iovec, 1, 64), buf: make([]byte, 0, 4096)}
}

// start begins a reply made of pieces; add appends to it; the header's length is filled in by send.
func (w *scratch) start() { w.iov = w.iov[:1] }

func (w *scratch) add(p []byte) {
	if len(p) > 0 {
		i := unix.Iovec{Base: unsafe.SliceData(p)}
		i.SetLen(len(p))
		w.iov = append(w.iov, i)
	}
}

// send writes the reply to unique: the pieces added since start, or an error. The kernel refuses it with
// ENOENT when the request was given up meanwhile; that and ENODEV concern nobody.
func (s *Server) send(w *scratch, unique uint64, errno syscall.Errno) {
	if errno != 0 {
		w.start()
	}
	n := outHeaderSize
	for _, i := range w.iov[1:] {
		n += int(i.Len)
	}
	w.head = fuse.OutHeader{Length: uint32(n), Status: -int32(errno), Unique: unique}
	w.iov[0].Base = (*byte)(unsafe.Pointer(&w.head))
	w.iov[0].SetLen(outHeaderSize)
	for {
		_, _, e := syscall.Syscall(unix.SYS_WRITEV, uintptr(s.conn.fd), uintptr(unsafe.Pointer(unsafe.SliceData(w.iov))), uintptr(len(w.iov)))
		switch e {
		case syscall.EINTR:
			continue
		case 0:
			s.slots.answered.Add(1)
		case syscall.ENOENT, syscall.ENODEV:
		default:
			// The kernel did not take it: without any answer the caller would wait for ever.
			if errno == 0 {
				s.log.Error("reply refused by the kernel", "error", e, "bytes", n)
				s.send(w, unique, syscall.EIO)
			}
		}
		return
	}
}

func (s *Server) reply(w *scratch, unique uint64, body []byte) {
	w.start()
	w.add(body)
	s.send(w, unique, 0)
}

// loop takes requests and answers them until the mount is gone. Nothing in it waits for anything but
// the device: a read whose bytes are not at hand is parked.
func (s *Server) loop() error {
	w := newScratch()
	sl := s.slots.take()
	defer func() { s.slots.put(sl) }()
	for {
		n, err := s.conn.read(sl.buf)
		if err != nil {
			return err
		}
		if n < inHeaderSize {
			return fmt.Errorf("the kernel sent a request of %d bytes", n)
		}
		if s.dispatch(w, sl) {
			sl = s.slots.take()
		} else {
			sl.clear()
		}
	}
}

// dispatch answers the request in sl, or parks it with its slot and says so.
func (s *Server) dispatch(w *scratch, sl slot) (parked bool) {
	h := as[fuse.InHeader](sl.buf)
	req := sl.buf[:min(int(h.Length), len(sl.buf))]
	unique := h.Unique
	if h.Opcode == opRead {
		if in := as[fuse.ReadIn](req); in != nil {
			return s.read(w, sl, in)
		}
	}
	s.stats.requests.Add(1)
	switch h.Opcode {
	case opForget, opBatchForget:
		return false // there is nothing to forget, and no reply
	case opInterrupt:
		if in := as[fuse.InterruptIn](req); in != nil {
			s.interrupt(w, unique, in.Unique)
		}
		return false
	case opDestroy:
		s.reply(w, unique, nil)
		return false
	case opInit:
		s.send(w, unique, syscall.EIO) // was answered long ago
		return false
	}
	if s.pass != nil && (h.Opcode == opOpen || h.Opcode == opRelease) {
		s.openOrRelease(w, h)
		return false
	}
	if errno := refusal(h.Opcode); errno != 0 {
		s.send(w, unique, errno)
		return false
	}
	row, ok := s.table.Row(h.NodeId)
	if !ok && h.Opcode != opStatfs {
		s.send(w, unique, syscall.ESTALE)
		return false
	}
	body, errno := s.meta(w, h.Opcode, row, req)
	if errno != 0 {
		s.send(w, unique, errno)
		return false
	}
	if len(body) > 0 && unsafe.SliceData(body) != unsafe.SliceData(w.buf) {
		// Out of the mapped table: a page that is not there would have to be found while the kernel copies the reply. That
		// fails in a process that is being killed, and the kernel would make it an EIO.
		body = append(w.buf[:0], body...)
		w.buf = body
	}
	s.reply(w, unique, body)
	return false
}

// refusal is how operations end that a read-only tree without state has no answer to. ENOSYS makes the
// kernel do without them from then on: for OPEN, OPENDIR and what belongs to them this is the quick way,
// for the rest it means the default.
func refusal(op uint32) syscall.Errno {
	switch op {
	case opLookup, opGetattr, opReadlink, opStatfs, opGetxattr, opListxattr, opReaddir, opReaddirplus, opLseek, opAccess:
		return 0
	case opSetattr, opSymlink, opMknod, opMkdir, opUnlink, opRmdir, opRename, opRename2, opLink, opCreate, opTmpfile,
		opWrite, opSetxattr, opRemovexattr, opFallocate:
		return syscall.EROFS
	default:
		return syscall.ENOSYS
	}
}

func (s *Server) meta(w *scratch, op uint32, row tree.Row, req []byte) ([]byte, syscall.Errno) {
	switch op {
	case opLookup:
		return s.lookup(w, row, cstring(req[inHeaderSize:]))
	case opGetattr:
		return s.getattr(w, row)
	case opReadlink:
		if t := s.table.Readlink(row); t != nil {
			return t, 0
		}
		return nil, syscall.EINVAL
	case opReaddir, opReaddirplus:
		in := as[fuse.ReadIn](req)
		if in == nil {
			return nil, syscall.EINVAL
		}
		return s.readdir(w, row, in.Offset, int(in.Size), op == opReaddirplus)
	case opGetxattr, opListxattr:
		in := as[fuse.GetXAttrIn](req)
		if in == nil {
			return nil, syscall.EINVAL
		}
		if op == opListxattr {
			return s.listxattr(w, row, int(in.Size))
		}
		return s.getxattr(w, row, cstring(req[inHeaderSize+8:]), int(in.Size))
	case opLseek:
		in := as[fuse.LseekIn](req)
		if in == nil {
			return nil, syscall.EINVAL
		}
		return s.lseek(w, row, int64(in.Offset), in.Whence)
	case opStatfs:
		return s.statfs(w)
	case opAccess:
		in := as[fuse.AccessIn](req)
		if in == nil || in.Mask&2 != 0 {
			return nil, syscall.EROFS
		}
		return nil, 0 // default_permissions: the kernel has checked
	}
	return nil, syscall.ENOSYS
}
