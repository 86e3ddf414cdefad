package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/zstd"
)

// mustGet builds or finds an image or ends the test.
func mustGet(t *testing.T, name string) string {
	t.Helper()
	dir, err := Get(name)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// tool is a program of the Debian package pkg, or the end of the test.
func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: apt-get install %s (or run tests/setup test)", name, pkg)
	}
	return path
}

// sampleArchive is a small archive with all that compressors like and dislike.
func sampleArchive() []byte {
	noise := make([]byte, 300_000)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	return Tar(
		Dir("d"), File("d/text", strings.Repeat("the quick brown fox jumps over the lazy dog\n", 20_000)),
		File("d/noise", string(noise)), File("d/zeros", strings.Repeat("\x00", 2_000_000)), File("d/empty", ""),
		File("d/holes", "start"+strings.Repeat("\x00", 5000)+"middle"+strings.Repeat("\x00", 1023)+"end"), Symlink("d/link", "text"), File("d/one", "1"),
	)
}

// TestDialects checks every dialect's bytes with the programs that define the formats: a layer must
// inflate to what its diff ID says.
func TestDialects(t *testing.T) {
	gzipProgram, zstdProgram := tool(t, "gzip", "gzip"), tool(t, "zstd", "zstd")
	names := []string{"mixed", "debian-python"}
	for _, d := range dialects {
		names = append(names, d.name)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			layers, err := ReadLayout(mustGet(t, name))
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range layers {
				f, err := l.Open()
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				blob := sha256.New()
				in := io.TeeReader(f, blob)
				var cmd *exec.Cmd
				switch l.MediaType {
				case MediaLayerGzip:
					cmd = exec.CommandContext(t.Context(), gzipProgram, "-dc")
				case MediaLayerZstd:
					cmd = exec.CommandContext(t.Context(), zstdProgram, "-dcq")
				default:
					cmd = exec.CommandContext(t.Context(), "cat")
				}
				inflated := sha256.New()
				var stderr bytes.Buffer
				cmd.Stdin, cmd.Stdout, cmd.Stderr = in, inflated, &stderr
				if err := cmd.Run(); err != nil {
					t.Errorf("layer %s: %v: %s", l.Digest, err, stderr.String())
				}
				if got := "sha256:" + hex.EncodeToString(inflated.Sum(nil)); got != l.DiffID {
					t.Errorf("layer %s inflates to %s, diff ID %s", l.Digest, got, l.DiffID)
				}
				if got := "sha256:" + hex.EncodeToString(blob.Sum(nil)); got != l.Digest {
					t.Errorf("layer %s has digest %s", l.Digest, got)
				}
			}
		})
	}
}

// TestUmociUnpacks checks that the plain unpack that mounts are compared with can be made: of torture
// without its largest file, which costs umoci most of a minute, and of the dialects that umoci is said
// to read. Those it is said to refuse it must refuse, or Plain says less than it could.
func TestUmociUnpacks(t *testing.T) {
	umoci := tool(t, "umoci", "umoci")
	if os.Geteuid() != 0 {
		t.Fatal("torture holds device nodes: this test runs as root")
	}
	unpack := func(t *testing.T, layout string) (string, error) {
		bundle := filepath.Join(t.TempDir(), "bundle")
		out, err := exec.CommandContext(t.Context(), umoci, "unpack", "--image", layout+":latest", bundle).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("umoci: %w\n%s", err, tail(string(out), 1000))
		}
		return filepath.Join(bundle, "rootfs"), err
	}
	t.Run("torture", func(t *testing.T) {
		dir := t.TempDir()
		var layers []Blob
		for _, entries := range tortureLayers() {
			layers = append(layers, Layer(slices.DeleteFunc(entries, func(e Entry) bool {
				return bytes.Contains(e.Raw, []byte("sp/zeros-3GiB"))
			})...))
		}
		if len(layers) != 300 {
			t.Errorf("%d layers", len(layers))
		}
		if err := WriteLayout(dir, layers...); err != nil {
			t.Fatal(err)
		}
		root, err := unpack(t, dir)
		if err != nil {
			t.Fatal(err)
		}
		checkTorture(t, root)
	})
	sample := sampleArchive()
	for _, d := range dialects {
		t.Run(d.name, func(t *testing.T) {
			l, err := d.libs(sample)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if err := WriteLayout(dir, l); err != nil {
				t.Fatal(err)
			}
			_, err = unpack(t, dir)
			if reads := Plain(d.name) == d.name; reads != (err == nil) {
				t.Errorf("Plain is %q, but: %v", Plain(d.name), err)
			}
		})
	}
	t.Run("odd", func(t *testing.T) {
		for i, entries := range oddLayers()[1:] {
			dir := t.TempDir()
			if err := WriteLayout(dir, Layer(oddLayers()[0]...), Layer(entries...)); err != nil {
				t.Fatal(err)
			}
			if _, err := unpack(t, dir); err != nil {
				t.Logf("layer %d: %.300s", i+1, err)
			}
		}
	})
}

