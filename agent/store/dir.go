package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// DefaultDir is where this user's store lies when nothing else is said: /var/lib/muster for root; for others
// $XDG_CACHE_HOME/muster or ~/.cache/muster if that is on a local disk (homes of clusters seldom are), else
// /var/tmp/muster-UID or /tmp/muster-UID. It is never a directory that belongs to somebody else. The
// directory may not exist yet.
func DefaultDir() (string, error) {
	uid := os.Geteuid()
	if uid == 0 {
		return "/var/lib/muster", nil
	}
	cache := os.Getenv("XDG_CACHE_HOME")
	if home := os.Getenv("HOME"); !filepath.IsAbs(cache) && filepath.IsAbs(home) {
		cache = filepath.Join(home, ".cache")
	}
	return defaultDir(uid, cache, "/var/tmp", "/tmp")
}

// defaultDir is DefaultDir of user uid. cache may be empty; the tmps are directories that everybody may write to.
func defaultDir(uid int, cache string, tmps ...string) (string, error) {
	var why []string
	if filepath.IsAbs(cache) {
		dir := filepath.Join(cache, "muster")
		err := checkLocal(dir)
		if err == nil {
			err = checkDir(dir, uid)
		}
		if err == nil {
			return dir, nil
		}
		why = append(why, err.Error())
	}
	for _, tmp := range tmps {
		dir := filepath.Join(tmp, fmt.Sprintf("muster-%d", uid))
		err := checkLocal(dir)
		if err == nil {
			err = checkDir(dir, uid)
		}
		if err == nil {
			return dir, nil
		}
		why = append(why, err.Error())
	}
	return "", fmt.Errorf("no directory is fit for a store, name one with --store DIR: %s", strings.Join(why, "; "))
}

// checkLocal says what is wrong with the file system that dir is, or would be, on.
func checkLocal(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		f, err := probeType(at)
		if errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
			continue
		}
		if err != nil {
			return err
		}
		if f.Network {
			return fmt.Errorf("%s: %w: %s", dir, ErrNetwork, f.Type)
		}
		if unix.Faccessat(unix.AT_FDCWD, at, unix.W_OK|unix.X_OK, unix.AT_EACCESS) != nil {
			return fmt.Errorf("%s is not writable", at)
		}
		return nil
	}
}

// checkDir says what is wrong with an existing dir as a store of user uid. One that does not exist is right.
func checkDir(dir string, uid int) error {
	var st unix.Stat_t
	err := unix.Lstat(dir, &st)
	switch {
	case err == unix.ENOENT:
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w", dir, err)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory", dir)
	case int(st.Uid) != uid:
		return fmt.Errorf("%s belongs to user %d, not to %d", dir, st.Uid, uid)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s may be written to by others (mode %#o): chmod 700 it", dir, st.Mode&0o777)
	}
	return nil
}

// makeDir makes dir, private to this user, and its parents, and checks it if it exists. A symbolic link given by
// the user himself is followed to a directory of his own; nobody else's is.
func makeDir(dir string) error {
	if real, err := filepath.EvalSymlinks(dir); err == nil && real != dir {
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK && int(st.Uid) != os.Geteuid() && st.Uid != 0 {
			return fmt.Errorf("%s is a symbolic link of user %d", dir, st.Uid)
		}
		return checkDir(real, os.Geteuid())
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	// Mkdir does not follow a link somebody puts there in between, and the check below sees it.
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return checkDir(dir, os.Geteuid())
}
