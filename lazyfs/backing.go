package lazyfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// Passthrough: the kernel reads a file of the mount from a plain copy of it, its backing file, without asking anybody.
//
//   - Which files: regular ones of at least MinBacking bytes, without holes, of which much has been read and all of whose
//     bytes are local. The copy is made when readers have been quiet for a while, from spans that were verified when they were
//     inflated, and shared by all images that have the same bytes of the same layer. It serves the mounts that are made
//     after it.
//   - Opening: without passthrough no open reaches the server. With it each does, so the kernel is asked for passthrough only
//     when the image has a backing file as it is mounted.
//   - A file's mode, cached or passed through, is decided when it is opened for the first time in the mount, and holds as long as the
//     mount does: the kernel fails opens of a file in two modes at once, and the server does not know how long the kernel goes
//     on using an open. What was opened cached stays so although a copy was made since; what was passed through stays so
//     although the copy was evicted since: the kernel holds the file it was given.
//   - Backing IDs belong to the connection, not to a process. Each is noted in Modes before the kernel is told to use it,
//     so a server that takes over answers the next open of the file with the same one. A server that is killed between getting an ID and
//     noting it leaves an ID that nobody uses, until the mount ends.
//
// Not promised: that the disk space of a copy is free as soon as it is evicted; a mount that passes the file through
// holds it.

// Backing keeps plain copies of files, named by the bytes of inflated layers that they are made of.
type Backing interface {
	// Any says whether there are copies of anything at all: a mount looks no further when there are none.
	Any() bool
	// Open is the copy of content, opened for reading, and nil when there is none that is known to be what was written. It is
	// called by those who answer the kernel and so must not wait, not for reading the file either.
	Open(content []ProfileRange) *os.File
	// Make keeps what write writes, size bytes, as the copy of content, when there is room that nothing else wants.
	Make(content []ProfileRange, size int64, write func(io.Writer) error) error
}

const (
	// MinBacking is how large a file must be to get a backing file, in bytes: below, the page cache and the spans at hand do as
	// well, and each copy costs an open file in the kernel.
	MinBacking = 8 << 20
	// ModesSize is the size of Config.Modes in bytes: room for 4096 files. Those beyond are never passed through.
	ModesSize = 64 << 10

	modeEntry  = 16 // node uint64, backing ID uint32 (0: cached), 4 bytes unused; in the order of this machine. Node 0: free
	maxContent = 64 // extents of a file with a backing file
	reallyRead = 64 << 20
)

// pass is what a server knows of the files opened in this mount that could be passed through.
type pass struct {
	mem []byte

	mu    sync.Mutex
	modes map[tree.Row]int32 // as in mem: backing ID, 0 cached
	used  int                // entries of mem
	ids   int                // files that are passed through
	off   error              // why no more are
}

// initBacking readies passthrough as far as the connection has it.
func (s *Server) initBacking() error {
	agreed, possible := s.cfg.Init.passthrough()
	if s.cfg.Backing != nil && possible && mayMount() && os.Geteuid() == 0 {
		s.grow = &grow{read: map[tree.Row]int64{}, wake: make(chan struct{}, 1)}
	}
	if !agreed {
		return nil
	}
	p := &pass{mem: s.cfg.Modes, modes: map[tree.Row]int32{}}
	if p.mem == nil {
		p.mem = make([]byte, ModesSize)
	}
	if len(p.mem) != ModesSize {
		return fmt.Errorf("memory for modes has %d bytes, not %d", len(p.mem), ModesSize)
	}
	for ; p.used < ModesSize/modeEntry; p.used++ {
		e := p.mem[p.used*modeEntry:]
		node := atomic.LoadUint64((*uint64)(unsafe.Pointer(&e[0])))
		if node == 0 {
			break
		}
		if row, ok := s.table.Row(node); ok {
			id := int32(binary.NativeEndian.Uint32(e[8:]))
			p.modes[row] = id
			if id != 0 {
				p.ids++
			}
		}
	}
	s.pass = p
	return nil
}

