package mountd

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// startParent starts a parent of exe (empty: this program) for the mount on dir and gives it the mount with m.
func startParent(exe, dir string, log *os.File, k *kit, m message) (*pipe, *os.Process, error) {
	ours, theirs, err := newPipe()
	if err != nil {
		return nil, nil, err
	}
	cmd := process(roleParent, dir, exe, log, theirs)
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		ours.Close()
		return nil, nil, fmt.Errorf("start a parent: %w", err)
	}
	go cmd.Wait() //nolint:errcheck // it tells how it ended, or does not
	var files []*os.File
	m.Files, files = k.pack(false)
	if err := ours.write(m, files...); err != nil {
		ours.Close()
		return nil, nil, err
	}
	return ours, cmd.Process, nil
}

// replaceParent is startParent that waits until the new one has taken over.
func replaceParent(exe, dir string, log *os.File, k *kit, m message, within time.Duration) (*pipe, error) {
	conn, proc, err := startParent(exe, dir, log, k, m)
	if err != nil {
		return nil, err
	}
	conn.wait(within)
	got, files, err := conn.read()
	closeAll(files)
	switch {
	case err != nil:
		err = fmt.Errorf("the new parent ended before it took over: %w", err)
	case got.Kind == kindFailed:
		err = errors.New(got.Error)
	case got.Kind != kindHere:
		err = fmt.Errorf("the new parent said %q", got.Kind)
	}
	if err != nil {
		_ = proc.Kill()
		conn.Close()
		return nil, err
	}
	conn.wait(0)
	return conn, nil
}

// A standby is what a parent knows of those that it is to replace.
type standby struct {
	before *pipe
	server int // pidfd or, where the kernel has none, -1
	pid    int
}

// adopt makes p the parent of a mount that there is.
func (p *parent) adopt(conn *pipe, m message, files []*os.File) (err error) {
	if m.Standby {
		p.standby = &standby{before: conn, server: -1, pid: m.PID}
		if fd, err := unix.PidfdOpen(m.PID, 0); err == nil {
			p.standby.server = fd
		}
	}
	if p.kit, err = unpack(m, files); err != nil {
		return err
	}
	if p.st, err = p.kit.standing(); err != nil {
		if !m.Standby {
			_ = conn.write(message{Kind: kindFailed, Error: err.Error()})
		}
		return err
	}
	p.start, p.live = p.st.Start, true
	switch {
	case m.Standby:
		go func() {
			for {
				m, files, err := conn.read()
				closeAll(files)
				if err != nil {
					m = message{}
				}
				p.events <- event{before: &m}
				if err != nil {
					return
				}
			}
		}()
		return p.again(true)
	case m.PID != 0:
		proc, err := os.FindProcess(m.PID)
		if err != nil {
			return err
		}
		p.watch(&server{pipe: conn, proc: proc})
		if err := conn.write(message{Kind: kindHere, PID: os.Getpid()}); err != nil {
			return nil //nolint:nilerr // it died: the goroutine that reads tells
		}
	default:
		if err := p.again(false); err != nil {
			return err
		}
		_ = conn.write(message{Kind: kindHere, PID: os.Getpid()})
		conn.Close()
	}
	return p.settle()
}

// settle begins what the parent of a live mount does beside its server.
func (p *parent) settle() error {
	p.listen()
	err := p.watchMounts()
	if err == nil && !p.stillMounted() {
		p.linger()
	}
	return err
}

// beforeSaid goes on when the parent that this one replaces says so, or has died after its server.
func (p *parent) beforeSaid(m message) error {
	switch {
	case p.standby == nil:
		return nil
	case m.Kind == kindServe:
	case m.Kind == "" && p.standby.serverEnded():
	case m.Kind == "":
		return errors.New("it was not needed") // the old server makes a parent of its own version
	default:
		return nil
	}
	before := p.standby.before
	p.standby = nil
	err := p.server.pipe.write(message{Kind: kindServe})
	if err == nil {
		_ = before.write(message{Kind: kindServing, PID: os.Getpid()})
	} // else it is dead, and will be replaced
	before.Close()
	return p.settle()
}

