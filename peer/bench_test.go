package peer_test

import (
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/peer/peertest"
	"github.com/muster-hpc/muster/ztoc"
)

// cpu is the processor time that this process has used.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// perGB reports the processor time for each GB that has moved once, of both ends, and MB/s for each core that was busy.
func perGB(b *testing.B, used time.Duration, bytes int64) {
	b.SetBytes(bytes / int64(b.N))
	b.ReportMetric(used.Seconds()/(float64(bytes)/1e9), "cpu-s/GB")
	b.ReportMetric(float64(bytes)/1e6/used.Seconds(), "MB/s/core")
}

// constant is a Source that has every blob, at no cost.
type constant struct{ p []byte }

func (c constant) Open(context.Context, peer.Asker, ztoc.Digest) (peer.Blob, error) { return c, nil }
func (c constant) Have(ztoc.Range) bool                                             { return true }
func (c constant) Promised(ztoc.Range) bool                                         { return false }
func (c constant) ReadAt(p []byte, _ int64) error                                   { copy(p, c.p); return nil }

func (c constant) Watch(func(ztoc.Range)) func() { return func() {} }
func (c constant) Close() error                  { return nil }

// fileSource has one file.
type fileSource struct {
	constant
	f *os.File
}

func (s fileSource) Open(context.Context, peer.Asker, ztoc.Digest) (peer.Blob, error) { return s, nil }

func (s fileSource) ReadAt(p []byte, off int64) error {
	_, err := s.f.ReadAt(p, off)
	return err
}

var benchDigest = ztoc.DigestOf([]byte("bench"))

// drain takes size bytes from a parent.
func drain(b testing.TB, s *peer.Stream, size int64, f func(e peer.Event)) {
	if _, err := s.Want(benchDigest, []ztoc.Range{{Start: 0, End: size}}); err != nil {
		b.Fatal(err)
	}
	for {
		e, err := s.Next()
		if err != nil {
			b.Fatal(err)
		}
		switch e.Kind {
		case peer.Bytes:
			f(e)
		case peer.Done:
			return
		}
	}
}

func networks(b testing.TB) (peer.Network, peer.Network) {
	of := cluster(b)
	return peer.NewTCP(of("a"), peer.TCPOptions{}), peer.NewTCP(of("b"), peer.TCPOptions{})
}

// BenchmarkRanges moves 64 MiB a time over TLS on loopback; both ends are in the figures.
func BenchmarkRanges(b *testing.B) {
	const size = 64 << 20
	for _, children := range []int{1, 4} {
		b.Run(map[int]string{1: "one child", 4: "four children"}[children], func(b *testing.B) {
			an, bn := networks(b)
			_, a := peertest.Serve(b, an, "a", "127.0.0.1:0", constant{peertest.Content(1, peer.FrameSize)}, peer.ServerOptions{})
			c := peertest.Client(b, bn, peer.ClientOptions{})
			var streams []*peer.Stream
			for range children {
				s, err := c.Open(b.Context(), a, peer.Hello{Priority: ztoc.Prefetch})
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				streams = append(streams, s)
			}
			start := cpu(b)
			b.ReportAllocs()
			for b.Loop() {
				var wg sync.WaitGroup
				for _, s := range streams {
					wg.Go(func() { drain(b, s, size, func(peer.Event) {}) })
				}
				wg.Wait()
			}
			perGB(b, cpu(b)-start, int64(b.N)*size*int64(children))
		})
	}
}

// BenchmarkPassOn is what one host of a tree does and what it takes to feed it: a receives from its parent, hashes, stores, and
// sends what it stored to a child. The figures hold two transfers: one in, one out.
func BenchmarkPassOn(b *testing.B) {
	const size = 64 << 20
	an, bn := networks(b)
	file, err := os.Create(filepath.Join(b.TempDir(), "blob"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	_, parent := peertest.Serve(b, bn, "b", "127.0.0.1:0", constant{peertest.Content(1, peer.FrameSize)}, peer.ServerOptions{})
	_, self := peertest.Serve(b, an, "a", "127.0.0.1:0", fileSource{constant{}, file}, peer.ServerOptions{})
	open := func(n peer.Network, to peer.Host) *peer.Stream {
		s, err := peertest.Client(b, n, peer.ClientOptions{}).Open(b.Context(), to, peer.Hello{Priority: ztoc.Prefetch})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { s.Close() })
		return s
	}
	in, out := open(an, parent), open(bn, self)
	start := cpu(b)
	for b.Loop() {
		h := sha256.New()
		drain(b, in, size, func(e peer.Event) {
			h.Write(e.Data)
			if _, err := file.WriteAt(e.Data, e.Range.Start); err != nil {
				b.Fatal(err)
			}
		})
		drain(b, out, size, func(peer.Event) {})
	}
	perGB(b, cpu(b)-start, int64(b.N)*size)
}

// BenchmarkDemand reads 256 KiB, idle and while four children fetch at full rate. The slowest of a hundred counts.
func BenchmarkDemand(b *testing.B) {
	for _, busy := range []bool{false, true} {
		b.Run(map[bool]string{false: "idle", true: "beside prefetch"}[busy], func(b *testing.B) {
			an, bn := networks(b)
			_, a := peertest.Serve(b, an, "a", "127.0.0.1:0", constant{peertest.Content(1, peer.FrameSize)}, peer.ServerOptions{})
			c := peertest.Client(b, bn, peer.ClientOptions{})
			ctx, cancel := context.WithCancel(b.Context())
			var wg sync.WaitGroup
			for range map[bool]int{false: 0, true: 4}[busy] {
				wg.Go(func() {
					s, err := c.Open(ctx, a, peer.Hello{Priority: ztoc.Prefetch})
					if err != nil {
						return
					}
					defer s.Close()
					s.Want(benchDigest, []ztoc.Range{{Start: 0, End: 10 << 30}})
					for err == nil {
						_, err = s.Next()
					}
				})
			}
			p := make([]byte, 256<<10)
			var took []time.Duration
			for b.Loop() {
				start := time.Now()
				if err := c.Read(b.Context(), a, peer.Hello{}, benchDigest, p, 0); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			cancel()
			wg.Wait()
		})
	}
}

// BenchmarkConnect is a handshake of both ends and a hello.
func BenchmarkConnect(b *testing.B) {
	an, bn := networks(b)
	_, a := peertest.Serve(b, an, "a", "127.0.0.1:0", peer.NotHere{}, peer.ServerOptions{})
	c := peertest.Client(b, bn, peer.ClientOptions{})
	start := cpu(b)
	for b.Loop() {
		s, err := c.Open(b.Context(), a, peer.Hello{Priority: ztoc.Prefetch})
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
	b.ReportMetric((cpu(b)-start).Seconds()*1000/float64(b.N), "cpu-ms")
}
