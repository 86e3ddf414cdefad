package tree_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

var update = flag.Bool("update", false, "write the golden table of the current version")

// golden is a small image with one of everything. It must never change: a new version of the table gets a
// golden copy of its own, of this same image.
func golden(t testing.TB) []byte {
	return write(t, tree.Options{Meta: []byte("golden")}, []ztoc.Entry{
		{Name: "./", Type: ztoc.TypeDir, Mode: 0o755, ModTime: time.Unix(1700000000, 0)},
		{Name: "bin/sh", Offset: 512, Size: 1000, Mode: 0o4755, ModTime: time.Unix(1600000000, 123456789), PAX: []ztoc.Record{{Key: "SCHILY.xattr.security.capability", Value: "\x01\x00"}, {Key: "SCHILY.xattr.user.a", Value: "b"}}},
		{Name: "bin/bash", Type: ztoc.TypeHardlink, Linkname: "/bin/sh"},
		{Name: "gone/x", Offset: 2048, Size: 5},
	}, []ztoc.Entry{
		{Name: "lib", Type: ztoc.TypeSymlink, Linkname: "usr/lib", UID: 3, GID: 4},
		{Name: "dev/null", Type: ztoc.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3},
		{Name: "dev/loop0", Type: ztoc.TypeBlock, Mode: 0o660, Devmajor: 7, Devminor: 300, GID: 6},
		{Name: "dev/fifo", Type: ztoc.TypeFifo, Mode: 0o600},
		{Name: "data/holes", Offset: 4096, Size: 1 << 20, Mode: 0o640, UID: 1000, GID: 100, Sparse: []ztoc.Extent{{FileOff: 4096, Offset: 4096, Len: 4096}, {FileOff: 65536, Offset: 8192, Len: 512}}},
		{Name: "data/\xff\xfe", Mode: 0o644},
		{Name: ".wh.gone"},
	})
}

