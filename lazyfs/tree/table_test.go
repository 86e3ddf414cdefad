package tree_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// write builds a table of one layer per argument and returns its bytes.
func write(t testing.TB, o tree.Options, ls ...[]ztoc.Entry) []byte {
	t.Helper()
	var in []tree.Layer
	for i, es := range ls {
		in = append(in, tree.Layer{LayerRef: tree.LayerRef{
			Blob: ztoc.BlobRef{Digest: ztoc.DigestOf([]byte{byte(i)}), Size: 1000 + int64(i)}, Ztoc: fmt.Sprint("key", i),
		}, Entries: es})
	}
	var w bytes.Buffer
	st, err := tree.Build(&w, in, o)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size != int64(w.Len()) {
		t.Fatalf("said %d bytes, wrote %d", st.Size, w.Len())
	}
	return w.Bytes()
}

func open(t testing.TB, b []byte) *tree.Table {
	t.Helper()
	tab, err := tree.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func find(t testing.TB, tab *tree.Table, path string) tree.Row {
	t.Helper()
	r, err := tab.Resolve(path, false)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return r
}

func TestEmptyImage(t *testing.T) {
	tab := open(t, write(t, tree.Options{}))
	a := tab.Attr(tree.Root, asImage)
	if tab.Len() != 1 || a.Mode != 0o40755 || a.Nlink != 2 || a.UID != 0 || a.Mtime != 0 || tab.Dirents(tree.Root) != 0 {
		t.Errorf("%d rows, root %+v", tab.Len(), a)
	}
	if _, ok := tab.Lookup(tree.Root, []byte("x")); ok {
		t.Error("found something")
	}
}

func TestLayersAndMeta(t *testing.T) {
	tab := open(t, write(t, tree.Options{Meta: []byte("sha256:…")}, nil, nil))
	if string(tab.Meta()) != "sha256:…" {
		t.Errorf("meta %q", tab.Meta())
	}
	l := tab.Layers()
	if len(l) != 2 || l[1].Ztoc != "key1" || l[1].Blob.Size != 1001 || l[1].Blob.Digest != ztoc.DigestOf([]byte{1}) {
		t.Errorf("layers %+v", l)
	}
}

func TestNodes(t *testing.T) {
	tab := open(t, write(t, tree.Options{}, []ztoc.Entry{{Name: "f", Size: 1}}))
	if tree.Root.Node() != 1 {
		t.Errorf("root is node %d", tree.Root.Node())
	}
	for node, ok := range map[uint64]bool{0: false, 1: true, 2: true, 3: false, 1 << 32: false, 1<<64 - 1: false} {
		r, got := tab.Row(node)
		if got != ok || (ok && r.Node() != node) {
			t.Errorf("node %d is row %d, %v", node, r, got)
		}
	}
}

func TestExtents(t *testing.T) {
	tab := open(t, write(t, tree.Options{}, nil, []ztoc.Entry{
		{Name: "whole", Offset: 512, Size: 100},
		{Name: "empty", Offset: 1024},
		{Name: "holes", Offset: 2048, Size: 10000, Sparse: []ztoc.Extent{
			{FileOff: 100, Offset: 2048, Len: 50},
			{FileOff: 150, Offset: 2098, Len: 50}, // goes on where the last ends
			{FileOff: 5000, Offset: 2148, Len: 1000},
			{FileOff: 10000, Len: 0}, // as GNU tar ends its maps
		}},
		{Name: "full", Offset: 4096, Size: 300, Sparse: []ztoc.Extent{{FileOff: 0, Offset: 4096, Len: 300}}},
		{Name: "zeros", Size: 3 << 30, Sparse: []ztoc.Extent{}},
		{Name: "dir", Type: ztoc.TypeDir},
	}))
	const hole = -1
	for _, c := range []struct {
		name string
		off  int64
		want tree.Extent
	}{
		{"whole", 0, tree.Extent{Layer: 1, Offset: 512, Len: 100}},
		{"whole", 60, tree.Extent{Layer: 1, Offset: 572, Len: 40}},
		{"whole", 100, tree.Extent{Layer: hole}},
		{"whole", -1, tree.Extent{Layer: hole}},
		{"empty", 0, tree.Extent{Layer: hole}},
		{"holes", 0, tree.Extent{Layer: hole, Len: 100}},
		{"holes", 99, tree.Extent{Layer: hole, Len: 1}},
		{"holes", 100, tree.Extent{Layer: 1, Offset: 2048, Len: 100}},
		{"holes", 199, tree.Extent{Layer: 1, Offset: 2147, Len: 1}},
		{"holes", 200, tree.Extent{Layer: hole, Len: 4800}},
		{"holes", 5999, tree.Extent{Layer: 1, Offset: 3147, Len: 1}},
		{"holes", 6000, tree.Extent{Layer: hole, Len: 4000}},
		{"holes", 10000, tree.Extent{Layer: hole}},
		{"full", 10, tree.Extent{Layer: 1, Offset: 4106, Len: 290}},
		{"zeros", 1 << 30, tree.Extent{Layer: hole, Len: 2 << 30}},
		{"dir", 0, tree.Extent{Layer: hole}},
	} {
		if got := tab.Extent(find(t, tab, c.name), c.off); got != c.want {
			t.Errorf("%s at %d: got %+v, want %+v", c.name, c.off, got, c.want)
		}
	}
	for _, c := range []struct {
		name       string
		off        int64
		data, hole int64 // -1: none
	}{
		{"whole", 0, 0, 100},
		{"whole", 99, 99, 100},
		{"whole", 100, -1, -1},
		{"empty", 0, -1, -1},
		{"holes", 0, 100, 0},
		{"holes", 120, 120, 200},
		{"holes", 200, 5000, 200},
		{"holes", 5000, 5000, 6000},
		{"holes", 6000, -1, 6000},
		{"zeros", 5, -1, 5},
	} {
		r := find(t, tab, c.name)
		for what, want := range map[string]int64{"data": c.data, "hole": c.hole} {
			seek := tab.SeekData
			if what == "hole" {
				seek = tab.SeekHole
			}
			got, err := seek(r, c.off)
			if want < 0 && !errors.Is(err, tree.ErrNoData) || want >= 0 && (err != nil || got != want) {
				t.Errorf("%s: next %s after %d: got %d, %v, want %d", c.name, what, c.off, got, err, want)
			}
		}
	}
	for name, want := range map[string]int64{"whole": 8, "empty": 0, "holes": 8, "zeros": 0, "dir": 8} {
		if a := tab.Attr(find(t, tab, name), asImage); a.Blocks != want {
			t.Errorf("%s has %d blocks, want %d", name, a.Blocks, want)
		}
	}
	if got, want := tab.Totals().Bytes, int64(100+10000+300+(3<<30)); got != want {
		t.Errorf("%d bytes in all, want %d", got, want)
	}
}

func TestReaddirOrderIsThatOfTheData(t *testing.T) {
	reg := func(name string) ztoc.Entry { return ztoc.Entry{Name: name, Size: 1} }
	dir := func(name string) ztoc.Entry { return ztoc.Entry{Name: name, Type: ztoc.TypeDir} }
	tab := open(t, write(t, tree.Options{},
		[]ztoc.Entry{dir("empty"), reg("z"), dir("d"), reg("y"), reg("d/q"), reg("d/p"), reg("e/x")},
		[]ztoc.Entry{reg("a"), dir("e"), reg("e/w"), {Name: "h", Type: ztoc.TypeHardlink, Linkname: "z"}},
	))
	names := func(path string) string {
		var out []string
		r := find(t, tab, path)
		for i := range tab.Dirents(r) {
			out = append(out, string(tab.Dirent(r, i, asImage).Name))
		}
		return strings.Join(out, " ")
	}
	for path, want := range map[string]string{"/": "empty h z y d e a", "/d": "q p", "/e": "x w"} {
		if got := names(path); got != want {
			t.Errorf("%s is read as %s, want %s", path, got, want)
		}
	}
}

func TestResolve(t *testing.T) {
	link := func(name, to string) ztoc.Entry {
		return ztoc.Entry{Name: name, Type: ztoc.TypeSymlink, Linkname: to}
	}
	tab := open(t, write(t, tree.Options{}, []ztoc.Entry{
		{Name: "usr/bin/python3.11", Size: 1},
		link("usr/bin/python3", "python3.11"), link("bin", "usr/bin"),
		link("abs", "/usr/bin/"), link("up", "../../.."), link("loop", "loop"), link("dangling", "nowhere"), link("file", "abs/python3"),
	}))
	for _, c := range []struct {
		path, want string
		err        error
	}{
		{"/", "/", nil},
		{"", "/", nil},
		{".", "/", nil},
		{"..", "/", nil},
		{"/bin/python3", "/usr/bin/python3.11", nil},
		{"bin//./python3", "/usr/bin/python3.11", nil},
		{"bin/../lib/../bin", "", tree.ErrNotExist},
		{"bin/../bin/python3", "/usr/bin/python3.11", nil}, // .. of what bin leads to
		{"abs/../../up/bin", "/usr/bin", nil},
		{"abs/", "/usr/bin", nil},
		{"file", "/usr/bin/python3.11", nil},
		{"file/", "", tree.ErrNotDir},
		{"file/x", "", tree.ErrNotDir},
		{"file/.", "", tree.ErrNotDir},
		{"dangling", "", tree.ErrNotExist},
		{"loop", "", tree.ErrLoop},
		{"loop/x", "", tree.ErrLoop},
		{"usr/\x00", "", tree.ErrNotExist},
	} {
		r, err := tab.Resolve(c.path, true)
		if !errors.Is(err, c.err) || (err == nil && string(tab.AppendPath(nil, r)) != c.want) {
			t.Errorf("%q: got %q, %v, want %q, %v", c.path, tab.AppendPath(nil, r), err, c.want, c.err)
		}
	}
	for path, want := range map[string]string{"file": "/file", "bin/python3": "/usr/bin/python3", "loop": "/loop", "dangling": "/dangling", "abs/.": "/usr/bin"} {
		r, err := tab.Resolve(path, false)
		if err != nil || string(tab.AppendPath(nil, r)) != want {
			t.Errorf("%q itself: got %q, %v, want %q", path, tab.AppendPath(nil, r), err, want)
		}
	}
}

func TestXattrs(t *testing.T) {
	pax := func(kv ...string) []ztoc.Record {
		var out []ztoc.Record
		for i := 0; i < len(kv); i += 2 {
			out = append(out, ztoc.Record{Key: kv[i], Value: kv[i+1]})
		}
		return out
	}
	var w bytes.Buffer
	st, err := tree.Build(&w, []tree.Layer{{Entries: []ztoc.Entry{
		{Name: "f", Mode: 0o644, UID: 300, PAX: pax("SCHILY.xattr.user.z", "1", "SCHILY.xattr.security.capability", "c", "mtime", "5", "SCHILY.xattr.user.a", "0", "SCHILY.xattr.user.z", "2")},
		{Name: "g", Mode: 0o444, PAX: pax("SCHILY.xattr.user.a", "0", "SCHILY.xattr.system.posix_acl_access", "x")},
		{Name: "l", Type: ztoc.TypeSymlink, Linkname: "x", PAX: pax("SCHILY.xattr.user.a", "0", "SCHILY.xattr.security.x", "1")},
		{Name: "n", PAX: pax("SCHILY.xattr.nowhere.a", "0", "SCHILY.xattr.trusted.overlay.redirect", "/etc", "SCHILY.xattr.user.big", strings.Repeat("v", 65537), "SCHILY.xattr.", "x", "SCHILY.xattr.user.empty", "")},
		{Name: "plain"},
	}}}, tree.Options{})
	if err != nil {
		t.Fatal(err)
	}
	tab := open(t, w.Bytes())
	for _, c := range []struct {
		name string
		p    tree.Presentation
		want string
	}{
		{"f", asImage, "security.capability user.a user.z"},
		{"f", asUser, "user.a user.z user.rootlesscontainers"},
		{"g", asImage, "system.posix_acl_access user.a"},
		{"g", asUser, "system.posix_acl_access"}, // an owner who may not write may not set xattrs
		{"l", asImage, "security.x"},
		{"l", asUser, ""},
		{"n", asImage, ""},
		{"plain", asUser, ""},
	} {
		r := find(t, tab, c.name)
		got := strings.TrimSpace(strings.ReplaceAll(string(tab.AppendXattrNames(nil, r, c.p)), "\x00", " "))
		if got != c.want {
			t.Errorf("%s %+v: got %q, want %q", c.name, c.p, got, c.want)
		}
		if tab.HasXattrs(r, c.p) != (c.want != "") {
			t.Errorf("%s %+v: HasXattrs is %v", c.name, c.p, tab.HasXattrs(r, c.p))
		}
	}
	if v, ok := tab.Getxattr(find(t, tab, "f"), []byte("user.z"), asImage); !ok || string(v) != "2" {
		t.Errorf("user.z is %q, %v", v, ok)
	}
	if v, _ := tab.Getxattr(find(t, tab, "f"), []byte("user.rootlesscontainers"), asUser); string(v) != "\x08\xac\x02\x10\xff\xff\xff\xff\x0f" {
		t.Errorf("owner is %q", v)
	}
	for _, hidden := range []string{"security.capability", "user.rootlesscontainers", "user.", ""} {
		if _, ok := tab.Getxattr(find(t, tab, "plain"), []byte(hidden), asUser); ok {
			t.Errorf("%q is there", hidden)
		}
	}
	if _, ok := tab.Getxattr(find(t, tab, "f"), []byte("security.capability"), asUser); ok {
		t.Error("a user sees security.capability")
	}
	var why []string
	for _, n := range st.Notes {
		why = append(why, n.Name+": "+n.Reason)
	}
	want := []string{
		`l: xattr "user.a" is not possible on this type of file`,
		`n: xattr "nowhere.a" is in no name space of Linux`,
		`n: xattr "trusted.overlay.redirect" belongs to overlayfs`,
		`n: xattr "user.big" is larger than 64 KiB`,
		`n: xattr "" has no possible name`,
	}
	if strings.Join(why, "\n") != strings.Join(want, "\n") || st.Skipped != 0 {
		t.Errorf("notes:\n%s\nwant:\n%s", strings.Join(why, "\n"), strings.Join(want, "\n"))
	}
}

func TestBrokenIndexIsAnError(t *testing.T) {
	for name, e := range map[string]ztoc.Entry{
		"negative size":    {Size: -1},
		"negative offset":  {Offset: -1, Size: 1},
		"behind the end":   {Offset: 900, Size: 101},
		"far behind":       {Offset: 1 << 62, Size: 1 << 62},
		"sparse overlap":   {Size: 100, Sparse: []ztoc.Extent{{FileOff: 0, Len: 10}, {FileOff: 9, Len: 10}}},
		"sparse backwards": {Size: 100, Sparse: []ztoc.Extent{{FileOff: 50, Len: 10}, {FileOff: 9, Len: 10}}},
		"sparse outside":   {Size: 100, Sparse: []ztoc.Extent{{FileOff: 95, Len: 10}}},
		"sparse beyond":    {Size: 100, Sparse: []ztoc.Extent{{FileOff: 0, Offset: 999, Len: 10}}},
		"sparse negative":  {Size: 100, Sparse: []ztoc.Extent{{FileOff: 0, Offset: 0, Len: -1}}},
	} {
		e.Name = "f"
		l := tree.Layer{LayerRef: tree.LayerRef{Size: 1000}, Entries: []ztoc.Entry{e}}
		if _, err := tree.Build(&bytes.Buffer{}, []tree.Layer{l}, tree.Options{}); !errors.Is(err, tree.ErrEntries) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLimits(t *testing.T) {
	var es []ztoc.Entry
	for i := range 10 {
		es = append(es, ztoc.Entry{Name: fmt.Sprint(i)})
	}
	if _, err := tree.Build(&bytes.Buffer{}, []tree.Layer{{Entries: es}}, tree.Options{MaxInodes: 10}); err == nil {
		t.Error("eleven inodes where ten are allowed")
	}
	if _, err := tree.Build(&bytes.Buffer{}, []tree.Layer{{Entries: es}}, tree.Options{MaxInodes: 11}); err != nil {
		t.Error(err)
	}
	var again []tree.Layer // what is gone does not count
	for range 10 {
		again = append(again, tree.Layer{Entries: []ztoc.Entry{{Name: "d", Type: ztoc.TypeDir}, {Name: "d", Type: ztoc.TypeDir}, {Name: "d/f"}}}, tree.Layer{Entries: []ztoc.Entry{{Name: ".wh.d"}}})
	}
	if _, err := tree.Build(&bytes.Buffer{}, again, tree.Options{MaxInodes: 3}); err != nil {
		t.Error(err)
	}
	if _, err := tree.Build(&bytes.Buffer{}, nil, tree.Options{Meta: make([]byte, 65537)}); err == nil {
		t.Error("65537 bytes of meta")
	}
	if _, err := tree.Build(&bytes.Buffer{}, make([]tree.Layer, 65537), tree.Options{}); err == nil {
		t.Error("65537 layers")
	}
	deep := func(n int) ztoc.Entry { return ztoc.Entry{Name: strings.Repeat("d/", n-1) + "f"} }
	for n, skipped := range map[int]int{2047: 0, 2048: 1, 100000: 1} {
		st, err := tree.Build(&bytes.Buffer{}, []tree.Layer{{Entries: []ztoc.Entry{deep(n)}}}, tree.Options{})
		if err != nil || st.Skipped != skipped || (skipped > 0 && st.Inodes != 1) {
			t.Errorf("depth %d: %+v, %v", n, st, err)
		}
	}
	var bad []ztoc.Entry
	for range 10 {
		bad = append(bad, ztoc.Entry{Name: "a", Type: 99})
	}
	st, err := tree.Build(&bytes.Buffer{}, []tree.Layer{{Entries: bad}}, tree.Options{MaxNotes: 3})
	if err != nil || st.Skipped != 10 || len(st.Notes) != 3 || st.NotesCut != 7 {
		t.Errorf("notes: %+v, %v", st, err)
	}
}

// TestLinkBombTakesBoundedTime has links that each lead through all others, and entries beneath them.
func TestLinkBombTakesBoundedTime(t *testing.T) {
	var es []ztoc.Entry
	for i := range 200 {
		es = append(es, ztoc.Entry{Name: fmt.Sprint("l", i), Type: ztoc.TypeSymlink, Linkname: strings.Repeat(fmt.Sprint("l", i+1, "/"), 500)})
	}
	for i := range 2000 {
		es = append(es, ztoc.Entry{Name: fmt.Sprint("l0/f", i)})
	}
	st, err := tree.Build(&bytes.Buffer{}, []tree.Layer{{Entries: es}}, tree.Options{})
	if err != nil || st.Skipped != 2000 {
		t.Errorf("%d skipped, %v", st.Skipped, err)
	}
}

// TestOpaqueBombTakesBoundedTime has as many opaque entries as files they have to look at.
func TestOpaqueBombTakesBoundedTime(t *testing.T) {
	var es []ztoc.Entry
	for i := range 50000 {
		es = append(es, ztoc.Entry{Name: fmt.Sprint("d/f", i)}, ztoc.Entry{Name: "d/.wh..wh..opq"}, ztoc.Entry{Name: ".wh.d"})
	}
	st, err := tree.Build(&bytes.Buffer{}, []tree.Layer{{Entries: es}}, tree.Options{})
	if err != nil || st.Inodes != 50002 {
		t.Errorf("%d inodes, %v", st.Inodes, err)
	}
}

func TestEqualInputGivesEqualBytes(t *testing.T) {
	s := torture()["300 layers"]
	ls, _ := layers(t, s)
	var a, b bytes.Buffer
	for _, w := range []*bytes.Buffer{&a, &b} {
		if _, err := tree.Build(w, ls, tree.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("two tables of one image differ")
	}
}

// TestAccessorsDoNotAllocate keeps the server's hot paths free of garbage.
func TestAccessorsDoNotAllocate(t *testing.T) {
	tab := open(t, write(t, tree.Options{}, []ztoc.Entry{
		{Name: "d/f", Size: 10, Mode: 0o600, UID: 5, PAX: []ztoc.Record{{Key: "SCHILY.xattr.user.a", Value: "1"}}},
		{Name: "d/l", Type: ztoc.TypeSymlink, Linkname: "f"},
		{Name: "d/x", ModTime: time.Unix(1, 1)},
	}))
	d, f, l := find(t, tab, "d"), find(t, tab, "d/f"), find(t, tab, "d/l")
	name, attr := []byte("x"), []byte("user.a")
	buf := make([]byte, 0, 256)
	for what, fn := range map[string]func(){
		"Attr":     func() { tab.Attr(f, asUser) },
		"Lookup":   func() { tab.Lookup(d, name) },
		"Dirent":   func() { tab.Dirent(d, 1, asUser) },
		"Extent":   func() { tab.Extent(f, 3) },
		"Readlink": func() { tab.Readlink(l) },
		"Getxattr": func() { tab.Getxattr(f, attr, asUser) },
		"names":    func() { tab.AppendXattrNames(buf, f, asUser) },
		"path":     func() { tab.AppendPath(buf, f) },
		"seek":     func() { _, _ = tab.SeekHole(f, 1) },
	} {
		if n := testing.AllocsPerRun(10, fn); n != 0 {
			t.Errorf("%s allocates %v times", what, n)
		}
	}
}