// decide notes the mode of a file for good; the ID goes first, so that whoever finds the node finds it too. False when there is
// no room. Called with mu held.
func (p *pass) decide(row tree.Row, id int32) bool {
	if p.used == ModesSize/modeEntry {
		return false
	}
	e := p.mem[p.used*modeEntry:]
	binary.NativeEndian.PutUint32(e[8:], uint32(id))
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&e[0])), row.Node())
	p.used++
	p.modes[row] = id
	if id != 0 {
		p.ids++
	}
	return true
}

// openOrRelease answers an OPEN or RELEASE. There is nothing to release.
func (s *Server) openOrRelease(w *scratch, h *fuse.InHeader) {
	if h.Opcode == opRelease {
		s.reply(w, h.Unique, nil)
		return
	}
	row, ok := s.table.Row(h.NodeId)
	if !ok {
		s.send(w, h.Unique, syscall.ESTALE)
		return
	}
	id, need := s.mode(row)
	if !need {
		s.send(w, h.Unique, syscall.ENOSYS) // the kernel asks no more
		return
	}
	out := fuse.OpenOut{OpenFlags: fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH}
	if id != 0 {
		out = fuse.OpenOut{OpenFlags: fuse.FOPEN_PASSTHROUGH | fuse.FOPEN_NOFLUSH, BackingID: id}
		s.stats.passed.Add(1)
	}
	s.reply(w, h.Unique, bytesOf(&out))
}

// mode is the backing ID of a file, 0 when it is read through the server; need is false when no open has to be answered any more.
func (s *Server) mode(row tree.Row) (id int32, need bool) {
	p := s.pass
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.off != nil && p.ids == 0 {
		return 0, false
	}
	if id, ok := p.modes[row]; ok {
		return id, true
	}
	if p.off != nil || s.cfg.Backing == nil || p.used == ModesSize/modeEntry {
		return 0, true
	}
	content := s.contentOf(row)
	if content == nil {
		return 0, true // follows from the table, so it will always be so
	}
	f := s.cfg.Backing.Open(content)
	if f != nil {
		defer f.Close()
		var err error
		if id, err = s.register(f, s.table.Size(row)); err != nil {
			p.off, id = err, 0
			s.log.Warn("large files are read through muster, although there are plain copies of them", "cause", err)
		}
	}
	p.decide(row, id)
	return id, p.off == nil || p.ids > 0
}

// A backingMap is the argument of FUSE_DEV_IOC_BACKING_OPEN, struct fuse_backing_map.
type backingMap struct {
	fd      int32
	flags   uint32
	padding uint64
}

const iocBackingOpen = 1<<30 | 16<<16 | 229<<8 | 1 // _IOW(229, 1, struct fuse_backing_map)

// register gives the kernel f, and is the ID that it gives it.
func (s *Server) register(f *os.File, size int64) (int32, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if st.Size() != size {
		return 0, fmt.Errorf("%s has %d bytes, not %d", f.Name(), st.Size(), size)
	}
	m := backingMap{fd: int32(f.Fd())}
	id, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s.conn.fd), iocBackingOpen, uintptr(unsafe.Pointer(&m)))
	switch {
	case errno == syscall.ELOOP:
		return 0, errors.New("the store lies on a stacked file system (overlay, ecryptfs), which the kernel does not pass files through from")
	case errno != 0:
		return 0, fmt.Errorf("the kernel does not take a backing file: %w", errno)
	}
	return int32(id), nil
}

// contentOf is what a file is made of, nil when it is no candidate for a backing file.
func (s *Server) contentOf(row tree.Row) []ProfileRange { return contentOf(s.table, row) }

func contentOf(t *tree.Table, row tree.Row) (c []ProfileRange) {
	size := t.Size(row)
	if size < MinBacking || !t.IsReg(row) {
		return nil
	}
	for off := int64(0); off < size; {
		e := t.Extent(row, off)
		if e.Len <= 0 || e.Layer < 0 || len(c) == maxContent {
			return nil
		}
		n := min(e.Len, size-off)
		c = append(c, ProfileRange{e.Layer, e.Offset, e.Offset + n})
		off += n
	}
	return c
}

