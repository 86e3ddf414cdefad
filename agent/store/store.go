package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that callers decide on.
var (
	// ErrAbsent says that some of the bytes asked for are not in the store.
	ErrAbsent = errors.New("not in the store")
	// ErrNoSpace says that bytes were not kept: the disk is full or the quota cannot be met. It is not
	// fatal to whoever has the bytes in hand.
	ErrNoSpace = errors.New("no space in the store")
	// ErrCorrupt says that a blob whose blocks are all here does not match its digest.
	ErrCorrupt = errors.New("stored bytes do not match their digest")
	// ErrNetwork says that a store was asked for on a file system that other hosts may share.
	ErrNetwork = errors.New("not a local file system")
	// ErrHost says that a store belongs to another host.
	ErrHost = errors.New("store belongs to another host")
	// ErrVersion says that a store was written by a newer muster.
	ErrVersion = errors.New("store has a newer format")
	// ErrClosed says that a handle or the store was closed.
	ErrClosed = errors.New("store is closed")
)

// Options say how a store is opened. The zero value is right for most.
type Options struct {
	// Quota is the most the store may take, in bytes of allocated blocks, everything counted. Too small and
	// blobs are fetched again and again; too large and jobs find their scratch disk full. Zero
	// means DefaultQuota.
	Quota int64
	// AllowNetwork opens a store on a network or unknown file system all the same. Only right where
	// no other host uses the directory.
	AllowNetwork bool
	// Logger gets the store's few warnings. Nil means slog.Default().
	Logger *slog.Logger

	host *hostID // in tests: who we claim to be
	fs   *FS     // in tests: what the probe is to have found
}

// A Store is an open store. Its methods may be called at the same time from several goroutines, and from
// several processes that have the same directory open.
type Store struct {
	dir   string
	quota int64
	fs    FS
	log   *slog.Logger

	boot  string   // ID of this kernel's boot
	lock  *dirLock // one evictor or collector at a time, over all processes
	host  *os.File // shared flock held while open
	usage []byte   // mapping of the shared counter; until closed and without handles
	count atomic.Pointer[atomic.Int64]
	slots chan struct{} // bounds what is being written at once

	fullUntil atomic.Int64 // unix nanoseconds until which writes are not tried
	warned    atomic.Bool
	seq       atomic.Int64 // names of temporary files

	mu     sync.Mutex
	open   map[string]*file // by file name; an entry has at least one handle
	closed bool
}

const (
	formatVersion = 1
	formatLine    = "muster store "

	writeChunk = 256 << 10 // bytes of one pwrite
	writeSlots = 4         // pwrites at once: with writeChunk, the bytes a recount may miss

	retryFull = 5 * time.Second
)

// The folders of a store.
const (
	blobsDir  = "blobs"
	filesDir  = "files"
	imagesDir = "images"
	pinsDir   = "pins"
	tmpDir    = "tmp"
)

// Open opens the store in dir, and makes it if need be. Errors name dir and what to do: ErrNetwork,
// ErrHost, ErrVersion.
func Open(dir string, o Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := makeDir(dir); err != nil {
		return nil, fmt.Errorf("store %s: %w", dir, err)
	}
	found, err := probeType(dir)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", dir, err)
	}
	if o.fs != nil {
		found = *o.fs
	}
	if found.Network && !o.AllowNetwork {
		return nil, fmt.Errorf("store %s: %w: %s; choose a directory on a local disk (--store DIR), or allow it where no other host uses it", dir, ErrNetwork, found.Type)
	}
	s := &Store{
		dir: dir, fs: found, log: o.Logger,
		slots: make(chan struct{}, writeSlots),
		open:  map[string]*file{},
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if err := s.openParts(o); err != nil {
		s.Close()
		return nil, fmt.Errorf("store %s: %w", dir, err)
	}
	return s, nil
}

