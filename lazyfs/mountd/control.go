package mountd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// The control socket of a mount is held by its parent: an abstract one, so that it ends with its holder, named after the
// device number of the mount, which no other mount of this kernel has. Root and the mount's own user may ask:
//
//	upgrade   with a descriptor of a program: answered by ready, or by refused and why
//	keep      answered by kit, with the mount's descriptors but life, and its program
//
// Who asks sends one packet and gets one.

// controlName is the name of a mount's control socket, as package net writes abstract ones.
func controlName(c lazyfs.Connection) string {
	return fmt.Sprintf("@muster-mount-%d-%d", c.Major, c.Minor)
}

// askWait bounds how long somebody who connects may take to ask, and to take the answer.
const askWait = 5 * time.Second

// An asker is somebody who asked at the control socket, and what he asked.
type asker struct {
	conn  *pipe
	m     message
	files []*os.File
}

// reply answers, once.
func (a *asker) reply(m message, files ...*os.File) {
	a.conn.wait(askWait)
	_ = a.conn.write(m, files...)
	a.conn.Close()
	closeAll(a.files)
}

// listen opens the control socket, as soon as the parent before this one lets go of it.
func (p *parent) listen() {
	name := controlName(p.st.Conn)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: name, Net: "unixpacket"})
	for end := time.Now().Add(time.Second); errors.Is(err, unix.EADDRINUSE) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		l, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: name, Net: "unixpacket"})
	}
	if err != nil {
		p.log.Warn("the mount can neither be upgraded nor kept", "error", err)
		return
	}
	p.control = l
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return // closed
			}
			go func() {
				if a := ask(c); a != nil {
					p.events <- event{ask: a}
				}
			}()
		}
	}()
}

// ask reads what somebody who may ask wants; nil when it is nothing.
func ask(c *net.UnixConn) *asker {
	a := &asker{conn: &pipe{f: c}}
	uid, err := peer(a.conn)
	if err == nil && uid != 0 && uid != uint32(os.Geteuid()) {
		err = unix.EPERM
	}
	if err == nil {
		a.conn.wait(askWait)
		a.m, a.files, err = a.conn.read()
		a.conn.wait(0)
	}
	if err != nil {
		c.Close()
		return nil
	}
	return a
}

// peer is the user at the other end.
func peer(p *pipe) (uid uint32, err error) {
	c, err := p.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := c.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

func (p *parent) answer(a *asker) {
	switch a.m.Kind {
	case kindKeep:
		exe, err := program()
		if err != nil {
			a.reply(message{Kind: kindRefused, Error: err.Error()})
			return
		}
		k := *p.kit
		k.exe = exe
		m := message{Kind: kindKit}
		var files []*os.File
		m.Files, files = k.pack(true)
		a.reply(m, files...)
		exe.Close()
	case kindUpgrade:
		if err := p.beginUpgrade(a); err != nil {
			a.reply(message{Kind: kindRefused, Error: err.Error()})
		}
	default:
		a.reply(message{Kind: kindRefused, Error: fmt.Sprintf("%q is not known here", a.m.Kind)})
	}
}

// request asks the parent of the mount on dir.
func request(ctx context.Context, dir string, m message, files ...*os.File) (got message, with []*os.File, err error) {
	conn, err := lazyfs.Mounted(dir)
	if err != nil {
		return got, nil, fmt.Errorf("nothing of muster is mounted there: %w", err)
	}
	var c net.Conn
	var d net.Dialer
	for end := time.Now().Add(2 * time.Second); ; {
		c, err = d.DialContext(ctx, "unixpacket", controlName(conn))
		if !errors.Is(err, unix.ECONNREFUSED) || time.Now().After(end) {
			break
		}
		time.Sleep(20 * time.Millisecond) // its parent may be just being replaced
	}
	if err != nil {
		return got, nil, fmt.Errorf("%s: its mount does not answer (it is of another network namespace, of a muster without upgrades, or dead): %w", dir, err)
	}
	defer c.Close()
	p := &pipe{f: c.(*net.UnixConn)}
	uid, err := peer(p)
	if err == nil && uid != 0 && uid != uint32(os.Geteuid()) {
		err = fmt.Errorf("%s: user %d pretends to be its mount", dir, uid)
	}
	if err != nil {
		return got, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := p.write(m, files...); err != nil {
		return got, nil, err
	}
	if got, with, err = p.read(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return got, nil, fmt.Errorf("%s: its mount: %w", dir, err)
	}
	if got.Kind == kindRefused {
		closeAll(with)
		return got, nil, fmt.Errorf("%s: refused: %s", dir, got.Error)
	}
	return got, with, nil
}

// Upgrade has the processes of the mount on dir replaced by processes of this program, while it is in use. When this
// program cannot read what the mount is made of it stays as it is, and the error says why.
func Upgrade(ctx context.Context, dir string) error {
	dir, err := resolve(dir)
	if err != nil {
		return err
	}
	exe, err := program()
	if err != nil {
		return err
	}
	defer exe.Close()
	got, files, err := request(ctx, dir, message{Kind: kindUpgrade}, exe)
	closeAll(files)
	if err == nil && got.Kind != kindReady {
		err = fmt.Errorf("%s: its mount said %q", dir, got.Kind)
	}
	return err
}
