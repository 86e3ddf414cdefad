package mountd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// A Builder finds what a request asks for, in the serving process. It runs before anything is mounted the first
// time, and again in each server that replaces a dead one.
type Builder func(ctx context.Context, r Request) (*Source, error)

// A Request is what a Builder gets.
type Request struct {
	// Request is Options.Request.
	Request []byte
	// State is Source.State of the server before this one, nil in the first. When it is set a mount is alive and
	// its users wait: build from State and Table alone, and quickly. The one before may have been of another version of
	// the program: what cannot be read is an error, which leaves the one before running if it lives.
	State []byte
	// Table is Source.Table of the server before this one, nil in the first. Its offset is nobody's.
	Table *os.File
	// Report sends progress to Options.OnEvent. It does nothing once the mount is ready.
	Report func([]byte)
}

// A Source is what is to be served.
type Source struct {
	// Config as lazyfs wants it. Init, Slots, Modes and Compat are filled in; so is Log when nil.
	Config lazyfs.Config
	// Mount says how the tree is mounted. Only the first server's counts. Passthrough is filled in.
	Mount lazyfs.MountOptions
	// Table is the file that Config.Table lies in. The parent keeps it for successors.
	Table *os.File
	// State is what a successor needs to build the same: at most 32 KiB.
	State []byte
	// Serving is called in a goroutine of its own when the first server of a mount serves, not in its successors. Its context ends with
	// serving, and Close waits until it has returned. nil: nothing to do.
	Serving func(ctx context.Context, s *lazyfs.Server)
	// Close is called when serving has ended; nil: nothing to do.
	Close func() error
}

