package twosum

import (
	"crypto/sha256"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/cpu"
)

// Sums of every length come out as crypto/sha256 has them, however the bytes are dealt out.
func TestWrite(t *testing.T) {
	data := make([]byte, 64<<10)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(data); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		a, b := sha256.New(), sha256.New()
		from, to := rng.IntN(300), len(data)-rng.IntN(300)
		p, q := data[:len(data)-rng.IntN(300)], data[from:to]
		wantA, wantB := sha256.Sum256(p), sha256.Sum256(q)
		for len(p)+len(q) > 0 {
			n, m := min(len(p), rng.IntN(20_000)), min(len(q), rng.IntN(20_000))
			if rng.IntN(2) == 0 {
				Write(a, b, p[:n], q[:m])
			} else {
				Write(b, a, q[:m], p[:n])
			}
			p, q = p[n:], q[m:]
		}
		if [32]byte(a.Sum(nil)) != wantA || [32]byte(b.Sum(nil)) != wantB {
			t.Fatalf("other sums than crypto/sha256's for [%d, %d)", from, to)
		}
	}
}

// The kernel agrees with crypto/sha256 on a machine that says it has what it takes.
func TestUsable(t *testing.T) {
	if usable != hasSHA() {
		t.Fatalf("the machine has the instructions: %v, the kernel is used: %v", hasSHA(), usable)
	}
	if runtime.GOARCH == "amd64" && cpu.X86.HasSSSE3 {
		t.Logf("SHA instructions: %v", hasSHA())
	}
}

func FuzzWrite(f *testing.F) {
	f.Add([]byte("abc"), 1, 2, 3)
	f.Add(make([]byte, 5000), 63, 1024, 2000)
	f.Fuzz(func(t *testing.T, data []byte, x, y, z int) {
		data = slices.Concat(data, make([]byte, 3000))
		at := func(i int) int { return int(uint(i) % uint(len(data))) }
		a, b := sha256.New(), sha256.New()
		a.Write(data[:at(x)])
		b.Write(data[:at(y)])
		Write(a, b, data[at(x):], data[at(y):at(y)+(len(data)-at(y))/(1+at(z)%3)])
		end := at(y) + (len(data)-at(y))/(1+at(z)%3)
		b.Write(data[end:])
		if want := sha256.Sum256(data); [32]byte(a.Sum(nil)) != want || [32]byte(b.Sum(nil)) != want {
			t.Fatal("other sums than crypto/sha256's")
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	data := make([]byte, 256<<10)
	b.Run("one", func(b *testing.B) {
		h := sha256.New()
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			h.Write(data)
		}
	})
	b.Run("two", func(b *testing.B) {
		x, y := sha256.New(), sha256.New()
		y.Write(data[:7])
		b.SetBytes(2 * int64(len(data)))
		for b.Loop() {
			Write(x, y, data, data)
		}
	})
}
