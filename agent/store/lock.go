package store

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// lockWait bounds every wait for another process: one that is stopped while it holds a lock must not hang the
// others.
const lockWait = 5 * time.Second

var errBusy = errors.New("locked by another process")

// tryFlock takes a flock without waiting. flocks belong to the open file, not to the process: two opens
// in one process exclude each other too, and kill -9 releases them.
func tryFlock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EWOULDBLOCK {
			return errBusy
		}
		return err
	}
}

// waitFlock takes a flock, waiting at most lockWait.
func waitFlock(f *os.File, how int) error {
	end := time.Now().Add(lockWait)
	pause := 100 * time.Microsecond
	for {
		err := tryFlock(f, how)
		if err != errBusy || time.Now().After(end) {
			return err
		}
		time.Sleep(pause)
		pause = min(2*pause, 10*time.Millisecond)
	}
}

// A dirLock is the store's lock: held by one goroutine of one process at a time.
type dirLock struct {
	mu sync.Mutex
	f  *os.File
}

func openLock(name string) (*dirLock, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	return &dirLock{f: f}, nil
}

// try takes the lock if nobody has it.
func (l *dirLock) try() bool {
	if !l.mu.TryLock() {
		return false
	}
	if tryFlock(l.f, unix.LOCK_EX) != nil {
		l.mu.Unlock()
		return false
	}
	return true
}

// lock takes the lock, waiting at most lockWait for another process.
func (l *dirLock) lock() error {
	l.mu.Lock()
	if err := waitFlock(l.f, unix.LOCK_EX); err != nil {
		l.mu.Unlock()
		return fmt.Errorf("%s: %w", l.f.Name(), err)
	}
	return nil
}

func (l *dirLock) unlock() {
	unix.Flock(int(l.f.Fd()), unix.LOCK_UN) //nolint:errcheck // cannot fail on a lock we hold
	l.mu.Unlock()
}

func (l *dirLock) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.f.Close()
}
