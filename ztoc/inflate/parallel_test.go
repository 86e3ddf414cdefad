package inflate

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"testing/iotest"
	"time"
)

// A result is all that can be seen of reading a file.
type result struct {
	size   int
	sum    [32]byte
	points int
	psum   [32]byte // of checkpoints and windows
	block  int64
	err    string
}

func readResult(r io.Reader, cores int, interval int64, whole bool) result {
	data, points := sha256.New(), sha256.New()
	var res result
	z := &Reader{chunk: 512 << 10} // so that files of some MiB have several
	z.Reset(r, Options{
		Interval: interval,
		Cores:    cores,
		OnCheckpoint: func(c Checkpoint, window []byte) error {
			fmt.Fprintln(points, c, len(window))
			points.Write(window)
			res.points++
			return nil
		},
	})
	defer z.Close()
	var n int64
	var err error
	if whole {
		n, err = z.WriteTo(data)
	} else {
		n, err = io.CopyBuffer(data, struct{ io.Reader }{z}, make([]byte, 77_777))
	}
	res.size, res.block, res.err = int(n), z.MaxBlock(), fmt.Sprint(err)
	data.Sum(res.sum[:0])
	points.Sum(res.psum[:0])
	return res
}

// large is data that compresses to some MiB: text and binary of changing character.
func large(size int) []byte {
	all := samples()
	r := rand.New(rand.NewPCG(3, 4))
	var b bytes.Buffer
	for b.Len() < size {
		switch r.IntN(5) {
		case 0:
			n := r.IntN(250_000)
			b.Write(all["noise"][n : n+r.IntN(50_000)])
		case 1:
			n := r.IntN(800_000)
			b.Write(all["mixed"][n : n+r.IntN(100_000)])
		default:
			text := bytes.Clone(all["text"][r.IntN(500_000):][:r.IntN(150_000)])
			for range len(text) / 10 {
				text[r.IntN(len(text))] = byte(r.Uint32())
			}
			b.Write(text)
		}
	}
	return b.Bytes()[:size]
}

// TestCores compares one core and several in everything that can be seen.
func TestCores(t *testing.T) {
	data := large(8 << 20)
	one := compress(t, data, 6, gzip.Header{Name: "one"})
	var small, members, mixed []byte
	for at := 0; at < len(data); at += 64 << 10 {
		part := data[at:min(len(data), at+64<<10)]
		small = append(small, compress(t, part, 6, gzip.Header{Extra: []byte("a chunk")})...)
	}
	for at := 0; at < len(data); {
		part := data[at:min(len(data), at+len(data)/5)]
		members = append(members, compress(t, part, 1+at%9, gzip.Header{})...)
		at += len(part)
	}
	for i := range 3 { // with what only one core can do in between
		mixed = append(mixed, compress(t, data[i<<20:5<<20], 6, gzip.Header{})...)
		mixed = append(mixed, compress(t, make([]byte, 10<<20<<(2*i)), 6, gzip.Header{})...) // also more than may be held
		mixed = append(mixed, compress(t, data[:5<<20], 0, gzip.Header{})...)
	}
	changed := func(gz []byte, seed uint64) []byte {
		gz = bytes.Clone(gz)
		r := rand.New(rand.NewPCG(seed, 1))
		gz[r.IntN(len(gz))] ^= 1 << r.IntN(8)
		return gz
	}
	files := map[string][]byte{
		"one":        one,
		"small":      small,
		"members":    members,
		"mixed":      mixed,
		"flushed":    member(rawDeflate(t, data, 6), data, true),
		"huffman":    compress(t, data, gzip.HuffmanOnly, gzip.Header{}),
		"zeros":      append(bytes.Clone(members), make([]byte, 3<<20)...),
		"garbage":    append(bytes.Clone(one), data[:3<<20]...),
		"cut":        one[:len(one)-len(one)/5],
		"cut inside": members[:len(members)/2],
		"no trailer": one[:len(one)-8],
		"bad crc":    append(append(bytes.Clone(one[:len(one)-8]), 1, 2, 3, 4), one[len(one)-4:]...),
		"bad length": append(bytes.Clone(one[:len(one)-1]), 9),
	}
	for seed := range uint64(4) {
		files[fmt.Sprintf("changed %d", seed)] = changed(one, seed)
		files[fmt.Sprintf("changed members %d", seed)] = changed(members, seed)
	}
	for name, gz := range files {
		t.Run(name, func(t *testing.T) {
			for _, how := range []struct {
				cores    int
				interval int64
			}{{2, 1}, {3, 300_000}} {
				want := readResult(bytes.NewReader(gz), 1, how.interval, true)
				got := readResult(iotest.DataErrReader(bytes.NewReader(gz)), how.cores, how.interval, how.cores == 2)
				if got != want {
					t.Errorf("%+v:\n%+v\n%+v", how, got, want)
				}
			}
		})
	}
	if n := runtime.NumGoroutine(); n > 20 {
		t.Errorf("%d goroutines are left", n)
	}
}

