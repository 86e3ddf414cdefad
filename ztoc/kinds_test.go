package ztoc

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// One case for each row of the table in the package's documentation: the format, what a digest covers,
// how much is needed before a mount, and whose bytes are shared.
func TestKindsOfLayer(t *testing.T) {
	fs := someFiles(60)
	layer := tarOf(t, fs...)
	build := func(blob []byte) (*Ztoc, []byte) {
		z, _, err := Build(bytes.NewReader(blob), BuildOptions{Want: DigestOf(blob), SpanSize: 128 << 10})
		if err != nil {
			t.Fatal(err)
		}
		return z, blob
	}
	viaSOCI := func(blob []byte) (*Ztoc, []byte) {
		z, _ := build(blob)
		b, err := EncodeSOCI(z)
		if err != nil {
			t.Fatal(err)
		}
		if z, err = DecodeSOCI(b); err != nil {
			t.Fatal(err)
		}
		z.Blob = DigestOf(blob)
		return z, blob
	}
	derive := func(blob []byte) (*Ztoc, []byte) {
		if z, _, err := Build(bytes.NewReader(blob), BuildOptions{MaxBlock: zstdMaxBlock}); !errors.Is(err, ErrNoRestart) || z != nil {
			t.Fatal(err)
		}
		var w bytes.Buffer
		z, _, err := Derive(bytes.NewReader(blob), &w, BuildOptions{DiffID: DigestOf(layer)})
		if err != nil {
			t.Fatal(err)
		}
		return z, w.Bytes()
	}
	for _, c := range []struct {
		name      string
		z         func() (*Ztoc, []byte)
		format    Format
		inflated  bool // digests are over inflated chunks
		registrys []byte
	}{
		{"gzip", func() (*Ztoc, []byte) { return build(gz(t, layer)) }, FormatGzip, false, gz(t, layer)},
		{"gzip + SOCI", func() (*Ztoc, []byte) { return viaSOCI(gz(t, layer)) }, FormatGzip, false, gz(t, layer)},
		{"tar", func() (*Ztoc, []byte) { return build(layer) }, FormatTar, false, layer},
		{"tar + SOCI", func() (*Ztoc, []byte) { return viaSOCI(layer) }, FormatTar, false, layer},
		{"zstd, frames", func() (*Ztoc, []byte) { return build(zsFrames(t, layer, 100000)) }, FormatZstd, false, zsFrames(t, layer, 100000)},
		{"zstd, one frame", func() (*Ztoc, []byte) { return derive(zs(t, layer)) }, FormatZstd, false, nil},
		{"gzip, giant block", func() (*Ztoc, []byte) {
			return derive(fixedBlock(layer))
		}, FormatZstd, false, nil},
		{"eStargz", func() (*Ztoc, []byte) {
			b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer), 0, int64(len(layer))))
			if err != nil {
				t.Fatal(err)
			}
			blob, err := io.ReadAll(b)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Close(); err != nil { // its temporary files
				t.Fatal(err)
			}
			reads := &countingReaderAt{b: blob}
			z, err := ParseEStargz(reads, int64(len(blob)), Digest(b.TOCDigest()))
			if err != nil || reads.n != 2 {
				t.Fatal(err, reads.n)
			}
			return z, blob
		}, FormatEStargz, true, nil},
		{"zstd:chunked", func() (*Ztoc, []byte) {
			blob, annotations := storageChunked(t, layer, 64<<10)
			reads := &countingReaderAt{b: blob}
			z, err := ParseZstdChunked(reads, int64(len(blob)), annotations)
			if err != nil || reads.n != 1 {
				t.Fatal(err, reads.n)
			}
			return z, blob
		}, FormatZstdChunked, true, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			z, blob := c.z()
			if z.Format != c.format || z.BlobSize != int64(len(blob)) {
				t.Fatalf("%s of %d bytes", z.Format, z.BlobSize)
			}
			if c.registrys != nil && (z.Blob != DigestOf(c.registrys) || !bytes.Equal(blob, c.registrys)) {
				t.Fatal("not the registry's blob")
			}
			for i := range z.NumSpans() {
				s := z.Span(i)
				dst := make([]byte, s.Out.Len())
				b := blob[s.Blob.Start:s.Blob.End]
				if err := z.Inflate(dst, i, b); err != nil {
					t.Fatal(err)
				}
				if r := z.row(i); c.inflated {
					if r.numChunks == 1 && z.chunk(r.firstChunk).digest != [32]byte(sum(dst)) {
						t.Fatalf("digest of span %d is not of what it inflates to", i)
					}
				} else if r.digest != [32]byte(sum(b)) {
					t.Fatalf("digest of span %d is not of its bytes", i)
				}
			}
			packed, err := Pack(z)
			if err != nil {
				t.Fatal(err)
			}
			prefix, size, err := PackedPrefix(packed[:PackedHeader])
			if err != nil || size != int64(len(packed)) || prefix > size {
				t.Fatal(prefix, size, len(packed), err)
			}
			if c.format != FormatGzip && prefix != size {
				t.Fatal("only gzip has windows")
			}
			es, err := z.Entries()
			if err != nil || len(es) != len(fs) {
				t.Fatalf("%d entries: %v", len(es), err)
			}
			out := inflateAll(t, z, blob)
			for i, e := range es {
				if e.Type == TypeReg && !bytes.Equal(out[e.Offset:e.Offset+e.Size], fs[i].body) {
					t.Fatalf("content of %q", e.Name)
				}
			}
			t.Logf("%3d spans, blob %d, before a mount %d, all of the table %d", z.NumSpans(), len(blob), prefix, size)
		})
	}
}

