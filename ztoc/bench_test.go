package ztoc

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// benchLayer is a layer of some 27 MB and 3,000 files.
func benchLayer(b *testing.B) (layer, blob []byte) {
	fs := someFiles(160)
	for i := range 3000 {
		f := fs[2+i%30]
		f.hdr.Name = fmt.Sprintf("usr/share/doc/package-%d/file-%d", i/20, i)
		fs = append(fs, f)
	}
	layer = tarOf(b, fs...)
	return layer, gz(b, layer)
}

func BenchmarkInflateOnly(b *testing.B) {
	layer, blob := benchLayer(b)
	b.SetBytes(int64(len(layer)))
	for b.Loop() {
		if _, err := inflate.NewReader(bytes.NewReader(blob), inflate.Options{}).WriteTo(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBuild(b *testing.B) {
	layer, blob := benchLayer(b)
	for _, c := range []struct {
		name  string
		blob  []byte
		diff  bool
		cores int
	}{
		{"gzip", blob, false, 1},
		{"gzip+diffID", blob, true, 1},
		{"gzip, two cores", blob, false, 2},
		{"tar", layer, false, 1},
		{"zstd", zsFrames(b, layer, 1<<20), false, 1},
		{"zstd, two cores", zsFrames(b, layer, 1<<20), false, 2},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(layer)))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := Build(bytes.NewReader(c.blob), BuildOptions{HashInflated: c.diff, Cores: c.cores}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkDerive(b *testing.B) {
	layer, _ := benchLayer(b)
	blob := zs(b, layer)
	b.SetBytes(int64(len(layer)))
	for b.Loop() {
		if _, _, err := Derive(bytes.NewReader(blob), io.Discard, BuildOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

// What a reader pays for one cold span, beside what inflating its bytes alone costs.
func BenchmarkColdSpan(b *testing.B) {
	_, blob := benchLayer(b)
	for _, span := range []int64{64 << 10, 256 << 10, 1 << 20, 4 << 20} {
		z, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: span})
		if err != nil {
			b.Fatal(err)
		}
		n := min(z.NumSpans(), 200)
		dst := make([]byte, 2*span+1<<20)
		var w [windowSize]byte
		for _, bare := range []bool{true, false} {
			name := "inflate/"
			if !bare {
				name = "all/"
			}
			b.Run(name+byteSize(span), func(b *testing.B) {
				b.SetBytes(z.Span(n - 1).Out.End)
				for b.Loop() {
					for i := range n {
						s := z.Span(i)
						in, out := blob[s.Blob.Start:s.Blob.End], dst[:s.Out.Len()]
						if bare {
							r := z.row(i)
							err = inflate.Span(out, in, r.bits, w[:])
						} else {
							err = z.Inflate(out, i, in)
						}
						if err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

func byteSize(n int64) string {
	if n >= 1<<20 {
		return string(rune('0'+n>>20)) + "MiB"
	}
	return map[int64]string{64 << 10: "64KiB", 256 << 10: "256KiB"}[n]
}

func BenchmarkForms(b *testing.B) {
	_, blob := benchLayer(b)
	z, _, err := Build(bytes.NewReader(blob), BuildOptions{})
	if err != nil {
		b.Fatal(err)
	}
	soci, err := EncodeSOCI(z)
	if err != nil {
		b.Fatal(err)
	}
	packed, err := Pack(z)
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("%d spans, %d entries: SOCI %d bytes, packed %d", z.NumSpans(), z.NumEntries(), len(soci), len(packed))
	for _, c := range []struct {
		name string
		f    func() error
	}{
		{"DecodeSOCI", func() error { _, err := DecodeSOCI(soci); return err }},
		{"EncodeSOCI", func() error { _, err := EncodeSOCI(z); return err }},
		{"Pack", func() error { _, err := Pack(z); return err }},
		{"Unpack", func() error { _, err := Unpack(packed); return err }},
		{"Entries", func() error { _, err := z.Entries(); return err }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := c.f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
