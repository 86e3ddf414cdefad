package mountd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// Limits of the parent's patience.
const (
	maxDeaths    = 5                // of servers
	deathsWithin = 30 * time.Second // of each other
	firstAnswer  = 30 * time.Second // from mounting until the root directory answers
	serverWait   = 3 * time.Second  // for a server to end by itself when the parent does
)

// parent is the process that holds a mount together. Everything is used by its main goroutine only, except what
// says otherwise.
type parent struct {
	log    *slog.Logger
	client *pipe // the command, until the mount is ready
	start  message
	slots  *os.File

	// Known once the first server has built.
	state []byte
	table *os.File
	dev   *os.File
	init  lazyfs.Init
	conn  lazyfs.Connection

	events chan event
	server *server
	deaths []time.Time
}

// An event is something that happens to the parent; sent by goroutines that live as long as what they watch.
type event struct {
	from    *server // of a server, which may have been replaced since
	message message
	files   []*os.File
	died    error // the server's process has ended
	client  bool  // the command is gone
	mounts  bool  // the mount table changed
	signal  bool  // somebody wants us to end
	linger  bool  // the time of those who stayed inside is over
	ready   error // outcome of looking at the root
	looked  bool
}

type server struct {
	pipe *pipe
	cmd  *exec.Cmd
}

func runParent(client *pipe, log *slog.Logger, code func(error) int) error {
	p := &parent{log: log, client: client, events: make(chan event, 16)}
	var err error
	if p.start, _, err = client.read(); err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("muster-requests", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	p.slots = os.NewFile(uintptr(fd), "slots")
	if err := p.slots.Truncate(lazyfs.SlotsSize); err != nil {
		return err
	}
	go func() {
		_, _, _ = client.read() // says nothing more; ends when the command does or the socket is closed
		p.events <- event{client: true}
	}()
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM)
	go func() {
		<-sig
		p.events <- event{signal: true}
	}()
	err = p.spawn()
	if err == nil {
		err = p.run()
	}
	p.clearUp()
	if err != nil && p.client != nil {
		m := message{Kind: kindFailed, Error: err.Error(), Code: code(err)}
		if e := (*Error)(nil); errors.As(err, &e) {
			m.Code = e.Code
		}
		_ = p.client.write(m)
		return nil
	}
	return err
}

// spawn starts a server.
func (p *parent) spawn() error {
	ours, theirs, err := newPipe()
	if err != nil {
		return err
	}
	s := &server{pipe: ours, cmd: process("server", p.start.Dir, os.Stderr, theirs, p.slots)}
	err = s.cmd.Start()
	theirs.Close()
	if err != nil {
		ours.Close()
		return fmt.Errorf("start a server: %w", err)
	}
	p.server = s
	go func() {
		for {
			m, f, err := s.pipe.read()
			if err != nil {
				break
			}
			p.events <- event{from: s, message: m, files: f}
		}
		err := s.cmd.Wait() // all its threads are gone: nothing of it touches the slots any more
		if err == nil {
			err = io.EOF
		}
		p.events <- event{from: s, died: err}
	}()
	m := p.start
	var files []*os.File
	if p.dev != nil {
		m.Again, m.State = true, p.state
		if p.table != nil {
			files = append(files, p.table)
		}
	}
	return s.pipe.write(m, files...)
}

// errGone ends the parent in the ordinary way.
var errGone = errors.New("unmounted")

