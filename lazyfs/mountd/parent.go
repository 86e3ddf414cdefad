package mountd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// Limits of patience.
const (
	firstAnswer = 30 * time.Second // from mounting until the root directory answers
	serverWait  = 3 * time.Second  // for a server to end by itself when the mount does
	unmountWait = 20 * time.Second
	adoptWait   = 30 * time.Second // for a new parent to take over
	upgradeWait = time.Minute      // for the processes of a new program to get ready
)

// parent is the process that holds a mount together. Everything is used by its main goroutine only, except what
// says otherwise.
type parent struct {
	log    *slog.Logger
	client *pipe // the command, until the mount is ready
	start  message

	kit  *kit // before there is a mount, the slots only
	st   standing
	live bool // there is a mount: kit and st are whole

	events  chan event
	server  *server
	control net.Listener // nil where there is none
	upgrade *upgrade     // nil but while one is tried
	standby *standby     // nil but in a parent that another gets ready to be replaced by
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
	respawn bool  // time to start a server
	ready   error // outcome of looking at the root
	looked  bool
	ask     *asker // somebody at the control socket

	before    *message // of the parent that this one is to replace; of no kind: it is gone
	successor *message // of the parent that is to replace this one; of no kind: it is gone
	up        *upgrade // to whom successor belongs
}

// A server is the process that serves, as its parent sees it: its child, or one that it found when it took over.
type server struct {
	pipe *pipe
	proc *os.Process
	last *message // kindEnded or kindFailed, when it has said that
}

func runParent(client *pipe, log *slog.Logger, code func(error) int) error {
	runtime.GOMAXPROCS(2) // it waits, mostly
	p := &parent{log: log, events: make(chan event, 16)}
	m, files, err := client.read()
	if err != nil {
		return err
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM)
	go func() {
		<-sig
		p.events <- event{signal: true}
	}()
	switch m.Kind {
	case kindStart:
		err = p.begin(client, m)
	case kindAdopt:
		err = p.adopt(client, m, files)
	default:
		return fmt.Errorf("%q is no way to start", m.Kind)
	}
	if err == nil {
		err = p.run()
	}
	switch {
	case errors.Is(err, errHandedOver):
		return nil
	case p.standby != nil:
		p.step(err)
		return nil
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

// begin starts what will be a mount.
func (p *parent) begin(client *pipe, m message) error {
	p.client, p.start, p.kit = client, m, &kit{}
	var err error
	if p.kit.slots, err = newSlots(); err != nil {
		return err
	}
	go func() {
		_, _, _ = client.read() // says nothing more; ends when the command does or the socket is closed
		p.events <- event{client: true}
	}()
	return p.spawn(p.start)
}

// spawn starts a server with a start message.
func (p *parent) spawn(m message, files ...*os.File) error {
	ours, theirs, err := newPipe()
	if err != nil {
		return err
	}
	cmd := process(roleServer, p.start.Dir, "", os.Stderr, theirs)
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		ours.Close()
		return fmt.Errorf("start a server: %w", err)
	}
	go cmd.Wait() //nolint:errcheck // it tells how it ended, or does not
	s := &server{pipe: ours, proc: cmd.Process}
	p.watch(s)
	return s.pipe.write(m, files...)
}

// watch makes s the server.
func (p *parent) watch(s *server) {
	p.server = s
	go func() {
		for {
			m, f, err := s.pipe.read()
			if err != nil {
				// All its threads are gone, or in the kernel on their way out: nothing of it touches the slots any more.
				p.events <- event{from: s, died: err}
				return
			}
			p.events <- event{from: s, message: m, files: f}
		}
	}()
}

// again starts another server of a live mount.
func (p *parent) again(standby bool) error {
	m := p.st.Start
	m.Kind, m.Again, m.State, m.Standby = kindStart, true, p.st.State, standby
	var files []*os.File
	m.Files, files = p.kit.pack(false)
	return p.spawn(m, files...)
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
		closeAll(e.files)
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
		return p.ready()
	case e.mounts:
		if p.live && !p.stillMounted() {
			p.linger()
		}
	case e.linger:
		p.log.Warn("processes still use what was unmounted: ending the connection")
		return errGone
	case e.signal:
		return errGone
	case e.respawn:
		if p.server == nil && (p.upgrade == nil || !p.upgrade.over) {
			return p.again(false)
		}
	case e.ask != nil:
		p.answer(e.ask)
	case e.before != nil:
		return p.beforeSaid(*e.before)
	case e.successor != nil:
		return p.successorSaid(e.up, *e.successor)
	}
	return nil
}

func (p *parent) linger() {
	time.AfterFunc(p.start.Linger, func() { p.events <- event{linger: true} })
}

func (p *parent) ready() error {
	// The server first: from now on it does not end with its parent, as nobody waits for Start any more.
	if err := p.server.pipe.write(message{Kind: kindReady}); err != nil {
		return err
	}
	err := p.client.write(message{Kind: kindReady, PID: os.Getpid()})
	p.client.Close()
	p.client = nil
	return err
}