// openParts does what Open does after the directory is known to be fit.
func (s *Store) openParts(o Options) error {
	if err := s.checkFormat(); err != nil {
		return err
	}
	for _, d := range []string{blobsDir, filesDir, imagesDir, pinsDir, tmpDir} {
		if err := os.Mkdir(s.path(d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	var err error
	if s.lock, err = openLock(s.path("lock")); err != nil {
		return err
	}
	if err := s.claim(o.host); err != nil {
		return err
	}
	s.sweepTemp()
	if o.fs == nil {
		s.fs.Holes, s.fs.Punch = s.probeHoles()
	}
	if s.usage, err = s.mapUsage(); err != nil {
		return err
	}
	s.count.Store(counter(s.usage))
	s.quota = o.Quota
	if s.quota <= 0 {
		s.quota = DefaultQuota(s.dir, s.fs, s.used().Load())
	}
	// The counter may stem from before a crash: count anew, unless somebody is at it.
	if s.lock.try() {
		s.recount()
		s.lock.unlock()
	}
	return nil
}

// used is the counter of allocated bytes.
func (s *Store) used() *atomic.Int64 { return s.count.Load() }

// Close releases the store. Handles of blobs that are still open stay usable; other methods of the store must have
// returned.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.lock != nil {
		s.lock.close()
	}
	if s.host != nil {
		s.host.Close()
	}
	s.unmapUsage()
	return nil
}

// unmapUsage lets go of the shared counter once nobody needs it. The caller holds s.mu.
func (s *Store) unmapUsage() {
	if !s.closed || len(s.open) > 0 || s.usage == nil {
		return
	}
	s.count.Store(new(atomic.Int64))
	unix.Munmap(s.usage) //nolint:errcheck // a mapping of ours
	s.usage = nil
}

// Dir is the directory of the store.
func (s *Store) Dir() string { return s.dir }

// FS is what was found out about the file system below.
func (s *Store) FS() FS { return s.fs }

// Quota is the most the store may take, in bytes.
func (s *Store) Quota() int64 { return s.quota }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// checkFormat reads the version file, or writes it into a new store.
func (s *Store) checkFormat() error {
	name := s.path("format")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		names, err := os.ReadDir(s.dir)
		if err != nil {
			return err
		}
		for _, n := range names {
			// Another process may be making the same store at this moment.
			if !ownName(n.Name()) {
				return fmt.Errorf("the directory holds other files (%s): choose an empty one", n.Name())
			}
		}
		tmp := fmt.Sprintf("%s.%d", name, os.Getpid())
		if err := os.WriteFile(tmp, fmt.Appendf(nil, "%s%d\n", formatLine, formatVersion), 0o600); err != nil {
			os.Remove(tmp)
			return err
		}
		return os.Rename(tmp, name)
	}
	if err != nil {
		return err
	}
	v, ok := strings.CutPrefix(strings.TrimSpace(string(b)), formatLine)
	n, err := strconv.Atoi(v)
	if !ok || err != nil || n < 1 {
		return fmt.Errorf("%s is not a version file of muster: the directory belongs to something else, or is damaged (then remove it)", name)
	}
	if n > formatVersion {
		return fmt.Errorf("%w: version %d, this muster knows %d; use a newer muster or another directory", ErrVersion, n, formatVersion)
	}
	return nil
}

// ownName reports whether a name in the store's directory is one of muster's, or one that a file system
// makes itself.
func ownName(n string) bool {
	switch n {
	case blobsDir, filesDir, imagesDir, pinsDir, tmpDir, "lock", "host", "usage", "lost+found", "mounts", "state", "run":
		return true
	}
	return strings.HasPrefix(n, "format")
}

// warnOnce logs why nothing is stored, the first time.
func (s *Store) warnOnce(why string) {
	if s.warned.CompareAndSwap(false, true) {
		s.log.Warn("muster: nothing more is stored for now, reads go on uncached",
			"dir", s.dir, "cause", why, "next", "free space there, raise the quota, unpin images (muster cache ls, muster cache unpin), or choose another --store")
	}
}

// degrade notes that writes fail and says so once.
func (s *Store) degrade(why string) error {
	s.fullUntil.Store(time.Now().Add(retryFull).UnixNano())
	s.warnOnce(why)
	return fmt.Errorf("%w: %s: %s", ErrNoSpace, s.dir, why)
}

// degraded reports whether writes are not even tried at the moment.
func (s *Store) degraded() bool {
	t := s.fullUntil.Load()
	return t != 0 && time.Now().UnixNano() < t
}

// isFull reports whether err is a file system's way to say that there is no room.
func isFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS)
}