// checkTorture looks at a few files whose fate says that the image means what it says it does.
func checkTorture(t *testing.T, root string) {
	for name, want := range map[string]string{
		"wh/before": "upper, after its whiteout", "wh/after": "upper, before its whiteout", "wh/returns": "second",
		"opq/same-name/lower": "upper, same name", "re/file-dir-file": "file again", "hl/upper-stays": "linked from above, then gone",
		"hl/changes-2": "old", "via/real/by-above": "by above", "du/file": "second", "es/up": "up", "etc/muster-torture": "through a link that leads out",
		"hd/v7": "v7", "hd/pax-size": "by pax\n\n", "many/counter": "299\n", "nm/latin-\xe9\xff": "not UTF-8",
	} {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != want {
			t.Errorf("%q holds %q (%v), want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"wh/goes", "wh/tree/a", "wh/part/gone", "opq/first/lower", "opq/unlisted/lower", "hl/lower-goes"} {
		if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%q is still there (%v)", name, err)
		}
	}
	want := make([]byte, 3<<20)
	copy(want, sparseData(1536)[:512])
	copy(want[1<<20:], sparseData(1536)[512:])
	for _, name := range []string{"pax00", "pax01", "pax10"} {
		if got, err := os.ReadFile(filepath.Join(root, "sp", name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("sp/%s is not what its map says (%v)", name, err)
		}
	}
}

// TestOldSparse has Go's reader and GNU tar read the sparse files that umoci refuses, each of which
// has a twin written in another way.
func TestOldSparse(t *testing.T) {
	archive := Tar(oddLayers()[1]...)
	content := map[string][]byte{}
	tr := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if content[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), tool(t, "tar", "tar"), "-xf", "-", "-C", dir)
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	for _, name := range []string{"few", "many", "unaligned", "hole"} {
		byGo, twin := content["sp/"+name], content["sp/"+name+"-twin"]
		if len(byGo) == 0 || !bytes.Equal(byGo, twin) {
			t.Errorf("%s: %d bytes, its twin %d, or they differ", name, len(byGo), len(twin))
		}
		for _, n := range []string{name, name + "-twin"} {
			if got, err := os.ReadFile(filepath.Join(dir, "sp", n)); err != nil || !bytes.Equal(got, byGo) {
				t.Errorf("GNU tar reads %s otherwise (%v)", n, err)
			}
		}
	}
}

// TestSameBytes builds what can be built twice in a test and compares.
func TestSameBytes(t *testing.T) {
	archive := sampleArchive()
	for _, d := range dialects {
		one, err := d.libs(archive)
		if err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		two, err := d.libs(archive)
		if err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		if one.Digest != two.Digest || one.DiffID != two.DiffID {
			t.Errorf("%s: two runs give %s and %s", d.name, one.Digest, two.Digest)
		}
	}
	for _, name := range []string{"torture", "small"} {
		a := find(name)
		var lists [2][]string
		for i := range lists {
			b := &build{dir: t.TempDir()}
			if err := a.build(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			for _, image := range a.images {
				index, err := os.ReadFile(filepath.Join(b.layout(image), "index.json"))
				if err != nil {
					t.Fatal(err)
				}
				lists[i] = append(lists[i], image+" "+string(index))
			}
		}
		if !slices.Equal(lists[0], lists[1]) {
			t.Errorf("%s: two builds differ:\n%s\n%s", name, lists[0], lists[1])
		}
	}
}

// TestGiant checks that there is one block, by its header, and that it inflates.
func TestGiant(t *testing.T) {
	for _, archive := range [][]byte{sampleArchive(), nil, []byte("a"), []byte("aaaa"), bytes.Repeat([]byte{'x'}, 70_000)} {
		b := GzipGiant(archive)
		if b[10]&7 != 0b011 {
			t.Fatalf("first block's header is %03b, want last and fixed", b[10]&7)
		}
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(got, archive) {
			t.Fatalf("%d bytes become %d: %v", len(archive), len(got), err)
		}
	}
}

// TestEStargz has the stargz-snapshotter's own library verify our layer against its table.
func TestEStargz(t *testing.T) {
	l, err := eStargz(sampleArchive(), 100_000)
	if err != nil {
		t.Fatal(err)
	}
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(l.Bytes()), 0, l.Size))
	if err != nil {
		t.Fatal(err)
	}
	if r.TOCDigest().String() != l.Annotations[TOCDigest] {
		t.Errorf("TOC digest %s, annotation %s", r.TOCDigest(), l.Annotations[TOCDigest])
	}
	if _, err := r.VerifyTOC(r.TOCDigest()); err != nil {
		t.Error(err)
	}
}

