package peer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/peer/peertest"
	"github.com/muster-hpc/muster/ztoc"
)

// proxy passes connections on to addr; spoil sees what the server sends and may change or end it.
func proxy(t *testing.T, addr string, spoil func(n int64, p []byte) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", addr)
			if err != nil {
				in.Close()
				continue
			}
			wg.Go(func() {
				defer out.Close()
				io.Copy(out, in)
			})
			wg.Go(func() {
				defer in.Close()
				buf := make([]byte, 16<<10)
				for n := int64(0); ; {
					k, err := out.Read(buf)
					if err != nil || spoil(n, buf[:k]) != nil {
						return
					}
					n += int64(k)
					if _, err := in.Write(buf[:k]); err != nil {
						return
					}
				}
			})
		}
	})
	return l.Addr().String()
}

// TestBadTransport has a network in between that cuts off or changes bytes: what arrived is right, and then there is an error.
func TestBadTransport(t *testing.T) {
	content := peertest.Content(1, 8<<20)
	shelf := &peertest.Shelf{}
	d := shelf.Put(content)
	an, bn := networks(t)
	_, a := peertest.Serve(t, an, "a", "127.0.0.1:0", shelf, peer.ServerOptions{})
	for name, spoil := range map[string]func(n int64, p []byte) error{
		"cut off": func(n int64, _ []byte) error {
			if n > 3<<20 {
				return io.EOF
			}
			return nil
		},
		"one bit": func(n int64, p []byte) error {
			if n <= 3<<20 && n+int64(len(p)) > 3<<20 {
				p[len(p)/2] ^= 4
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := peertest.Client(t, bn, peer.ClientOptions{Stall: peertest.Patience})
			s, err := c.Open(t.Context(), peer.Host{Name: "a", Addr: proxy(t, a.Addr, spoil)}, peer.Hello{Priority: ztoc.Prefetch})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			id, err := s.Want(d, []ztoc.Range{{Start: 0, End: int64(len(content))}})
			if err != nil {
				t.Fatal(err)
			}
			data, got, _, err := peertest.Take(s, id, int64(len(content)))
			if !errors.Is(err, peer.ErrTruncated) {
				t.Errorf("%v, want ErrTruncated", err)
			}
			if len(got) == 0 {
				t.Error("nothing arrived before")
			}
			for _, r := range got {
				if !bytes.Equal(data[r.Start:r.End], content[r.Start:r.End]) {
					t.Errorf("%v has other bytes", r)
				}
			}
			if n := c.Stats().Truncated; n != 1 {
				t.Errorf("%d truncated streams counted", n)
			}
		})
	}
}

// TestThousandConnects shows that connections leave nothing behind.
func TestThousandConnects(t *testing.T) {
	an, bn := networks(t)
	shelf := &peertest.Shelf{}
	d := shelf.Put([]byte("0123456789"))
	s, a := peertest.Serve(t, an, "a", "127.0.0.1:0", shelf, peer.ServerOptions{PerHost: 1024})
	c := peertest.Client(t, bn, peer.ClientOptions{Stall: peertest.Patience})
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for k := range 50 {
				st, err := c.Open(t.Context(), a, peer.Hello{Priority: ztoc.Prefetch})
				if err != nil {
					t.Errorf("connect %d of %d: %v", k, i, err)
					return
				}
				id, err := st.Want(d, []ztoc.Range{{Start: 0, End: 10}})
				if err == nil {
					_, _, _, err = peertest.Take(st, id, 10)
				}
				if err != nil {
					t.Error(err)
				}
				st.Close()
			}
		})
	}
	wg.Wait()
	deadline := time.Now().Add(peertest.Patience)
	for s.Stats().Conns > 0 || runtime.NumGoroutine() > before+5 {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections and %d goroutines stay, before %d", s.Stats().Conns, runtime.NumGoroutine(), before)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := s.Stats(); n.Refused+n.Failed+n.Strangers != 0 {
		t.Errorf("%+v", n)
	}
}

