package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// Spare files are plain copies of what else is in the store (KindBacking). They are made only from room that is free, are
// evicted before everything else, also while the kernel reads one (whoever has a file open keeps it), and are given out only
// when they are known to be what was written.

// BackingKey is the key of a copy of what text describes, which is a part of a blob (the first, where it is of several): when images
// with the blob are removed and no other has it, so is the copy.
func BackingKey(blob ztoc.Digest, text string) string { return blob.Hex() + "-" + Key(text) }

// PutSpare is Put of size bytes if there is room for them below the quota and on the disk without evicting anything; ErrNoSpace
// otherwise. A file that is there stays.
func (s *Store) PutSpare(kind Kind, key string, size int64, write func(io.Writer) error) error {
	path, err := s.filePath(kind, key)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	if s.used().Load()+size > s.lowWater() {
		return fmt.Errorf("%w: %d bytes would not be below %d of the quota of %d", ErrNoSpace, size, s.lowWater(), s.quota)
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(s.dir, &disk); err != nil {
		return fmt.Errorf("%s: %w", s.dir, err)
	}
	if free := int64(disk.Bavail) * disk.Bsize; free < size+size/4+fullDiskRoom {
		return fmt.Errorf("%w: %d bytes free on the disk, for %d", ErrNoSpace, free, size)
	}
	return s.Put(kind, key, func(w io.Writer) error {
		c := &countingWriter{w: w}
		if err := write(c); err != nil {
			return err
		}
		if c.n != size {
			return fmt.Errorf("%s %s: %d bytes were written instead of %d", kind, key, c.n, size)
		}
		return nil
	})
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// ErrUnchecked says that a spare file was written before this host booted, and power may have been lost since: Check reads it.
var ErrUnchecked = errors.New("not checked since this host booted")

// Spare opens a file that was written, or checked as a whole, since this host booted; ErrUnchecked, or fs.ErrNotExist when there is
// none. It does not read the file, so it does not wait for a disk. The file may be evicted while it is open.
func (s *Store) Spare(kind Kind, key string) (*os.File, error) {
	path, err := s.filePath(kind, key)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	ok, err := s.sealedNow(f)
	if err == nil && !ok {
		err = fmt.Errorf("%s: %w", path, ErrUnchecked)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	touchFile(f)
	return f, nil
}

// Any says whether there is any file of a kind.
func (s *Store) Any(kind Kind) bool {
	d, err := os.Open(s.path(filesDir, string(kind)))
	if err != nil {
		return false
	}
	defer d.Close()
	names, _ := d.Readdirnames(1)
	return len(names) > 0
}

// Check reads a spare file of an earlier boot as a whole, and removes it when it is damaged. From then on Spare opens it.
func (s *Store) Check(kind Kind, key string) error {
	f, err := s.Get(kind, key)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}
