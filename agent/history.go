package agent

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/store"
)

// A history is what this host remembers of stages, after their jobs and over restarts: a compressed file for each, named by when it began, so
// that the names sort by age. The oldest go when there are too many.
type history struct {
	dir string

	mu sync.Mutex // held while files are written or removed
}

// Bounds of a history. A stage of 16,384 hosts takes about 100 kB, one of four 1 kB.
const (
	maxHistory      = 1000     // files
	maxHistoryBytes = 32 << 20 // of all files
	maxRecord       = 8 << 20  // of one, unpacked
)

func newHistory(st *store.Store) *history {
	return &history{dir: filepath.Join(st.Dir(), "state", "history")}
}

// name is the file of a record.
func (*history) name(r control.Record) string {
	return fmt.Sprintf("%020d-%s.json.gz", r.Began.UnixNano(), historyKey(r.ID))
}

func historyKey(id string) string { return store.Key(id)[:16] }

// save writes a record, in place of what was written of the same stage before, and forgets what is too old.
func (h *history) save(r control.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.write(r)
}

// write is save. The caller holds mu.
func (h *history) write(r control.Record) (err error) {
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(h.dir, h.name(r))
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	z := gzip.NewWriter(f)
	err = errors.Join(json.NewEncoder(z).Encode(r), z.Close(), f.Close())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		_ = os.Remove(path + ".new")
		return err
	}
	h.prune()
	return nil
}

// prune removes the oldest files until the bounds hold. The caller holds mu.
func (h *history) prune() {
	names := h.files()
	var sizes []int64
	var total int64
	for _, n := range names {
		var size int64
		if st, err := os.Stat(filepath.Join(h.dir, n)); err == nil {
			size = st.Size()
		}
		sizes = append(sizes, size)
		total += size
	}
	for i, n := range names {
		if len(names)-i <= maxHistory && total <= maxHistoryBytes {
			return
		}
		_ = os.Remove(filepath.Join(h.dir, n))
		total -= sizes[i]
	}
}

// files are the names of all records, oldest first.
func (h *history) files() (names []string) {
	all, err := os.ReadDir(h.dir)
	if err != nil {
		return nil
	}
	for _, e := range all {
		if strings.HasSuffix(e.Name(), ".json.gz") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names
}

// read is the record of a file. What cannot be read is no record.
func (h *history) read(name string) (r control.Record, err error) {
	f, err := os.Open(filepath.Join(h.dir, name))
	if err != nil {
		return r, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return r, err
	}
	err = json.NewDecoder(io.LimitReader(z, maxRecord)).Decode(&r)
	if err == nil && r.ID == "" {
		err = errors.New("not a record")
	}
	return r, err
}

// all are the records that keep accepts, oldest first; of a stage that was asked for several times, each time.
func (h *history) all(keep func(control.Record) bool) (list []control.Record) {
	for _, n := range h.files() {
		if r, err := h.read(n); err == nil && keep(r) {
			list = append(list, r)
		}
	}
	return list
}

// find is the newest record of a stage.
func (h *history) find(id string) (control.Record, error) {
	for _, n := range slices.Backward(h.files()) {
		if strings.HasSuffix(n, "-"+historyKey(id)+".json.gz") {
			return h.read(n)
		}
	}
	return control.Record{}, fs.ErrNotExist
}

// change changes the newest record of a stage, if there is one.
func (h *history) change(id string, f func(*control.Record) error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	r, err := h.find(id)
	if err != nil {
		return err
	}
	if err := f(&r); err != nil {
		return err
	}
	return h.write(r)
}
