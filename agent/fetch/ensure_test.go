package fetch_test

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/fetch/fetchtest"
	"github.com/muster-hpc/muster/ztoc"
)

func TestEnsure(t *testing.T) {
	data := fetchtest.Content(7, 20*mib)
	ref := fetchtest.Ref(data)
	o, st := fetchtest.NewOrigin(data), fetchtest.NewStore()
	c := newChain(t, fetch.Options{Origin: o, Store: st})
	if err := c.Give(ref, data[4*mib:5*mib], 4*mib); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time everything is there
		if err := c.Ensure(t.Context(), ref, ztoc.Range{Start: mib, End: 13 * mib}, ztoc.Prefetch); err != nil {
			t.Fatal(err)
		}
	}
	b, err := st.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	if m := b.Missing(ztoc.Range{Start: mib, End: 13 * mib}); len(m) > 0 {
		t.Errorf("not in the store: %v", m)
	}
	if got, want := trace(o), "1024+3072 5120+8192"; got != want {
		t.Errorf("requests %q, want %q", got, want)
	}
	mustRead(t, c, data, ref, mib, 13*mib)
}

func TestEnsureIsNotKept(t *testing.T) {
	data := fetchtest.Content(7, 8*mib)
	ref := fetchtest.Ref(data)
	st := fetchtest.NewStore()
	c := newChain(t, fetch.Options{Origin: fetchtest.NewOrigin(data), Store: st})
	if err := c.Ensure(t.Context(), ref, ztoc.Range{End: mib}, ztoc.Prefetch); err != nil {
		t.Fatal(err)
	}
	st.SetFull(true)
	if err := c.Ensure(t.Context(), ref, ztoc.Range{Start: mib, End: 6 * mib}, ztoc.Prefetch); !errors.Is(err, fetch.ErrNotKept) {
		t.Errorf("into a full store: %v", err)
	}
	if err := c.Give(ref, data[mib:2*mib], mib); err == nil {
		t.Error("a full store takes bytes")
	}
}

// A reader that waits for the origin is served by what comes another way.
func TestGiveServesReaders(t *testing.T) {
	data := fetchtest.Content(7, 4*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Latency = 3600e9
	c := newChain(t, fetch.Options{Origin: o, Store: fetchtest.NewStore()})
	got := make([]byte, 100)
	read, ensured := make(chan error, 1), make(chan error, 1)
	go func() { read <- c.ReadAt(t.Context(), ref, got, 2*mib+5, ztoc.Demand) }()
	go func() { ensured <- c.Ensure(t.Context(), ref, ztoc.Range{Start: 2 * mib, End: 3 * mib}, ztoc.Prefetch) }()
	eventually(t, "both wait", func() bool { return c.Stats().Waiting == 2 })
	if err := c.Give(ref, data[2*mib:3*mib], 2*mib); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil || string(got) != string(data[2*mib+5:2*mib+105]) {
		t.Error("read:", err)
	}
	if err := <-ensured; err != nil {
		t.Error("ensure:", err)
	}
}

// A patientOrigin lets prefetches wait until it is closed.
type patientOrigin struct {
	*fetchtest.Origin
	closed chan struct{}
	asked  chan struct{} // one for each prefetch that waits
}

func (o patientOrigin) Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	if fetch.Priority(ctx) == ztoc.Prefetch {
		o.asked <- struct{}{}
		select {
		case <-o.closed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return o.Origin.Blob(ctx, d, r)
}

// Where prefetches may wait, nobody who needs the bytes now waits with them.
func TestPatientPrefetch(t *testing.T) {
	data := fetchtest.Content(7, 4*mib)
	ref := fetchtest.Ref(data)
	o := patientOrigin{fetchtest.NewOrigin(data), make(chan struct{}), make(chan struct{}, 10)}
	c := newChain(t, fetch.Options{Origin: o, Store: fetchtest.NewStore(), PatientPrefetch: true})
	c.Prefetch(t.Context(), ref, []ztoc.Range{{Start: mib, End: 3 * mib}})
	<-o.asked
	mustRead(t, c, data, ref, mib, mib+100_000)
	mustRead(t, c, data, ref, 2*mib, 3*mib)
	close(o.closed)
	mustRead(t, c, data, ref, mib, 3*mib)
}
