package fetchtest

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/ztoc"
)

// Conformance is what every fetch.Store must do. open makes an empty one.
func Conformance(t *testing.T, open func(t *testing.T) fetch.Store) {
	blob := func(t *testing.T, s fetch.Store, ref ztoc.BlobRef) fetch.Blob {
		t.Helper()
		b, err := s.Blob(ref)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		return b
	}
	t.Run("model", func(t *testing.T) {
		// Random writes, drops and reads against an array of booleans.
		data := Content(1, 3*128<<10+5000)
		size := int64(len(data))
		s := open(t)
		b := blob(t, s, Ref(data))
		other := blob(t, s, Ref(data)) // a second handle sees the same
		here := make([]bool, (size+BlockSize-1)/BlockSize)
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 2000 {
			a := rnd.Int64N(size)
			z := min(size, a+1+rnd.Int64N(1<<rnd.IntN(19)))
			switch op := rnd.IntN(5); {
			case op <= 1:
				if err := b.WriteAt(data[a:z], a); err != nil {
					t.Fatal(err)
				}
				for i := range here {
					lo, hi := int64(i)*BlockSize, min(int64(i+1)*BlockSize, size)
					here[i] = here[i] || a <= lo && hi <= z
				}
			case op == 2:
				b.Drop(ztoc.Range{Start: a, End: z})
				for i := a / BlockSize; i*BlockSize < z; i++ {
					here[i] = false
				}
			}
			var want []ztoc.Range
			for i := a / BlockSize; i*BlockSize < z; i++ {
				if here[i] {
					continue
				}
				r := ztoc.Range{Start: i * BlockSize, End: min((i+1)*BlockSize, size)}
				if n := len(want); n > 0 && want[n-1].End == r.Start {
					want[n-1].End = r.End
				} else {
					want = append(want, r)
				}
			}
			if got := other.Missing(ztoc.Range{Start: a, End: z}); !slices.Equal(got, want) {
				t.Fatalf("missing of [%d, %d): %v, want %v", a, z, got, want)
			}
			p := make([]byte, z-a)
			err := other.ReadAt(p, a)
			if (err == nil) != (want == nil) {
				t.Fatalf("read of [%d, %d) with missing %v: %v", a, z, want, err)
			}
			if err == nil && !bytes.Equal(p, data[a:z]) {
				t.Fatalf("read of [%d, %d): wrong bytes", a, z)
			}
		}
	})
	t.Run("present bytes stay", func(t *testing.T) {
		data := Content(2, 20000)
		b := blob(t, open(t), Ref(data))
		if err := b.WriteAt(data[4096:8192], 4096); err != nil {
			t.Fatal(err)
		}
		if err := b.WriteAt(make([]byte, len(data)), 0); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 4096)
		if err := b.ReadAt(p, 4096); err != nil || !bytes.Equal(p, data[4096:8192]) {
			t.Fatalf("a later write replaced present bytes: %v", err)
		}
	})
	t.Run("sizes", func(t *testing.T) {
		s := open(t)
		for _, n := range []int{0, 1, 4095, 4096, 4097, 131071, 131072, 131073} {
			data := Content(uint64(n), n)
			b := blob(t, s, Ref(data))
			if err := b.WriteAt(data, 0); err != nil {
				t.Fatal(err)
			}
			if m := b.Missing(ztoc.Range{End: int64(n)}); len(m) != 0 {
				t.Fatalf("%d bytes: missing %v", n, m)
			}
			p := make([]byte, n)
			if err := b.ReadAt(p, 0); err != nil || !bytes.Equal(p, data) {
				t.Fatalf("%d bytes: %v", n, err)
			}
			if err := b.ReadAt(make([]byte, 2), int64(n)-1); err == nil {
				t.Fatalf("%d bytes: read beyond the end", n)
			}
			if err := b.WriteAt(make([]byte, 2), int64(n)-1); err == nil {
				t.Fatalf("%d bytes: write beyond the end", n)
			}
			if m := b.Missing(ztoc.Range{Start: int64(n) + 5, End: int64(n) + 9}); len(m) != 0 {
				t.Fatalf("%d bytes: missing beyond the end: %v", n, m)
			}
		}
	})
	t.Run("at the same time", func(t *testing.T) {
		data := Content(3, 2<<20)
		s := open(t)
		var wg sync.WaitGroup
		for g := range 8 {
			b := blob(t, s, Ref(data))
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(g), 1))
				p := make([]byte, 64<<10)
				for range 300 {
					a := rnd.Int64N(int64(len(data) - len(p)))
					switch rnd.IntN(4) {
					case 0:
						if err := b.WriteAt(data[a:a+int64(len(p))], a); err != nil {
							t.Error(err)
						}
					case 1:
						b.Drop(ztoc.Range{Start: a, End: a + 4096})
					default:
						if b.ReadAt(p, a) == nil && !bytes.Equal(p, data[a:a+int64(len(p))]) {
							t.Errorf("wrong bytes at %d", a)
						}
					}
				}
			})
		}
		wg.Wait()
	})
}
