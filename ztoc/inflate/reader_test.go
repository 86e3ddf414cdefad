package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"
)

// samples are data of different character: name and content.
func samples() map[string][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	words := make([][]byte, 4000)
	for i := range words {
		words[i] = noise[i*7 : i*7+2+r.IntN(9)]
		for j := range words[i] {
			words[i][j] = 'a' + words[i][j]%26
		}
	}
	var text, mixed, far bytes.Buffer
	for text.Len() < 700_000 {
		text.Write(words[int(r.ExpFloat64()*400)%len(words)])
		text.WriteByte(' ')
	}
	for mixed.Len() < 900_000 {
		switch r.IntN(4) {
		case 0:
			mixed.Write(bytes.Repeat([]byte{byte(r.IntN(4))}, r.IntN(4000)))
		case 1:
			n := r.IntN(100_000)
			mixed.Write(noise[n : n+r.IntN(5000)])
		case 2:
			n := r.IntN(300_000)
			mixed.Write(text.Bytes()[n : n+r.IntN(30_000)])
		default:
			mixed.Write(bytes.Repeat(noise[r.IntN(1000):][:1+r.IntN(40)], r.IntN(60)))
		}
	}
	for range 40 { // matches at the greatest distances
		far.Write(noise[:windowSize-r.IntN(3)])
	}
	return map[string][]byte{
		"empty": nil, "byte": {'x'}, "zeros": make([]byte, 1_000_000), "noise": noise,
		"text": text.Bytes(), "mixed": mixed.Bytes(), "far": far.Bytes(),
	}
}

func compress(t testing.TB, data []byte, level int, h gzip.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Header = h
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A restart is a checkpoint with its window.
type restart struct {
	Checkpoint
	window []byte
}

// readAll inflates gz with a checkpoint every interval bytes.
func readAll(gz []byte, interval int64) ([]byte, []restart, error) {
	var points []restart
	z := NewReader(bytes.NewReader(gz), Options{
		Interval: interval,
		OnCheckpoint: func(c Checkpoint, window []byte) error {
			points = append(points, restart{c, bytes.Clone(window)})
			return nil
		},
	})
	var b bytes.Buffer
	_, err := z.WriteTo(&b)
	return b.Bytes(), points, err
}

// checkSpans inflates every span between points by itself and compares.
func checkSpans(t *testing.T, gz, want []byte, points []restart) {
	t.Helper()
	for i, p := range points {
		out, in := int64(len(want)), int64(len(gz))
		if i+1 < len(points) {
			out, in = points[i+1].Out, points[i+1].In
		}
		from := p.In
		if p.Bits > 0 {
			from--
		}
		room := make([]byte, out-p.Out+16)
		for j := range room {
			room[j] = 0xaa
		}
		dst := room[8 : len(room)-8 : len(room)-8]
		used := new([windowSize]byte)
		check := func(how string, err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("%s of span %d of %d at %+v to %d, %d: %v", how, i, len(points), p.Checkpoint, in, out, err)
			}
			if !bytes.Equal(dst, want[p.Out:out]) {
				t.Fatalf("%s of span %d at %+v: wrong data", how, i, p.Checkpoint)
			}
			for _, b := range [][]byte{room[:8], room[len(room)-8:]} {
				if !bytes.Equal(b, bytes.Repeat([]byte{0xaa}, 8)) {
					t.Fatalf("%s of span %d at %+v wrote outside dst", how, i, p.Checkpoint)
				}
			}
			clear(dst)
		}
		check("Span", Span(dst, gz[from:in:in], p.Bits, p.window))
		if err := SpanUse(used, out-p.Out, gz[from:in:in], p.Bits); err != nil {
			t.Fatalf("SpanUse of span %d at %+v: %v", i, p.Checkpoint, err)
		}
		sparse := make([]byte, windowSize)
		w := sparse[windowSize-len(p.window):]
		copy(w, p.window)
		for j := range sparse {
			if used[j] == 0 {
				sparse[j] ^= 0xff
			}
		}
		check("Span with the window bytes in use", Span(dst, gz[from:in:in], p.Bits, w))
	}
}

