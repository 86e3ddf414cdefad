package fetch_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/fetch/fetchtest"
	"github.com/muster-hpc/muster/ztoc"
)

// What a Prefetch asked for ends with its context also when a demand read has been cut out of it.
func TestPrefetchEndsAfterCarve(t *testing.T) {
	data := fetchtest.Content(3, 8*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Gate = make(chan struct{})
	c := newChain(t, fetch.Options{Origin: o, Store: fetchtest.NewStore(), Requests: 2})
	c.Prefetch(context.Background(), ref, []ztoc.Range{{Start: 4 * mib, End: 5 * mib}}) // takes the one place for prefetches
	ahead, endAhead := context.WithCancel(t.Context())
	c.Prefetch(ahead, ref, []ztoc.Range{{Start: 0, End: mib}})
	reader, endReader := context.WithCancel(t.Context())
	read := make(chan error, 1)
	go func() { read <- c.ReadAt(reader, ref, make([]byte, 100), 0, ztoc.Demand) }()
	eventually(t, "both places are taken", func() bool { return c.Stats().Running == 2 })
	endAhead()
	endReader()
	if err := <-read; !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	eventually(t, "nobody wants the second", func() bool { s := c.Stats(); return s.Queued == 0 && s.Running == 1 })
}

// A store that takes nothing more ends Ensure at once, however patient the chain is with its origin.
func TestEnsureNotKept(t *testing.T) {
	data := fetchtest.Content(7, 8*mib)
	st := fetchtest.NewStore()
	c := newChain(t, fetch.Options{Origin: fetchtest.NewOrigin(data), Store: st, Patience: time.Hour, Temporary: func(error) bool { return true }})
	if err := c.Ensure(t.Context(), fetchtest.Ref(data), ztoc.Range{End: mib}, ztoc.Prefetch); err != nil {
		t.Fatal(err)
	}
	st.SetFull(true)
	if err := c.Ensure(t.Context(), fetchtest.Ref(data), ztoc.Range{Start: mib, End: 6 * mib}, ztoc.Prefetch); !errors.Is(err, fetch.ErrNotKept) {
		t.Errorf("got %v, want ErrNotKept", err)
	}
}
