package fetch_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/fetch/fetchtest"
	"github.com/muster-hpc/muster/ztoc"
)

const kib, mib = 1 << 10, 1 << 20

func newChain(t *testing.T, o fetch.Options) *fetch.Chain {
	t.Helper()
	c := fetch.New(o)
	t.Cleanup(func() { c.Close() })
	return c
}

// mustRead reads [a, b) of data through the chain and compares.
func mustRead(t *testing.T, c *fetch.Chain, data []byte, ref ztoc.BlobRef, a, b int) {
	t.Helper()
	p := make([]byte, b-a)
	if err := c.ReadAt(t.Context(), ref, p, int64(a), ztoc.Demand); err != nil {
		t.Errorf("read [%d, %d): %v", a, b, err)
	} else if !bytes.Equal(p, data[a:b]) {
		t.Errorf("read [%d, %d): wrong bytes", a, b)
	}
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for range 2000 {
		if cond() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

// trace is the requests, by offset, of an origin in KiB, "512+256" being 256 KiB from 512 KiB on.
func trace(o *fetchtest.Origin) string {
	var out []string
	reqs := o.Requests()
	slices.SortStableFunc(reqs, func(a, b fetchtest.Request) int { return int(a.Range.Start - b.Range.Start) })
	for _, r := range reqs {
		s := fmt.Sprintf("%d+%d", r.Range.Start/kib, r.Range.Len()/kib)
		if r.Range.Start%kib != 0 || r.Range.Len()%kib != 0 {
			s = fmt.Sprintf("%dB+%dB", r.Range.Start, r.Range.Len())
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

// TestTrace says which requests a row of reads makes.
func TestTrace(t *testing.T) {
	data := fetchtest.Content(1, 20*mib+1000)
	ref := fetchtest.Ref(data)
	for _, tc := range []struct {
		name  string
		reads [][2]int // KiB
		want  string
	}{
		{"small read is widened to its unit", [][2]int{{300, 304}}, "256+256"},
		{"its neighbour is there then", [][2]int{{300, 304}, {304, 400}}, "256+256"},
		{"across two units", [][2]int{{500, 520}}, "256+512"},
		{"a unit and more is taken as it is", [][2]int{{300, 700}}, "300+400"},
		{"present blocks are left out", [][2]int{{300, 700}, {256, 260}, {690, 710}}, "256+44 300+400 700+1092"},
		{"what goes on from present blocks fetches on", [][2]int{{300, 304}, {600, 604}, {1700, 1704}}, "256+256 512+1280"},
		{"what stands alone does not", [][2]int{{300, 304}, {3000, 3004}}, "256+256 2816+256"},
		{"large reads are cut at 4 MiB", [][2]int{{1024, 11 * 1024}}, "1024+4096 5120+4096 9216+2048"},
		{"the blob's end", [][2]int{{20 * 1024, 20 * 1024}}, "20971520B+1000B"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := fetchtest.NewOrigin(data)
			c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o, Requests: 1})
			for _, r := range tc.reads {
				mustRead(t, c, data, ref, r[0]*kib, max(r[1]*kib, r[0]*kib+1))
				eventually(t, "flights end", func() bool { return c.Stats().Running == 0 })
			}
			if got := trace(o); got != tc.want {
				t.Errorf("requests %s, want %s", got, tc.want)
			}
		})
	}
}

func TestSmallBlobIsFetchedWhole(t *testing.T) {
	data := fetchtest.Content(1, 900*kib)
	o := fetchtest.NewOrigin(data)
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	if c.Local(fetchtest.Ref(data), ztoc.Range{Start: 500 * kib, End: 501 * kib}) {
		t.Error("local before it is fetched")
	}
	mustRead(t, c, data, fetchtest.Ref(data), 500*kib, 501*kib)
	eventually(t, "the rest arrives", func() bool { return c.Local(fetchtest.Ref(data), ztoc.Range{End: 900 * kib}) })
	mustRead(t, c, data, fetchtest.Ref(data), 0, 900*kib)
	if got := trace(o); got != "0+900" {
		t.Errorf("requests %s", got)
	}
}

// TestTinyChunks is an eStargz layer of 50,000 chunks: requests in the order of its MiB.
func TestTinyChunks(t *testing.T) {
	data := fetchtest.Content(1, 32*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	step := len(data) / 50000
	for i := range 50000 {
		mustRead(t, c, data, ref, i*step, (i+1)*step)
	}
	if n := len(o.Requests()); n > 4*32 {
		t.Errorf("%d requests for 32 MiB", n)
	}
	if o.Sent() > int64(len(data)) {
		t.Errorf("%d bytes for a blob of %d", o.Sent(), len(data))
	}
}

// TestSlowRegistry is F14: many readers, few connections, one flight for a range.
func TestSlowRegistry(t *testing.T) {
	data := fetchtest.Content(1, 8*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Latency, o.Rate = 50*time.Millisecond, 4*mib
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	var peak atomic.Int64
	var wg sync.WaitGroup
	for g := range 500 {
		wg.Go(func() {
			at := g % 16 * 512 * kib
			mustRead(t, c, data, ref, at+g*16, at+g*16+5000)
			peak.Store(max(peak.Load(), c.Stats().Buffered))
		})
	}
	wg.Wait()
	if o.Most() > 8 {
		t.Errorf("%d connections at once", o.Most())
	}
	seen := map[ztoc.Range]bool{}
	for _, r := range o.Requests() {
		if seen[r.Range] {
			t.Errorf("%v was asked for twice", r)
		}
		seen[r.Range] = true
	}
	if n := len(o.Requests()); n > 16 {
		t.Errorf("%d requests for 16 ranges", n)
	}
	if peak.Load() > 32*mib {
		t.Errorf("buffers of %d bytes", peak.Load())
	}
}

// TestBuffersWithoutStore: memory stays bounded when flights hold what the store does not keep.
func TestBuffersWithoutStore(t *testing.T) {
	data := fetchtest.Content(1, 64*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Latency = 20 * time.Millisecond
	c := newChain(t, fetch.Options{Origin: o})
	if err := c.ReadAt(t.Context(), ref, nil, 5, ztoc.Demand); err != nil {
		t.Error(err)
	}
	var peak atomic.Int64
	var wg sync.WaitGroup
	for g := range 100 {
		wg.Go(func() {
			at := g % 16 * 4 * mib
			mustRead(t, c, data, ref, at, at+3*mib+g)
			peak.Store(max(peak.Load(), c.Stats().Buffered))
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for {
		select {
		case <-done:
			if o.Most() > 8 || peak.Load() > 32*mib {
				t.Errorf("%d connections, buffers of %d bytes", o.Most(), peak.Load())
			}
			return
		case <-time.After(2 * time.Millisecond):
			peak.Store(max(peak.Load(), c.Stats().Buffered))
		}
	}
}

// TestServedAsItArrives: a waiter goes as soon as its own bytes are there.
func TestServedAsItArrives(t *testing.T) {
	data := fetchtest.Content(1, 4*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Gate = make(chan struct{}) // lets through 16 KiB each
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	done := make(chan string, 3)
	read := func(name string, a, b int) {
		go func() {
			mustRead(t, c, data, ref, a, b)
			done <- name
		}()
	}
	read("first", 0, 4*kib)
	eventually(t, "a request", func() bool { return len(o.Requests()) == 1 })
	read("late", 200*kib, 256*kib)
	eventually(t, "two wait", func() bool { return c.Stats().Waiting == 2 })
	o.Gate <- struct{}{}
	if got := <-done; got != "first" {
		t.Fatal(got)
	}
	// What has arrived and is not stored yet comes from the flight's buffer.
	read("buffered", 1*kib, 10*kib)
	if got := <-done; got != "buffered" {
		t.Fatal(got)
	}
	for range 15 {
		o.Gate <- struct{}{}
	}
	if got := <-done; got != "late" {
		t.Fatal(got)
	}
	if got := trace(o); got != "0+256" {
		t.Errorf("requests %s", got)
	}
}

// TestDemandBeforePrefetch: a demand read is served though prefetches fill their share and the queue.
func TestDemandBeforePrefetch(t *testing.T) {
	data := fetchtest.Content(1, 128*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Rate = 64 * kib // prefetches of 8 MiB take two minutes
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	c.Prefetch(t.Context(), ref, []ztoc.Range{{Start: 0, End: 120 * mib}})
	eventually(t, "prefetches run", func() bool { return c.Stats().Running == 6 })
	if c.Stats().Queued == 0 {
		t.Fatal("nothing is queued")
	}
	at := 100 * mib // queued
	mustRead(t, c, data, ref, at, at+kib)
	at = 7 * mib // far ahead in a running one
	mustRead(t, c, data, ref, at, at+kib)
	at = 125 * mib // not asked for by the prefetch
	mustRead(t, c, data, ref, at, at+kib)
	if o.Most() > 8 {
		t.Errorf("%d connections at once", o.Most())
	}
}

func TestPrefetch(t *testing.T) {
	data := fetchtest.Content(1, 40*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	c.Prefetch(t.Context(), ref, []ztoc.Range{{Start: 0, End: 20 * mib}, {Start: 30*mib + 5, End: 30*mib + 10}, {Start: 30*mib + 20000, End: 30*mib + 20001}})
	eventually(t, "prefetch ends", func() bool { s := c.Stats(); return s.Running+s.Queued == 0 })
	// Six small ones, then larger ones; two ranges with a small gap are one.
	if got := trace(o); got != "0+1024 1024+1024 2048+1024 3072+1024 4096+1024 5120+1024 6144+2048 8192+2048 10240+2048 12288+2048 14336+2048 16384+2048 18432+2048 30720+256" {
		t.Errorf("requests %s", got)
	}
	mustRead(t, c, data, ref, 0, 20*mib)
	if s := c.Stats(); s.OriginRequests != 14 || s.StoreBytes != 20*mib {
		t.Errorf("stats %+v", s)
	}

	// The end of its context ends it.
	ctx, cancel := context.WithCancel(t.Context())
	data2 := fetchtest.Content(2, 64*mib)
	slow := fetchtest.NewOrigin(data2)
	slow.Rate = mib
	c2 := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: slow})
	c2.Prefetch(ctx, fetchtest.Ref(data2), []ztoc.Range{{End: 64 * mib}})
	eventually(t, "it runs", func() bool { return slow.Sent() > 0 })
	cancel()
	eventually(t, "it ends", func() bool { s := c2.Stats(); return s.Running+s.Queued+slow.Open() == 0 })
}

// TestReject is F8.
func TestReject(t *testing.T) {
	data := fetchtest.Content(1, 2*mib)
	ref := fetchtest.Ref(data)
	r := ztoc.Range{Start: 100_000, End: 150_000}
	cause := errors.New("sha256 differs")
	for _, st := range []fetch.Store{fetchtest.NewStore(), nil} {
		for _, wrong := range []int{1, 2, 1000} { // how many of the first answers are wrong
			o := fetchtest.NewOrigin(data)
			o.Fault = func(n int, _ ztoc.Digest, rr ztoc.Range, body []byte) ([]byte, error) {
				if n <= wrong {
					body[r.Start-rr.Start] ^= 1
				}
				return body, nil
			}
			c := newChain(t, fetch.Options{Store: st, Origin: o})
			var err error
			tries := 0
			p := make([]byte, r.Len())
			for err == nil {
				if err = c.ReadAt(t.Context(), ref, p, r.Start, ztoc.Demand); err != nil {
					t.Fatal(err)
				}
				if tries++; bytes.Equal(p, data[r.Start:r.End]) {
					break
				}
				err = c.Reject(ref, r, cause)
			}
			if wrong < 3 && (err != nil || tries != wrong+1) {
				t.Errorf("%d wrong answers: %v after %d reads", wrong, err, tries)
			}
			if wrong >= 3 && (!errors.Is(err, fetch.ErrWrong) || !errors.Is(err, cause) || tries != 3) {
				t.Errorf("always wrong: %v after %d reads", err, tries)
			}
			if m, ok := st.(*fetchtest.MemoryStore); ok {
				b, _ := m.Open(ref)
				if err != nil && len(b.Missing(r)) == 0 {
					t.Error("wrong bytes stay in the store")
				}
				m.Evict()
			}
		}
	}
}

// TestRejectByMany: many readers who got the same wrong bytes do not use up the tries.
func TestRejectByMany(t *testing.T) {
	data := fetchtest.Content(1, 2*mib)
	ref := fetchtest.Ref(data)
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: fetchtest.NewOrigin(data)})
	r := ztoc.Range{Start: 0, End: 4096}
	for range 10 {
		if err := c.Reject(ref, r, io.ErrUnexpectedEOF); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCancel(t *testing.T) {
	data := fetchtest.Content(1, 16*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Gate = make(chan struct{}, 1)
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	for range 2 {
		go func() { errs <- c.ReadAt(ctx, ref, make([]byte, 4*mib), 0, ztoc.Demand) }()
	}
	stay := make(chan error, 1)
	p := make([]byte, 4*kib)
	go func() { stay <- c.ReadAt(t.Context(), ref, p, 8*mib, ztoc.Demand) }()
	eventually(t, "three wait", func() bool { return c.Stats().Waiting == 3 })
	cancel()
	for range 2 {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled read: %v", err)
		}
	}
	eventually(t, "their flight ends, the other stays", func() bool { return o.Open() == 1 })
	close(o.Gate)
	if err := <-stay; err != nil || !bytes.Equal(p, data[8*mib:8*mib+4*kib]) {
		t.Errorf("the other read: %v", err)
	}
}

// TestClose is F10: nothing comes from the origin after Close.
func TestClose(t *testing.T) {
	data := fetchtest.Content(1, 64*mib)
	ref := fetchtest.Ref(data)
	o := fetchtest.NewOrigin(data)
	o.Rate = 256 * kib
	c := fetch.New(fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	c.Prefetch(t.Context(), ref, []ztoc.Range{{End: 64 * mib}})
	errs := make(chan error)
	go func() { errs <- c.ReadAt(t.Context(), ref, make([]byte, mib), 0, ztoc.Demand) }()
	eventually(t, "a reader waits", func() bool { return c.Stats().Waiting == 1 && o.Sent() > 0 })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if o.Open() != 0 {
		t.Errorf("%d requests are open after Close", o.Open())
	}
	if err := <-errs; !errors.Is(err, fetch.ErrClosed) {
		t.Errorf("the reader got %v", err)
	}
	if err := c.ReadAt(t.Context(), ref, make([]byte, 1), 0, ztoc.Demand); !errors.Is(err, fetch.ErrClosed) {
		t.Errorf("a later read got %v", err)
	}
}

// TestNothingKept is F12: reads go on when nothing can be stored.
func TestNothingKept(t *testing.T) {
	data := fetchtest.Content(1, 8*mib)
	ref := fetchtest.Ref(data)
	full := fetchtest.NewStore()
	full.SetFull(true)
	refusing := fetch.StoreFunc(func(ztoc.BlobRef) (fetch.Blob, error) { return nil, fetchtest.ErrFull })
	for _, st := range []fetch.Store{nil, full, refusing} {
		o := fetchtest.NewOrigin(data)
		c := newChain(t, fetch.Options{Store: st, Origin: o})
		mustRead(t, c, data, ref, 100, 5*mib)
		mustRead(t, c, data, ref, 3*mib+1, 3*mib+2)
		s, err := c.Stream(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(s)
		s.Close()
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("stream: %d bytes, %v", len(got), err)
		}
		eventually(t, "flights end", func() bool { return c.Stats().Running == 0 })
	}
}

func TestErrors(t *testing.T) {
	data := fetchtest.Content(1, 2*mib)
	ref := fetchtest.Ref(data)
	outage := errors.New("outage")
	o := fetchtest.NewOrigin(data)
	var down atomic.Bool
	o.Fault = func(n int, _ ztoc.Digest, _ ztoc.Range, body []byte) ([]byte, error) {
		if down.Load() {
			return nil, outage
		}
		if n == 2 {
			return body[:len(body)/2], nil // cut short
		}
		return body, nil
	}
	c := newChain(t, fetch.Options{Store: fetchtest.NewStore(), Origin: o})
	down.Store(true)
	if err := c.ReadAt(t.Context(), ref, make([]byte, 10), 0, ztoc.Demand); !errors.Is(err, outage) {
		t.Errorf("outage: %v", err)
	}
	down.Store(false)
	if err := c.ReadAt(t.Context(), ref, make([]byte, 10), 256*kib-10, ztoc.Demand); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short body: %v", err)
	}
	mustRead(t, c, data, ref, 0, 2*mib)
	if err := c.ReadAt(t.Context(), ref, make([]byte, 10), 2*mib-5, ztoc.Demand); err == nil {
		t.Error("read beyond the end")
	}

	// F9: with patience, an outage is waited out.
	down.Store(true)
	c2 := newChain(t, fetch.Options{
		Store: fetchtest.NewStore(), Origin: o, Patience: time.Minute,
		Temporary: func(err error) bool { return errors.Is(err, outage) },
	})
	time.AfterFunc(300*time.Millisecond, func() { down.Store(false) })
	mustRead(t, c2, data, ref, 0, 4096)
	down.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c2.ReadAt(ctx, ref, make([]byte, 10), mib, ztoc.Demand); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("outage beyond the deadline: %v", err)
	}
}

// TestChurn has everything at once: readers of all kinds, cancellations, faults, an evicting store; every read that
// succeeds gives right bytes, and nothing is left in the end.
func TestChurn(t *testing.T) {
	var blobs [][]byte
	var refs []ztoc.BlobRef
	for i, n := range []int{0, 1, 5000, 900 * kib, 6*mib + 3, 20 * mib} {
		blobs = append(blobs, fetchtest.Content(uint64(i), n))
		refs = append(refs, fetchtest.Ref(blobs[i]))
	}
	temporary := errors.New("try again")
	o := fetchtest.NewOrigin(blobs...)
	var faults atomic.Int64
	o.Fault = func(n int, _ ztoc.Digest, _ ztoc.Range, body []byte) ([]byte, error) {
		switch {
		case n%17 == 0:
			faults.Add(1)
			return nil, temporary
		case n%23 == 0:
			return body[:len(body)/2], nil
		}
		return body, nil
	}
	st := fetchtest.NewStore()
	c := newChain(t, fetch.Options{
		Store: st, Origin: o, Ahead: 2 * mib,
		Temporary: func(err error) bool { return errors.Is(err, temporary) || errors.Is(err, io.ErrUnexpectedEOF) },
	})
	end := time.Now().Add(3 * time.Second)
	var wg sync.WaitGroup
	for g := range 40 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 7))
			for time.Now().Before(end) {
				i := rnd.IntN(len(blobs))
				data, ref := blobs[i], refs[i]
				a := rnd.IntN(len(data) + 1)
				b := min(len(data), a+rnd.IntN(1<<rnd.IntN(23)+1))
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rnd.IntN(200))*time.Millisecond)
				switch op := rnd.IntN(100); {
				case op < 5:
					c.Prefetch(ctx, ref, []ztoc.Range{{Start: int64(a), End: int64(b)}})
					time.Sleep(time.Millisecond)
				case op < 8:
					s, err := c.Stream(ctx, ref)
					if err != nil {
						t.Error(err)
						break
					}
					got, err := io.ReadAll(s)
					if err == nil && len(got) != len(data) || !bytes.Equal(got, data[:len(got)]) {
						t.Errorf("stream: %d bytes, %v", len(got), err)
					}
					s.Close()
				case op < 9:
					st.Evict()
				case op < 11:
					st.SetFull(rnd.IntN(2) == 0)
				default:
					if op >= 60 {
						cancel()
						ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
					}
					p := make([]byte, b-a)
					err := c.ReadAt(ctx, ref, p, int64(a), ztoc.Priority(rnd.IntN(2)))
					if err == nil && !bytes.Equal(p, data[a:b]) {
						t.Errorf("wrong bytes in [%d, %d) of %d", a, b, len(data))
					}
					if err != nil && ctx.Err() == nil {
						t.Error(err)
					}
				}
				cancel()
			}
		})
	}
	wg.Wait()
	eventually(t, "all ends", func() bool {
		s := c.Stats()
		return s.Running+s.Queued+s.Waiting+o.Open() == 0
	})
	if faults.Load() == 0 {
		t.Error("no faults happened")
	}
	if o.Most() > 8 {
		t.Errorf("%d connections at once", o.Most())
	}
	t.Logf("%+v", c.Stats())
}
