package ztoc

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
)

// tocLayer has what a table of contents must get right.
func tocLayer(t testing.TB) (layer []byte, contents map[string][]byte) {
	fs := someFiles(30)
	when := time.Unix(1700000001, 0)
	for i := range 40 { // tiny ones that share a member
		fs = append(fs, file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("etc/tiny-%02d", i), Mode: 0o600, ModTime: when}, body: text(uint64(i), 10+i)})
	}
	fs = append(
		fs,
		file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "empty", Mode: 0o644, ModTime: when}},
		file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "big", Mode: 0o644, ModTime: when}, body: text(99, 700000)},
		file{hdr: tar.Header{Typeflag: tar.TypeLink, Name: "link", Linkname: "big", ModTime: when}},
		file{hdr: tar.Header{Typeflag: tar.TypeSymlink, Name: "sym", Linkname: "../big", ModTime: when}},
		file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "etc/.wh.gone", ModTime: when}},
		file{hdr: tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666, ModTime: when}},
		file{hdr: tar.Header{
			Typeflag: tar.TypeReg, Name: "caps", Mode: 0o4755, ModTime: when, Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\xfe", "SCHILY.xattr.user.a": "b"},
		}, body: []byte("x")},
	)
	contents = make(map[string][]byte)
	for _, f := range fs {
		if f.hdr.Typeflag == tar.TypeReg {
			contents[f.hdr.Name] = f.body
		}
	}
	return tarOf(t, fs...), contents
}

// checkContents reads every file through the table of contents.
func checkContents(t *testing.T, z *Ztoc, blob []byte, contents map[string][]byte) {
	t.Helper()
	out := inflateAll(t, z, blob)
	es, err := z.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if landmarks[strings.TrimPrefix(e.Name, "./")] {
			t.Fatalf("%s was not dropped", e.Name)
		}
		if e.Type != TypeReg {
			continue
		}
		want, ok := contents[e.Name]
		if !ok {
			t.Fatalf("there is no %q", e.Name)
		}
		delete(contents, e.Name)
		got := make([]byte, e.Size)
		if e.Sparse == nil {
			copy(got, out[e.Offset:e.Offset+e.Size])
		}
		for _, x := range e.Sparse {
			copy(got[x.FileOff:x.FileOff+x.Len], out[x.Offset:])
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%q differs", e.Name)
		}
		switch e.Name {
		case "caps":
			if len(e.PAX) != 2 || e.PAX[0] != (Record{"SCHILY.xattr.security.capability", "\x01\x00\x00\x02\xff\xfe"}) || e.Mode != 0o4755 {
				t.Fatalf("%+v", e)
			}
		case "big":
			if e.ModTime.Unix() != 1700000001 {
				t.Fatal(e.ModTime)
			}
		}
	}
	if len(contents) != 0 {
		t.Fatalf("missing: %v", contents)
	}
	// A changed byte anywhere in a member is found.
	for i := range z.NumSpans() {
		s := z.Span(i)
		bad := bytes.Clone(blob[s.Blob.Start:s.Blob.End])
		bad[len(bad)/4] ^= 1
		dst := make([]byte, s.Out.Len())
		if err := z.Inflate(dst, i, bad); err != nil {
			if !errors.Is(err, ErrMismatch) {
				t.Fatal(err)
			}
		} else if !bytes.Equal(dst, out[s.Out.Start:s.Out.End]) {
			t.Fatalf("span %d: a flipped bit went through", i)
		}
	}
	packed, err := Pack(z)
	if err != nil {
		t.Fatal(err)
	}
	z2, err := Unpack(packed)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(inflateAll(t, z2, blob), out) {
		t.Fatal("differs after packing")
	}
}