func TestReader(t *testing.T) {
	for name, data := range samples() {
		for _, level := range []int{flate.HuffmanOnly, 0, 1, 6, 9} {
			t.Run(fmt.Sprintf("%s/%d", name, level), func(t *testing.T) {
				gz := compress(t, data, level, gzip.Header{})
				for _, interval := range []int64{1, 50_000, 400_000} {
					got, points, err := readAll(gz, interval)
					if err != nil || !bytes.Equal(got, data) {
						t.Fatalf("interval %d: %d bytes of %d, right: %v, %v", interval, len(got), len(data), bytes.Equal(got, data), err)
					}
					if p := points[0]; p.In != 10 || p.Out != 0 || p.Bits != 0 || len(p.window) != 0 {
						t.Fatalf("first checkpoint is %+v with %d bytes of window", p.Checkpoint, len(p.window))
					}
					for i := range points[1:] {
						if points[i+1].Out < points[i].Out+interval {
							t.Fatalf("checkpoints at %d and %d", points[i].Out, points[i+1].Out)
						}
					}
					checkSpans(t, gz, data, points)
				}
				twin := new(Reader)
				twin.d.plain = true
				twin.Reset(bytes.NewReader(gz), Options{})
				if got, err := io.ReadAll(twin); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("without assembly: %d bytes of %d, %v", len(got), len(data), err)
				}
				for how, r := range map[string]io.Reader{
					"one byte at a time": iotest.OneByteReader(bytes.NewReader(gz)),
					"error with data":    iotest.DataErrReader(iotest.HalfReader(bytes.NewReader(gz))),
				} {
					got, err := io.ReadAll(iotest.OneByteReader(NewReader(r, Options{})))
					if err != nil || !bytes.Equal(got, data) {
						t.Fatalf("%s: %d bytes of %d, %v", how, len(got), len(data), err)
					}
				}
			})
		}
	}
}

// member is one gzip member with every header field, around raw deflate data of content.
func member(raw, content []byte, headerCRC bool) []byte {
	b := []byte{0x1f, 0x8b, 8, flagExtra | flagName | flagComment, 1, 2, 3, 4, 5, 6}
	if headerCRC {
		b[3] |= flagHeaderCRC
	}
	b = append(b, 5, 0, 'e', 'x', 't', 'r', 0)
	b = append(b, "a name\x00and a comment\x00"...)
	if headerCRC {
		b = binary.LittleEndian.AppendUint16(b, uint16(crc32.ChecksumIEEE(b)))
	}
	b = append(b, raw...)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(content))
	return binary.LittleEndian.AppendUint32(b, uint32(len(content)))
}