// TestCoresFound checks that chunks really are begun in the middle, on which nothing else depends.
func TestCoresFound(t *testing.T) {
	gz := compress(t, large(8<<20), 6, gzip.Header{})
	// Every block but the last is found where a sequential reader comes by, if it has codes of its own.
	var bits []int64
	z := NewReader(bytes.NewReader(gz), Options{
		Interval:     1,
		OnCheckpoint: func(c Checkpoint, _ []byte) error { bits = append(bits, c.In*8-int64(c.Bits)); return nil },
	})
	if _, err := io.Copy(io.Discard, z); err != nil {
		t.Fatal(err)
	}
	d := new(decoder)
	d.in = gz
	var found []int64
	for at := 80; ; {
		f, _ := d.findBlock(at)
		if f < 0 {
			break
		}
		found = append(found, int64(f))
		at = f + 1
	}
	at := make(map[int64]bool)
	for _, b := range bits {
		at[b] = true
	}
	right := 0
	for _, f := range found {
		if at[f] {
			right++
		}
	}
	if wrong := len(found) - right; right < len(bits)*3/4 || wrong > 2 {
		t.Errorf("%d of %d blocks found, and %d that are none", right, len(bits), wrong)
	}
}

// TestCoresRuns checks that a chunk may inflate to much more than others, but not without end.
func TestCoresRuns(t *testing.T) {
	data := large(2 << 20)
	for _, c := range []struct {
		zeros int
		left  bool
	}{{30 << 20, false}, {120 << 20, true}} {
		gz := compress(t, slices.Concat(data, make([]byte, c.zeros), data), 6, gzip.Header{})
		z := &Reader{chunk: 256 << 10}
		z.Reset(bytes.NewReader(gz), Options{Cores: 2})
		n, err := io.Copy(io.Discard, z)
		if want := int64(2*len(data) + c.zeros); n != want || err != nil {
			t.Fatalf("%d bytes of %d, %v", n, want, err)
		}
		if left := z.hireAt > 0; left != c.left {
			t.Errorf("%d MiB of zeros left to one core: %v", c.zeros>>20, left)
		}
	}
}

