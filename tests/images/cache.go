package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// buildTime bounds one Get: the slowest artifact takes two to three minutes on two idle cores, and a
// builder may wait for another one.
const buildTime = 30 * time.Minute

// An artifact is what one build makes: one or more layouts below one directory.
type artifact struct {
	name    string
	version int      // raised when the bytes that its builder writes change
	inputs  []string // what else decides about the bytes, such as package names
	needs   []string // artifacts that the builder reads
	images  []string // names of the layouts below the artifact's directory
	build   func(ctx context.Context, b *build) error
}

// A build is one run of an artifact's builder.
type build struct {
	dir  string                            // to fill; renamed when the builder returns nil
	need func(name string) (string, error) // directory of an artifact that it needs
}

// layout is the directory of one of the build's images.
func (b *build) layout(name string) string { return filepath.Join(b.dir, name) }

// scratch is a directory for files that are linked into layouts or removed before the build ends.
func (b *build) scratch() (string, error) { return os.MkdirTemp(b.dir, "scratch-") }

// ErrUnknown says that no image has the name.
var ErrUnknown = errors.New("no such test image")

// Names lists the images that Get knows.
func Names() []string {
	var names []string
	for _, a := range artifacts() {
		names = append(names, a.images...)
	}
	return names
}

// Get builds the image called name unless the cache has it, and returns the directory of its OCI
// layout, which holds one image under the tag "latest". Nobody may write there. A build can take
// minutes and says so on standard error.
func Get(name string) (string, error) {
	for _, a := range artifacts() {
		if slices.Contains(a.images, name) {
			ctx, cancel := context.WithTimeout(context.Background(), buildTime)
			defer cancel()
			dir, err := get(ctx, a)
			if err != nil {
				return "", fmt.Errorf("test image %s: %w", name, err)
			}
			return filepath.Join(dir, name), nil
		}
	}
	return "", fmt.Errorf("%w: %q; there are %s", ErrUnknown, name, strings.Join(Names(), ", "))
}

// get returns the artifact's directory, building it when it is missing.
func get(ctx context.Context, a artifact) (string, error) {
	root, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, a.name+"-"+key(a))
	if isDir(dir) {
		return dir, nil
	}
	needed := map[string]string{}
	for _, name := range a.needs {
		if needed[name], err = get(ctx, find(name)); err != nil {
			return "", fmt.Errorf("building %s: %w", name, err)
		}
	}
	unlock, err := lock(ctx, filepath.Join(root, "."+a.name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if isDir(dir) { // built by the one we waited for
		return dir, nil
	}
	stale, err := filepath.Glob(filepath.Join(root, ".tmp-"+a.name+"-*"))
	if err != nil {
		return "", err
	}
	for _, s := range stale { // we hold the lock, so their builders are dead
		if err := os.RemoveAll(s); err != nil {
			return "", err
		}
	}
	tmp, err := os.MkdirTemp(root, ".tmp-"+a.name+"-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "images: building %s (once on this machine, into %s)\n", a.name, root)
	start := time.Now()
	err = a.build(ctx, &build{dir: tmp, need: func(name string) (string, error) {
		if d, ok := needed[name]; ok {
			return d, nil
		}
		return "", fmt.Errorf("artifact %s does not say that it needs %s", a.name, name)
	}})
	if err != nil {
		return "", err
	}
	scratch, err := filepath.Glob(filepath.Join(tmp, "scratch-*"))
	if err != nil {
		return "", err
	}
	for _, s := range scratch {
		if err := os.RemoveAll(s); err != nil {
			return "", err
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "images: built %s in %.1f s\n", a.name, time.Since(start).Seconds())
	return dir, nil
}

// find is the artifact called name. It panics when there is none: names in needs are ours.
func find(name string) artifact {
	for _, a := range artifacts() {
		if a.name == name {
			return a
		}
	}
	panic("no artifact " + name)
}

// key names an artifact's content by everything that decides about it.
func key(a artifact) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s %d %s %s %q", a.name, a.version, runtime.Version(), runtime.GOARCH, a.inputs)
	for _, n := range a.needs {
		fmt.Fprintf(h, " %s", key(find(n)))
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// cacheDir is where artifacts live; it is made when missing.
func cacheDir() (string, error) {
	dir := os.Getenv("MUSTER_TEST_IMAGES")
	if dir == "" {
		dir = "/var/cache/muster-test-images"
		if os.Geteuid() != 0 {
			user, err := os.UserCacheDir()
			if err != nil {
				return "", fmt.Errorf("no place for test images, set MUSTER_TEST_IMAGES: %w", err)
			}
			dir = filepath.Join(user, "muster-test-images")
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("no place for test images, set MUSTER_TEST_IMAGES: %w", err)
	}
	return dir, nil
}

// Clean removes artifacts that the present sources would not use, and returns their directories.
func Clean() ([]string, error) {
	root, err := cacheDir()
	if err != nil {
		return nil, err
	}
	current := map[string]bool{}
	for _, a := range artifacts() {
		current[a.name+"-"+key(a)] = true
	}
	list, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var gone []string
	for _, e := range list {
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") || current[e.Name()] {
			continue
		}
		p := filepath.Join(root, e.Name())
		if err := os.RemoveAll(p); err != nil {
			return gone, err
		}
		gone = append(gone, p)
	}
	return gone, nil
}

// lock takes the lock file at path, waiting until ctx ends, and returns how to give it back.
func lock(ctx context.Context, path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for told := false; ; {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
		}
		if !told {
			fmt.Fprintf(os.Stderr, "images: waiting for another builder (%s)\n", path)
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, &fs.PathError{Op: "lock", Path: path, Err: ctx.Err()}
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}
