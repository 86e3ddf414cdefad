package mountd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
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
	// its users wait: build from State and Table alone, and quickly.
	State []byte
	// Table is Source.Table of the server before this one, nil in the first. Its offset is nobody's.
	Table *os.File
	// Report sends progress to Options.OnEvent. It does nothing once the mount is ready.
	Report func([]byte)
}

// A Source is what is to be served.
type Source struct {
	// Config as lazyfs wants it. Init, Slots and Compat are filled in; so is Log when nil.
	Config lazyfs.Config
	// Mount says how the tree is mounted. Only the first server's counts.
	Mount lazyfs.MountOptions
	// Table is the file that Config.Table lies in. The parent keeps it for successors.
	Table *os.File
	// State is what a successor needs to build the same: at most 32 KiB.
	State []byte
	// Serving is called in a goroutine of its own when the first server of a mount serves. Its context ends with
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
		case "parent":
			err = runParent(conn, log, code)
		case "server":
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

// errOrphan ends a server whose parent is gone.
var errOrphan = errors.New("the parent is gone")

func runServer(parent *pipe, log *slog.Logger, build Builder, code func(error) int) error {
	signal.Ignore(syscall.SIGTERM) // the parent decides
	// Requests that need no inflating must not wait for those that do.
	runtime.GOMAXPROCS(runtime.NumCPU() + 2)
	debug.SetMemoryLimit(56 << 20) // of the collected heap, which inflated spans are not in

	start, files, err := parent.read()
	if err != nil {
		return err
	}
	slots, err := mapSlots(os.NewFile(4, "slots"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	serve := make(chan message, 1)
	device := make(chan *os.File, 1)
	go func() {
		for {
			m, f, err := parent.read()
			if err != nil {
				cancel(errOrphan)
				return
			}
			if m.Kind == kindServe && len(f) == 1 {
				device <- f[0]
				serve <- m
			}
		}
	}()

	r := Request{Request: start.Request, Report: func(b []byte) { _ = parent.write(message{Kind: kindEvent, Event: b}) }}
	if start.Again {
		r.State = start.State
		if len(files) > 0 {
			r.Table = files[0]
		}
	}
	src, err := build(ctx, r)
	if err != nil {
		if e := parent.write(message{Kind: kindFailed, Error: err.Error(), Code: code(err)}); e != nil {
			return errors.Join(err, e)
		}
		return nil
	}
	if src.Close != nil {
		defer src.Close()
	}
	var table []*os.File
	if src.Table != nil {
		table = append(table, src.Table)
	}
	if err := parent.write(message{Kind: kindBuilt, Mount: src.Mount, State: src.State}, table...); err != nil {
		return err
	}
	var dev *os.File
	select {
	case dev = <-device:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	cfg := src.Config
	cfg.Init, cfg.Slots = (<-serve).Init, slots
	if cfg.Log == nil {
		cfg.Log = log
	}
	s, err := lazyfs.New(cfg)
	if err != nil {
		_ = parent.write(message{Kind: kindFailed, Error: err.Error(), Code: code(err)})
		return nil
	}
	if err := parent.write(message{Kind: kindServing}); err != nil {
		return err
	}
	if src.Serving != nil && !start.Again {
		done := make(chan struct{})
		serving, stop := context.WithCancel(ctx)
		go func() { defer close(done); src.Serving(serving, s) }()
		defer func() { stop(); <-done }() // before Close, which was deferred before
	}
	return serveUntilOrphan(ctx, s, dev, start, log)
}

// serveUntilOrphan serves until the mount is gone. When the parent dies before, it unmounts, and serves those who are
// still inside as long as they may linger.
func serveUntilOrphan(ctx context.Context, s *lazyfs.Server, dev *os.File, start message, log *slog.Logger) error {
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.WithoutCancel(ctx), dev) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	log.Error("the parent is gone, unmounting")
	un, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := lazyfs.Unmount(un, start.Dir); err != nil {
		return err
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(start.Linger):
		return errOrphan // the connection ends with this process
	}
}

func mapSlots(f *os.File) (*lazyfs.Slots, error) {
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, lazyfs.SlotsSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory for requests: %w", err)
	}
	return lazyfs.NewSharedSlots(mem)
}
