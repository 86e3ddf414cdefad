package fetch_test

import (
	"bytes"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/fetch/fetchtest"
)

func TestStream(t *testing.T) {
	data := fetchtest.Content(1, 40*mib+77)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	st := fetchtest.NewStore()
	var events atomic.Int64
	c := newChain(t, fetch.Options{Store: st, Origin: o, OnEvent: func(e fetch.Event) {
		if e.Kind == fetch.Ended {
			events.Add(e.Range.Len())
		}
	}})
	// A part is here already, another is read while the stream runs.
	mustRead(t, c, data, ref, 10*mib, 12*mib)
	s, err := c.Stream(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 20*mib)
	if _, err := io.ReadFull(s, got); err != nil {
		t.Fatal(err)
	}
	mustRead(t, c, data, ref, 39*mib, 39*mib+10)
	mustRead(t, c, data, ref, 15*mib, 16*mib)
	rest, err := io.ReadAll(s)
	if err != nil {
		t.Fatal(err)
	}
	if got = append(got, rest...); !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, not those of the blob", len(got))
	}
	s.Close()
	eventually(t, "flights end", func() bool { return c.Stats().Running == 0 })
	// Where a demand read cuts a running stream short, what the stream had in hand may come twice.
	if o.Sent() > int64(len(data))+256*kib {
		t.Errorf("%d bytes from the origin for %d", o.Sent(), len(data))
	}
	if n := len(o.Requests()); n > 6 {
		t.Errorf("%d requests: %s", n, trace(o))
	}
	if events.Load() != o.Sent() {
		t.Errorf("events tell of %d bytes, %d were sent", events.Load(), o.Sent())
	}

	// Again, by another process: nothing is fetched.
	o2 := fetchtest.NewOrigin(data)
	c2 := newChain(t, fetch.Options{Store: st, Origin: o2})
	s2, _ := c2.Stream(t.Context(), ref)
	defer s2.Close()
	if got, err := io.ReadAll(s2); err != nil || !bytes.Equal(got, data) || o2.Sent() != 0 {
		t.Errorf("second stream: %d bytes, %v, %d from the origin", len(got), err, o2.Sent())
	}
}

// TestStreamKilled: a first pull that ends in the middle goes on where it was.
func TestStreamKilled(t *testing.T) {
	data := fetchtest.Content(1, 40*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	st := fetchtest.NewStore()
	for i := range 4 {
		c := fetch.New(fetch.Options{Store: st, Origin: o})
		s, err := c.Stream(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		n := (i + 1) * 10 * mib
		got := make([]byte, n)
		if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, data[:n]) {
			t.Fatal(err)
		}
		c.Close() // the stream stays open
	}
	// Each end loses less than a chunk.
	if o.Sent() > int64(len(data))+3*256*kib {
		t.Errorf("%d bytes from the origin for %d", o.Sent(), len(data))
	}
}

// TestStreamBounds: a stream waits for its reader, and ends with it.
func TestStreamBounds(t *testing.T) {
	data := fetchtest.Content(1, 64*mib)
	ref := fetchtest.Ref(data)
	for _, st := range []fetch.Store{fetchtest.NewStore(), nil} {
		o := fetchtest.NewOrigin(data)
		c := newChain(t, fetch.Options{Store: st, Origin: o, Ahead: 4 * mib})
		s, err := c.Stream(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(s, make([]byte, mib))
		time.Sleep(100 * time.Millisecond)
		if o.Sent() > 5*mib+512*kib {
			t.Errorf("%d bytes were fetched ahead", o.Sent())
		}
		if n := c.Stats().Buffered; n > mib {
			t.Errorf("%d bytes are held", n)
		}
		// A second stream, and a reader, are not held up by the first one's pace.
		s2, err := c.Stream(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, s2, 32*mib); err != nil {
			t.Fatal(err)
		}
		mustRead(t, c, data, ref, 50*mib, 51*mib)
		s.Close()
		s2.Close()
		eventually(t, "requests end", func() bool { return o.Open() == 0 })
	}
}

// TestStalledStreams: a stream whose reader has stopped does not keep its place among the requests.
func TestStalledStreams(t *testing.T) {
	one, two := fetchtest.Content(1, 8*mib), fetchtest.Content(2, 8*mib)
	o := fetchtest.NewOrigin(one, two)
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o, Requests: 2, Ahead: mib})
	s1, err := c.Stream(t.Context(), fetchtest.Ref(one))
	if err != nil {
		t.Fatal(err)
	}
	defer s1.Close()
	s2, err := c.Stream(t.Context(), fetchtest.Ref(two))
	if err != nil {
		t.Fatal(err)
	}
	defer s2.Close()
	head := make([]byte, 100)
	if _, err := io.ReadFull(s1, head); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s2); err != nil || !bytes.Equal(got, two) {
		t.Errorf("second stream: %d bytes, %v", len(got), err)
	}
	rest, err := io.ReadAll(s1)
	if err != nil || !bytes.Equal(append(head, rest...), one) {
		t.Errorf("first stream: %d bytes, %v", len(head)+len(rest), err)
	}
	if n := len(o.Requests()); n > 3 {
		t.Errorf("%d requests", n)
	}
}