func TestGolden(t *testing.T) {
	const name = "testdata/v1.table"
	now := golden(t)
	if *update {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, now, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	then, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(now, then) {
		t.Errorf("the golden image makes other bytes than it did: a new version of the table is due")
	}
	tab, err := tree.Open(then)
	if err != nil {
		t.Fatal(err)
	}
	sh, err := tab.Resolve("/bin/bash", true)
	if err != nil {
		t.Fatal(err)
	}
	a := tab.Attr(sh, asImage)
	if a.Mode != 0o104755 || a.Nlink != 2 || a.Size != 1000 || a.Mtime != 1600000000 || a.Nsec != 123456789 {
		t.Errorf("sh is %+v", a)
	}
	if v, _ := tab.Getxattr(sh, []byte("security.capability"), asImage); string(v) != "\x01\x00" {
		t.Errorf("its capability is %q", v)
	}
	if tot := tab.Totals(); tot.Inodes != 11 || tot.Dirents != 11 || tot.Devices != 2 {
		t.Errorf("totals %+v", tot)
	}
}

// seal makes the checksums and the size of a table right, so that what they guard can be broken.
func seal(b []byte) []byte {
	const headerSize, sections, first, sectionSize = 216, 7, 48, 24
	if len(b) < headerSize {
		return b
	}
	le, table := binary.LittleEndian, crc32.MakeTable(crc32.Castagnoli)
	le.PutUint64(b[16:], uint64(len(b)))
	for i := range sections {
		h := b[first+i*sectionSize:]
		off, n := le.Uint64(h), le.Uint64(h[8:])
		if off <= uint64(len(b)) && n <= uint64(len(b))-off {
			le.PutUint32(h[16:], crc32.Checksum(b[off:off+n], table))
		}
	}
	le.PutUint32(b[12:], 0)
	le.PutUint32(b[12:], crc32.Checksum(b[:headerSize], table))
	return b
}

func TestOpenRefuses(t *testing.T) {
	good := golden(t)
	for name, c := range map[string]struct {
		change func(b []byte) []byte
		want   error
	}{
		"nothing":         {func([]byte) []byte { return nil }, tree.ErrCorrupt},
		"another file":    {func([]byte) []byte { return []byte(strings.Repeat("x", 1000)) }, tree.ErrCorrupt},
		"newer version":   {func(b []byte) []byte { b[8] = 2; return b }, tree.ErrVersion},
		"newer, sealed":   {func(b []byte) []byte { b[8] = 2; return seal(b) }, tree.ErrVersion},
		"cut":             {func(b []byte) []byte { return b[:len(b)-8] }, tree.ErrCorrupt},
		"cut, sealed":     {func(b []byte) []byte { return seal(b[:len(b)-8]) }, tree.ErrCorrupt},
		"longer":          {func(b []byte) []byte { return append(b, 0) }, tree.ErrCorrupt},
		"longer, sealed":  {func(b []byte) []byte { return seal(append(b, make([]byte, 8)...)) }, tree.ErrCorrupt},
		"header only":     {func(b []byte) []byte { return b[:216] }, tree.ErrCorrupt},
		"less than that":  {func(b []byte) []byte { return b[:100] }, tree.ErrCorrupt},
		"flipped in head": {func(b []byte) []byte { b[33] ^= 1; return b }, tree.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := tree.Open(c.change(bytes.Clone(good))); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if _, err := tree.Open(seal(bytes.Clone(good))); err != nil {
		t.Errorf("a table sealed again: %v", err)
	}
}

// TestEveryFlippedBitIsSeen rots a table bit by bit: padding between sections is the only place where none of
// it matters.
func TestEveryFlippedBitIsSeen(t *testing.T) {
	good := golden(t)
	unseen := 0
	for i := range len(good) * 8 {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		if _, err := tree.Open(b); err == nil {
			unseen++
		}
	}
	if unseen > 7*7*8 {
		t.Errorf("%d of %d flipped bits are not seen", unseen, len(good)*8)
	}
}

// TestHostileTablesDoNotPanic flips bits behind right checksums and uses whatever opens.
func TestHostileTablesDoNotPanic(t *testing.T) {
	good, opened := golden(t), 0
	for i := range len(good) * 8 {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		if i/8 == 12 || i/8 == 8 {
			continue
		}
		if tab, err := tree.Open(seal(b)); err == nil {
			opened++
			use(t, tab)
		}
	}
	t.Logf("%d of %d open", opened, len(good)*8)
}

// TestMangledTablesDoNotPanic writes a few numbers that hurt over random words, behind right checksums.
func TestMangledTablesDoNotPanic(t *testing.T) {
	good, opened := golden(t), 0
	for seed := range 30000 {
		r := rand.New(rand.NewPCG(uint64(seed), 5))
		b := bytes.Clone(good)
		for range 1 + r.IntN(3) {
			at := 16 + 4*r.IntN((len(b)-16)/4)
			old := binary.LittleEndian.Uint32(b[at:])
			binary.LittleEndian.PutUint32(b[at:], pick(r, 0, 1, old+1, old-1, old*2, 1<<31, 1<<32-1, 1<<32-2, uint32(len(b)), r.Uint32N(16)))
		}
		if tab, err := tree.Open(seal(b)); err == nil {
			opened++
			use(t, tab)
		}
	}
	t.Logf("%d of 30000 open", opened)
}

// use calls everything a server would, for every inode.
func use(t testing.TB, tab *tree.Table) {
	t.Helper()
	seen := 0
	var buf []byte
	for i := range tab.Len() {
		r := tree.Row(i)
		for _, p := range []tree.Presentation{asImage, asUser} {
			tab.Attr(r, p)
			tab.Mode(r, p)
			for n := range tab.Dirents(r) {
				d := tab.Dirent(r, n, p)
				if got, ok := tab.Lookup(r, d.Name); !ok || got != d.Row {
					t.Fatalf("row %d: %q is row %d, but found %d, %v", r, d.Name, d.Row, got, ok)
				}
				seen++
			}
			if tab.HasXattrs(r, p) != (len(tab.AppendXattrNames(nil, r, p)) > 0) {
				t.Fatalf("row %d has xattrs or not", r)
			}
			tab.Getxattr(r, []byte("user.a"), p)
		}
		tab.Readlink(r)
		tab.Lookup(r, []byte("x"))
		tab.Parent(r)
		buf = tab.AppendPath(buf[:0], r)
		if got, err := tab.Resolve(string(buf), false); err != nil || got != r {
			t.Fatalf("row %d has path %q, which leads to %d, %v", r, buf, got, err)
		}
		if n := runsOf(t, tab, r); tab.IsReg(r) && n != tab.Size(r) {
			t.Fatalf("row %d has runs of %d bytes of %d", r, n, tab.Size(r))
		}
		_, _ = tab.SeekData(r, 0)
		_, _ = tab.SeekHole(r, 0)
	}
	if seen != 2*int(tab.Totals().Dirents) {
		t.Fatalf("saw %d names of %d", seen/2, tab.Totals().Dirents)
	}
}

func runsOf(t testing.TB, tab *tree.Table, r tree.Row) int64 {
	t.Helper()
	at := int64(0)
	for {
		x := tab.Extent(r, at)
		if x.Len == 0 {
			return at
		}
		if x.Layer >= len(tab.Layers()) || x.Offset < 0 || x.Len < 0 {
			t.Fatalf("row %d at %d: %+v", r, at, x)
		}
		at += x.Len
	}
}
