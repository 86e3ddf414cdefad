package peer_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/peer/peertest"
	"github.com/muster-hpc/muster/ztoc"
)

// dir issues an identity in a directory of its own.
func dir(t *testing.T, ca, name string, life time.Duration) string {
	t.Helper()
	d := t.TempDir()
	issue(t, ca, name, life, d)
	return d
}

func newCA(t *testing.T) string {
	t.Helper()
	ca := t.TempDir()
	if err := peer.Init(ca); err != nil {
		t.Fatal(err)
	}
	return ca
}

func load(t *testing.T, dir string) *peer.Identity {
	t.Helper()
	id, err := peer.LoadIdentity(dir)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestStrangers shows what hosts get that are not of the cluster: nothing, on either kind of connection.
func TestStrangers(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	shelf := &peertest.Shelf{}
	content := peertest.Content(1, 100_000)
	d := shelf.Put(content)
	asked := make(chan string, 100)
	shelf.Allow = func(from peer.Asker, _ ztoc.Digest) error { asked <- from.Name; return nil }
	srv, a := peertest.Serve(t, peer.NewTCP(load(t, dir(t, ca, "a", time.Hour)), peer.TCPOptions{}), "a", "127.0.0.1:0", shelf, peer.ServerOptions{},
		func(s *peer.Server) {
			peer.Handle(s, peer.Status, func(_ context.Context, from string, _ []byte) ([]byte, error) {
				asked <- from
				return []byte("yes"), nil
			})
		})

	attempt := func(t *testing.T, dir string, to peer.Host) (ranges, question error) {
		c := peertest.Client(t, peer.NewTCP(load(t, dir), peer.TCPOptions{}), peer.ClientOptions{Stall: peertest.Patience})
		ctx, cancel := context.WithTimeout(t.Context(), peertest.Patience)
		defer cancel()
		ranges = c.Read(ctx, to, peer.Hello{}, d, make([]byte, 10), 0)
		_, question = peer.Ask(ctx, c, to, peer.Status, nil)
		return ranges, question
	}
	nothing := func(t *testing.T, dir string, to peer.Host) {
		t.Helper()
		r, q := attempt(t, dir, to)
		if r == nil || q == nil {
			t.Errorf("got ranges (%v) or an answer (%v)", r, q)
		}
		select {
		case name := <-asked:
			t.Errorf("the server was asked by %q", name)
		default:
		}
		t.Logf("ranges: %v; question: %v", r, q)
	}

	t.Run("one of us", func(t *testing.T) {
		if r, q := attempt(t, dir(t, ca, "b", time.Hour), a); r != nil || q != nil {
			t.Errorf("ranges: %v; question: %v", r, q)
		}
		<-asked
		<-asked
	})
	t.Run("another CA", func(t *testing.T) { nothing(t, dir(t, other, "b", time.Hour), a) })
	t.Run("another CA that believes ours", func(t *testing.T) {
		// The client has no objection, so it is the server that must refuse.
		d := dir(t, other, "b", time.Hour)
		ours, err := os.ReadFile(filepath.Join(ca, peer.CAFile))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, peer.CAFile), ours, 0o600); err != nil {
			t.Fatal(err)
		}
		before := srv.Stats().Strangers
		nothing(t, d, a)
		for deadline := time.Now().Add(peertest.Patience); srv.Stats().Strangers == before && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		if srv.Stats().Strangers == before {
			t.Error("the stranger was not counted")
		}
	})
	t.Run("expired", func(t *testing.T) {
		d := dir(t, ca, "b", time.Millisecond)
		time.Sleep(1100 * time.Millisecond) // certificates know seconds
		nothing(t, d, a)
	})
	t.Run("no certificate", func(t *testing.T) {
		for _, proto := range []string{"h2", "muster-range/1", "http/1.1", ""} {
			cfg := &tls.Config{InsecureSkipVerify: true}
			if proto != "" {
				cfg.NextProtos = []string{proto}
			}
			conn, err := tls.Dial("tcp", a.Addr, cfg)
			if err == nil {
				// TLS 1.3: the client is through before the server has looked.
				conn.SetDeadline(time.Now().Add(peertest.Patience))
				if _, err = conn.Read(make([]byte, 1)); err == nil {
					t.Errorf("%q: the server talks to a stranger", proto)
				}
				conn.Close()
			}
			var late net.Error
			if errors.As(err, &late) && late.Timeout() {
				t.Errorf("%q: the server keeps a stranger's connection: %v", proto, err)
			}
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		if conn, err := tls.Dial("tcp", a.Addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}); err == nil {
			conn.Close()
			t.Error("TLS 1.2 was accepted")
		}
	})
	t.Run("another host's address", func(t *testing.T) {
		// Of the cluster, but not the one that was meant: the client refuses.
		r, q := attempt(t, dir(t, ca, "b", time.Hour), peer.Host{Name: "c", Addr: a.Addr})
		if !errors.Is(r, peer.ErrDenied) || !errors.Is(q, peer.ErrDenied) {
			t.Errorf("ranges: %v; question: %v; want ErrDenied", r, q)
		}
	})
	t.Run("server of another CA", func(t *testing.T) {
		_, x := peertest.Serve(t, peer.NewTCP(load(t, dir(t, other, "a", time.Hour)), peer.TCPOptions{}), "a", "127.0.0.1:0", shelf, peer.ServerOptions{})
		r, q := attempt(t, dir(t, ca, "b", time.Hour), x)
		if !errors.Is(r, peer.ErrDenied) || !errors.Is(q, peer.ErrDenied) {
			t.Errorf("ranges: %v; question: %v; want ErrDenied", r, q)
		}
	})
}

