package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/ztoc"
)

// backing keeps plain copies of large files in the store, for the kernel to read them from. A copy is named by the
// registry's digests of the layers it comes from and where in them it lies, so all images with the layer share it.
type backing struct {
	store  *store.Store
	layers []string // by layer: what offsets in it count in

	digests []ztoc.Digest // by layer

	mu      sync.Mutex
	checked map[string]bool // copies of an earlier boot that were found
	todo    []string        // of these, to be checked, the first just now
}

func newBacking(s *store.Store, views []*view) *backing {
	b := &backing{store: s, checked: map[string]bool{}}
	for _, v := range views {
		b.digests = append(b.digests, v.report.Digest)
		b.layers = append(b.layers, string(v.report.Digest)+" "+v.form())
	}
	return b
}

func (b *backing) key(content []lazyfs.ProfileRange) string {
	var s strings.Builder
	s.WriteString("backing 1")
	for _, c := range content {
		fmt.Fprintf(&s, "\n%s %d %d", b.layers[c.Layer], c.Start, c.End)
	}
	return store.BackingKey(b.digests[content[0].Layer], s.String())
}

// Any says whether there are copies of anything.
func (b *backing) Any() bool { return b.store.Any(store.KindBacking) }

// Open is the copy of content if it was written or checked since the host booted. Others are checked beside it, for the next
// mount.
func (b *backing) Open(content []lazyfs.ProfileRange) *os.File {
	key := b.key(content)
	f, err := b.store.Spare(store.KindBacking, key)
	if errors.Is(err, store.ErrUnchecked) {
		b.check(key)
	}
	if err != nil {
		return nil
	}
	return f
}

// check has a copy read, once, one at a time.
func (b *backing) check(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.checked[key] {
		return
	}
	b.checked[key] = true
	b.todo = append(b.todo, key)
	if len(b.todo) > 1 {
		return // a goroutine is at it
	}
	go func() { // ends with the list or the process: closing an image does not wait for a disk
		b.mu.Lock()
		defer b.mu.Unlock()
		for ; len(b.todo) > 0; b.todo = b.todo[1:] {
			key := b.todo[0]
			b.mu.Unlock()
			_ = b.store.Check(store.KindBacking, key) // what cannot be checked is not used
			b.mu.Lock()
		}
	}()
}

// Make keeps a copy where there is room to spare.
func (b *backing) Make(content []lazyfs.ProfileRange, size int64, write func(io.Writer) error) error {
	return b.store.PutSpare(store.KindBacking, b.key(content), size, write)
}
