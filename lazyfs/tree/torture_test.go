package tree_test

import (
	"archive/tar"
	"fmt"
	"strings"
	"testing"
	"time"
)

func file(name, body string) member {
	return member{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body: body}
}

func dir(name string, mode int64) member {
	return member{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}

func symlink(name, target string) member {
	return member{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) member {
	return member{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

func (m member) with(f func(h *tar.Header)) member {
	f(&m.Header)
	return m
}

func node(typ byte, name string, major, minor int64) member {
	return member{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o660, Devmajor: major, Devminor: minor}}
}

func xattrs(m member, kv ...string) member {
	m.PAXRecords = map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m.PAXRecords["SCHILY.xattr."+kv[i]] = kv[i+1]
	}
	return m
}

// capability is a valid security.capability: version 2, cap_setuid, effective.
const capability = "\x01\x00\x00\x02\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// torture are images of which each has one thing that has broken an unpacker or a lazy file system.
func torture() map[string]stack {
	long, longer := strings.Repeat("n", 255), strings.Repeat("p", 251)
	owned := func(uid, gid int) func(h *tar.Header) {
		return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
	}
	at := func(sec, nsec int64) func(h *tar.Header) {
		return func(h *tar.Header) { h.ModTime = time.Unix(sec, nsec) }
	}
	many := stack{}
	for i := range 300 {
		l := []member{file(fmt.Sprintf("d/f%d", i), fmt.Sprint(i)), file("same", fmt.Sprint(i))}
		if i%3 == 2 {
			l = append(l, file(fmt.Sprintf("d/.wh.f%d", i-1), ""))
		}
		many = append(many, l)
	}
	return map[string]stack{
		"nothing":        {},
		"empty layers":   {{}, {}},
		"whiteout":       {{file("a", "1"), file("b", "2"), dir("d", 0o755), file("d/x", "3")}, {file(".wh.a", ""), file(".wh.d", "")}},
		"whiteout later": {{file("a", "1")}, {file("a", "2"), file(".wh.a", "")}},
		"opaque": {
			{dir("d", 0o755), file("d/low", "1"), dir("d/sub", 0o700), file("d/sub/low", "1")},
			{dir("d", 0o750), file("d/before", "2"), file("d/.wh..wh..opq", ""), file("d/after", "2"), file("d/sub/new", "3")},
		},
		"opaque between": {
			{file("d/low", "1"), file("d/e/low", "1")},
			{file("d/e/mine", "2"), file("d/.wh..wh..opq", "")},
			{file("d/top", "3")},
		},
		"opaque root":          {{file("a", "1"), file("d/x", "1")}, {file("b", "2"), file(".wh..wh..opq", "")}},
		"whiteout of new dir":  {{file("d/low", "1")}, {file("d/new", "2"), file(".wh.d", "")}},
		"whiteout of nothing":  {{file(".wh.a", ""), file("x/.wh.b", ""), file("y/.wh..wh..opq", "")}},
		"whiteout of aufs":     {{file(".wh..wh.plnk", ""), dir(".wh..wh.aufs", 0o700)}},
		"whiteout by link":     {{file("d/x", "1"), file("d/y", "1"), symlink("l", "d")}, {file("l/.wh.x", "")}, {file("l/.wh..wh..opq", "")}},
		"file to dir to file":  {{file("a", "1")}, {dir("a", 0o711), file("a/b", "2")}, {file("a", "3")}},
		"dir to symlink":       {{file("d/x", "1"), file("e/y", "1")}, {symlink("d", "e"), file("d/z", "2")}},
		"symlink to dir":       {{file("e/y", "1"), symlink("d", "e")}, {dir("d", 0o755), file("d/z", "2")}},
		"duplicates":           {{file("a", "one"), file("a", "two"), dir("d", 0o700), dir("d", 0o755), file("a", "three")}},
		"hard links":           {{file("a", "1"), hardlink("b", "a"), hardlink("d/c", "/b"), hardlink("e", "../../d/c")}},
		"link to lower":        {{file("a", "1")}, {hardlink("b", "a")}, {file(".wh.a", "")}, {hardlink("c", "b")}},
		"link, then whiteout":  {{file("a", "1")}, {hardlink("b", "a"), file(".wh.a", "")}},
		"link, then new":       {{file("a", "1"), hardlink("b", "a")}, {file("a", "2")}},
		"link over its twin":   {{file("a", "1"), hardlink("b", "a"), hardlink("b", "a")}},
		"link to symlink":      {{file("t", "1"), symlink("l", "t"), hardlink("h", "l")}},
		"link to special":      {{node(tar.TypeFifo, "p", 0, 0), hardlink("q", "p"), node(tar.TypeChar, "c", 1, 3), hardlink("d", "c")}},
		"link by symlink":      {{file("d/x", "1"), symlink("l", "/d"), hardlink("h", "l/x"), hardlink("l/i", "l/x")}},
		"clean names":          {{file("/abs", "1"), file("../../up", "2"), file("./dot", "3"), file("a/../b/./c//d", "4"), dir("./", 0o700)}},
		"parents missing":      {{file("a/b/c/d", "1")}, {file("a/x/y", "2")}},
		"parents late":         {{file("a/b/c", "1"), dir("a/b", 0o700), dir("a", 0o711).with(owned(3, 4))}},
		"parents setgid":       {{dir("g", 0o2775).with(owned(0, 50)), file("g/h/i/j", "1"), dir("g/k", 0o755), file("g/f", "1")}},
		"parents dangling":     {{symlink("l", "no/where"), file("l/x", "1"), file("l/y/z", "2")}},
		"parents up":           {{symlink("d/l", "../../../e"), file("d/l/x", "1"), symlink("m", "nowhere/.."), file("m/y", "2")}},
		"parents chain":        {{symlink("a", "b"), symlink("b", "/c/d"), symlink("c", "r"), file("a/x", "1")}},
		"long names":           {{file(long, "1"), file(strings.Repeat("deep/", 30)+long, "2"), file(longer, "3"), dir(long+"d"[1:], 0o755).with(func(h *tar.Header) { h.Name = long[:254] + "d" })}},
		"long whiteout":        {{file(long, "1")}, {file(".wh."+long, "")}},
		"raw names":            {{file("\xff\xfe", "1"), file("a\nb\\c d\te", "2"), dir("\x80", 0o755), file("\x80/\xc3\x28", "3"), symlink("s", "\xff")}},
		"odd whiteouts":        {{file("wh", "1"), file(".wh", "2"), file("a.wh.b", "3")}, {file(".wh.wh", ""), file("d/.wh.x", "")}},
		"modes":                {{file("suid", "1").with(func(h *tar.Header) { h.Mode = 0o4755 }), file("sgid", "1").with(func(h *tar.Header) { h.Mode = 0o2711; h.Gid = 42 }), dir("tmp", 0o1777), file("zero", "").with(func(h *tar.Header) { h.Mode = 0 }), file("type bits", "").with(func(h *tar.Header) { h.Mode = 0o100640 })}},
		"owners":               {{file("a", "").with(owned(1<<31, 1<<32-2)), symlink("l", "a").with(owned(7, 8)), dir("d", 0o755).with(owned(65534, 0)), node(tar.TypeFifo, "p", 0, 0).with(owned(9, 0))}},
		"devices":              {{node(tar.TypeChar, "null", 1, 3), node(tar.TypeBlock, "loop", 7, 300), node(tar.TypeChar, "big", 4095, 1<<20-1), node(tar.TypeChar, "overlay", 0, 0), node(tar.TypeFifo, "p", 0, 0)}},
		"times":                {{file("old", "").with(at(-1, 0)), file("nano", "").with(at(1, 999_999_999)), file("far", "").with(at(1<<33, 5)), file("zero", "").with(at(0, 0)), symlink("l", "x").with(at(77, 88)), dir("d", 0o755).with(at(5, 6)), file("d/x", "")}},
		"root":                 {{dir("./", 0o1750).with(owned(5, 6)).with(at(123, 456))}, {file("x", "1")}},
		"xattrs":               {{xattrs(file("f", "1"), "user.a", "1", "user.big", strings.Repeat("v", 3000), "security.capability", capability, "trusted.t", "x"), xattrs(dir("d", 0o755), "user.d", "\x00\xff"), file("d/x", "")}},
		"xattrs go":            {{xattrs(dir("d", 0o755), "user.d", "1"), xattrs(file("f", "1"), "user.f", "1")}, {dir("d", 0o755), file("f", "2")}},
		"xattrs of others":     {{xattrs(file("f", "1"), "security.selinux", "system_u:object_r:usr_t:s0", "system.nfs4_acl", "x", "trusted.overlay.opaque", "y")}},
		"xattrs on link":       {{xattrs(file("f", "1"), "user.a", "1"), hardlink("g", "f")}, {file(".wh.f", "")}},
		"300 layers":           many,
		"deep":                 {{file(strings.Repeat("d/", 900)+"f", "1")}},
		"symlink target":       {{symlink("l", strings.Repeat("t/", 2047)+"t")}},
		"loops are no trouble": {{symlink("a", "b"), symlink("b", "a"), symlink("self", "self")}},
	}
}

func TestTortureIsAsUmociUnpacksIt(t *testing.T) {
	for name, s := range torture() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ls, _ := layers(t, s)
			if _, st := build(t, ls); st.Skipped > 0 {
				t.Fatalf("entries skipped: %v", st.Notes)
			}
			sameAsUmoci(t, s, asImage)
			sameAsUmoci(t, s, asUser)
		})
	}
}