func rawDeflate(t testing.TB, content []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	for len(content) > 0 { // with sync flushes
		n := min(len(content), 30_000)
		if _, err := w.Write(content[:n]); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		content = content[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestMembers(t *testing.T) {
	data := samples()
	var gz, want []byte
	add := func(content []byte, m []byte) {
		gz, want = append(gz, m...), append(want, content...)
	}
	for range 2 {
		for _, name := range []string{"empty", "byte", "text", "empty", "noise", "far", "empty", "empty"} {
			add(data[name], compress(t, data[name], 6, gzip.Header{Name: "x", Comment: "y", Extra: []byte("zzz")}))
			add(data[name], member(rawDeflate(t, data[name], 1), data[name], true))
			add(data[name], member(rawDeflate(t, data[name], 0), data[name], false))
		}
	}
	gz = append(gz, make([]byte, 700)...)
	for _, interval := range []int64{1, 1000, 200_000, 1_500_000} {
		got, points, err := readAll(gz, interval)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("interval %d: %d bytes of %d, %v", interval, len(got), len(want), err)
		}
		checkSpans(t, gz, want, points)
	}
	z := NewReader(bytes.NewReader(gz), Options{})
	if _, err := io.Copy(io.Discard, z); err != nil {
		t.Fatal(err)
	}
	if m := z.MaxBlock(); m < 100_000 || m > int64(len(want)) {
		t.Errorf("largest block inflates to %d bytes", m)
	}
}

func TestMaxBlock(t *testing.T) {
	data := make([]byte, 3_000_000)
	gz := compress(t, data, 9, gzip.Header{}) // one block
	z := NewReader(bytes.NewReader(gz), Options{})
	if _, err := io.Copy(io.Discard, z); err != nil {
		t.Fatal(err)
	}
	if z.MaxBlock() < 1_000_000 {
		t.Errorf("largest block inflates to %d bytes", z.MaxBlock())
	}
}

func TestMalformed(t *testing.T) {
	data := samples()["mixed"][:200_000]
	good := member(rawDeflate(t, data, 6), data, true)
	size := int64(len(good))
	change := func(at int, b byte) []byte {
		m := bytes.Clone(good)
		m[at] ^= b
		return m
	}
	for _, test := range []struct {
		name   string
		gz     []byte
		cause  Cause
		offset int64
	}{
		{"empty", nil, Truncated, 0},
		{"half magic", good[:1], Truncated, 1},
		{"magic", change(1, 1), BadMagic, 0},
		{"method", change(2, 1), BadMethod, 0},
		{"flags", change(3, 0x20), BadFlags, 0},
		{"header crc", change(4, 1), BadHeaderCRC, 0},
		{"header cut", good[:20], Truncated, 20},
		{"data cut", good[:len(good)/2], Truncated, size / 2},
		{"trailer cut", good[:len(good)-3], Truncated, size - 3},
		{"crc", change(len(good)-8, 1), BadCRC, size - 8},
		{"length", change(len(good)-1, 1), BadLength, size - 4},
		{"garbage", append(bytes.Clone(good), "garbage"...), BadMagic, size},
		{"zeros and more", append(bytes.Clone(good), 0, 0, 0, 9), Trailing, size + 3},
		{"block type", member([]byte{7}, nil, false), BadBlockType, 38},
		{"stored", member([]byte{1, 2, 0, 2, 0}, nil, false), BadStored, 39},
		{"distance", member([]byte{3, 2}, nil, false), TooFar, 38},
	} {
		got, _, err := readAll(test.gz, 10_000)
		var e *Error
		if !errors.As(err, &e) || e.Err != test.cause {
			t.Errorf("%s: %v, want %v", test.name, err, test.cause)
			continue
		}
		if e.Offset < test.offset || e.Offset > test.offset+1 {
			t.Errorf("%s: offset %d, want %d", test.name, e.Offset, test.offset)
		}
		if !bytes.HasPrefix(data, got) {
			t.Errorf("%s: wrong data before the fault", test.name)
		}
		if (test.cause == Truncated) != errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: io.ErrUnexpectedEOF: %v", test.name, errors.Is(err, io.ErrUnexpectedEOF))
		}
	}

	// Every prefix of a small file is truncated, and what a broken reader says is passed on.
	small := member(rawDeflate(t, data[:3000], 6), data[:3000], true)
	broken := errors.New("broken")
	for n := range small {
		_, err := io.ReadAll(NewReader(bytes.NewReader(small[:n]), Options{}))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("first %d bytes: %v", n, err)
		}
		r := io.MultiReader(bytes.NewReader(small[:n]), iotest.ErrReader(broken))
		var e *Error
		if _, err = io.ReadAll(NewReader(r, Options{})); !errors.Is(err, broken) || !errors.As(err, &e) || e.Offset != int64(n) {
			t.Fatalf("broken after %d bytes: %v", n, err)
		}
	}
	if _, err := io.ReadAll(NewReader(bytes.NewReader(small), Options{})); err != nil {
		t.Fatal(err)
	}
	_, err := io.ReadAll(NewReader(bytes.NewReader(small), Options{
		Interval: 1, OnCheckpoint: func(Checkpoint, []byte) error { return broken },
	}))
	if err != broken {
		t.Errorf("callback's error became %v", err)
	}
}

func TestSpanMalformed(t *testing.T) {
	data := samples()["text"][:100_000]
	raw := rawDeflate(t, data, 6)
	dst := make([]byte, len(data)+1)
	for _, test := range []struct {
		name   string
		src    []byte
		bits   uint8
		dst    int
		cause  Cause
		offset int64
	}{
		{"cut", raw[:100], 0, len(data), Truncated, 100},
		{"more than there is", raw, 0, len(data), "", 0},
		{"bits", raw, 8, 10, BadBits, 0},
		{"bits of nothing", nil, 1, 10, BadBits, 0},
		{"nothing of nothing", nil, 0, 0, "", 0},
		{"distance", []byte{3, 2}, 0, 10, TooFar, 1},
		{"no next member", slices.Concat(raw, []byte("12345678garbage")), 0, len(data) + 1, BadMagic, int64(len(raw) + 8)},
	} {
		err := Span(dst[:test.dst], test.src, test.bits, nil)
		var e *Error
		if test.cause == "" {
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
		} else if !errors.As(err, &e) || e.Err != test.cause || e.Offset != test.offset {
			t.Errorf("%s: %v, want %v at %d", test.name, err, test.cause, test.offset)
		}
	}
}
