package store

import (
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// A Kind is what a small file is; each kind has its own folder and names.
type Kind string

// The kinds of small files.
const (
	KindZtoc     Kind = "ztoc"     // index of a layer; key: digest of the layer, and what else tells indexes apart
	KindTable    Kind = "table"    // file system table of an image
	KindManifest Kind = "manifest" // manifest or config, by its digest
	KindProfile  Kind = "profile"  // start-up profile of an image
	KindWarm     Kind = "warm"     // what is inflated ahead
	KindRef      Kind = "ref"      // what a reference resolved to
	KindBacking  Kind = "backing"  // plain copy of a large file of an image, the first to be evicted
)

var kinds = []Kind{KindZtoc, KindTable, KindManifest, KindProfile, KindWarm, KindRef, KindBacking}

// ErrKey says that a kind or key cannot name a file of the store.
var ErrKey = errors.New("not a valid key")

// Key makes a valid key of any text, such as a reference: the hex digits of its SHA-256.
func Key(text string) string { return ztoc.DigestOf([]byte(text)).Hex() }

// checkKey allows up to 200 of the characters of digests, numbers and plain names; none leads out of a folder.
func checkKey(key string) error {
	if key == "" || len(key) > 200 || key[0] == '.' {
		return fmt.Errorf("%w: %.220q", ErrKey, key)
	}
	for _, c := range []byte(key) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("._:@=+,-", c) >= 0:
		default:
			return fmt.Errorf("%w: %.220q (use store.Key for free text)", ErrKey, key)
		}
	}
	return nil
}

// filePath is where the file of kind and key lies.
func (s *Store) filePath(kind Kind, key string) (string, error) {
	if err := checkKey(key); err != nil {
		return "", err
	}
	for _, k := range kinds {
		if k == kind {
			return s.path(filesDir, string(kind), key), nil
		}
	}
	return "", fmt.Errorf("%w: kind %q", ErrKey, kind)
}

// PutBytes is Put of bytes at hand.
func (s *Store) PutBytes(kind Kind, key string, b []byte) error {
	return s.Put(kind, key, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

// Put writes a small file: under a temporary name, then renamed, so that readers find all of it or none. An
// existing file is replaced; whoever has it open keeps the old one. An error of write is returned as it is,
// ErrNoSpace when the file does not fit.
func (s *Store) Put(kind Kind, key string, write func(io.Writer) error) error {
	path, err := s.filePath(kind, key)
	if err != nil {
		return err
	}
	if err := os.Mkdir(s.path(filesDir, string(kind)), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return s.spaceError(err)
	}
	return s.putFile(path, write)
}

func (s *Store) putFile(path string, write func(io.Writer) error) error {
	t, err := s.newTemp()
	if err != nil {
		return s.spaceError(err)
	}
	defer t.discard()
	w := &chargedWriter{s: s, f: t.f, sum: newSum()}
	if err := write(w); err != nil {
		s.used().Add(-w.charged)
		if w.err != nil {
			return w.err
		}
		return err
	}
	if w.err != nil { // write overlooked it
		s.used().Add(-w.charged)
		return w.err
	}
	setSeal(t.f, seal(s.boot, w.written, w.sum.Sum32()))
	var st, old unix.Stat_t
	unix.Fstat(int(t.f.Fd()), &st) //nolint:errcheck // an open file
	if unix.Lstat(path, &old) != nil {
		old.Blocks = 0
	}
	if err := t.rename(path); err != nil {
		s.used().Add(-w.charged)
		return s.spaceError(err)
	}
	s.used().Add((st.Blocks-old.Blocks)*512 - w.charged)
	return nil
}

// A chargedWriter charges what it writes to the quota before it does.
type chargedWriter struct {
	s       *Store
	f       *os.File
	sum     hash.Hash32
	charged int64
	written int64
	err     error
}

func (w *chargedWriter) Write(p []byte) (n int, err error) {
	for n < len(p) && w.err == nil {
		part := p[n:min(len(p), n+writeChunk)]
		if need := w.written + int64(len(part)) - w.charged; need > 0 {
			need = (need + BlockSize - 1) / BlockSize * BlockSize
			if w.err = w.s.reserve(need); w.err != nil {
				break
			}
			w.charged += need
		}
		var k int
		k, err = w.f.Write(part)
		if err != nil && isFull(err) && w.s.evictSome(fullDiskRoom) {
			var more int
			more, err = w.f.Write(part[k:])
			k += more
		}
		w.sum.Write(part[:k])
		n += k
		w.written += int64(k)
		if err != nil {
			w.err = w.s.spaceError(err)
		}
	}
	return n, w.err
}

// Get opens a small file for reading; fs.ErrNotExist if there is none, or one that a crash has damaged. It is evicted last while the file is open. A
// mapping of it stays good for ever, whatever is evicted.
func (s *Store) Get(kind Kind, key string) (*os.File, error) {
	path, err := s.filePath(kind, key)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	tryFlock(f, unix.LOCK_SH) //nolint:errcheck // an evictor has it: then we have the last of it
	if err := s.checkSeal(f); err != nil {
		f.Close()
		if errors.Is(err, errTorn) {
			s.log.Warn("muster: a damaged file is removed", "path", path, "cause", err)
			s.unlinkIdle(item{path: path})
			err = &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		return nil, err
	}
	touchFile(f)
	return f, nil
}

// touchFile notes the time of use, at most once a second.
func touchFile(f *os.File) {
	if st, err := f.Stat(); err == nil && time.Since(st.ModTime()) > time.Second {
		setTimes(f, time.Now().UnixNano())
	}
}

// Delete removes a small file; none is not an error.
func (s *Store) Delete(kind Kind, key string) error {
	path, err := s.filePath(kind, key)
	if err != nil {
		return err
	}
	_, err = s.removeCounted(path)
	return err
}

// removeCounted removes a file and takes its blocks off the counter.
func (s *Store) removeCounted(path string) (freed int64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if err == unix.ENOENT {
			return 0, nil
		}
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	s.used().Add(-st.Blocks * 512)
	return st.Blocks * 512, nil
}