type countingReaderAt struct {
	b []byte
	n int
}

func (r *countingReaderAt) ReadAt(p []byte, off int64) (int, error) {
	r.n++
	return bytes.NewReader(r.b).ReadAt(p, off)
}

// SpansOf finds exactly the spans that hold a range.
func TestSpansOf(t *testing.T) {
	layer := tarOf(t, someFiles(40)...)
	z, _, err := Build(bytes.NewReader(gz(t, layer)), BuildOptions{SpanSize: 32 << 10})
	if err != nil {
		t.Fatal(err)
	}
	for start := int64(-5); start < z.InflatedSize+5; start += 977 {
		for _, n := range []int64{-1, 0, 1, 100, 70000, 1 << 30} {
			r := Range{start, start + n}
			lo, hi := z.SpansOf(r)
			for i := range z.NumSpans() {
				holds := !z.Span(i).Out.Intersect(r).Empty()
				if in := lo <= i && i < hi; in != holds && !(in && z.Span(i).Out.Empty()) {
					t.Fatalf("%v is in spans [%d, %d), span %d is %v", r, lo, hi, i, z.Span(i).Out)
				}
			}
		}
	}
}

// A table costs no heap when it is unpacked, whatever it holds.
func TestUnpackCost(t *testing.T) {
	var fs []file
	for i := range 50000 {
		fs = append(fs, file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib/python3/dist-packages/pkg%d/mod%d.py", i/50, i), Mode: 0o644}})
	}
	z, _, err := Build(bytes.NewReader(gz(t, tarOf(t, fs...))), BuildOptions{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := Pack(z)
	if err != nil {
		t.Fatal(err)
	}
	r := testing.Benchmark(func(tb *testing.B) {
		tb.ReportAllocs()
		for tb.Loop() {
			if _, err := Unpack(b); err != nil {
				tb.Fatal(err)
			}
		}
	})
	if r.AllocedBytesPerOp() > 4096 {
		t.Fatalf("unpacking a table of %d bytes takes %d bytes of heap", len(b), r.AllocedBytesPerOp())
	}
	t.Logf("%d entries in %d bytes", z.NumEntries(), len(b))
}

// Spans of one table are inflated by many at once, and for gzip without allocating.
func TestInflateConcurrently(t *testing.T) {
	layer := tarOf(t, someFiles(40)...)
	blob := gz(t, layer)
	z, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 32 << 10})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for k := range z.NumSpans() {
				i := (k + g*3) % z.NumSpans()
				s := z.Span(i)
				dst := make([]byte, s.Out.Len())
				if err := z.Inflate(dst, i, blob[s.Blob.Start:s.Blob.End]); err != nil {
					t.Error(err)
				} else if !bytes.Equal(dst, layer[s.Out.Start:s.Out.End]) {
					t.Errorf("span %d differs", i)
				}
			}
		})
	}
	wg.Wait()
	s := z.Span(5)
	dst := make([]byte, s.Out.Len())
	if n := testing.AllocsPerRun(50, func() {
		if err := z.Inflate(dst, 5, blob[s.Blob.Start:s.Blob.End]); err != nil {
			t.Error(err)
		}
	}); n > 8 { // 0 but for pools, which drop things under the race detector
		t.Errorf("%v allocations to inflate a span", n)
	}
}