func (p *parent) run() error {
	for e := range p.events {
		err := p.handle(e)
		if errors.Is(err, errGone) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *parent) handle(e event) error {
	switch {
	case e.from != nil && e.from != p.server:
		return nil // last words of one that was replaced
	case e.died != nil:
		return p.serverDied(e.died)
	case e.from != nil:
		return p.serverSaid(e)
	case e.client:
		if p.client != nil {
			return errors.New("the command was ended before the mount was ready")
		}
	case e.looked:
		if e.ready != nil {
			return fmt.Errorf("mount %s: the root directory does not answer: %w", p.start.Dir, e.ready)
		}
		err := p.client.write(message{Kind: kindReady, PID: os.Getpid()})
		p.client.Close()
		p.client = nil
		return err
	case e.mounts:
		if p.dev != nil && !p.stillMounted() {
			time.AfterFunc(p.start.Linger, func() { p.events <- event{linger: true} })
		}
	case e.linger:
		p.log.Warn("processes still use what was unmounted: ending the connection")
		return errGone
	case e.signal:
		return errGone
	}
	return nil
}

func (p *parent) serverSaid(e event) error {
	switch e.message.Kind {
	case kindEvent:
		if p.client != nil {
			return p.client.write(e.message)
		}
	case kindFailed:
		return &Error{e.message.Error, e.message.Code}
	case kindBuilt:
		if p.dev == nil {
			if err := p.mount(e); err != nil {
				return err
			}
		}
		return p.server.pipe.write(message{Kind: kindServe, Init: p.init}, p.dev)
	case kindServing:
		if p.client != nil {
			go p.look()
		}
	}
	return nil
}

// mount mounts what the first server has built.
func (p *parent) mount(e event) error {
	p.state = e.message.State
	if len(e.files) > 0 {
		p.table = e.files[0]
	}
	compat, err := lazyfs.ParseCompat(os.Getenv(lazyfs.CompatVariable))
	if err != nil {
		return err
	}
	dev, err := lazyfs.Mount(context.Background(), p.start.Dir, e.message.Mount)
	if err != nil {
		return err
	}
	p.dev = dev
	if p.init, err = lazyfs.Negotiate(dev, compat); err != nil {
		return err
	}
	if p.conn, err = lazyfs.Mounted(p.start.Dir); err != nil {
		return err
	}
	if err := p.conn.SetReadahead(p.start.Ahead); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
		p.log.Debug("readahead stays as it is", "error", err)
	}
	// Not an *os.File: the runtime would poll it too, and each change shows to one poller only.
	table, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open /proc/self/mountinfo", err)
	}
	go p.watchMounts(table)
	return nil
}

// look reports whether the tree answers.
func (p *parent) look() {
	done := make(chan error, 1)
	go func() {
		_, err := os.Stat(p.start.Dir)
		done <- err
	}()
	var err error
	select {
	case err = <-done:
	case <-time.After(firstAnswer):
		err = context.DeadlineExceeded
	}
	p.events <- event{looked: true, ready: err}
}

// watchMounts tells of changes of the mount table since fd was opened. It sleeps in the kernel in between.
func (p *parent) watchMounts(fd int) {
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		p.events <- event{mounts: true}
	}
}

func (p *parent) stillMounted() bool {
	c, err := lazyfs.Mounted(p.start.Dir)
	return err == nil && c.Minor == p.conn.Minor
}

// serverDied starts another under a live mount.
func (p *parent) serverDied(cause error) error {
	p.server.pipe.Close()
	p.server = nil
	if p.dev == nil {
		return fmt.Errorf("the server ended before it was ready: %w", cause)
	}
	if errors.Is(cause, io.EOF) {
		return errGone // it ended by itself, because the mount did
	}
	if p.client != nil {
		return fmt.Errorf("the server died before the mount was ready: %w", cause)
	}
	now := time.Now()
	p.deaths = append(p.deaths, now)
	for now.Sub(p.deaths[0]) > deathsWithin {
		p.deaths = p.deaths[1:]
	}
	if len(p.deaths) >= maxDeaths {
		return fmt.Errorf("the server died %d times within %v, last: %w", len(p.deaths), deathsWithin, cause)
	}
	p.log.Warn("the server died, starting another", "cause", cause)
	return p.spawn()
}

// clearUp leaves nothing behind.
func (p *parent) clearUp() {
	if p.dev != nil && p.stillMounted() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if _, err := lazyfs.Unmount(ctx, p.start.Dir); err != nil {
			p.log.Error("unmount", "error", err)
		}
	}
	if p.server != nil {
		// It sees that nobody is there, and takes its temporary files along.
		p.server.pipe.Close()
		kill := time.After(serverWait)
		for gone := time.After(serverWait + 5*time.Second); p.server != nil; {
			select {
			case e := <-p.events:
				if e.from == p.server && e.died != nil {
					p.server = nil
				}
			case <-kill:
				_ = p.server.cmd.Process.Kill()
			case <-gone: // it hangs in the kernel; it will die when it can
				p.server = nil
			}
		}
	}
	if p.dev != nil {
		p.dev.Close() // with the server dead this was the last: the kernel ends whatever still waits
	}
}