func (p *parent) serverSaid(e event) error {
	m := e.message
	if m.Kind != kindBuilt || p.live {
		closeAll(e.files)
	}
	switch m.Kind {
	case kindEvent:
		if p.client != nil {
			return p.client.write(m)
		}
	case kindFailed:
		if !p.live {
			return &Error{m.Error, m.Code}
		}
		p.server.last = &m
		if p.standby != nil {
			return errors.New(m.Error) // it cannot read what is there
		}
	case kindEnded:
		if p.server.last == nil {
			p.server.last = &m
		}
	case kindBuilt:
		switch {
		case p.standby != nil:
			return p.standby.before.write(message{Kind: kindBuilt})
		case p.live: // it serves by itself
		default:
			if err := p.mount(e); err != nil {
				return err
			}
			m := message{Kind: kindServe}
			var files []*os.File
			m.Files, files = p.kit.pack(false)
			return p.server.pipe.write(m, files...)
		}
	case kindServing:
		if p.client != nil {
			go p.look()
		}
	}
	return nil
}

// mount mounts what the first server has built.
func (p *parent) mount(e event) error {
	if len(e.files) > 0 {
		p.kit.table = e.files[0]
	}
	compat, err := lazyfs.ParseCompat(os.Getenv(lazyfs.CompatVariable))
	if err != nil {
		return err
	}
	if err := p.kit.renew(); err != nil {
		return err
	}
	if p.kit.dev, err = lazyfs.Mount(context.Background(), p.start.Dir, e.message.Mount); err != nil {
		return err
	}
	p.st = standing{Version: standingVersion, Slots: lazyfs.SlotsVersion, Start: p.start, State: e.message.State}
	p.live = true
	if p.st.Conn, err = lazyfs.Mounted(p.start.Dir); err != nil {
		return err
	}
	if p.st.Init, err = lazyfs.Negotiate(p.kit.dev, compat, e.message.Mount.Passthrough); err != nil {
		return err
	}
	if err := p.st.Conn.SetReadahead(p.start.Ahead); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
		p.log.Debug("readahead stays as it is", "error", err)
	}
	if err := p.kit.keep(p.st); err != nil {
		return err
	}
	p.listen()
	return p.watchMounts()
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

// watchMounts has changes of the mount table told. In between the goroutine sleeps in the kernel.
func (p *parent) watchMounts() error {
	// Not an *os.File: the runtime would poll it too, and each change shows to one poller only.
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open /proc/self/mountinfo", err)
	}
	go func() {
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
	}()
	return nil
}

func (p *parent) stillMounted() bool {
	c, err := lazyfs.Mounted(p.start.Dir)
	return err == nil && c.Minor == p.st.Conn.Minor
}

// serverDied starts another under a live mount.
func (p *parent) serverDied(cause error) error {
	s := p.server
	s.pipe.Close()
	p.server = nil
	switch {
	case !p.live:
		return fmt.Errorf("the server ended before it was ready: %w", cause)
	case p.standby != nil:
		return fmt.Errorf("its server ended before it was ready: %w", cause)
	case p.upgrade != nil && p.upgrade.over:
		return p.handOver()
	case s.last != nil && s.last.Error == "":
		return errGone // it ended by itself, because the mount did
	case s.last != nil:
		cause = errors.New(s.last.Error)
	}
	if errors.Is(cause, io.EOF) {
		cause = errors.New("it was killed, or crashed: then its last words are above")
	}
	if p.client != nil {
		return fmt.Errorf("the server died before the mount was ready: %w", cause)
	}
	wait, err := p.kit.mourn(roleServer)
	if err != nil {
		return fmt.Errorf("%w, last: %w", err, cause)
	}
	p.log.Warn("the server died, starting another", "cause", cause)
	if wait > 0 {
		time.AfterFunc(wait, func() { p.events <- event{respawn: true} })
		return nil
	}
	return p.again(false)
}

// clearUp leaves nothing behind.
func (p *parent) clearUp() {
	if p.control != nil {
		p.control.Close()
	}
	if p.live && p.stillMounted() {
		if p.server == nil {
			// Nobody answers and nobody will: who waits gets an error, and so it can be unmounted.
			_ = lazyfs.Abort(p.start.Dir)
		}
		if err := release(p.st); err != nil {
			p.log.Error("unmount", "error", err)
		}
	}
	if p.server != nil {
		// It takes its temporary files along.
		_ = p.server.pipe.write(message{Kind: kindEnd})
		kill := time.After(serverWait)
		for gone := time.After(serverWait + 5*time.Second); p.server != nil; {
			select {
			case e := <-p.events:
				if e.from == p.server && e.died != nil {
					p.server = nil
				}
			case <-kill:
				_ = p.server.proc.Kill()
			case <-gone: // it hangs in the kernel; it will die when it can
				p.server = nil
			}
		}
	}
	if p.kit != nil {
		p.kit.Close() // with the server dead and without a keeper this was the last: the kernel ends whatever still waits
	}
}

// process is this executable, or exe, as one of the processes of a mount; conn becomes its descriptor 3.
func process(role, dir, exe string, log, conn *os.File) *exec.Cmd {
	if exe == "" {
		exe = "/proc/self/exe"
	}
	cmd := exec.Command(exe)
	cmd.Args = []string{processName, role, dir}
	if log != nil {
		cmd.Stdout, cmd.Stderr = log, log
	}
	cmd.ExtraFiles = []*os.File{conn}
	if role == roleParent {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		cmd.Dir = "/"
	}
	return cmd
}