// Main has to be called at the very beginning of main. In a process of a mount it does not return. code turns a
// Builder's error into the exit code that Error.Code carries to the command.
func Main(build Builder, code func(error) int) {
	if len(os.Args) != 3 || os.Args[0] != processName {
		return
	}
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE, syscall.SIGTTOU)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("mount", os.Args[2])
	conn, err := inherited(3)
	if err == nil {
		switch os.Args[1] {
		case roleParent:
			err = runParent(conn, log, code)
		case roleServer:
			err = runServer(conn, log, build, code)
		default:
			err = fmt.Errorf("unknown role %q", os.Args[1])
		}
	}
	if err != nil {
		log.Error(os.Args[1]+" ended", "error", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A serverProcess answers the kernel, and has all that its mount is, so that it can start another parent when the one
// it has dies.
type serverProcess struct {
	log   *slog.Logger
	start message

	mu     sync.Mutex
	parent *pipe // the present one

	// Used by the goroutine that listens to the parent only.
	kit  *kit // nil until there is a mount
	sure bool // the mount was ready once: from then on it outlives its parent

	serve chan *kit // gets the kit when it is time to serve
	end   context.CancelCauseFunc
}

var (
	errOrphan = errors.New("the parent is gone")
	errTold   = errors.New("the parent says that the mount is over")
)

func runServer(conn *pipe, log *slog.Logger, build Builder, code func(error) int) error {
	signal.Ignore(syscall.SIGTERM) // the parent decides
	beQuiet()
	start, files, err := conn.read()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	p := &serverProcess{log: log, start: start, parent: conn, serve: make(chan *kit, 1), end: cancel}
	r := Request{Request: start.Request, Report: func(b []byte) { _ = p.say(message{Kind: kindEvent, Event: b}) }}
	if start.Again {
		if p.kit, err = unpack(start, files); err != nil {
			return err
		}
		r.State, r.Table = start.State, p.kit.table
		p.sure = !start.Standby
		if p.sure {
			p.serve <- p.kit
		}
	}
	go p.listen()
	err = p.run(ctx, build, r, code)
	m := message{Kind: kindEnded}
	if err != nil && !errors.Is(err, errTold) {
		m.Error = err.Error()
	}
	_ = p.say(m)
	return err
}

// say writes to the present parent. A message that nobody gets is lost: a new parent is told what it needs to know.
func (p *serverProcess) say(m message, files ...*os.File) error {
	p.mu.Lock()
	c := p.parent
	p.mu.Unlock()
	return c.write(m, files...)
}

// run builds and serves. It returns when the mount is gone, or nil when it was said that building failed.
func (p *serverProcess) run(ctx context.Context, build Builder, r Request, code func(error) int) error {
	src, err := build(ctx, r)
	if err != nil {
		return p.say(message{Kind: kindFailed, Error: err.Error(), Code: code(err)})
	}
	if src.Close != nil {
		defer src.Close()
	}
	if !p.start.Again {
		src.Mount.Passthrough = lazyfs.HasBacking(src.Config)
	}
	m, files := message{Kind: kindBuilt, Mount: src.Mount, State: src.State}, []*os.File(nil)
	if src.Table != nil {
		m.Files, files = []string{"table"}, []*os.File{src.Table}
	}
	if err := p.say(m, files...); err != nil && !p.start.Again {
		return err
	}
	var k *kit
	select {
	case k = <-p.serve:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	st, err := k.standing()
	if err != nil {
		return err
	}
	cfg := src.Config
	cfg.Init = st.Init
	if cfg.Slots, err = mapSlots(k.slots); err != nil {
		return err
	}
	if cfg.Modes, err = mapModes(k.slots); err != nil {
		return err
	}
	if cfg.Log == nil {
		cfg.Log = p.log
	}
	if cfg.Inflaters == 0 {
		cfg.Inflaters = inflaters()
	}
	s, err := lazyfs.New(cfg)
	if err != nil {
		return p.say(message{Kind: kindFailed, Error: err.Error(), Code: code(err)})
	}
	_ = p.say(message{Kind: kindServing})
	if src.Serving != nil && !p.start.Again {
		done := make(chan struct{})
		serving, stop := context.WithCancel(ctx)
		go func() { defer close(done); src.Serving(serving, s) }()
		defer func() { stop(); <-done }() // before Close, which was deferred before
	}
	return p.serveUntilOrphan(ctx, s, k, st)
}

// serveUntilOrphan serves until the mount is gone or over. When no parent can be had it unmounts, and serves those who
// are still inside as long as they may linger.
func (p *serverProcess) serveUntilOrphan(ctx context.Context, s *lazyfs.Server, k *kit, st standing) error {
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.WithoutCancel(ctx), k.dev) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	if errors.Is(context.Cause(ctx), errTold) {
		return nil // the connection ends with this process
	}
	p.log.Error("unmounting", "cause", context.Cause(ctx))
	if err := release(st); err != nil {
		return err
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(st.Start.Linger):
		return errOrphan
	}
}

// release unmounts what nobody will look after any more, unless that was done.
func release(st standing) error {
	if c, err := lazyfs.Mounted(st.Start.Dir); err != nil || c.Minor != st.Conn.Minor {
		return nil //nolint:nilerr // it is not mounted
	}
	ctx, cancel := context.WithTimeout(context.Background(), unmountWait)
	defer cancel()
	_, err := lazyfs.Unmount(ctx, st.Start.Dir)
	return err
}

// listen does what the parent says, and sees to it that there is one.
func (p *serverProcess) listen() {
	conn := p.parent
	for {
		m, files, err := conn.read()
		if err != nil {
			_ = conn.Close()
			if p.kit == nil || !p.sure {
				p.end(errOrphan)
				return
			}
			if conn, err = p.another(); err != nil {
				p.end(fmt.Errorf("%w: %w", errOrphan, err))
				return
			}
			continue
		}
		switch m.Kind {
		case kindServe:
			if p.kit == nil {
				if p.kit, err = unpack(m, files); err != nil {
					p.end(err)
					return
				}
			} else {
				closeAll(files)
				p.sure = true
			}
			p.serve <- p.kit
		case kindReady:
			p.sure = true
		case kindEnd:
			p.end(errTold)
			return
		case kindHere: // of a parent that this server started
		default:
			closeAll(files)
		}
	}
}

// another starts a parent in place of one that died, and returns when it has taken over. The mount answers meanwhile.
func (p *serverProcess) another() (*pipe, error) {
	give, wait := time.Now().Add(adoptWait), 100*time.Millisecond
	for {
		if _, err := p.kit.mourn(roleParent); err != nil {
			return nil, err
		}
		p.log.Warn("the parent died, starting another")
		conn, err := replaceParent("", p.start.Dir, os.Stderr, p.kit, message{Kind: kindAdopt, PID: os.Getpid()}, time.Until(give))
		if err == nil {
			p.mu.Lock()
			p.parent = conn
			p.mu.Unlock()
			return conn, nil
		}
		p.log.Error("start a parent", "error", err)
		if time.Now().Add(wait).After(give) {
			return nil, fmt.Errorf("no new one for %v, last: %w", adoptWait, err)
		}
		time.Sleep(wait)
		wait = min(2*wait, 2*time.Second)
	}
}

func mapSlots(f *os.File) (*lazyfs.Slots, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, lazyfs.SlotsSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory for requests: %w", err)
	}
	return lazyfs.NewSharedSlots(mem)
}

// mapModes maps how files were opened. A mount that a program without passthrough made has no such memory, and needs none.
func mapModes(f *os.File) ([]byte, error) {
	if st, err := f.Stat(); err != nil || st.Size() < modesOffset+lazyfs.ModesSize {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), modesOffset, lazyfs.ModesSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map how files were opened: %w", err)
	}
	return mem, nil
}