func TestCoresEnd(t *testing.T) {
	before := runtime.NumGoroutine()
	gz := compress(t, large(9<<20), 6, gzip.Header{})
	broken := errors.New("broken")

	// Closed in the middle.
	z := NewReader(bytes.NewReader(gz), Options{Cores: 2})
	if _, err := io.CopyN(io.Discard, z, 4<<20); err != nil {
		t.Fatal(err)
	}
	z.Close()
	if n, err := z.Read(make([]byte, 10)); n != 0 || err == nil {
		t.Errorf("read %d bytes after Close, %v", n, err)
	}
	z.Close()

	// Ended by a callback, at the checkpoint.
	var at int64
	z.Reset(bytes.NewReader(gz), Options{Cores: 2, Interval: 2 << 20, OnCheckpoint: func(c Checkpoint, _ []byte) error {
		if at = c.Out; c.Out > 5<<20 {
			return broken
		}
		return nil
	}})
	if n, err := io.Copy(io.Discard, z); err != broken || n != at {
		t.Errorf("ended by the callback at %d with %d bytes, %v", at, n, err)
	}

	// Ended by the reader below, whose data all counts.
	half := len(gz) / 2
	r := func() io.Reader { return io.MultiReader(bytes.NewReader(gz[:half]), iotest.ErrReader(broken)) }
	want, got := readResult(r(), 1, 1<<20, true), readResult(r(), 2, 1<<20, true)
	if got != want {
		t.Errorf("broken reader:\n%+v\n%+v", got, want)
	}

	// From a reader that has little at a time.
	want, got = readResult(bytes.NewReader(gz), 1, 1<<20, true), readResult(iotest.HalfReader(iotest.OneByteReader(bytes.NewReader(gz))), 2, 1<<20, false)
	if got != want {
		t.Errorf("byte by byte:\n%+v\n%+v", got, want)
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), before)
}

// TestWide compares decoding without a window, then resolved, with decoding with it.
func TestWide(t *testing.T) {
	data := large(3 << 20)
	gz := compress(t, data, 6, gzip.Header{})
	_, points, err := readAll(gz, 500_000)
	if err != nil {
		t.Fatal(err)
	}
	const size = 400_000
	wide := make([]uint16, windowSize+size+maxMatch+slack)
	res := new(resolution)
	for _, p := range points[1 : len(points)-1] {
		for _, plain := range []bool{false, true} {
			markWindow(wide)
			d := new(decoder)
			d.restart(nil, windowSize+size)
			d.plain, d.wide, d.wp, d.in, d.pos = plain, wide, windowSize, gz, int(p.In)
			if d.nb = uint(p.Bits); d.nb > 0 {
				d.bb = uint64(gz[p.In-1] >> (8 - d.nb))
			}
			for s := d.run(); s != isFull; s = d.run() {
				if s != blockEnd {
					t.Fatalf("at %+v: status %d", p.Checkpoint, s)
				}
			}
			var before window
			copy(before.b[:], p.window)
			res.set(&before)
			dst := make([]byte, size)
			res.resolve(dst, wide[windowSize:][:size])
			if !bytes.Equal(dst, data[p.Out:][:size]) {
				t.Fatalf("at %+v, plain %v: wrong data", p.Checkpoint, plain)
			}
		}
	}
}

func TestCombine(t *testing.T) {
	data := samples()["mixed"]
	for _, n := range []int{0, 1, 7, 100, 65_536, len(data)} {
		a, b := data[:n], data[n:]
		if got, want := combine(crc32.ChecksumIEEE(a), crc32.ChecksumIEEE(b), int64(len(b))), crc32.ChecksumIEEE(data); got != want {
			t.Errorf("%d bytes and %d: %08x, want %08x", len(a), len(b), got, want)
		}
	}
}

func TestResolve(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	var before window
	for i := range before.b {
		before.b[i] = byte(r.Uint32())
	}
	res := new(resolution)
	res.set(&before)
	wide := make([]uint16, 5000)
	want := make([]byte, len(wide))
	for i := range wide {
		if i/200%3 == 0 && r.IntN(9) == 0 {
			n := r.IntN(windowSize)
			wide[i], want[i] = marker|uint16(n), before.b[n]
		} else {
			wide[i] = uint16(r.IntN(256))
			want[i] = byte(wide[i])
		}
	}
	for _, n := range []int{0, 1, 31, 32, 33, 1000, len(wide)} {
		for name, f := range map[string]func([]byte, []uint16){"resolve": res.resolve, "resolveGo": res.resolveGo} {
			dst := make([]byte, n)
			f(dst, wide[:n])
			if !bytes.Equal(dst, want[:n]) {
				t.Errorf("%s of %d elements is wrong", name, n)
			}
		}
	}
}