// serverEnded says whether the old server is dead. Its parent may have died just when it had killed it, so it may take
// a moment.
func (s *standby) serverEnded() bool {
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if s.server >= 0 {
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.server), Events: unix.POLLIN}}, 0); err == nil && n > 0 {
				return true
			}
			continue
		}
		if errors.Is(unix.Kill(s.pid, 0), unix.ESRCH) {
			return true
		}
	}
	return false
}

// step is how a parent that was not needed, or is not able, ends: the mount is others'.
func (p *parent) step(why error) {
	if why == nil {
		why = errors.New("it was ended")
	}
	_ = p.standby.before.write(message{Kind: kindFailed, Error: why.Error()})
	if p.server != nil {
		_ = p.server.proc.Kill()
	}
}

// An upgrade is an attempt to have another program's processes take over.
type upgrade struct {
	asker *asker
	pipe  *pipe // to the new parent
	proc  *os.Process
	limit *time.Timer
	over  bool // ours is over: the server was killed, and will not be replaced by us
	given bool // the new ones were told to go on
}

// beginUpgrade starts an upgrade to the program that a brought along.
func (p *parent) beginUpgrade(a *asker) error {
	switch {
	case p.upgrade != nil:
		return errors.New("another upgrade is going on")
	case p.client != nil || p.standby != nil || p.server == nil:
		return errors.New("the mount is just being started: try again")
	case len(a.files) != 1:
		return errors.New("no program came along")
	}
	exe, err := pathOf(a.files[0])
	if err != nil {
		return err
	}
	u := &upgrade{asker: a}
	u.pipe, u.proc, err = startParent(exe, p.start.Dir, os.Stderr, p.kit, message{Kind: kindAdopt, Standby: true, PID: p.server.proc.Pid})
	if err != nil {
		return err
	}
	p.upgrade = u
	u.limit = time.AfterFunc(upgradeWait, func() { _ = u.proc.Kill() })
	go func() {
		for {
			m, files, err := u.pipe.read()
			closeAll(files)
			if err != nil {
				m = message{}
			}
			p.events <- event{successor: &m, up: u}
			if err != nil {
				return
			}
		}
	}()
	return nil
}

// errHandedOver ends a parent whose mount is another's now.
var errHandedOver = errors.New("handed over")

func (p *parent) successorSaid(u *upgrade, m message) error {
	if u != p.upgrade {
		return nil
	}
	switch {
	case m.Kind == kindBuilt && !u.over:
		// The old server is killed like any that dies: what it has not answered lies in the slots.
		u.limit.Stop()
		u.over = true
		if p.server == nil {
			return p.handOver()
		}
		if err := p.server.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			u.over = false
			return p.giveUp(u, err)
		}
	case m.Kind == kindServing && u.given:
		u.asker.reply(message{Kind: kindReady, PID: m.PID})
		return errHandedOver
	case m.Kind == kindFailed && !u.over:
		return p.giveUp(u, errors.New(m.Error))
	case m.Kind == "" && !u.over:
		return p.giveUp(u, errors.New("the new program's process ended; is it a muster that knows upgrades?"))
	case m.Kind == "":
		// The new parent died in between. If it had told its server to serve, that one starts another.
		time.Sleep(time.Second)
		if fds := processesOf(p.start.Dir, roleServer); len(fds) > 0 {
			closeFDs(fds)
			u.asker.reply(message{Kind: kindReady})
			return errHandedOver
		}
		u.over = false
		err := p.giveUp(u, errors.New("the new program's parent died"))
		if p.server == nil {
			err = errors.Join(err, p.again(false))
		}
		return err
	}
	return nil
}

// giveUp goes on without u, and says why.
func (p *parent) giveUp(u *upgrade, why error) error {
	p.log.Warn("not upgraded", "error", why)
	u.limit.Stop()
	_ = u.proc.Kill()
	u.pipe.Close()
	u.asker.reply(message{Kind: kindRefused, Error: why.Error()})
	p.upgrade = nil
	return nil
}

// handOver tells the new parent to go on: the old server is dead.
func (p *parent) handOver() error {
	u := p.upgrade
	u.given = true
	if p.control != nil {
		p.control.Close() // the name is the new one's now
	}
	if err := u.pipe.write(message{Kind: kindServe}); err != nil {
		p.log.Warn("the new parent is gone", "error", err) // what reads from it says so too
	}
	return nil
}
