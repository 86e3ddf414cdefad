package ztoc

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func zs(t testing.TB, b []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, opts...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// zsFrames is b as zstd frames of n bytes each.
func zsFrames(t testing.TB, b []byte, n int, opts ...zstd.EOption) (blob []byte) {
	t.Helper()
	for len(b) > 0 {
		m := min(n, len(b))
		blob = append(blob, zs(t, b[:m], opts...)...)
		b = b[m:]
	}
	return blob
}

func TestDerive(t *testing.T) {
	layer := tarOf(t, someFiles(45)...)
	for name, blob := range map[string][]byte{"gzip": gz(t, layer), "tar": layer, "zstd": zs(t, layer)} {
		t.Run(name, func(t *testing.T) {
			var derived, again bytes.Buffer
			z, sums, err := Derive(bytes.NewReader(blob), &derived, BuildOptions{Want: DigestOf(blob), DiffID: DigestOf(layer)})
			if err != nil {
				t.Fatal(err)
			}
			if sums.Blob != DigestOf(blob) || sums.DiffID != DigestOf(layer) || sums.InflatedSize != int64(len(layer)) {
				t.Fatalf("sums are %+v", sums)
			}
			if z.Blob != DigestOf(derived.Bytes()) || z.BlobSize != int64(derived.Len()) {
				t.Fatal("ztoc does not name the derived blob")
			}
			if !bytes.Equal(inflateAll(t, z, derived.Bytes()), layer) {
				t.Fatal("inflated layer differs")
			}
			checkEntries(t, z, layer)
			if _, _, err := Derive(bytes.NewReader(blob), &again, BuildOptions{}); err != nil || !bytes.Equal(again.Bytes(), derived.Bytes()) {
				t.Fatalf("deriving is not deterministic: %v", err)
			}
			// The derived blob is a zstd layer like any other.
			z2, _, err := Build(&derived, BuildOptions{DiffID: DigestOf(layer)})
			if err != nil || z2.NumSpans() != z.NumSpans() {
				t.Fatalf("%d spans, want %d: %v", z2.NumSpans(), z.NumSpans(), err)
			}
		})
	}
}

func TestDeriveReportsItsWriter(t *testing.T) {
	layer := tarOf(t, someFiles(45)...)
	full := errors.New("disk full")
	_, _, err := Derive(bytes.NewReader(layer), writerFunc(func(p []byte) (int, error) { return 0, full }), BuildOptions{})
	if !errors.Is(err, full) || errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestDeriveEmpty(t *testing.T) {
	var derived bytes.Buffer
	z, _, err := Derive(bytes.NewReader(gz(t, nil)), &derived, BuildOptions{})
	if err != nil || z.NumSpans() != 0 || derived.Len() == 0 {
		t.Fatal(z, err, derived.Len())
	}
}

func TestZstdManyFrames(t *testing.T) {
	layer := tarOf(t, someFiles(45)...)
	skip := append([]byte{0x5a, 0x2a, 0x4d, 0x18, 5, 0, 0, 0}, "hello"...)
	for _, size := range []int{9000, 70000, 1 << 20, len(layer)} {
		var blob []byte
		for i, b := 0, layer; len(b) > 0; i++ {
			n := min(size, len(b))
			blob = append(blob, zs(t, b[:n], zstd.WithWindowSize(64<<10), zstd.WithSingleSegment(i%2 == 0), zstd.WithEncoderCRC(i%3 == 0))...)
			b = b[n:]
			if i%5 == 0 {
				blob = append(blob, skip...)
				blob = append(blob, zs(t, nil, zstd.WithZeroFrames(true))...)
			}
		}
		z, sums, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 256 << 10, Want: DigestOf(blob), DiffID: DigestOf(layer)})
		if err != nil {
			t.Fatal(err)
		}
		if sums.Format != FormatZstd {
			t.Fatal(sums.Format)
		}
		if !bytes.Equal(inflateAll(t, z, blob), layer) {
			t.Fatalf("frames of %d: inflated layer differs", size)
		}
		for i := range z.NumSpans() {
			if n := z.Span(i).Out.Len(); n > max(256<<10, int64(size)) {
				t.Fatalf("frames of %d: span of %d", size, n)
			}
		}
		checkEntries(t, z, layer)
	}
}

// A frame beyond the limit, with and without its size in the header, first and after smaller ones.
func TestZstdBigFrame(t *testing.T) {
	layer := tarOf(t, someFiles(45)...)
	for _, small := range []int{0, 300000} {
		blob := append(zsFrames(t, layer[:small], 100000), zs(t, layer[small:])...)
		z, sums, err := Build(io.MultiReader(bytes.NewReader(blob)), BuildOptions{MaxBlock: 1 << 20, DiffID: DigestOf(layer)})
		if !errors.Is(err, ErrNoRestart) || z != nil {
			t.Fatal(err)
		}
		if sums.Blob != DigestOf(blob) || sums.DiffID != DigestOf(layer) || sums.InflatedSize != int64(len(layer)) || sums.BlobSize != int64(len(blob)) {
			t.Fatalf("sums are %+v", sums)
		}
		_, _, err = Build(bytes.NewReader(blob), BuildOptions{MaxBlock: 1 << 20, DiffID: DigestOf(blob)})
		if !errors.Is(err, ErrMismatch) {
			t.Fatal(err)
		}
	}
}
