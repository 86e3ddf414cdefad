package ztoc

import (
	"archive/tar"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// tool is the path of a program that the tests need.
func tool(t testing.TB, name, pkg string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: apt-get install %s", name, pkg)
	}
	return p
}

// member is b as one gzip member: a header with what flags say, blocks of a level that changes at will.
func member(t testing.TB, r *rand.Rand, b []byte) []byte {
	t.Helper()
	flags := byte(r.IntN(32)) &^ 1
	h := []byte{0x1f, 0x8b, 8, flags, byte(r.Uint32()), 2, 3, 4, 0, 3}
	if flags&4 != 0 {
		extra := make([]byte, r.IntN(300))
		h = append(binary.LittleEndian.AppendUint16(h, uint16(len(extra))), extra...)
	}
	if flags&8 != 0 {
		h = append(h, "name.tar\x00"...)
	}
	if flags&16 != 0 {
		h = append(h, "a comment\x00"...)
	}
	if flags&2 != 0 {
		h = binary.LittleEndian.AppendUint16(h, uint16(crc32.ChecksumIEEE(h)))
	}
	buf := bytes.NewBuffer(h)
	level := []int{flate.NoCompression, flate.BestSpeed, flate.DefaultCompression, flate.BestCompression, flate.HuffmanOnly}[r.IntN(5)]
	w, err := flate.NewWriter(buf, level)
	if err != nil {
		t.Fatal(err)
	}
	for rest := b; len(rest) > 0; {
		n := min(len(rest), 1+r.IntN(60000))
		if _, err := w.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
		if r.IntN(3) == 0 { // an empty stored block, as pigz and zlib's flush make them
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	buf.Write(binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE(b)))
	buf.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(b))))
	return buf.Bytes()
}

// members is layer as a gzip file of so many members, cut anywhere, some empty, perhaps with zeros behind.
func members(t testing.TB, r *rand.Rand, layer []byte, n int) (blob []byte) {
	t.Helper()
	for i := range n {
		size := len(layer)
		if i < n-1 {
			size = r.IntN(min(len(layer)+1, 2*len(layer)/(n-i)+1))
			if r.IntN(4) == 0 {
				size = 0
			}
		}
		blob = append(blob, member(t, r, layer[:size])...)
		layer = layer[size:]
	}
	if r.IntN(2) == 0 {
		blob = append(blob, make([]byte, r.IntN(2000))...)
	}
	return blob
}

// F16: members × span sizes × where boundaries fall; every span alone gives the bytes that gzip gives.
// F17: zlib (by python3), Go's own inflate and ours agree on all of it.
func TestGzipMembersAndSpans(t *testing.T) {
	gzipTool, python := tool(t, "gzip", "gzip"), tool(t, "python3", "python3")
	dir := t.TempDir()
	shared, aligned, atMember := 0, 0, 0
	var sums string
	for seed := range uint64(24) {
		r := rand.New(rand.NewPCG(seed, 16))
		body := text(seed, 200000+r.IntN(300000))
		layer := tarOf(t,
			file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "a", Mode: 0o644}, body: body},
			file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "b", Mode: 0o644}, body: make([]byte, r.IntN(200000))},
		)
		n := []int{1, 1, 2, 3, 9, 60}[seed%6]
		blob := members(t, r, layer, n)
		path := filepath.Join(dir, fmt.Sprintf("%d.gz", seed))
		if err := os.WriteFile(path, blob, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(gzipTool, "-dc", path)
		want, err := cmd.Output()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 2 {
			err = nil // a warning: trailing zeros
		}
		if err != nil || !bytes.Equal(want, layer) {
			t.Fatalf("seed %d: gzip -dc: %v", seed, err)
		}
		zr, err := gzip.NewReader(bytes.NewReader(bytes.TrimRight(blob, "\x00")))
		if err == nil {
			std, err := io.ReadAll(zr)
			// Trimmed zeros may have been of the length in the last trailer.
			if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(std, layer) {
				t.Fatalf("seed %d: compress/gzip: %v", seed, err)
			}
		}
		sums += fmt.Sprintf("%s %s\n", DigestOf(layer).Hex(), path)
		for _, span := range []int64{4 << 10, 10000, 64 << 10, 1 << 20} {
			z, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: span, Want: DigestOf(blob), DiffID: DigestOf(layer)})
			if err != nil {
				t.Fatalf("seed %d, %d members, spans of %d: %v", seed, n, span, err)
			}
			if !bytes.Equal(inflateAll(t, z, blob), layer) {
				t.Fatalf("seed %d, %d members, spans of %d: spans differ from gzip -dc", seed, n, span)
			}
			for i := range z.NumSpans() {
				row := z.row(i)
				switch {
				case row.bits > 0:
					shared++
				case row.kind == windowNone && i > 0:
					atMember++
				default:
					aligned++
				}
			}
			soci, err := EncodeSOCI(z)
			if err != nil {
				t.Fatal(err)
			}
			z, err = DecodeSOCI(soci)
			if err != nil {
				t.Fatal(err)
			}
			if out := inflateAll(t, z, blob); !bytes.Equal(out, layer[:len(out)]) {
				t.Fatalf("seed %d, %d members, spans of %d: spans differ in SOCI's form", seed, n, span)
			}
		}
	}
	t.Logf("spans that share a byte: %d, that start with one: %d, that need no window: %d", shared, aligned, atMember)
	if shared == 0 || aligned == 0 || atMember == 0 {
		t.Fatal("a kind of boundary was not tried")
	}
	const script = `
import hashlib, sys, zlib
for line in sys.stdin:
    want, path = line.split()
    data, h = open(path, "rb").read(), hashlib.sha256()
    while data.strip(b"\0"):
        d = zlib.decompressobj(31)
        h.update(d.decompress(data)); h.update(d.flush())
        assert d.eof, path
        data = d.unused_data
    assert h.hexdigest() == want, path
`
	cmd := exec.Command(python, "-c", script)
	cmd.Stdin = bytes.NewReader([]byte(sums))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("zlib disagrees: %v\n%s", err, out)
	}
}