func TestEStargz(t *testing.T) {
	layer, _ := tocLayer(t)
	for _, opts := range [][]estargz.Option{
		nil,
		{estargz.WithChunkSize(64 << 10)},
		{estargz.WithChunkSize(64 << 10), estargz.WithMinChunkSize(128 << 10)},
		{estargz.WithPrioritizedFiles([]string{"big", "usr/lib/file-0007"})},
	} {
		b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer), 0, int64(len(layer))), opts...)
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
		z, err := ParseEStargz(bytes.NewReader(blob), int64(len(blob)), Digest(b.TOCDigest()))
		if err != nil {
			t.Fatal(err)
		}
		_, contents := tocLayer(t)
		checkContents(t, z, blob, contents)
		t.Logf("%d spans, %d chunks", z.NumSpans(), len(z.chunks)/chunkSize)

		if _, err := ParseEStargz(bytes.NewReader(blob), int64(len(blob)), DigestOf(nil)); !errors.Is(err, ErrMismatch) {
			t.Fatal(err)
		}
		if _, err := ParseEStargz(bytes.NewReader(blob), int64(len(blob)), ""); !errors.Is(err, ErrUnsupported) {
			t.Fatal(err)
		}
		// It is a gzip layer too.
		zz, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 100000})
		if err != nil {
			t.Fatal(err)
		}
		inflateAll(t, zz, blob)
	}
	blob := gz(t, layer)
	if _, err := ParseEStargz(bytes.NewReader(blob), int64(len(blob)), DigestOf(nil)); !errors.Is(err, ErrUnsupported) {
		t.Fatal(err)
	}
}

func TestEStargzLegacyFooter(t *testing.T) {
	// A footer as the first version wrote it: the extra field without a subfield.
	extra := fmt.Sprintf("%016xSTARGZ", 1234)
	footer := append([]byte{0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, byte(len(extra)), 0}, extra...)
	footer = append(footer, 1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0)
	if len(footer) != estargzLegacyFooter {
		t.Fatal(len(footer))
	}
	got, err := EStargzTOC(append([]byte("xxxx"), footer...), 5000)
	if err != nil || got != (Range{1234, 5000 - estargzLegacyFooter}) {
		t.Fatal(got, err)
	}
}

type zstdChunkedCompression struct {
	*zstdchunked.Compressor
	*zstdchunked.Decompressor
}

func TestZstdChunkedStargz(t *testing.T) {
	layer, _ := tocLayer(t)
	for _, opts := range [][]estargz.Option{nil, {estargz.WithChunkSize(64 << 10), estargz.WithMinChunkSize(128 << 10)}} {
		annotations := make(map[string]string)
		c := zstdChunkedCompression{
			&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations}, &zstdchunked.Decompressor{},
		}
		b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer), 0, int64(len(layer))), append(opts, estargz.WithCompression(c))...)
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
		annotations[EStargzDigestAnnotation] = string(b.TOCDigest())
		parse := func() (*Ztoc, error) {
			return ParseZstdChunked(bytes.NewReader(blob), int64(len(blob)), annotations)
		}
		z, err := parse()
		if err != nil {
			t.Fatal(err)
		}
		_, contents := tocLayer(t)
		checkContents(t, z, blob, contents)
		// By footer.
		delete(annotations, zstdChunkedStargz+zstdChunkedPosition)
		if z2, err := parse(); err != nil || z2.NumSpans() != z.NumSpans() {
			t.Fatal(err)
		}
		delete(annotations, zstdChunkedStargz+zstdChunkedChecksum)
		if z2, err := parse(); err != nil || z2.NumSpans() != z.NumSpans() {
			t.Fatal(err)
		}
		annotations[EStargzDigestAnnotation] = string(DigestOf(nil))
		if _, err := parse(); !errors.Is(err, ErrMismatch) {
			t.Fatal(err)
		}
		delete(annotations, EStargzDigestAnnotation)
		if _, err := parse(); !errors.Is(err, ErrUnsupported) {
			t.Fatal(err)
		}
	}
}

