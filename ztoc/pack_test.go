package ztoc

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"testing"
)

// A table packed by the first version stays readable. The file was written by
//
//	Pack(Build(testdata/soci/plain.tar.gz, SpanSize 30000, Tool "muster test"))
//
// and is not compared with what Pack writes now: compression may change, the format may not.
func TestPackedVersion1(t *testing.T) {
	b, err := os.ReadFile("testdata/packed-v1.ztoc")
	if err != nil {
		t.Fatal(err)
	}
	z, err := Unpack(b)
	if err != nil {
		t.Fatal(err)
	}
	blob := testSOCI(t, "plain.tar.gz")
	own, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 30000})
	if err != nil {
		t.Fatal(err)
	}
	if z.Tool != "muster test" || z.Blob != DigestOf(blob) || z.Format != FormatGzip || z.SpanSize != 30000 ||
		z.BlobSize != own.BlobSize || z.InflatedSize != own.InflatedSize || z.TarSize != own.TarSize || z.NumSpans() != own.NumSpans() {
		t.Fatalf("%+v", z)
	}
	if !bytes.Equal(inflateAll(t, z, blob), inflateAll(t, own, blob)) {
		t.Fatal("inflates to something else")
	}
	e1, err1 := z.Entries()
	e2, err2 := own.Entries()
	if err1 != nil || err2 != nil || !reflect.DeepEqual(e1, e2) {
		t.Fatal("entries differ", err1, err2)
	}
	b[14]++ // the version
	if _, err := Unpack(b); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) {
		t.Fatal(err)
	}
	b[14]--
	b[13] = '2'
	if _, err := Unpack(b); !errors.Is(err, ErrUnsupported) {
		t.Fatal(err)
	}
}

// Every bit of a packed table is proven by the time it is used.
func TestPackedBitsAreProven(t *testing.T) {
	layer := tarOf(t, someFiles(30)...)
	blob := gz(t, layer)
	z, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 4 << 10, Tool: "a tool"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := Pack(z)
	if err != nil {
		t.Fatal(err)
	}
	read := func(b []byte) error {
		z, err := Unpack(b)
		if err != nil {
			return err
		}
		if _, err := z.Entries(); err != nil {
			return err
		}
		for i := range z.NumSpans() {
			s := z.Span(i)
			if err := z.Inflate(make([]byte, s.Out.Len()), i, blob[s.Blob.Start:s.Blob.End]); err != nil {
				return err
			}
		}
		return nil
	}
	if err := read(b); err != nil {
		t.Fatal(err)
	}
	step := max(1, len(b)/1500)
	for i := 0; i < len(b); i += step {
		b[i] ^= 1 << (i % 8)
		if err := read(b); err == nil {
			t.Fatalf("a bit flipped in byte %d of %d was not noticed", i, len(b))
		} else if !known(err) {
			t.Fatal(err)
		}
		b[i] ^= 1 << (i % 8)
	}
	for _, n := range []int{0, 1, packHeader - 1, packHeader, len(b) - 1} {
		if _, err := Unpack(b[:n]); !errors.Is(err, ErrInvalid) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
}

// The header of a table says how much of it is needed before anything is inflated.
func TestPackedPrefix(t *testing.T) {
	z, err := DecodeSOCI(testSOCI(t, "plain.tar.gz.ztoc"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := Pack(z)
	if err != nil {
		t.Fatal(err)
	}
	prefix, size, err := PackedPrefix(b[:PackedHeader])
	if err != nil || size != int64(len(b)) {
		t.Fatal(prefix, size, err)
	}
	if want := int64(packHeader + z.NumSpans()*rowSize + len(z.toc.packed)); prefix < want || prefix > want+int64(len(z.Tool))+7 {
		t.Fatalf("%d bytes before the windows, want %d", prefix, want)
	}
}
