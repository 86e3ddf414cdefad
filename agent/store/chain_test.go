package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/fetch/fetchtest"
	"github.com/muster-hpc/muster/ztoc"
)

// chainOn makes a chain on a store as the rest of muster does.
func chainOn(t testing.TB, s *Store, o *fetchtest.Origin) *fetch.Chain {
	c := fetch.New(fetch.Options{
		Store:  fetch.StoreFunc(func(ref ztoc.BlobRef) (fetch.Blob, error) { return s.Blob(ref) }),
		Origin: o,
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// TestFirstPullTwice: two processes pull the same image through one store; each byte comes once for each
// of them at most, and once altogether when one is after the other.
func TestFirstPullTwice(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 24<<20+99)
	o := fetchtest.NewOrigin(data)
	for range 2 {
		st, err := chainOn(t, s, o).Stream(t.Context(), refOf(data))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(st)
		st.Close()
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	if o.Sent() != int64(len(data)) || len(o.Requests()) != 1 {
		t.Errorf("%d bytes in %d requests for %d", o.Sent(), len(o.Requests()), len(data))
	}
	if err := openBlob(t, s, refOf(data)).Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestManyAtOnce: processes that start the same image at the same moment fetch its bytes once between them.
func TestManyAtOnce(t *testing.T) {
	dir := t.TempDir() + "/s"
	data := content(1, 24<<20+99)
	ref := refOf(data)
	o := fetchtest.NewOrigin(data)
	o.Rate, o.Latency = 40<<20, 5*time.Millisecond
	var wg sync.WaitGroup
	for p := range 6 {
		c := chainOn(t, openStore(t, dir, Options{}), o) // a store of its own stands for a process
		wg.Go(func() {
			if p%2 == 0 {
				st, err := c.Stream(t.Context(), ref)
				if err != nil {
					t.Error(err)
					return
				}
				defer st.Close()
				if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, data) {
					t.Errorf("stream: %d bytes, %v", len(got), err)
				}
				return
			}
			p := make([]byte, 300_000)
			for off := 0; off+len(p) <= len(data); off += len(p) {
				if err := c.ReadAt(t.Context(), ref, p, int64(off), ztoc.Demand); err != nil || !bytes.Equal(p, data[off:off+len(p)]) {
					t.Errorf("read at %d: %v", off, err)
				}
			}
		})
	}
	wg.Wait()
	// A reader far behind the head of another's long request goes ahead alone: a few units come twice.
	if o.Sent() > int64(len(data))*5/4 {
		t.Errorf("%d bytes for %d", o.Sent(), len(data))
	}
	t.Logf("%d bytes in %d requests for %d", o.Sent(), len(o.Requests()), len(data))
}

// TestClaimOfAStoppedProcess: a claim that does not move holds nobody up for ever, and that of a killed one
// not at all.
func TestClaimOfAStoppedProcess(t *testing.T) {
	dir := t.TempDir() + "/s"
	data := content(1, 4<<20)
	o := fetchtest.NewOrigin(data)
	stopped := openBlob(t, openStore(t, dir, Options{}), refOf(data))
	if _, ok := stopped.Claim(ztoc.Range{Start: 1 << 20, End: 2 << 20}); !ok {
		t.Fatal("no claim")
	}
	s := openStore(t, dir, Options{})
	if by, ok := openBlob(t, s, refOf(data)).Claim(ztoc.Range{End: 4 << 20}); ok || by != (ztoc.Range{Start: 1 << 20, End: 2 << 20}) {
		t.Fatalf("claimed twice: %v %v", by, ok)
	}
	c := fetch.New(fetch.Options{
		Store:  fetch.StoreFunc(func(ref ztoc.BlobRef) (fetch.Blob, error) { return s.Blob(ref) }),
		Origin: o, Yield: 200 * time.Millisecond,
	})
	defer c.Close()
	p := make([]byte, len(data))
	if err := c.ReadAt(t.Context(), refOf(data), p, 0, ztoc.Demand); err != nil || !bytes.Equal(p, data) {
		t.Fatal(err)
	}
	if s := c.Stats(); s.Yielded == 0 || o.Sent() != int64(len(data)) {
		t.Errorf("%d bytes, %+v", o.Sent(), s)
	}
	stopped.Close()
	if _, ok := openBlob(t, s, refOf(data)).Claim(ztoc.Range{End: 4 << 20}); !ok {
		t.Error("a claim outlives its process")
	}
}

// TestStreamLargerThanQuota: a first pull through a store that does not hold it still fetches each byte once.
func TestStreamLargerThanQuota(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{Quota: 32 << 20})
	data := content(1, 80<<20)
	o := fetchtest.NewOrigin(data)
	st, err := chainOn(t, s, o).Stream(t.Context(), refOf(data))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	got, err := io.ReadAll(st)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if o.Sent() > int64(len(data))+1<<20 {
		t.Errorf("%d bytes for %d", o.Sent(), len(data))
	}
}

// TestChainsUnderChurn: two chains with stores of their own on one directory, at half of what they want; every
// read is right.
func TestChainsUnderChurn(t *testing.T) {
	dir := t.TempDir() + "/s"
	var blobs [][]byte
	var refs []ztoc.BlobRef
	for i := range 4 {
		blobs = append(blobs, content(uint64(i), 6<<20))
		refs = append(refs, refOf(blobs[i]))
	}
	o := fetchtest.NewOrigin(blobs...)
	var wg sync.WaitGroup
	end := time.Now().Add(2 * time.Second)
	for p := range 2 {
		s := openStore(t, dir, Options{Quota: 12 << 20})
		c := chainOn(t, s, o)
		for g := range 6 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(p), uint64(g)))
				for time.Now().Before(end) {
					i := rnd.IntN(len(blobs))
					data := blobs[i]
					a := rnd.IntN(len(data))
					b := min(len(data), a+1+rnd.IntN(1<<20))
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					got := make([]byte, b-a)
					if err := c.ReadAt(ctx, refs[i], got, int64(a), ztoc.Demand); err != nil {
						t.Error(err)
					} else if !bytes.Equal(got, data[a:b]) {
						t.Errorf("wrong bytes in [%d, %d)", a, b)
					}
					cancel()
				}
			})
		}
	}
	wg.Wait()
}

