package peertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// Patience is how long tests wait for what must come.
const Patience = 60 * time.Second

// Serve runs a server until the test ends and returns how to reach it.
func Serve(t testing.TB, n peer.Network, name, addr string, source peer.Source, o peer.ServerOptions, prepare ...func(*peer.Server)) (*peer.Server, peer.Host) {
	t.Helper()
	s := peer.NewServer(n, source, o)
	for _, f := range prepare {
		f(s)
	}
	at, err := s.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, peer.Host{Name: name, Addr: at}
}

// Client makes a client that the end of the test closes.
func Client(t testing.TB, n peer.Network, o peer.ClientOptions) *peer.Client {
	t.Helper()
	c := peer.NewClient(n, o)
	t.Cleanup(func() { c.Close() })
	return c
}

// Content is n bytes that follow from seed.
func Content(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 7))
	for i := 0; i+8 <= n; i += 8 {
		v := r.Uint64()
		for k := range 8 {
			b[i+k] = byte(v >> (8 * k))
		}
	}
	return b
}

// Take reads a stream until want is answered and returns the bytes, the missing ranges, and how it was refused.
func Take(s *peer.Stream, want uint32, size int64) (data []byte, got, missing []ztoc.Range, err error) {
	data = make([]byte, size)
	for {
		e, err := s.Next()
		if err != nil {
			return data, merge(got), merge(missing), err
		}
		if e.Kind == peer.Waiting || e.Want != want {
			continue
		}
		switch e.Kind {
		case peer.Bytes:
			copy(data[e.Range.Start:], e.Data)
			got = append(got, e.Range)
		case peer.Missing:
			missing = append(missing, e.Ranges...)
		case peer.Refused:
			return data, merge(got), merge(missing), e.Err
		case peer.Done:
			return data, merge(got), merge(missing), nil
		}
	}
}

// A Pair is two hosts of one network: "a" serves at Addr (may be empty: any), "b" asks.
type Pair struct {
	A, B peer.Network
	Addr string
}

func span(a, z int64) ztoc.Range { return ztoc.Range{Start: a, End: z} }