// TestDataNetworkOnly shows that nothing is dialled or listened to outside network.data.
func TestDataNetworkOnly(t *testing.T) {
	of := cluster(t)
	_, a := peertest.Serve(t, peer.NewTCP(of("a"), peer.TCPOptions{}), "a", "127.0.0.1:0", peer.NotHere{}, peer.ServerOptions{})
	limited := peer.NewTCP(of("b"), peer.TCPOptions{Data: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}})
	c := peertest.Client(t, limited, peer.ClientOptions{})
	if _, err := c.Open(t.Context(), a, peer.Hello{}); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("%v, want ErrDenied", err)
	}
	if _, err := c.Open(t.Context(), peer.Host{Name: "a", Addr: "localhost:1"}, peer.Hello{}); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("a name: %v, want ErrDenied", err)
	}
	s := peer.NewServer(limited, peer.NotHere{}, peer.ServerOptions{})
	defer s.Close()
	if _, err := s.Listen("127.0.0.1:0"); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("%v, want ErrDenied", err)
	}
	if _, err := s.Listen("[::1]:0"); err != nil {
		t.Error(err)
	}
}

// TestRotation changes certificates, and then the CA with overlap, while a stream runs.
func TestRotation(t *testing.T) {
	ca, next := newCA(t), newCA(t)
	read := func(path ...string) []byte {
		b, err := os.ReadFile(filepath.Join(path...))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	dirs := map[string]string{"a": dir(t, ca, "a", time.Hour), "b": dir(t, ca, "b", time.Hour)}
	ids := map[string]*peer.Identity{"a": load(t, dirs["a"]), "b": load(t, dirs["b"])}
	shelf := &peertest.Shelf{}
	content := peertest.Content(1, 8*ztoc.PieceSize)
	size := int64(len(content))
	d := ztoc.DigestOf(content)
	shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
	_, a := peertest.Serve(t, peer.NewTCP(ids["a"], peer.TCPOptions{}), "a", "127.0.0.1:0", shelf, peer.ServerOptions{})
	c := peertest.Client(t, peer.NewTCP(ids["b"], peer.TCPOptions{}), peer.ClientOptions{Stall: peertest.Patience})
	ctx, cancel := context.WithTimeout(t.Context(), peertest.Patience)
	defer cancel()
	s, err := c.Open(ctx, a, peer.Hello{Priority: ztoc.Prefetch})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Want(d, []ztoc.Range{{Start: 0, End: size}}); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, size)
	next1 := 0
	onward := func(what string) {
		t.Helper()
		r := ztoc.Piece(next1).Range(size)
		next1++
		shelf.Write(d, r.Start, content[r.Start:r.End])
		for got := int64(0); got < r.Len(); {
			e, err := s.Next()
			if err != nil {
				t.Fatalf("%s: the old stream: %v", what, err)
			}
			if e.Kind == peer.Bytes {
				got += int64(copy(data[e.Range.Start:], e.Data))
			}
		}
		x, err := c.Open(ctx, a, peer.Hello{Priority: ztoc.Prefetch})
		if err != nil {
			t.Fatalf("%s: a new stream: %v", what, err)
		}
		x.Close()
	}
	put := func(name, file string, text []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dirs[name], file), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	reload := func(name string) {
		t.Helper()
		if err := ids[name].Reload(); err != nil {
			t.Fatal(err)
		}
	}
	onward("before")
	first := ids["a"].Expires()
	issue(t, ca, "a", 2*time.Hour, dirs["a"])
	// Noticed without being told, within a second or so.
	for deadline := time.Now().Add(peertest.Patience); ids["a"].Expires().Equal(first); {
		if time.Now().After(deadline) {
			t.Fatal("the new certificate was not noticed")
		}
		time.Sleep(50 * time.Millisecond)
	}
	onward("a has a new certificate")
	// Half a rotation, the key without its certificate, changes nothing.
	other, err := peer.Issue(ca, "b", nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	put("b", peer.KeyFile, other.Key)
	if err := ids["b"].Reload(); err == nil {
		t.Error("a key without its certificate was loaded")
	}
	onward("b is half rotated")
	put("b", peer.HostFile, other.Cert)
	reload("b")
	onward("b has a new certificate")
	// A new CA: both are believed, then certificates change, then the old one goes.
	both := append(bytes.Clone(read(next, peer.CAFile)), read(ca, peer.CAFile)...)
	for _, name := range []string{"a", "b"} {
		put(name, peer.CAFile, both)
		reload(name)
		onward(name + " believes both CAs")
	}
	if err := os.WriteFile(filepath.Join(next, peer.CAFile), both, 0o600); err != nil { // what Issue hands out
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		issue(t, next, name, time.Hour, dirs[name])
		reload(name)
		onward(name + " is of the new CA")
	}
	if !bytes.Equal(data, content) {
		t.Error("the old stream brought other bytes")
	}
	only := both[:bytes.Index(both[1:], []byte("-----BEGIN"))+1]
	for _, name := range []string{"a", "b"} {
		put(name, peer.CAFile, only)
		reload(name)
	}
	if err := c.Read(ctx, a, peer.Hello{}, d, make([]byte, 10), 0); err != nil {
		t.Errorf("the old CA is gone: %v", err)
	}
	// And a certificate of the old CA is nothing now.
	old := peertest.Client(t, peer.NewTCP(load(t, dir(t, ca, "c", time.Hour)), peer.TCPOptions{}), peer.ClientOptions{})
	if err := old.Read(ctx, a, peer.Hello{}, d, make([]byte, 10), 0); err == nil {
		t.Error("a host of the old CA got something")
	}
}

// TestExpiryEndsStream shows that a connection does not outlive the certificate it began with.
func TestExpiryEndsStream(t *testing.T) {
	ca := newCA(t)
	shelf := &peertest.Shelf{}
	d := ztoc.DigestOf(nil)
	shelf.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
	_, a := peertest.Serve(t, peer.NewTCP(load(t, dir(t, ca, "a", time.Hour)), peer.TCPOptions{}), "a", "127.0.0.1:0", shelf, peer.ServerOptions{})
	c := peertest.Client(t, peer.NewTCP(load(t, dir(t, ca, "b", 3*time.Second)), peer.TCPOptions{}), peer.ClientOptions{Stall: peertest.Patience})
	s, err := c.Open(t.Context(), a, peer.Hello{Priority: ztoc.Prefetch})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	id, err := s.Want(d, []ztoc.Range{{Start: 0, End: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := peertest.Take(s, id, 1); !errors.Is(err, peer.ErrTruncated) {
		t.Errorf("%v, want ErrTruncated", err)
	}
}

func TestIssue(t *testing.T) {
	ca := newCA(t)
	if err := peer.Init(ca); !errors.Is(err, os.ErrExist) {
		t.Errorf("a second Init: %v, want ErrExist", err)
	}
	for name, ok := range map[string]bool{"node1": true, "Node_1.example": true, "": false, "a b": false, "../x": false, "nöde": false} {
		if _, err := peer.Issue(ca, name, nil, time.Hour); (err == nil) != ok {
			t.Errorf("Issue(%q): %v", name, err)
		}
	}
	d := dir(t, ca, "node1", time.Hour)
	if id := load(t, d); id.Name() != "node1" {
		t.Errorf("name %q", id.Name())
	}
	if _, err := os.Stat(filepath.Join(d, peer.CAKeyFile)); !errors.Is(err, os.ErrNotExist) {
		t.Error("the CA's key went to a host")
	}
	for _, f := range []string{filepath.Join(ca, peer.CAKeyFile), filepath.Join(ca, peer.GossipFile), filepath.Join(d, peer.KeyFile), filepath.Join(d, peer.GossipFile)} {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi.Mode(), err)
		}
	}
	keys, err := peer.LoadGossipKeys(filepath.Join(d, peer.GossipFile))
	if err != nil || len(keys) != 1 || len(keys[0]) != 32 {
		t.Errorf("%d gossip keys, %v", len(keys), err)
	}
}

// TestSignatures shows whose word counts: that of hosts of the cluster, about what they have said.
func TestSignatures(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	a := peertest.Client(t, peer.NewTCP(load(t, dir(t, ca, "a", time.Hour)), peer.TCPOptions{}), peer.ClientOptions{})
	b := peertest.Client(t, peer.NewTCP(load(t, dir(t, ca, "b", time.Hour)), peer.TCPOptions{}), peer.ClientOptions{})
	stranger := peertest.Client(t, peer.NewTCP(load(t, dir(t, other, "a", time.Hour)), peer.TCPOptions{}), peer.ClientOptions{})
	said := []byte("the origin accepts alice")
	s, err := a.Sign(said)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := b.Signer(said, s); err != nil || name != "a" {
		t.Errorf("%q, %v", name, err)
	}
	bad := func(what string, said, s []byte) {
		t.Helper()
		if name, err := b.Signer(said, s); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("%s: %q, %v", what, name, err)
		}
	}
	bad("other words", []byte("the origin accepts bob"), s)
	for n := range s {
		bad("cut short", said, s[:n])
	}
	s[len(s)-1] ^= 1
	bad("a changed bit", said, s)
	if s, err = stranger.Sign(said); err != nil {
		t.Fatal(err)
	}
	bad("a stranger", said, s)
}