// TestPodmanTable follows podman's table of contents to every chunk.
func TestPodmanTable(t *testing.T) {
	l, err := ZstdPodman(sampleArchive())
	if err != nil {
		t.Fatal(err)
	}
	blob := l.Bytes()
	footer := blob[len(blob)-64:]
	if string(footer[56:]) != "GNUlInUx" {
		t.Fatalf("footer ends in %q", footer[56:])
	}
	at, n := binary.LittleEndian.Uint64(footer), binary.LittleEndian.Uint64(footer[8:])
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	table, err := d.DecodeAll(blob[at:at+n], nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%d:%d:%d:1", at, n, len(table)); l.Annotations[PodmanPosition] != want {
		t.Errorf("position %s, footer says %s", l.Annotations[PodmanPosition], want)
	}
	if got := digestOf(blob[at : at+n]); got != l.Annotations[PodmanChecksum] {
		t.Errorf("checksum %s, table's is %s", l.Annotations[PodmanChecksum], got)
	}
	var toc struct{ Entries []podmanEntry }
	if err := json.Unmarshal(table, &toc); err != nil {
		t.Fatal(err)
	}
	zeros, chunks := 0, 0
	var file string  // whose chunks come, with its digest
	var whole []byte // its content so far
	check := func() {
		if digestOf(whole) != file && file != "" {
			t.Errorf("%d bytes of chunks do not have digest %s of their file", len(whole), file)
		}
	}
	for i, e := range toc.Entries {
		if e.Digest == "" && e.Type != "chunk" {
			continue
		}
		end := e.EndOffset
		if e.ChunkSize > 0 && i+1 < len(toc.Entries) && toc.Entries[i+1].Type == "chunk" {
			end = toc.Entries[i+1].Offset
		} else if e.Type == "chunk" {
			for j := i; j >= 0; j-- {
				if toc.Entries[j].Type == "reg" {
					end = toc.Entries[j].EndOffset
					break
				}
			}
		}
		data, err := d.DecodeAll(blob[e.Offset:end], nil)
		if err != nil {
			t.Fatalf("%s at %d: %v", e.Name, e.ChunkOffset, err)
		}
		if e.Type == "reg" {
			check()
			file, whole = e.Digest, nil
		}
		whole = append(whole, data...)
		want := e.ChunkDigest
		if want == "" {
			want = e.Digest
		}
		if digestOf(data) != want {
			t.Errorf("%s at %d does not have its digest", e.Name, e.ChunkOffset)
		}
		chunks++
		if e.ChunkType == "zeros" {
			zeros++
			if len(bytes.Trim(data, "\x00")) > 0 {
				t.Errorf("%s at %d is not zeros", e.Name, e.ChunkOffset)
			}
		}
	}
	check()
	if zeros < 1 || chunks < 10 {
		t.Errorf("%d chunks, %d of them zeros: the sample should give more", chunks, zeros)
	}
}