// HasBacking says whether a file of the table has a backing file, and this process may have the kernel use it.
func HasBacking(c Config) bool {
	if c.Backing == nil || c.Table == nil || !c.Backing.Any() || os.Geteuid() != 0 || !mayMount() {
		return false
	}
	for node := uint64(1); ; node++ {
		row, ok := c.Table.Row(node)
		if !ok {
			return false
		}
		if content := contentOf(c.Table, row); content != nil {
			if f := c.Backing.Open(content); f != nil {
				_ = f.Close()
				return true
			}
		}
	}
}

// grow makes backing files. A nil grow does nothing.
type grow struct {
	wake chan struct{} // has room for one

	mu   sync.Mutex
	read map[tree.Row]int64 // bytes of each large file that readers got; -1: done with
	todo []tree.Row
}

// note counts what is read of large files.
func (g *grow) note(row tree.Row, size, n int64) {
	if g == nil || size < MinBacking {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	had, ok := g.read[row]
	if had < 0 || !ok && len(g.read) == ModesSize/modeEntry {
		return
	}
	if g.read[row] = had + n; g.read[row] < min(size/2, reallyRead) {
		return
	}
	g.read[row] = -1
	g.todo = append(g.todo, row)
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

func (g *grow) next() (row tree.Row, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.todo) == 0 {
		return 0, false
	}
	row, g.todo = g.todo[0], g.todo[1:]
	return row, true
}

// makeBacking makes the backing files of what was really read, one at a time, while nobody reads. It sleeps without waking up
// while there is nothing to do.
func (s *Server) makeBacking(ctx context.Context) {
	if s.grow == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.grow.wake:
		}
		for row, ok := s.grow.next(); ok; row, ok = s.grow.next() {
			if s.waitQuiet(ctx) != nil {
				return
			}
			content := s.contentOf(row)
			if content == nil || !s.allLocal(content) {
				continue
			}
			if f := s.cfg.Backing.Open(content); f != nil {
				_ = f.Close()
				continue
			}
			err := s.cfg.Backing.Make(content, s.table.Size(row), func(w io.Writer) error { return s.copyContent(ctx, content, w) })
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				s.log.Debug("a large file gets no backing file", "inode", row.Node(), "cause", err)
				continue
			}
			s.stats.backed.Add(1)
		}
	}
}

// waitQuiet waits until readers have been quiet.
func (s *Server) waitQuiet(ctx context.Context) error {
	for s.recorder.silence() < s.cfg.Quiet {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(max(s.cfg.Quiet-s.recorder.silence(), time.Millisecond)):
		}
	}
	return ctx.Err()
}

// allLocal says whether content can be read without the network.
func (s *Server) allLocal(content []ProfileRange) bool {
	if s.local == nil {
		return false
	}
	for _, c := range content {
		l := s.layers[c.Layer]
		lo, hi := l.Ztoc.SpansOf(ztoc.Range{Start: c.Start, End: c.End})
		for i := lo; i < hi; i++ {
			if !s.local.Local(l.Ref, l.Ztoc.Span(i).Blob) {
				return false
			}
		}
	}
	return true
}

// copyContent writes content to w: of spans only, each of which was verified when it was inflated. It pauses while readers are
// busy.
func (s *Server) copyContent(ctx context.Context, content []ProfileRange, w io.Writer) error {
	for _, c := range content {
		z := s.layers[c.Layer].Ztoc
		lo, hi := z.SpansOf(ztoc.Range{Start: c.Start, End: c.End})
		for i := lo; i < hi; i++ {
			if err := s.waitQuiet(ctx); err != nil {
				return err
			}
			u, err := s.acquire(ctx, unitOf(c.Layer, i))
			if err != nil {
				return err
			}
			out := z.Span(i).Out
			_, err = w.Write(u.buf[max(c.Start-out.Start, 0) : min(c.End, out.End)-out.Start])
			s.unpin([]*unit{u})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