// TestLimits fills a server's places: who comes then is told so at once, readers still get in, and all get what they want in
// the end.
func TestLimits(t *testing.T) {
	m := peer.NewMemory()
	content := peertest.Content(1, 1<<20)
	shelf := &peertest.Shelf{}
	d := shelf.Put(content)
	promised := ztoc.DigestOf(nil)
	shelf.Promise(promised, func(peer.Asker, ztoc.Range) bool { return true })
	s, a := peertest.Serve(t, m.Host("a"), "a", "", shelf, peer.ServerOptions{Conns: 16, PerHost: 4, Pieces: 64, Buffers: 2})
	ctx, cancel := context.WithTimeout(t.Context(), peertest.Patience)
	defer cancel()
	client := func(name string) *peer.Client {
		return peertest.Client(t, m.Host(name), peer.ClientOptions{Stall: peertest.Patience, Demand: 100})
	}
	busy := func(c *peer.Client, priority ztoc.Priority) error {
		st, err := c.Open(ctx, a, peer.Hello{Priority: priority})
		if err != nil {
			return err
		}
		t.Cleanup(func() { st.Close() })
		id, err := st.Want(promised, []ztoc.Range{{Start: 0, End: 1}})
		if err != nil {
			return err
		}
		for {
			e, err := st.Next()
			switch {
			case err != nil:
				return err
			case e.Kind == peer.Refused && e.Want == id:
				return e.Err
			case e.Kind == peer.Waiting:
				return nil // it has a place, and keeps it
			}
		}
	}
	// One host has four places; three more hosts and a half fill what prefetch may have: 14 of 16.
	var wg sync.WaitGroup
	for i := range 14 {
		c := client(string(rune('b' + i/4)))
		wg.Go(func() {
			if err := busy(c, ztoc.Prefetch); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if err := busy(client("b"), ztoc.Prefetch); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("a fifth of one host: %v, want ErrBusy", err)
	}
	if err := busy(client("z"), ztoc.Prefetch); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("a fifteenth: %v, want ErrBusy", err)
	}
	p := make([]byte, len(content))
	if err := client("z").Read(ctx, a, peer.Hello{}, d, p, 0); err != nil || !bytes.Equal(p, content) {
		t.Errorf("a reader: %v", err)
	}
	if n := s.Stats().Refused; n != 2 {
		t.Errorf("%d refused", n)
	}
	// Readers of thirty hosts on two places: those who are told ErrBusy come again, and all are done in the end.
	var again atomic.Int64
	for i := range 30 {
		c := client("r" + string(rune('a'+i)))
		wg.Go(func() {
			for range 3 {
				p := make([]byte, 100_000)
				err := c.Read(ctx, a, peer.Hello{}, d, p, 5)
				for errors.Is(err, peer.ErrBusy) || errors.Is(err, peer.ErrTruncated) {
					again.Add(1)
					time.Sleep(time.Millisecond)
					err = c.Read(ctx, a, peer.Hello{}, d, p, 5)
				}
				if err != nil || !bytes.Equal(p, content[5:][:len(p)]) {
					t.Errorf("reader %d: %v", i, err)
				}
			}
			c.Close() // gives its place back
		})
	}
	wg.Wait()
	t.Logf("%d times told to come again", again.Load())
}

// TestPiecesLimit bounds what may be wanted at once.
func TestPiecesLimit(t *testing.T) {
	m := peer.NewMemory()
	shelf := &peertest.Shelf{}
	d := ztoc.DigestOf(nil)
	shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
	s, a := peertest.Serve(t, m.Host("a"), "a", "", shelf, peer.ServerOptions{Pieces: 10})
	st, err := peertest.Client(t, m.Host("b"), peer.ClientOptions{Stall: peertest.Patience}).Open(t.Context(), a, peer.Hello{Priority: ztoc.Prefetch})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := st.Want(d, []ztoc.Range{{Start: 0, End: 8 * ztoc.PieceSize}}); err != nil {
		t.Fatal(err)
	}
	id, err := st.Want(d, []ztoc.Range{{Start: 0, End: 3 * ztoc.PieceSize}})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := peertest.Take(st, id, 1); !errors.Is(err, peer.ErrBusy) {
		t.Errorf("%v, want ErrBusy", err)
	}
	if n := s.Stats().Pieces; n != 8 {
		t.Errorf("%d pieces are wanted", n)
	}
}

// TestSlowChild has a child that does not read hold the only buffer: it is cut off, and the other child gets everything.
func TestSlowChild(t *testing.T) {
	an, bn := networks(t)
	content := peertest.Content(1, 32<<20)
	shelf := &peertest.Shelf{}
	d := shelf.Put(content)
	s, a := peertest.Serve(t, an, "a", "127.0.0.1:0", shelf, peer.ServerOptions{Buffers: 1, Accept: 500 * time.Millisecond})
	c := peertest.Client(t, bn, peer.ClientOptions{Stall: peertest.Patience})
	var streams []*peer.Stream
	var ids []uint32
	for range 2 {
		st, err := c.Open(t.Context(), a, peer.Hello{Priority: ztoc.Prefetch})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		id, err := st.Want(d, []ztoc.Range{{Start: 0, End: int64(len(content))}})
		if err != nil {
			t.Fatal(err)
		}
		streams, ids = append(streams, st), append(ids, id)
		if len(streams) == 1 {
			time.Sleep(50 * time.Millisecond) // the first one fills its socket
		}
	}
	data, _, _, err := peertest.Take(streams[1], ids[1], int64(len(content)))
	if err != nil || !bytes.Equal(data, content) {
		t.Errorf("the other child: %v", err)
	}
	for deadline := time.Now().Add(peertest.Patience); s.Stats().Failed == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the slow child was not cut off")
		}
	}
	if _, _, _, err := peertest.Take(streams[0], ids[0], int64(len(content))); !errors.Is(err, peer.ErrTruncated) {
		t.Errorf("the slow child: %v, want ErrTruncated", err)
	}
}

// TestMemoryCut breaks a host off and lets it come back.
func TestMemoryCut(t *testing.T) {
	m := peer.NewMemory()
	shelf := &peertest.Shelf{}
	d := shelf.Put([]byte("0123456789"))
	_, a := peertest.Serve(t, m.Host("a"), "a", "", shelf, peer.ServerOptions{})
	c := peertest.Client(t, m.Host("b"), peer.ClientOptions{Stall: peertest.Patience})
	read := func() error { return c.Read(t.Context(), a, peer.Hello{}, d, make([]byte, 10), 0) }
	if err := read(); err != nil {
		t.Error(err)
	}
	m.Cut("a")
	if err := read(); err == nil {
		t.Error("read across a cut")
	}
	m.Heal("a")
	if err := read(); err != nil {
		t.Error(err)
	}
}