// TestProgram runs the program of the small images as root and as somebody else.
func TestProgram(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test changes user: it runs as root")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "say")
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		mode os.FileMode
		uid  string
		want string
	}{
		{0o755, "0", "uid 0\n"},
		{0o755, "65534", "not root\n"},
		{0o755 | os.ModeSetuid, "65534", "uid 0\n"},
	} {
		if err := os.WriteFile(path, rootProbe(), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), tool(t, "setpriv", "util-linux"), "--reuid", c.uid, "--clear-groups", path).CombinedOutput()
		if string(out) != c.want {
			t.Errorf("mode %v as %s: %q (%v), want %q", c.mode, c.uid, out, err, c.want)
		}
	}
}

// TestGetOnce asks for one artifact from many sides: one builds, all get it, nothing is left behind.
func TestGetOnce(t *testing.T) {
	t.Setenv("MUSTER_TEST_IMAGES", t.TempDir())
	builds := 0
	a := artifact{name: "once", version: 1, images: []string{"once"}, build: func(_ context.Context, b *build) error {
		builds++ // under the artifact's lock
		if _, err := b.scratch(); err != nil {
			return err
		}
		return WriteLayout(b.layout("once"), Layer(File("a", "a")))
	}}
	// What a killed builder leaves.
	if err := os.Mkdir(filepath.Join(os.Getenv("MUSTER_TEST_IMAGES"), ".tmp-once-1"), 0o755); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if dir, err := get(t.Context(), a); err != nil || !isDir(filepath.Join(dir, "once")) {
				t.Errorf("get: %v, %v", dir, err)
			}
		})
	}
	wg.Wait()
	if builds != 1 {
		t.Errorf("built %d times", builds)
	}
	left, err := filepath.Glob(filepath.Join(os.Getenv("MUSTER_TEST_IMAGES"), "*"))
	if err != nil || len(left) != 2 { // the artifact and its lock: Glob's star takes dots too
		t.Errorf("left behind: %q (%v)", left, err)
	}
	scratch, _ := filepath.Glob(filepath.Join(os.Getenv("MUSTER_TEST_IMAGES"), "*", "scratch-*"))
	if len(scratch) > 0 {
		t.Errorf("scratch is still there: %q", scratch)
	}
	failing := a
	failing.name, failing.build = "fails", func(context.Context, *build) error { return errors.New("no luck") }
	if _, err := get(t.Context(), failing); err == nil || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("a failing build gives %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.Getenv("MUSTER_TEST_IMAGES"), ".tmp-*")); len(left) > 0 {
		t.Errorf("a failing build leaves %q", left)
	}
	if _, err := Get("no-such-image"); !errors.Is(err, ErrUnknown) {
		t.Errorf("an unknown name gives %v", err)
	}
}

// TestDebianLayers checks what debian-python promises: 6 to 9 layers of real sizes, at least 300 MB
// unpacked, a directory for every file.
func TestDebianLayers(t *testing.T) {
	layers, err := ReadLayout(mustGet(t, "debian-python"))
	if err != nil {
		t.Fatal(err)
	}
	if len(layers) < 6 || len(layers) > 9 {
		t.Errorf("%d layers", len(layers))
	}
	var size int64
	have := map[string]bool{}
	for i, l := range layers {
		archive, err := Gunzip(l)
		if err != nil {
			t.Fatal(err)
		}
		size += int64(len(archive))
		tr := tar.NewReader(bytes.NewReader(archive))
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := strings.TrimSuffix(h.Name, "/")
			if dir := filepath.Dir(name); dir != "." && !have[dir] {
				t.Fatalf("layer %d has %s before its directory", i, h.Name)
			}
			if have[name] && h.Typeflag != tar.TypeDir {
				t.Errorf("layer %d has %s again", i, h.Name)
			}
			have[name] = true
		}
	}
	if size < 300_000_000 {
		t.Errorf("only %d bytes unpacked", size)
	}
	for _, name := range []string{"usr/bin/python3", "etc/ld.so.cache", "var/lib/dpkg/status", "usr/lib/python3/dist-packages/numpy/__pycache__/__init__.cpython-311.pyc", "opt/muster/solve.py"} {
		if !have[name] {
			t.Errorf("no %s", name)
		}
	}
}
