package ztoc

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// sparseFiles makes files with holes in dir: none, few, many, only holes, a hole at the end.
func sparseFiles(t testing.TB, dir string) map[string]int64 {
	t.Helper()
	var many []int64
	for i := range int64(70) {
		many = append(many, i*40000)
	}
	sparseFile(t, dir, "a-plain", 5000, 5000, 0)
	sparseFile(t, dir, "b-few", 1000000, 5000, 0, 300000, 900000)
	sparseFile(t, dir, "c-many", 40000*70, 5000, many...)
	sparseFile(t, dir, "d-only-hole", 3<<20, 5000)
	sparseFile(t, dir, "e-end", 2000000, 5000, 50000)
	sparseFile(t, dir, "f-plain", 5001, 5000, 1)
	return map[string]int64{"b-few": 1000000, "c-many": 40000 * 70, "d-only-hole": 3 << 20, "e-end": 2000000}
}

// sparseFile makes a file of size bytes with data of n bytes at each of the offsets.
func sparseFile(t testing.TB, dir, name string, size int64, n int, at ...int64) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range at {
		if _, err := f.WriteAt(text(uint64(off), n), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestSparse(t *testing.T) {
	tarTool := tool(t, "tar", "tar")
	for _, args := range [][]string{
		{"--format=gnu"}, {"--format=pax", "--sparse-version=0.0"}, {"--format=pax", "--sparse-version=0.1"}, {"--format=pax", "--sparse-version=1.0"},
	} {
		t.Run(args[len(args)-1], func(t *testing.T) {
			dir := t.TempDir()
			sparse := sparseFiles(t, dir)
			args = append(args, "-S", "--hole-detection=raw", "--sort=name", "-C", dir, "-cf", "-", ".")
			layer, err := exec.Command(tarTool, args...).Output()
			if err != nil {
				t.Fatal(err)
			}
			z, _, err := Build(bytes.NewReader(layer), BuildOptions{})
			if err != nil {
				t.Fatal(err)
			}
			checkEntries(t, z, layer)
			es, _ := z.Entries()
			for _, e := range es {
				size, ok := sparse[filepath.Base(e.Name)]
				if !ok {
					continue
				}
				delete(sparse, filepath.Base(e.Name))
				var data int64
				for _, x := range e.Sparse {
					data += x.Len
				}
				if e.Sparse == nil || e.Size != size || data > size/2 {
					t.Fatalf("%q: size %d, %d bytes of data in %d extents", e.Name, e.Size, data, len(e.Sparse))
				}
			}
			if len(sparse) > 0 {
				t.Fatalf("missing: %v", sparse)
			}
			if _, err := EncodeSOCI(z); !errors.Is(err, ErrUnsupported) {
				t.Fatalf("SOCI's form cannot say holes: %v", err)
			}
			packed, err := Pack(z)
			if err != nil {
				t.Fatal(err)
			}
			if z, err = Unpack(packed); err != nil {
				t.Fatal(err)
			}
			checkEntries(t, z, layer)
		})
	}
}

// F34: what archives have in them besides files.
func TestOddEntries(t *testing.T) {
	long := string(bytes.Repeat([]byte("n"), 255))
	pax := func(records map[string]string) tar.Header {
		return tar.Header{Typeflag: tar.TypeReg, Name: "x", Mode: 0o644, Format: tar.FormatPAX, PAXRecords: records, ModTime: time.Unix(1, 123456789)}
	}
	fs := []file{
		{hdr: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"comment": "c"}}},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "usr/" + long + "/" + long, Mode: 0o644, Format: tar.FormatGNU}, body: []byte("gnu")},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "usr/" + long + "/" + long, Mode: 0o644, Format: tar.FormatPAX}, body: []byte("pax")},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "caf\xe9", Mode: 0o644, Format: tar.FormatGNU}},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "/../etc/passwd", Mode: 0o644}, body: []byte("evil")},
		{hdr: tar.Header{Typeflag: tar.TypeBlock, Name: "blk", Devmajor: 7, Devminor: 300, Mode: 0o600}},
		{hdr: tar.Header{Typeflag: tar.TypeChar, Name: "chr", Devmajor: 10, Devminor: 1, Mode: 0o600}},
		{hdr: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600}},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "suid", Mode: 0o6755, Uid: 1 << 22, Gid: 70000, Uname: "u", Gname: "g"}},
		{hdr: pax(map[string]string{"SCHILY.xattr.user.z": "1", "SCHILY.xattr.user.a": "\x00\xff\n"}), body: []byte("x")},
		{hdr: tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "in/a/lower/layer"}},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "dup", Mode: 0o644}, body: []byte("1")},
		{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "dup", Mode: 0o644}, body: []byte("2")},
	}
	layer := tarOf(t, fs...)
	z, _, err := Build(bytes.NewReader(gz(t, layer)), BuildOptions{})
	if err != nil {
		t.Fatal(err)
	}
	es, err := z.Entries()
	if err != nil || len(es) != len(fs)-1 {
		t.Fatalf("%d entries: %v", len(es), err)
	}
	for i, e := range es {
		want := fs[i+1].hdr
		if e.Name != want.Name || e.Mode != want.Mode || e.Linkname != want.Linkname || e.UID != want.Uid || e.GID != want.Gid ||
			e.Uname != want.Uname || e.Devmajor != want.Devmajor || e.Devminor != want.Devminor ||
			string(layer[e.Offset:e.Offset+e.Size]) != string(fs[i+1].body) {
			t.Errorf("entry %d is %+v, want %+v", i, e, want)
		}
	}
	x := es[8]
	if len(x.PAX) != 3 || x.PAX[0] != (Record{"SCHILY.xattr.user.a", "\x00\xff\n"}) || x.PAX[2].Key != "mtime" || x.ModTime.UnixNano() != 1123456789 {
		t.Errorf("%+v", x)
	}
}