// storageChunked writes a layer as containers/storage does: a frame of headers, then the frames of each
// file's chunks, runs of zeros told apart in the table.
func storageChunked(t testing.TB, layer []byte, chunk int) (blob []byte, annotations map[string]string) {
	t.Helper()
	type m map[string]any
	types := map[byte]string{
		tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeLink: "hardlink", tar.TypeSymlink: "symlink", tar.TypeChar: "char",
	}
	var entries []m
	headers := []byte("headers")
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		blob = append(blob, zs(t, headers)...)
		body, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		xattrs := m{}
		for k, v := range hdr.PAXRecords {
			if k, ok := strings.CutPrefix(k, XattrPrefix); ok {
				xattrs[k] = base64.StdEncoding.EncodeToString([]byte(v))
			}
		}
		e := m{
			"type": types[hdr.Typeflag], "name": hdr.Name, "linkName": hdr.Linkname, "mode": hdr.Mode, "size": hdr.Size,
			"uid": hdr.Uid, "gid": hdr.Gid, "modtime": hdr.ModTime, "accesstime": hdr.ModTime, "xattrs": xattrs,
			"devMajor": hdr.Devmajor, "devMinor": hdr.Devminor,
		}
		file := []m{e}
		if len(body) > 0 {
			e["digest"], e["offset"] = DigestOf(body), len(blob)
			for at := 0; at < len(body); at += chunk {
				b := body[at:min(at+chunk, len(body))]
				c := e
				if at > 0 {
					c = m{"type": "chunk", "name": hdr.Name, "chunkOffset": at}
					file = append(file, c)
				}
				if len(body) > chunk {
					c["chunkSize"], c["chunkDigest"], c["offset"] = len(b), DigestOf(b), len(blob)
					if allZero(b) {
						c["chunkType"] = "zeros"
					}
				}
				blob = append(blob, zs(t, b)...)
			}
			e["endOffset"] = len(blob)
		}
		entries = append(entries, file...)
	}
	doc, err := json.Marshal(m{"version": 1, "entries": entries, "tarSplitDigest": DigestOf(nil)})
	if err != nil {
		t.Fatal(err)
	}
	skippable := func(b []byte) []byte {
		return append(binary.LittleEndian.AppendUint32([]byte{0x50, 0x2a, 0x4d, 0x18}, uint32(len(b))), b...)
	}
	toc := zs(t, doc)
	at := len(blob) + 8
	blob = append(blob, skippable(toc)...)
	blob = append(blob, skippable([]byte("tar-split"))...)
	footer := make([]byte, zstdStorageFooter)
	for i, w := range []int{at, len(toc), len(doc), 1} {
		binary.LittleEndian.PutUint64(footer[8*i:], uint64(w))
	}
	copy(footer[56:], zstdStorageMagic)
	blob = append(blob, skippable(footer)...)
	return blob, map[string]string{
		"io.github.containers.zstd-chunked.manifest-checksum": string(DigestOf(toc)),
		"io.github.containers.zstd-chunked.manifest-position": fmt.Sprintf("%d:%d:%d:1", at, len(toc), len(doc)),
		"io.github.containers.zstd-chunked.tarsplit-position": "1:2:3",
	}
}

func TestZstdChunkedStorage(t *testing.T) {
	base, _ := tocLayer(t)
	holes := make([]byte, 500000)
	copy(holes[200000:], text(5, 1000))
	more := tarOf(t, file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "holes", Mode: 0o644}, body: holes})
	layer := append(bytes.Clone(base[:len(base)-1024]), more...)
	blob, annotations := storageChunked(t, layer, 50000)
	z, err := ParseZstdChunked(bytes.NewReader(blob), int64(len(blob)), annotations)
	if err != nil {
		t.Fatal(err)
	}
	_, contents := tocLayer(t)
	contents["holes"] = holes
	checkContents(t, z, blob, contents)
	es, _ := z.Entries()
	if e := es[len(es)-1]; e.Name != "holes" || len(e.Sparse) != 1 || e.Sparse[0].Len != 50000 {
		t.Fatalf("%+v", e)
	}
	delete(annotations, "io.github.containers.zstd-chunked.manifest-position")
	if z2, err := ParseZstdChunked(bytes.NewReader(blob), int64(len(blob)), annotations); err != nil || z2.NumSpans() != z.NumSpans() {
		t.Fatal(err)
	}
}
