package runtime

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A starter starts a process in the assembled root.
type starter struct {
	name   string
	binary string // looked up in PATH; "" needs none
	start  func(s *stage, binary string, p process) (running, error)
}

// A running is a command that was started.
type running struct {
	pid      int      // its own process
	ends     int      // the child of the stage whose end tells the command's: pid, or a runtime that stays above it
	terminal *os.File // the master of its terminal, if it has one
}

var (
	builtin = starter{"builtin", "", (*stage).startBuiltin}

	// The order is the order of preference.
	rootStarters = []starter{
		{"runc", "runc", (*stage).startRunc},
		{"crun", "crun", (*stage).startCrun},
		builtin,
	}
	userStarters = []starter{
		{"bwrap", "bwrap", (*stage).startBwrap},
		{"ch-run", "ch-run", (*stage).startChRun},
		{"apptainer", "apptainer", (*stage).startApptainer},
		{"runc", "runc", (*stage).startRunc},
		builtin,
	}
)

// Names are the runtimes for root, or for others, the preferred first.
func Names(root bool) (names []string) {
	all := userStarters
	if root {
		all = rootStarters
	}
	for _, st := range all {
		names = append(names, st.name)
	}
	return names
}

// Installed is where the program of a runtime is, "" when it is not there or the runtime needs none.
func Installed(name string) string {
	for _, st := range slices.Concat(rootStarters, userStarters) {
		if st.name == name && st.binary != "" {
			path, _ := lookPath(st.binary)
			return path
		}
	}
	return ""
}

// lookPath finds a runtime also where the PATH of a user does not lead.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return filepath.Abs(p)
	}
	for _, d := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/usr/local/bin", "/usr/local/sbin"} {
		if p, err := exec.LookPath(filepath.Join(d, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: %s is not installed", ErrUnsupported, name)
}

// launch starts p with the runtime that was asked for, or with the first that can.
func (s *stage) launch(p process) (name string, r running, err error) {
	all := userStarters
	if !s.user {
		all = rootStarters
	}
	chosen := slices.IndexFunc(all, func(st starter) bool { return st.name == s.o.Runtime })
	if s.o.Runtime != "" {
		if chosen < 0 {
			return "", r, fmt.Errorf("%w: no runtime %q for this user: it must be one of %s", ErrUnsupported, s.o.Runtime, strings.Join(Names(!s.user), ", "))
		}
		all = all[chosen : chosen+1]
	}
	var refused []error
	for _, st := range all {
		binary := ""
		if st.binary != "" {
			binary, err = lookPath(st.binary)
		}
		if err == nil {
			r, err = st.start(s, binary, p)
		}
		if err == nil {
			return st.name, r, nil
		}
		var command *CommandError
		if errors.As(err, &command) || s.o.Runtime != "" {
			return "", r, err
		}
		refused = append(refused, fmt.Errorf("%s: %w", st.name, err))
		err = nil
	}
	return "", r, errors.Join(refused...)
}

// spawn starts a runtime's program as the plain caller: what the stage may do in its user namespace is
// not inherited. With a terminal the program is in its foreground.
func (s *stage) spawn(cmd *exec.Cmd) (r running, err error) {
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	var slave *os.File
	if s.o.Terminal {
		if r.terminal, slave, err = openTerminal(s.root); err != nil {
			return r, err
		}
		defer slave.Close()
		// The stage leads the session, so that it does not end with a runtime that Ctrl-C kills.
		if err := unix.IoctlSetInt(int(slave.Fd()), unix.TIOCSCTTY, 0); err != nil {
			r.drop()
			return r, os.NewSyscallError("setting the terminal", err)
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.SysProcAttr.Foreground, cmd.SysProcAttr.Ctty = true, int(slave.Fd())
	}
	r.pid, err = s.forkPlain(cmd)
	r.ends = r.pid
	if err != nil {
		r.drop()
	}
	return r, err
}

// drop lets go of the terminal of a command that is not to be used.
func (r *running) drop() {
	if r.terminal != nil {
		_ = r.terminal.Close()
		r.terminal = nil
	}
}

// forkPlain starts cmd without inheritable capabilities and does not wait for it: reap does.
func (s *stage) forkPlain(cmd *exec.Cmd) (int, error) {
	type result struct {
		pid int
		err error
	}
	done := make(chan result)
	go func() {
		// Ambient capabilities belong to the thread that forks; it is thrown away afterwards.
		runtime.LockOSThread()
		if s.user {
			if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
				done <- result{0, os.NewSyscallError("prctl", err)}
				return
			}
		}
		err := cmd.Start()
		if err != nil {
			done <- result{0, err}
			return
		}
		done <- result{cmd.Process.Pid, nil}
	}()
	r := <-done
	return r.pid, r.err
}

// waitChild waits for the end of one child and returns its exit code.
func waitChild(pid int) int {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return ws.ExitStatus()
		}
	}
}