func same(t *testing.T, what string, got, want []ztoc.Range) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// TestNetwork is what every peer.Network must do under a server and a client. pair makes two hosts named "a" and "b".
func TestNetwork(t *testing.T, pair func(t *testing.T) Pair) {
	const piece = ztoc.PieceSize
	content := Content(1, 5*piece+12345)
	size := int64(len(content))
	plan := peer.Hello{Plan: "p", Rank: 3, Priority: ztoc.Prefetch, Grant: []byte("g")}

	start := func(t *testing.T, source peer.Source, prepare ...func(*peer.Server)) (*peer.Server, peer.Host, *peer.Client, context.Context) {
		p := pair(t)
		s, host := Serve(t, p.A, "a", p.Addr, source, peer.ServerOptions{}, prepare...)
		ctx, cancel := context.WithTimeout(t.Context(), Patience)
		t.Cleanup(cancel)
		return s, host, Client(t, p.B, peer.ClientOptions{Stall: Patience}), ctx
	}
	open := func(t *testing.T, ctx context.Context, c *peer.Client, to peer.Host) *peer.Stream {
		t.Helper()
		s, err := c.Open(ctx, to, plan)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	want := func(t *testing.T, s *peer.Stream, d ztoc.Digest, ranges ...ztoc.Range) uint32 {
		t.Helper()
		id, err := s.Want(d, ranges)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}

	t.Run("whole", func(t *testing.T) {
		shelf := &Shelf{}
		d := shelf.Put(content)
		_, a, c, ctx := start(t, shelf)
		s := open(t, ctx, c, a)
		data, got, missing, err := Take(s, want(t, s, d, span(0, size)), size)
		if err != nil || !bytes.Equal(data, content) {
			t.Errorf("bytes are equal: %v; %v", bytes.Equal(data, content), err)
		}
		same(t, "got", got, []ztoc.Range{span(0, size)})
		same(t, "missing", missing, nil)
		// The same stream, for odd ranges that touch and overlap.
		data, got, _, err = Take(s, want(t, s, d, span(piece-1, piece+1), span(7, 9), span(8, 12), span(3*piece, 3*piece+1)), size)
		if err != nil {
			t.Error(err)
		}
		same(t, "got", got, []ztoc.Range{span(7, 12), span(piece-1, piece+1), span(3*piece, 3*piece+1)})
		for _, r := range got {
			if !bytes.Equal(data[r.Start:r.End], content[r.Start:r.End]) {
				t.Errorf("%v has other bytes", r)
			}
		}
	})
	t.Run("asker", func(t *testing.T) {
		var mu sync.Mutex
		var from peer.Asker
		shelf := &Shelf{Allow: func(f peer.Asker, _ ztoc.Digest) error {
			mu.Lock()
			defer mu.Unlock()
			from = f
			if string(f.Grant) != "g" {
				return fmt.Errorf("%w: no grant", peer.ErrDenied)
			}
			return nil
		}}
		d := shelf.Put(content)
		_, a, c, ctx := start(t, shelf)
		s := open(t, ctx, c, a)
		if _, _, _, err := Take(s, want(t, s, d, span(0, 10)), size); err != nil {
			t.Error(err)
		}
		mu.Lock()
		if from.Name != "b" || from.Plan != "p" || from.Rank != 3 || from.Priority != ztoc.Prefetch {
			t.Errorf("asker is %+v", from)
		}
		mu.Unlock()
		if err := c.Read(ctx, a, peer.Hello{}, d, make([]byte, 10), 0); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("without a grant: %v, want ErrDenied", err)
		}
		if err := c.Read(ctx, a, peer.Hello{Grant: []byte("g")}, d, make([]byte, 10), 0); err != nil {
			t.Errorf("with a grant, same connection: %v", err)
		}
	})
	t.Run("promised", func(t *testing.T) {
		// Three pieces are there, two are promised of which one comes and one is given up, one is neither.
		shelf := &Shelf{}
		d := ztoc.DigestOf(content)
		for _, p := range []int64{0, 2, 4} {
			r := ztoc.Piece(p).Range(size)
			shelf.Write(d, r.Start, content[r.Start:r.End])
		}
		one, three := ztoc.Piece(1).Range(size), ztoc.Piece(3).Range(size)
		shelf.Promise(d, func(_ peer.Asker, r ztoc.Range) bool { return r == one || r == three })
		_, a, c, ctx := start(t, shelf)
		s := open(t, ctx, c, a)
		id := want(t, s, d, span(0, size))
		var got, missing []ztoc.Range
		waited := false
		for done := false; !done; {
			e, err := s.Next()
			if err != nil {
				t.Fatal(err)
			}
			switch e.Kind {
			case peer.Bytes:
				if !bytes.Equal(e.Data, content[e.Range.Start:e.Range.End]) {
					t.Errorf("%v has other bytes", e.Range)
				}
				got = append(got, e.Range)
			case peer.Missing:
				missing = append(missing, e.Ranges...)
			case peer.Waiting:
				if !waited {
					waited = true
					same(t, "missing while waiting", merge(missing), []ztoc.Range{ztoc.Piece(5).Range(size)})
					shelf.Write(d, one.Start, content[one.Start:one.End])
					shelf.Promise(d, nil)
				}
			case peer.Done:
				done = e.Want == id
			}
		}
		if !waited {
			t.Error("the parent did not say that it waits")
		}
		same(t, "got", merge(got), []ztoc.Range{span(0, 3*piece), ztoc.Piece(4).Range(size)})
		same(t, "missing", merge(missing), []ztoc.Range{three, ztoc.Piece(5).Range(size)})
	})
	t.Run("drop", func(t *testing.T) {
		shelf := &Shelf{}
		d := ztoc.DigestOf(content)
		shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
		srv, a, c, ctx := start(t, shelf)
		s := open(t, ctx, c, a)
		id := want(t, s, d, span(0, size))
		if e, err := s.Next(); err != nil || e.Kind != peer.Waiting {
			t.Fatalf("%+v, %v; want Waiting", e, err)
		}
		if err := s.Drop(id, []ztoc.Range{span(0, 2*piece), span(2*piece+1, size)}); err != nil {
			t.Fatal(err)
		}
		// Frames are read in order: once this is refused, the drop has been seen.
		if _, _, _, err := Take(s, want(t, s, ztoc.DigestOf(nil), span(0, 1)), size); !errors.Is(err, peer.ErrNotHere) {
			t.Fatalf("%v, want ErrNotHere", err)
		}
		shelf.Write(d, 0, content)
		_, got, missing, err := Take(s, id, size)
		if err != nil {
			t.Error(err)
		}
		same(t, "got what was not dropped", got, []ztoc.Range{ztoc.Piece(2).Range(size)})
		same(t, "missing", missing, nil)
		if n := srv.Stats().Pieces; n != 0 {
			t.Errorf("%d pieces are still wanted", n)
		}
	})
	t.Run("not here", func(t *testing.T) {
		_, a, c, ctx := start(t, peer.NotHere{})
		s := open(t, ctx, c, a)
		if _, _, _, err := Take(s, want(t, s, ztoc.DigestOf(content), span(0, 10)), size); !errors.Is(err, peer.ErrNotHere) {
			t.Errorf("%v, want ErrNotHere", err)
		}
		if err := c.Read(ctx, a, peer.Hello{}, ztoc.DigestOf(content), make([]byte, 10), 0); !errors.Is(err, peer.ErrNotHere) {
			t.Errorf("%v, want ErrNotHere", err)
		}
	})
	t.Run("demand", func(t *testing.T) {
		shelf := &Shelf{}
		d := shelf.Put(content)
		shelf.Drop(d, span(piece, piece+1))
		shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true }) // not for demand
		_, a, c, ctx := start(t, shelf)
		p := make([]byte, 3*piece+77)
		if err := c.Read(ctx, a, peer.Hello{}, d, p, 2*piece-5); err != nil || !bytes.Equal(p, content[2*piece-5:][:len(p)]) {
			t.Errorf("other bytes, or %v", err)
		}
		if err := c.Read(ctx, a, peer.Hello{}, d, p, 0); !errors.Is(err, peer.ErrNotHere) {
			t.Errorf("%v, want ErrNotHere", err)
		}
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() {
				p, off := make([]byte, 1000), 2*int64(piece)+int64(i)*3333
				if err := c.Read(ctx, a, peer.Hello{}, d, p, off); err != nil || !bytes.Equal(p, content[off:off+1000]) {
					t.Errorf("reader %d: other bytes, or %v", i, err)
				}
			})
		}
		wg.Wait()
	})
	t.Run("evicted", func(t *testing.T) {
		// What is gone when its turn comes is told as missing, and the rest still comes.
		shelf := &Shelf{}
		d := shelf.Put(content)
		gone := ztoc.Piece(3).Range(size)
		_, a, c, ctx := start(t, forgetful{shelf, gone})
		s := open(t, ctx, c, a)
		_, got, missing, err := Take(s, want(t, s, d, span(0, size)), size)
		if err != nil {
			t.Error(err)
		}
		same(t, "got", got, []ztoc.Range{span(0, gone.Start), span(gone.End, size)})
		same(t, "missing", missing, []ztoc.Range{gone})
	})
	t.Run("questions", func(t *testing.T) {
		type q struct{ A, B int }
		sum := peer.Question[q, int]{Name: "Sum"}
		slow := peer.Question[[]byte, []byte]{Name: "Slow", Timeout: 50 * time.Millisecond}
		_, a, c, ctx := start(t, peer.NotHere{}, func(s *peer.Server) {
			peer.Handle(s, sum, func(_ context.Context, from string, in q) (int, error) {
				if from != "b" {
					return 0, fmt.Errorf("%w: %s", peer.ErrDenied, from)
				}
				if in.A < 0 {
					return 0, fmt.Errorf("no sum of %d: %w", in.A, peer.ErrNotHere)
				}
				return in.A + in.B, nil
			})
			peer.Handle(s, slow, func(ctx context.Context, _ string, _ []byte) ([]byte, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			})
		})
		if n, err := peer.Ask(ctx, c, a, sum, q{3, 4}); n != 7 || err != nil {
			t.Errorf("3+4 = %d, %v", n, err)
		}
		if _, err := peer.Ask(ctx, c, a, sum, q{-3, 4}); !errors.Is(err, peer.ErrNotHere) {
			t.Errorf("%v, want ErrNotHere", err)
		}
		if _, err := peer.Ask(ctx, c, a, slow, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want a deadline", err)
		}
		if _, err := peer.Ask(ctx, c, a, peer.Status, nil); !errors.Is(err, peer.ErrUnknown) {
			t.Errorf("%v, want ErrUnknown", err)
		}
	})
	t.Run("close", func(t *testing.T) {
		// A server that goes ends everything at once, as errors.
		shelf := &Shelf{}
		d := shelf.Put(content)
		shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
		srv, a, c, ctx := start(t, shelf)
		s := open(t, ctx, c, a)
		id := want(t, s, d, span(0, size+piece))
		ended := make(chan error)
		go func() {
			_, _, _, err := Take(s, id, size+piece)
			ended <- err
		}()
		srv.Close()
		if err := <-ended; !errors.Is(err, peer.ErrTruncated) {
			t.Errorf("%v, want ErrTruncated", err)
		}
		if n := shelf.OpenBlobs(); n != 0 {
			t.Errorf("%d blobs are open after Close", n)
		}
		if _, err := c.Open(ctx, a, plan); err == nil {
			t.Error("a closed server was reached")
		}
		if n := c.Stats().Truncated; n != 1 {
			t.Errorf("%d truncated streams counted, want 1", n)
		}
	})
	t.Run("context", func(t *testing.T) {
		shelf := &Shelf{}
		d := ztoc.DigestOf(content)
		shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
		_, a, c, ctx := start(t, shelf)
		ctx, cancel := context.WithCancel(ctx)
		s := open(t, ctx, c, a)
		id := want(t, s, d, span(0, size))
		time.AfterFunc(20*time.Millisecond, cancel)
		if _, _, _, err := Take(s, id, size); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want context.Canceled", err)
		}
	})
}

// forgetful claims to have a range and fails to read it.
type forgetful struct {
	*Shelf
	gone ztoc.Range
}

func (f forgetful) Open(ctx context.Context, from peer.Asker, d ztoc.Digest) (peer.Blob, error) {
	b, err := f.Shelf.Open(ctx, from, d)
	return forgetfulBlob{b, f.gone}, err
}

type forgetfulBlob struct {
	peer.Blob
	gone ztoc.Range
}

func (b forgetfulBlob) ReadAt(p []byte, off int64) error {
	if !b.gone.Intersect(span(off, off+int64(len(p)))).Empty() {
		return errors.New("evicted")
	}
	return b.Blob.ReadAt(p, off)
}
