package image

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// mappings are the files an image has mapped: its table and its ztocs. What is mapped costs page
// cache, which the kernel takes back when it must, and no private memory.
type mappings struct {
	mu sync.Mutex
	b  [][]byte // released by close
}

// add maps all of f, which may be closed afterwards. The file must not shrink: files of the store are
// replaced, never rewritten.
func (m *mappings) add(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() == 0 {
		return nil, nil
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap "+f.Name(), err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.b = append(m.b, b)
	return b, nil
}

func (m *mappings) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.b {
		unix.Munmap(b) //nolint:errcheck // it was mapped by add
	}
	m.b = nil
}