// TestRefusedEntries are entries that cannot be in a tree, each with the reason that is given. umoci gives up
// at them.
func TestRefusedEntries(t *testing.T) {
	for _, c := range []struct {
		why string
		s   stack
	}{
		{"the root must be a directory", stack{{symlink(".", "x")}}},
		{"name is longer than 255 bytes", stack{{file(strings.Repeat("n", 256), "1")}}},
		{"a directory in its path has a name longer", stack{{file(strings.Repeat("n", 256)+"/f", "1")}}},
		{"its directory is not a directory", stack{{file("f", "1"), file("f/x", "2")}}},
		{"its directory is not a directory", stack{{file("f", "1"), file("f/x/y", "2")}}},
		{"too many symbolic links", stack{{symlink("a", "b"), symlink("b", "a"), file("a/x", "1")}}},
		{"hard link to a file that does not exist", stack{{hardlink("a", "b")}}},
		{"hard link to a file that does not exist", stack{{file("b", "")}, {file(".wh.b", ""), hardlink("a", "b")}}},
		{"hard link to a directory", stack{{dir("d", 0o755), hardlink("a", "d")}}},
		{"hard link to a directory", stack{{hardlink("a", "/")}}},
		{"hard link to itself", stack{{file("a", "1"), hardlink("a", "a")}}},
		{"hard link to itself", stack{{file("a/b", "1"), hardlink("a", "a/b")}}},
		{"symbolic link without a target", stack{{symlink("a", "")}}},
		{"symbolic link's target is longer", stack{{symlink("a", strings.Repeat("t", 4096))}}},
		{"whiteout of no name", stack{{file(".wh.", "")}}},
		{"whiteout of no name", stack{{file("d/x", "")}, {file("d/.wh..", "")}}},
		{"whiteout of no name", stack{{file("d/x", "")}, {file("d/.wh...", "")}}},
	} {
		t.Run(c.why, func(t *testing.T) {
			ls, _ := layers(t, c.s)
			_, st := build(t, ls)
			if st.Skipped != 1 || len(st.Notes) != 1 || !strings.Contains(st.Notes[0].Reason, c.why) {
				t.Fatalf("skipped %d, notes %v", st.Skipped, st.Notes)
			}
			umociRefuses(t, c.s)
		})
	}
}
