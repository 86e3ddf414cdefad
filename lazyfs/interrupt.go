package lazyfs

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// interrupt handles the kernel's INTERRUPT for a request: somebody who waits for it got a signal.
//
// A reader that is being killed is let go at once. One that merely got a signal it handles is not: a file
// system on a disk does not fail reads because of a timer or a SIGCHLD, and a page fault that failed so would
// kill the program with SIGBUS. As the kernel says nothing when such a reader is killed later, we look from time to time as
// long as it waits.
func (s *Server) interrupt(w *scratch, unique, target uint64) {
	s.mu.Lock()
	m := s.parked[target&^resentUnique]
	s.mu.Unlock()
	if m == nil {
		// Being answered, or just being parked by another loop: let the kernel ask again. It does not when
		// the request is answered.
		s.send(w, unique, syscall.EAGAIN)
		return
	}
	if dying(m.pid) {
		s.giveUp(w, m)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.working.Add(1)
		go s.watch(m)
	}
}

// watchParked watches the readers of all that is parked: of requests that a server before this one had, that server
// knew whether the kernel had sent an INTERRUPT, and the kernel sends none twice.
func (s *Server) watchParked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.parked {
		s.working.Add(1)
		go s.watch(m)
	}
}

const watchEvery = 50 * time.Millisecond

// watch gives m up when its reader is being killed. It ends with m or with Serve.
func (s *Server) watch(m *miss) {
	defer s.working.Done()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		waiting := s.parked[m.unique] == m
		s.mu.Unlock()
		if !waiting && s.answered(m) {
			return
		}
		if dying(m.pid) {
			s.giveUp(newScratch(), m)
			return
		}
	}
}

// answered reports whether m has left its slot.
func (s *Server) answered(m *miss) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return m.over
}

// giveUp answers m with EINTR if it still waits.
func (s *Server) giveUp(w *scratch, m *miss) {
	s.mu.Lock()
	if s.parked[m.unique] != m {
		s.mu.Unlock()
		return
	}
	s.unpark(m)
	s.mu.Unlock()
	s.stats.interrupted.Add(1)
	s.send(w, m.unique, syscall.EINTR)
	s.finish(m)
}

// dying reports whether the task has a signal that ends it. A task that cannot be seen from here (another
// PID namespace, gone) counts as dying: better a reader that sees EINTR than one that cannot be killed.
func dying(pid uint32) bool {
	if pid == 0 {
		return true
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	return fatal(b)
}

// deadly are the signals whose default is to end a process.
var deadly = func() (set uint64) {
	set = 1<<64 - 1
	for _, sig := range []unix.Signal{unix.SIGCHLD, unix.SIGCONT, unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGURG, unix.SIGWINCH} {
		set &^= 1 << (sig - 1)
	}
	return set
}()

// fatal reads /proc/PID/status: is a signal pending that will end the task? The kernel marks all threads of
// a process that is being killed with SIGKILL.
func fatal(status []byte) bool {
	mask := func(key string) (m uint64) {
		_, after, ok := bytes.Cut(status, []byte("\n"+key+":\t"))
		if ok && len(after) >= 16 {
			m, _ = strconv.ParseUint(string(after[:16]), 16, 64)
		}
		return m
	}
	pending := mask("SigPnd") | mask("ShdPnd")
	if pending&(1<<(unix.SIGKILL-1)) != 0 {
		return true
	}
	return pending&deadly&^mask("SigBlk")&^mask("SigIgn")&^mask("SigCgt") != 0
}