// A span is proven before it is inflated, and an index that lies is told from bytes that are wrong.
func TestInflateTellsBytesFromIndex(t *testing.T) {
	layer := tarOf(t, someFiles(40)...)
	blob := gz(t, layer)
	z, _, err := Build(bytes.NewReader(blob), BuildOptions{SpanSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	i := z.NumSpans() / 2
	s := z.Span(i)
	dst := make([]byte, s.Out.Len())
	good := blob[s.Blob.Start:s.Blob.End]
	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 0x80
	if err := z.Inflate(dst, i, bad); !errors.Is(err, ErrMismatch) {
		t.Fatal(err)
	}
	if err := z.Inflate(dst, i, good[1:]); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	if err := z.Inflate(dst, i, good); err != nil {
		t.Fatal(err)
	}
	// A window that rotted.
	r := z.row(i)
	z.windows[r.window+5] ^= 1
	if err := z.Inflate(dst, i, good); !errors.Is(err, ErrIndex) {
		t.Fatal(err)
	}
	z.windows[r.window+5] ^= 1
	// A lie about where the block starts.
	r.bits ^= 3
	copy(z.rows[i*rowSize:], r.append(nil))
	if err := z.Inflate(dst, i, good); err != nil && !errors.Is(err, ErrIndex) {
		t.Fatal(err)
	}
}

func TestBuildErrors(t *testing.T) {
	layer := tarOf(t, someFiles(40)...)
	blob := gz(t, layer)
	cut := errors.New("connection reset")
	for _, c := range []struct {
		name string
		r    io.Reader
		o    BuildOptions
		want error
	}{
		{"digest", bytes.NewReader(blob), BuildOptions{Want: DigestOf(nil)}, ErrMismatch},
		{"diff ID", bytes.NewReader(blob), BuildOptions{DiffID: DigestOf(nil)}, ErrMismatch},
		{"cut", bytes.NewReader(blob[:len(blob)-100]), BuildOptions{}, ErrInvalid},
		{"cut tar", bytes.NewReader(gz(t, layer[:len(layer)-3000])), BuildOptions{}, ErrInvalid},
		{"not a tar", bytes.NewReader(gz(t, text(1, 5000))), BuildOptions{}, ErrInvalid},
		{"broken reader", io.MultiReader(bytes.NewReader(blob[:len(blob)/2]), errReader{cut}), BuildOptions{}, cut},
		{"broken at once", errReader{cut}, BuildOptions{}, cut},
		{"bzip2", bytes.NewReader([]byte("BZh91AY&SY")), BuildOptions{}, ErrUnsupported},
		{"nothing", bytes.NewReader(nil), BuildOptions{}, ErrUnsupported},
		{"options", bytes.NewReader(blob), BuildOptions{SpanSize: 1}, ErrInvalid},
	} {
		if _, _, err := Build(c.r, c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	_, _, err := Build(io.MultiReader(bytes.NewReader(blob[:len(blob)/2]), errReader{cut}), BuildOptions{})
	if errors.Is(err, ErrInvalid) {
		t.Errorf("a broken connection is blamed on the layer: %v", err)
	}
	flipped := bytes.Clone(blob)
	flipped[len(blob)-6] ^= 1 // in the checksum
	if _, _, err := Build(bytes.NewReader(flipped), BuildOptions{}); !errors.Is(err, ErrInvalid) || errors.Is(err, ErrMismatch) {
		t.Error(err)
	}
	// With a digest to compare with, it shows whose fault it is.
	for _, at := range []int{2, 5000, len(blob) / 2, len(blob) - 6} {
		flipped := bytes.Clone(blob)
		flipped[at] ^= 0x10
		if _, _, err := Build(bytes.NewReader(flipped), BuildOptions{Want: DigestOf(blob)}); !errors.Is(err, ErrMismatch) {
			t.Errorf("flipped at %d: %v", at, err)
		}
		flippedTar := bytes.Clone(layer)
		flippedTar[at&^511+100] ^= 0x10
		if _, _, err := Build(bytes.NewReader(flippedTar), BuildOptions{Want: DigestOf(layer)}); !errors.Is(err, ErrMismatch) {
			t.Errorf("flipped tar at %d: %v", at, err)
		}
		if _, _, err := Build(bytes.NewReader(flipped), BuildOptions{Want: DigestOf(flipped)}); err != nil && !errors.Is(err, ErrInvalid) || errors.Is(err, ErrMismatch) {
			t.Errorf("made wrong at %d: %v", at, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// A giant deflate block: no restart points, and yet everything is checked.
func TestGiantBlock(t *testing.T) {
	layer := tarOf(t, file{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Mode: 0o644}, body: make([]byte, 3<<20)})
	blob := fixedBlock(layer)
	z, sums, err := Build(bytes.NewReader(blob), BuildOptions{MaxBlock: 1 << 20, DiffID: DigestOf(layer), Want: DigestOf(blob)})
	if !errors.Is(err, ErrNoRestart) || z != nil || sums.InflatedSize != int64(len(layer)) || sums.DiffID != DigestOf(layer) {
		t.Fatalf("%v, %+v", err, sums)
	}
	if _, _, err := Build(bytes.NewReader(blob), BuildOptions{MaxBlock: 1 << 20, Want: DigestOf(layer)}); !errors.Is(err, ErrMismatch) {
		t.Fatal(err)
	}
	z, _, err = Build(bytes.NewReader(blob), BuildOptions{})
	if err != nil || !bytes.Equal(inflateAll(t, z, blob), layer) {
		t.Fatal(err)
	}
	var derived bytes.Buffer
	z, _, err = Derive(bytes.NewReader(blob), &derived, BuildOptions{Want: DigestOf(blob), DiffID: DigestOf(layer)})
	if err != nil || !bytes.Equal(inflateAll(t, z, derived.Bytes()), layer) {
		t.Fatal(err)
	}
}

// fixedBlock is layer as gzip in a single block with the fixed code. zlib and Go would both start
// another long before, so it is made by hand.
func fixedBlock(layer []byte) []byte {
	var bits bitWriter
	bits.add(1, 1)
	bits.add(1, 2)
	literal := func(c byte) {
		if c < 144 {
			bits.addHuffman(0x30+uint32(c), 8)
		} else {
			bits.addHuffman(0x190+uint32(c)-144, 9)
		}
	}
	for i := 0; i < len(layer); {
		if i > 0 && i+258 <= len(layer) && allZero(layer[i-1:i+258]) {
			bits.addHuffman(0xc5, 8) // length 258
			bits.addHuffman(0, 5)    // distance 1
			i += 258
			continue
		}
		literal(layer[i])
		i++
	}
	bits.addHuffman(0, 7)
	blob := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3}, bits.bytes()...)
	blob = binary.LittleEndian.AppendUint32(blob, crc32.ChecksumIEEE(layer))
	blob = binary.LittleEndian.AppendUint32(blob, uint32(len(layer)))
	return blob
}

// A bitWriter packs deflate's bits.
type bitWriter struct {
	b []byte
	n uint
}

func (w *bitWriter) add(v uint32, n uint) {
	for i := range n {
		if w.n%8 == 0 {
			w.b = append(w.b, 0)
		}
		w.b[len(w.b)-1] |= byte(v>>i&1) << (w.n % 8)
		w.n++
	}
}

func (w *bitWriter) addHuffman(v uint32, n uint) {
	for i := range n {
		w.add(v>>(n-1-i)&1, 1)
	}
}

func (w *bitWriter) bytes() []byte { return w.b }
