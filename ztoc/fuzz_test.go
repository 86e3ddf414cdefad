package ztoc

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"io"
	"os/exec"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// known says whether err is one that callers can decide on.
func known(err error) bool {
	for _, e := range []error{ErrMismatch, ErrIndex, ErrNoRestart, ErrUnsupported, ErrInvalid, io.ErrUnexpectedEOF} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// use does with a table from outside what readers do, and checks what they rely on.
func use(t *testing.T, z *Ztoc) {
	t.Helper()
	n := z.NumSpans()
	if z.InflatedSize > 0 {
		if lo, hi := z.SpansOf(Range{0, z.InflatedSize}); n > 0 && (lo < 0 || hi > n || lo >= hi) {
			t.Fatalf("spans [%d, %d) of %d", lo, hi, n)
		}
		if lo, hi := z.SpansOf(Range{z.InflatedSize - 1, z.InflatedSize}); hi-lo != 1 || z.Span(lo).Out.End != z.InflatedSize {
			t.Fatalf("last byte is in spans [%d, %d) of %d", lo, hi, n)
		}
	}
	for i := range min(n, 4) {
		s := z.Span(i)
		if s.Blob.Len() > 1<<20 || s.Out.Len() > 1<<20 {
			continue
		}
		if err := z.Inflate(make([]byte, s.Out.Len()), i, make([]byte, s.Blob.Len())); err != nil && !known(err) {
			t.Fatal(err)
		}
		var w [windowSize]byte
		r := z.row(i)
		if err := z.window(&w, &r); err != nil && !known(err) {
			t.Fatal(err)
		}
	}
	if _, err := z.Entries(); err != nil && !known(err) {
		t.Fatal(err)
	}
}

func FuzzDecodeSOCI(f *testing.F) {
	// Small ones: a gzip layer's first checkpoint is left out, as SOCI's first version did, for its window's
	// sake; a plain tar has none. Mutating 32 KiB of zeros finds nothing.
	z, _, err := Build(bytes.NewReader(gz(f, tarOf(f, someFiles(3)...))), BuildOptions{})
	if err != nil {
		f.Fatal(err)
	}
	z.implied = true
	b, err := EncodeSOCI(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	if z, _, err = Build(bytes.NewReader(tarOf(f, someFiles(3)...)), BuildOptions{SpanSize: 4 << 10}); err != nil {
		f.Fatal(err)
	}
	if b, err = EncodeSOCI(z); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		z, err := DecodeSOCI(b)
		if err != nil {
			if !known(err) {
				t.Fatal(err)
			}
			return
		}
		use(t, z)
		packed, err := Pack(z)
		if err != nil {
			t.Fatal(err)
		}
		z, err = Unpack(packed)
		if err != nil {
			t.Fatal(err)
		}
		again, err := EncodeSOCI(z)
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("decodes and encodes to something else: %v", err)
		}
	})
}

// resign makes the digests in the header right again, so that what is behind them is tried.
func resign(b []byte) {
	_, s, err := parseHeader(append(bytes.Clone(b[:224]), sum(b[:224])...))
	if err == nil && s.windows.End <= int64(len(b)) {
		copy(b[128:], sum(b[s.entries.Start:s.entries.End]))
		copy(b[160:], sum(b[s.rows.Start:s.chunks.End]))
		copy(b[192:], sum(b[s.tool.Start:s.tool.End]))
	}
	copy(b[224:], sum(b[:224]))
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

func FuzzUnpack(f *testing.F) {
	layer := tarOf(f, someFiles(4)...)
	for _, blob := range [][]byte{layer, gz(f, layer), zsFrames(f, layer, 5000)} {
		z, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 4 << 10, Tool: "tool"})
		if err != nil {
			f.Fatal(err)
		}
		b, err := Pack(z)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint16(0), byte(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint16, with byte) {
		if len(b) < packHeader {
			return
		}
		b = bytes.Clone(b)
		b[int(at)%len(b)] ^= with
		resign(b)
		z, err := Unpack(b)
		if err != nil {
			if !known(err) {
				t.Fatal(err)
			}
			return
		}
		use(t, z)
		if es, err := z.Entries(); err == nil {
			if _, err := packEntries(es); err != nil {
				t.Fatal(err)
			}
		}
		if again, err := Pack(z); err == nil {
			if _, err := Unpack(again); err != nil {
				t.Fatal(err)
			}
		}
	})
}

const fuzzTOC = `{"version":1,"entries":[
{"name":"a/","type":"dir","mode":493,"modtime":"2024-01-02T03:04:05Z","userName":"root","xattrs":{"user.a":"Yg=="}},
{"name":"a/f","type":"reg","size":100,"offset":40,"chunkSize":60,"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","chunkDigest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},
{"name":"a/f","type":"chunk","offset":40,"innerOffset":700,"chunkOffset":60,"chunkDigest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},
{"name":".prefetch.landmark","type":"reg","size":1,"offset":90,"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},
{"name":"z","type":"reg","size":10,"offset":95,"endOffset":99,"chunkSize":5,"chunkType":"zeros"},
{"name":"z","type":"chunk","offset":97,"chunkOffset":5,"chunkDigest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},
{"name":"l","type":"hardlink","linkName":"a/f"},{"name":"c","type":"char","devMajor":1,"devMinor":3}],"tarSplitDigest":"x"}`

