package mountd_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/ztoc"
)

// copies is a lazyfs.Backing in a directory.
type copies struct{ dir string }

func (c copies) path(content []lazyfs.ProfileRange) string {
	return filepath.Join(c.dir, fmt.Sprintf("%x", sha256.Sum256(fmt.Append(nil, content))))
}

func (copies) Any() bool { return true }

func (c copies) Open(content []lazyfs.ProfileRange) *os.File {
	f, err := os.Open(c.path(content))
	if err != nil {
		return nil
	}
	return f
}

func (c copies) Make(content []lazyfs.ProfileRange, _ int64, write func(io.Writer) error) error {
	f, err := os.Create(c.path(content) + ".tmp")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	return os.Rename(f.Name(), c.path(content))
}

// localFile is a slowFile that is not far.
type localFile struct{ slowFile }

func (localFile) Local(ztoc.BlobRef, ztoc.Range) bool { return true }

// graduate reads files of the picture through a mount until each has a copy in o.Copies, and gives the copies' names.
func graduate(t *testing.T, o order, files ...string) (names []string) {
	t.Helper()
	o.Soon, o.Delay = true, 0
	m, err := start(t, o, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		hash(t, filepath.Join(m.Dir, f))
	}
	for end := time.Now().Add(soon); len(names) < len(files); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d backing files were made, not %d", len(names), len(files))
		}
		names, _ = filepath.Glob(filepath.Join(o.Copies, "*[0-9a-f]"))
	}
	if busy, err := m.Unmount(t.Context()); busy || err != nil {
		t.Fatal(busy, err)
	}
	return names
}

// Servers are killed under a file that is passed through, open, mapped and opened again each time, also when its copy is evicted and
// another made meanwhile: no error, right bytes, and still passed through.
func TestServerIsKilledUnderPassthrough(t *testing.T) {
	t.Setenv(lazyfs.CompatVariable, "")
	dir, sum := picture(t, 12<<20, 0)
	o := order{Dir: dir, Soon: true, Copies: t.TempDir()}
	name := graduate(t, o, "data")[0]
	content, err := os.ReadFile(name)
	if err != nil || sha256.Sum256(content) != sum {
		t.Fatalf("the copy is wrong: %d bytes, %v", len(content), err)
	}

	m, err := start(t, o, nil)
	if err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(m.Dir, "data")
	f, err := os.Open(data)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapped, err := unix.Mmap(int(f.Fd()), 0, 12<<20, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped) //nolint:errcheck // the test is over
	for i := range 6 {
		kill(t, "server", m.Dir)
		switch i {
		case 1:
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		case 3: // another one, which must not be taken: it has other bytes of the same number
			if err := os.WriteFile(name, make([]byte, 12<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := hash(t, data); got != sum {
			t.Errorf("opened again after kill %d: wrong bytes", i)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			t.Error(err)
		}
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil || [32]byte(h.Sum(nil)) != sum {
			t.Errorf("open since before kill %d: wrong bytes, %v", i, err)
		}
		if sha256.Sum256(mapped) != sum {
			t.Errorf("mapped since before kill %d: wrong bytes", i)
		}
	}
}