// TestHintsLie: zeroed blocks under presence come back right after Reject, from the origin.
func TestHintsLie(t *testing.T) {
	s := openStore(t, t.TempDir()+"/s", Options{})
	data := content(1, 2<<20)
	ref := fill(t, s, data, 0)
	b := openBlob(t, s, ref)
	b.file.f.WriteAt(make([]byte, 8192), 512<<10)
	o := fetchtest.NewOrigin(data)
	c := chainOn(t, s, o)
	r := ztoc.Range{Start: 500 << 10, End: 600 << 10}
	p := make([]byte, r.Len())
	if err := c.ReadAt(t.Context(), ref, p, r.Start, ztoc.Demand); err != nil || bytes.Equal(p, data[r.Start:r.End]) {
		t.Fatalf("the test damaged nothing: %v", err)
	}
	if err := c.Reject(ref, r, errors.New("digest")); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadAt(t.Context(), ref, p, r.Start, ztoc.Demand); err != nil || !bytes.Equal(p, data[r.Start:r.End]) {
		t.Fatalf("after reject: %v", err)
	}
	if o.Sent() != 100<<10 {
		t.Errorf("%d bytes were fetched", o.Sent())
	}
}

func BenchmarkStream(b *testing.B) {
	s, err := Open(b.TempDir()+"/s", Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := content(1, 64<<20)
	ref := refOf(data)
	o := fetchtest.NewOrigin(data)
	c := chainOn(b, s, o)
	buf := make([]byte, 256<<10)
	for _, name := range []string{"first", "again"} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(ref.Size)
			for b.Loop() {
				if name == "first" {
					bl, _ := s.Blob(ref)
					bl.Drop(ztoc.Range{End: ref.Size})
					bl.Close()
				}
				st, err := c.Stream(b.Context(), ref)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{st}, buf); err != nil {
					b.Fatal(err)
				}
				st.Close()
			}
		})
	}
}

func BenchmarkChainReadAt(b *testing.B) {
	s, err := Open(b.TempDir()+"/s", Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := content(1, 64<<20)
	ref := refOf(data)
	c := chainOn(b, s, fetchtest.NewOrigin(data))
	p := make([]byte, 4096)
	for b.Loop() {
		if err := c.ReadAt(b.Context(), ref, p, 1<<20, ztoc.Demand); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir() + "/s"
	for i := 0; b.Loop(); i++ {
		s, err := Open(dir, Options{})
		if err != nil {
			b.Fatal(err)
		}
		bl, err := s.Blob(ztoc.BlobRef{Digest: ztoc.DigestOf([]byte{byte(i), byte(i >> 8), byte(i >> 16)}), Size: 50 << 20})
		if err != nil {
			b.Fatal(err)
		}
		bl.Close()
		s.Close()
	}
}
