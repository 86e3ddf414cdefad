package ztoc

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	flatbuffers "github.com/google/flatbuffers/go"
)

func testSOCI(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "soci", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What SOCI wrote is read, gives back the layer, and is written again byte for byte the same.
func TestSOCIWritten(t *testing.T) {
	for _, c := range []struct {
		layer, ztoc string
		span        int64
	}{
		{"plain.tar.gz", "plain.tar.gz.ztoc", 30000},
		{"plain.tar.gz", "plain.tar.gz.v1.ztoc", 30000},
		{"named.tar.gz", "named.tar.gz.ztoc", 50000},
		{"members.tar.gz", "members.tar.gz.ztoc", 40000},
		{"plain.tar", "plain.tar.ztoc", 100000},
	} {
		t.Run(c.ztoc, func(t *testing.T) {
			blob, b := testSOCI(t, c.layer), testSOCI(t, c.ztoc)
			z, err := DecodeSOCI(b)
			if err != nil {
				t.Fatal(err)
			}
			again, err := EncodeSOCI(z)
			if err != nil || !bytes.Equal(again, b) {
				t.Fatalf("not the same again: %v", err)
			}
			packed, err := Pack(z)
			if err != nil {
				t.Fatal(err)
			}
			z2, err := Unpack(packed)
			if err != nil {
				t.Fatal(err)
			}
			if again, err = EncodeSOCI(z2); err != nil || !bytes.Equal(again, b) {
				t.Fatalf("not the same after packing: %v", err)
			}
			out := inflateAll(t, z2, blob)
			// Our own table of the same layer has the same spans, digests and entries.
			own, sums, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: c.span, HashInflated: true, Tool: "AWS SOCI CLI v0.2"})
			if err != nil {
				t.Fatal(err)
			}
			layer := inflateAll(t, own, blob)
			if DigestOf(layer) != sums.DiffID || !bytes.Equal(layer[:len(out)], out) || int64(len(out)) < z.TarSize || own.TarSize != z.TarSize {
				t.Fatalf("inflated layers differ: %d and %d bytes, tar ends at %d and %d", len(layer), len(out), own.TarSize, z.TarSize)
			}
			if own.NumSpans() != z.NumSpans() {
				t.Fatalf("%d spans, SOCI has %d", own.NumSpans(), z.NumSpans())
			}
			for i := range z.NumSpans() {
				a, b := own.row(i), z.row(i)
				if i == 0 && z.implied && c.layer != "plain.tar.gz" {
					continue
				}
				if a.blob != b.blob || a.blobLen != b.blobLen || a.out != b.out || a.bits != b.bits || a.digest != b.digest {
					t.Fatalf("span %d is %+v, SOCI has %+v", i, a, b)
				}
			}
			e1, err1 := own.Entries()
			e2, err2 := z.Entries()
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			for i := range e2 {
				e2[i].ModTime = e2[i].ModTime.UTC()
			}
			if !reflect.DeepEqual(e1, e2) {
				t.Fatal("entries differ from SOCI's")
			}
		})
	}
}

// Where nothing but our sparse windows could differ, and SOCI's windows are empty, our ztoc is SOCI's.
func TestSOCISameBytes(t *testing.T) {
	z, _, err := Build(bytes.NewReader(testSOCI(t, "plain.tar")), BuildOptions{SpanSize: 100000, Tool: "AWS SOCI CLI v0.2"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := EncodeSOCI(z)
	if err != nil || !bytes.Equal(b, testSOCI(t, "plain.tar.ztoc")) {
		t.Fatalf("differs from SOCI's: %v", err)
	}
}

func TestSOCICannotSay(t *testing.T) {
	layer := tarOf(t, someFiles(3)...)
	z, _, err := Build(bytes.NewReader(zs(t, layer)), BuildOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := EncodeSOCI(z); !errors.Is(err, ErrUnsupported) {
		t.Fatal(err)
	}
}

// A small file whose many entries all point to one large name would take hours to read.
func TestSOCISharedStrings(t *testing.T) {
	b := flatbuffers.NewBuilder(0)
	name := b.CreateString(string(make([]byte, 1<<20)))
	typ := b.CreateString("reg")
	b.StartObject(14)
	b.PrependUOffsetTSlot(fbName, name, 0)
	b.PrependUOffsetTSlot(fbType, typ, 0)
	b.PrependInt64Slot(fbOffset, 512, 0)
	e := b.EndObject()
	files := make([]flatbuffers.UOffsetT, 1<<20)
	for i := range files {
		files[i] = e
	}
	metadata := offsetVector(b, files)
	b.StartObject(1)
	b.PrependUOffsetTSlot(0, metadata, 0)
	toc := b.EndObject()
	z := &Ztoc{BlobSize: 1024, SpanSize: 1024}
	points := b.CreateByteVector(z.sociTarCheckpoints())
	digests := offsetVector(b, []flatbuffers.UOffsetT{b.CreateString(string(DigestOf(nil)))})
	b.StartObject(4)
	b.PrependUOffsetTSlot(fbDigests, digests, 0)
	b.PrependUOffsetTSlot(fbCheckpoints, points, 0)
	b.PrependInt8Slot(fbAlgorithm, sociTar, sociGzip)
	info := b.EndObject()
	version := b.CreateString(sociVersion)
	b.StartObject(6)
	b.PrependUOffsetTSlot(fbVersion, version, 0)
	b.PrependUOffsetTSlot(fbTOC, toc, 0)
	b.PrependInt64Slot(fbBlobSize, 1024, 0)
	b.PrependInt64Slot(fbTarSize, 1024, 0)
	b.PrependUOffsetTSlot(fbInfo, info, 0)
	b.Finish(b.EndObject())
	if _, err := DecodeSOCI(b.FinishedBytes()); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
}
