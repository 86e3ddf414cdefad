package inflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// fuzzLimit is how much a fuzzed stream may inflate to: some become a thousand times as large.
const fuzzLimit = 256 << 10

// seeds are streams of all kinds, small ones.
func seeds(f *testing.F) [][]byte {
	var all [][]byte
	for name, data := range samples() {
		data = data[:min(len(data), 3000)]
		for _, level := range []int{0, 1, 9} {
			all = append(all,
				compress(f, data, level, gzip.Header{}),
				member(rawDeflate(f, data, level), data, true),
				append(compress(f, data, level, gzip.Header{Name: name}), member(rawDeflate(f, data, level), data, false)...))
		}
	}
	return all
}

// FuzzReader compares with compress/gzip: both find the same bytes, or both an error, and where
// checkpoints are found spans come to the same bytes.
func FuzzReader(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
		f.Add(append(bytes.Clone(s), 0, 0, 0))
		f.Add(s[:len(s)*2/3])
	}
	f.Fuzz(func(t *testing.T, gz []byte) {
		want, wantErr := standard(gz)
		for end := len(bytes.TrimRight(gz, "\x00")); wantErr != nil && end < len(gz); end++ {
			want, wantErr = standard(gz[:end]) // zeros after the last member it refuses
		}
		if len(want) >= fuzzLimit {
			return
		}
		var points []restart
		z := NewReader(bytes.NewReader(gz), Options{
			Interval: 500,
			OnCheckpoint: func(c Checkpoint, window []byte) error {
				points = append(points, restart{c, bytes.Clone(window)})
				return nil
			},
		})
		got, err := io.ReadAll(io.LimitReader(z, fuzzLimit))
		twin := new(Reader)
		twin.d.plain = true
		twin.Reset(bytes.NewReader(gz), Options{})
		plain, plainErr := io.ReadAll(io.LimitReader(twin, fuzzLimit))
		if !bytes.Equal(got, plain) || fmt.Sprint(err) != fmt.Sprint(plainErr) {
			t.Fatalf("%d bytes and %v, %d and %v without assembly", len(got), err, len(plain), plainErr)
		}
		checkCrew(t, gz, got, err, points)
		slow, slowErr := io.ReadAll(io.LimitReader(NewReader(iotest.OneByteReader(bytes.NewReader(gz)), Options{}), fuzzLimit))
		if !bytes.Equal(got, slow) || fmt.Sprint(err) != fmt.Sprint(slowErr) {
			t.Fatalf("%d bytes and %v at once, %d and %v byte by byte", len(got), err, len(slow), slowErr)
		}
		if err == nil {
			checkSpans(t, gz, got, points)
		}
		var c Cause
		var e *Error
		switch {
		case err != nil && (!errors.As(err, &c) || !errors.As(err, &e) || e.Offset < 0 || e.Offset > int64(len(gz))):
			t.Fatalf("error %#v", err)
		case (err == nil) == (wantErr == nil):
		case errors.Is(err, BadFlags): // which compress/gzip ignores, against RFC 1952
			return
		case err == nil && errors.Is(wantErr, gzip.ErrHeader):
			return // it refuses long fields in a header
		default:
			t.Fatalf("error %v where compress/gzip has %v", err, wantErr)
		}
		if err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, other than compress/gzip's %d", len(got), len(want))
		}
	})
}

// checkCrew inflates gz with several cores in tiny chunks and compares with what one core found.
func checkCrew(t *testing.T, gz, want []byte, wantErr error, wantPoints []restart) {
	t.Helper()
	z := &Reader{chunk: 100 + int64(len(gz))%400}
	i := 0
	z.Reset(bytes.NewReader(gz), Options{
		Cores:    2 + len(gz)%2,
		Interval: 500,
		OnCheckpoint: func(c Checkpoint, window []byte) error {
			if i >= len(wantPoints) || wantPoints[i].Checkpoint != c || !bytes.Equal(wantPoints[i].window, window) {
				return fmt.Errorf("checkpoint %d is %+v", i, c)
			}
			i++
			return nil
		},
	})
	defer z.Close()
	got, err := io.ReadAll(io.LimitReader(z, fuzzLimit))
	if !bytes.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(wantErr) || len(got) < fuzzLimit && i != len(wantPoints) {
		t.Fatalf("several cores: %d bytes, %d checkpoints, %v; one: %d, %d, %v", len(got), i, err, len(want), len(wantPoints), wantErr)
	}
}

// standard is what compress/gzip makes of gz.
func standard(gz []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(z, fuzzLimit))
}

// FuzzSpan inflates anything into dst with anything before it: no panic, no byte outside dst, the
// same result however often, and window bytes that are said not to be used do not matter.
func FuzzSpan(f *testing.F) {
	window := strings.Repeat("all that went before ", 2000)
	for _, s := range seeds(f) {
		f.Add(s[10:], uint8(0), []byte(window), uint32(3000))
		f.Add(s[len(s)/3:], uint8(len(s)%8), []byte(window[:len(s)/2]), uint32(40_000))
	}
	f.Fuzz(func(t *testing.T, src []byte, bits uint8, window []byte, size uint32) {
		size %= 1 << 17
		room := bytes.Repeat([]byte{0xaa}, int(size)+64)
		dst := room[32 : 32+size : 32+size]
		err := Span(dst, src, bits, window)
		first := bytes.Clone(dst)
		used := new([windowSize]byte)
		err2 := SpanUse(used, int64(size), src, bits)
		if err == nil && err2 != nil || size <= windowSize && len(window) >= windowSize && fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Fatalf("Span: %v, SpanUse: %v", err, err2)
		}
		for _, b := range [][]byte{room[:32], room[32+size:]} {
			if !bytes.Equal(b, bytes.Repeat([]byte{0xaa}, 32)) {
				t.Fatal("wrote outside dst")
			}
		}
		if err != nil {
			return
		}
		other, different := bytes.Clone(window[max(0, len(window)-windowSize):]), 0
		same := bytes.Clone(other)
		for i := range other {
			if used[i+windowSize-len(other)] == 0 {
				other[i] ^= 0x55
			} else {
				same[i] ^= 0x55
				different++
			}
		}
		if err := Span(dst, src, bits, other); err != nil || !bytes.Equal(first, dst) {
			t.Fatalf("bytes of the window that are not used matter: %v", err)
		}
		if err := Span(dst, src, bits, same); err != nil || bytes.Equal(first, dst) != (different == 0) {
			t.Fatalf("%d bytes of the window that are used do not matter: %v", different, err)
		}
	})
}
