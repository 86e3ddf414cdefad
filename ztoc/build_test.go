package ztoc

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

// A file of a test layer.
type file struct {
	hdr  tar.Header
	body []byte
}

func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		f.hdr.Size = int64(len(f.body))
		if err := w.WriteHeader(&f.hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, _ := gzip.NewWriterLevel(&buf, 6)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// text is n bytes that compress about as well as programs do.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		switch r.IntN(3) {
		case 0:
			if len(b) > 100 {
				at := max(0, len(b)-r.IntN(40000)-1)
				b = append(b, b[at:min(len(b), at+r.IntN(60))]...)
				continue
			}
			fallthrough
		case 1:
			b = fmt.Appendf(b, "line %d of %d\n", r.IntN(1000), r.IntN(10))
		default:
			for range r.IntN(20) {
				b = append(b, byte(r.Uint32()))
			}
		}
	}
	return b[:n]
}

// someFiles is a small tree with n files of contents that differ.
func someFiles(n int) []file {
	fs := []file{
		{hdr: tar.Header{Typeflag: tar.TypeDir, Name: "usr/", Mode: 0o755, ModTime: time.Unix(1700000000, 0)}},
		{hdr: tar.Header{Typeflag: tar.TypeDir, Name: "usr/lib/", Mode: 0o755, ModTime: time.Unix(1700000000, 0)}},
	}
	for i := range n {
		fs = append(fs, file{
			hdr:  tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib/file-%04d", i), Mode: 0o644, Uid: i % 3, ModTime: time.Unix(1700000000+int64(i), 0)},
			body: text(uint64(i), 100+i*i*60%300000),
		})
	}
	return fs
}

// inflateAll inflates every span of z from blob and puts the layer together.
func inflateAll(t testing.TB, z *Ztoc, blob []byte) []byte {
	t.Helper()
	out := make([]byte, 0, z.InflatedSize)
	for i := range z.NumSpans() {
		s := z.Span(i)
		dst := make([]byte, s.Out.Len())
		if err := z.Inflate(dst, i, blob[s.Blob.Start:s.Blob.End]); err != nil {
			t.Fatal(err)
		}
		out = append(out, dst...)
	}
	return out
}

func TestBuildGzip(t *testing.T) {
	layer := tarOf(t, someFiles(60)...)
	blob := gz(t, layer)
	z, sums, err := Build(io.MultiReader(bytes.NewReader(blob)), BuildOptions{
		SpanSize: 64 << 10, Want: DigestOf(blob), DiffID: DigestOf(layer), Tool: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Sums{FormatGzip, DigestOf(blob), int64(len(blob)), DigestOf(layer), int64(len(layer))}); sums != want {
		t.Fatalf("sums are %+v, want %+v", sums, want)
	}
	if z.NumSpans() < 20 {
		t.Fatalf("%d spans", z.NumSpans())
	}
	if !bytes.Equal(inflateAll(t, z, blob), layer) {
		t.Fatal("inflated layer differs")
	}
	packed, err := Pack(z)
	if err != nil {
		t.Fatal(err)
	}
	z2, err := Unpack(packed)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(inflateAll(t, z2, blob), layer) {
		t.Fatal("inflated layer differs after packing")
	}
	checkEntries(t, z2, layer)
	soci, err := EncodeSOCI(z2)
	if err != nil {
		t.Fatal(err)
	}
	z3, err := DecodeSOCI(soci)
	if err != nil {
		t.Fatal(err)
	}
	if got := inflateAll(t, z3, blob); !bytes.Equal(got, layer[:len(got)]) || int64(len(got)) != z3.TarSize {
		t.Fatal("inflated layer differs in SOCI's form")
	}
	e1, _ := z.Entries()
	e3, _ := z3.Entries()
	for i := range e3 {
		e3[i].ModTime = e3[i].ModTime.UTC()
	}
	if !reflect.DeepEqual(e1, e3) {
		t.Fatal("entries differ in SOCI's form")
	}
	t.Logf("%d spans, blob %d, packed %d, SOCI %d", z.NumSpans(), len(blob), len(packed), len(soci))
}

// Any number of cores gives the same table.
func TestBuildCores(t *testing.T) {
	var layer []byte
	fs := someFiles(45)
	for i := range 12 {
		fs = append(fs, file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("big-", i), Mode: 0o644}, body: text(uint64(i), 2<<20)})
	}
	layer = tarOf(t, fs...)
	blob := gz(t, layer)
	var want []byte
	for _, cores := range []int{1, 2, 3} {
		z, _, err := Build(bytes.NewReader(blob), BuildOptions{Cores: cores, Want: DigestOf(blob), DiffID: DigestOf(layer)})
		if err != nil {
			t.Fatal(err)
		}
		b, err := Pack(z)
		if err != nil {
			t.Fatal(err)
		}
		if want == nil {
			want = b
		}
		if !bytes.Equal(b, want) {
			t.Fatalf("%d cores give another table", cores)
		}
		if _, _, err := Build(bytes.NewReader(blob[:len(blob)/2]), BuildOptions{Cores: cores}); !errors.Is(err, ErrInvalid) {
			t.Fatal(err)
		}
		bad := bytes.Clone(layer)
		copy(bad[len(bad)/2:], "no longer a tar archive")
		clear(bad[:512])
		if _, _, err := Build(bytes.NewReader(gz(t, bad)), BuildOptions{Cores: cores}); !errors.Is(err, ErrInvalid) {
			t.Fatal(err)
		}
	}
}

// checkEntries compares the entries of z with what archive/tar reads from the layer, contents included.
func checkEntries(t testing.TB, z *Ztoc, layer []byte) {
	t.Helper()
	es, err := z.Entries()
	if err != nil {
		t.Fatal(err)
	}
	tr := tar.NewReader(bytes.NewReader(layer))
	for i := 0; ; i++ {
		hdr, err := tr.Next()
		if err == io.EOF {
			if i != len(es) {
				t.Fatalf("%d entries, want %d", len(es), i)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		e := es[i]
		if e.Name != hdr.Name || e.Size != hdr.Size || e.Mode != hdr.Mode || e.UID != hdr.Uid || !e.ModTime.Equal(hdr.ModTime) {
			t.Fatalf("entry %d is %+v, header %+v", i, e, hdr)
		}
		want, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, e.Size)
		if e.Sparse == nil {
			copy(got, layer[e.Offset:e.Offset+e.Size])
		}
		for _, x := range e.Sparse {
			copy(got[x.FileOff:x.FileOff+x.Len], layer[x.Offset:])
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("content of entry %d, %q, differs", i, e.Name)
		}
	}
}