func FuzzTOC(f *testing.F) {
	f.Add([]byte(fuzzTOC), false)
	f.Add([]byte(fuzzTOC), true)
	f.Add([]byte(`{"version":1,"entries":null}`), true)
	f.Fuzz(func(t *testing.T, json []byte, gzip bool) {
		format := FormatZstdChunked
		if gzip {
			format = FormatEStargz
		}
		z, err := parseTOC(json, format, "fuzz", 1<<20, 1<<21)
		if err != nil {
			if !known(err) {
				t.Fatal(err)
			}
			return
		}
		use(t, z)
		b, err := Pack(z)
		if err != nil {
			t.Fatal(err)
		}
		if z, err = Unpack(b); err != nil {
			t.Fatal(err)
		}
		es, err := z.Entries()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			if e.Sparse == nil && e.Type == TypeReg && e.Offset+e.Size > z.InflatedSize {
				t.Fatalf("%+v is outside of the layer", e)
			}
			for _, x := range e.Sparse {
				if x.FileOff+x.Len > e.Size || x.Offset+x.Len > z.InflatedSize {
					t.Fatalf("%+v is outside of the layer", e)
				}
			}
		}
	})
}

func FuzzFooters(f *testing.F) {
	f.Add([]byte("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x0000000000000004d2STARGZ\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"), "1:2:3:1", int64(5000))
	f.Add(append(make([]byte, 56), zstdStorageMagic...), "", int64(5000))
	f.Fuzz(func(t *testing.T, footer []byte, position string, size int64) {
		if size < int64(len(footer)) {
			return
		}
		r, err := EStargzTOC(footer, size)
		if err == nil && (r.Start < 0 || r.End > size || r.Empty()) || err != nil && !known(err) {
			t.Fatal(r, err)
		}
		c, err := ZstdChunkedTOC(map[string]string{
			zstdChunkedStorage + zstdChunkedChecksum: string(DigestOf(nil)), zstdChunkedStorage + zstdChunkedPosition: position,
		}, footer, size)
		if err == nil && (c.At.Start < 0 || c.At.End > size) || err != nil && !known(err) {
			t.Fatal(c, err)
		}
		var malformed *inflate.Error
		if err := inflateMember(FormatEStargz, make([]byte, 100), footer); err != nil && !errors.As(err, &malformed) {
			t.Fatal(err)
		}
	})
}

// FuzzBuild: whatever is taken for a layer inflates from its spans to what was hashed, and its entries
// lie inside of it and have the contents that archive/tar reads.
func FuzzBuild(f *testing.F) {
	small := tarOf(f, someFiles(4)...)
	f.Add(small, byte(0))
	f.Add(small, byte(1))
	f.Add(small, byte(2))
	f.Add(gz(f, small), byte(0))
	f.Add(zsFrames(f, small, 2000), byte(0))
	tarTool := tool(f, "tar", "tar")
	dir := f.TempDir()
	sparseFile(f, dir, "s", 20000, 300, 1000, 9000)
	for _, args := range [][]string{{"--format=gnu"}, {"--format=pax", "--sparse-version=0.0"}, {"--format=pax", "--sparse-version=1.0"}} {
		b, err := exec.Command(tarTool, append(args, "-b1", "-S", "--hole-detection=raw", "-C", dir, "-cf", "-", "s")...).Output()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, byte(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, how byte) {
		switch how % 3 {
		case 1:
			var buf bytes.Buffer
			w, _ := gzip.NewWriterLevel(&buf, 1)
			_, _ = w.Write(b)
			_ = w.Close()
			b = buf.Bytes()
		case 2:
			b = fuzzEncoder.EncodeAll(b, nil)
		}
		z, sums, err := Build(bytes.NewReader(b), BuildOptions{SpanSize: 8 << 10, HashInflated: true, MaxBlock: 1 << 20})
		if err != nil {
			if !known(err) {
				t.Fatal(err)
			}
			return
		}
		if sums.Blob != DigestOf(b) || z.InflatedSize > 64<<20 {
			return
		}
		layer := inflateAll(t, z, b)
		if DigestOf(layer) != sums.DiffID {
			t.Fatal("spans inflate to something else")
		}
		es, err := z.Entries()
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(bytes.NewReader(layer))
		for _, e := range es {
			hdr, err := tr.Next()
			for err == nil && (hdr.Typeflag == tar.TypeXGlobalHeader || bytes.IndexByte([]byte("VMN"), hdr.Typeflag) >= 0) {
				hdr, err = tr.Next()
			}
			if err != nil || hdr.Name != e.Name {
				t.Fatal(err, e)
			}
			for _, x := range e.Sparse {
				if x.Offset < 0 || x.FileOff < 0 || x.Len <= 0 || x.FileOff+x.Len > e.Size || x.Offset+x.Len > z.InflatedSize {
					t.Fatalf("%+v is outside of the layer", e)
				}
			}
			if e.Sparse == nil && e.Offset+e.Size > z.InflatedSize {
				t.Fatalf("%+v is outside of the layer", e)
			}
			if e.Type != TypeReg || e.Size > 8<<20 {
				continue
			}
			got := make([]byte, e.Size)
			if e.Sparse == nil {
				copy(got, layer[e.Offset:])
			}
			for _, x := range e.Sparse {
				copy(got[x.FileOff:x.FileOff+x.Len], layer[x.Offset:])
			}
			want, err := io.ReadAll(tr)
			if err == nil && !bytes.Equal(got, want) {
				t.Fatalf("content of %+v differs", e)
			}
		}
	})
}

var fuzzEncoder, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
