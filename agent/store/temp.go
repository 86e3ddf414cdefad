package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A temp is a file being written under a temporary name. Its writer holds an exclusive flock on it, by which
// everybody can tell whether the writer lives.
type temp struct {
	s    *Store
	f    *os.File
	name string // empty once it has its final name
}

// newTemp makes a temporary file. discard must be called.
func (s *Store) newTemp() (*temp, error) {
	for range 100 {
		name := s.path(tmpDir, fmt.Sprintf("%d-%d", os.Getpid(), s.seq.Add(1)))
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue // of a dead process with our number, or of one in another pid namespace
		}
		if err != nil {
			return nil, err
		}
		// A sweeper may lock and remove it between the two calls.
		var st unix.Stat_t
		if tryFlock(f, unix.LOCK_EX) == nil && unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 0 {
			return &temp{s: s, f: f, name: name}, nil
		}
		f.Close()
	}
	return nil, errors.New("cannot make a temporary file")
}

// rename gives the file its final name, replacing what has it.
func (t *temp) rename(path string) error {
	if err := os.Rename(t.name, path); err != nil {
		return err
	}
	t.name = ""
	return nil
}

// link gives the file its final name, fs.ErrExist if it is taken.
func (t *temp) link(path string) error {
	err := os.Link(t.name, path)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		// No hard links here. rename is right too unless it replaces a file that is in use.
		err = unix.Renameat2(unix.AT_FDCWD, t.name, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		if err == nil {
			t.name = ""
		}
	}
	return err
}

// discard closes the file and removes its temporary name.
func (t *temp) discard() {
	if t.name != "" {
		os.Remove(t.name)
	}
	t.f.Close()
}

// sweepTemp removes temporary files whose writers are gone.
func (s *Store) sweepTemp() (removed int) {
	names, err := os.ReadDir(s.path(tmpDir))
	if err != nil {
		return 0
	}
	for _, n := range names {
		name := s.path(tmpDir, n.Name())
		f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if tryFlock(f, unix.LOCK_EX) == nil && os.Remove(name) == nil {
			removed++
		}
		f.Close()
	}
	return removed
}
