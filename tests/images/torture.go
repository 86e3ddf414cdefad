package images

import (
	"archive/tar"
	"context"
	"fmt"
	"strings"
	"time"
)

// buildTorture makes torture, whose every layer umoci unpacks, and torture-odd, with what umoci
// refuses or treats unlike containerd.
func buildTorture(_ context.Context, b *build) error {
	var layers []Blob
	for _, entries := range tortureLayers() {
		layers = append(layers, Layer(entries...))
	}
	config := RunConfig{
		Env: []string{PathEnv, "ODD=a=b c\td", "EMPTY="}, Entrypoint: []string{"/bin/say"}, Cmd: []string{"two words", ""},
		User: "1000:1001", WorkingDir: "/made by/workdir", Labels: map[string]string{"org.muster.test": "ünïcode"},
	}
	if err := WriteImage(b.layout("torture"), Image{Layers: layers, Config: config, Comment: "torture"}); err != nil {
		return err
	}
	layers = nil
	for _, entries := range oddLayers() {
		layers = append(layers, Layer(entries...))
	}
	return WriteImage(b.layout("torture-odd"), Image{Layers: layers, Config: config, Comment: "torture-odd"})
}

// tortureSize is how many layers torture has: far above Docker's 125 and overlayfs's page of options.
const tortureSize = 300

// tortureLayers is the whole image. Each theme has a directory; themes that need several layers share
// them, and one file and one whiteout per layer fill up to tortureSize.
func tortureLayers() [][]Entry {
	layers := make([][]Entry, tortureSize)
	for _, theme := range [][][]Entry{
		whiteouts(), opaques(), replaced(), hardlinks(), throughLinks(),
		{attributes()},
		{names()},
		{devices()},
		{sparse()},
		{duplicates()},
		{escapes()},
		{headers()},
		directories(),
	} {
		for i, entries := range theme {
			layers[i] = append(layers[i], entries...)
		}
	}
	for i := range layers {
		layers[i] = append(layers[i], File(fmt.Sprintf("many/file-%03d", i), fmt.Sprintf("layer %d\n", i)))
		layers[i] = append(layers[i], File("many/counter", fmt.Sprintf("%d\n", i)))
		if i >= 10 && i%3 == 0 {
			layers[i] = append(layers[i], Whiteout(fmt.Sprintf("many/file-%03d", i-10)))
		}
	}
	layers[0] = append([]Entry{Dir("."), Dir("many"), Dir("bin"), program("bin/say")}, layers[0]...)
	return layers
}

// whiteouts: removed files, trees, links; removed and made again; a whiteout and a file of one name.
func whiteouts() [][]Entry {
	return [][]Entry{
		{
			Dir("wh"), File("wh/stays", "stays"), File("wh/goes", "goes"), File("wh/returns", "first"),
			Dir("wh/tree"), File("wh/tree/a", "a"), Dir("wh/tree/b"), File("wh/tree/b/c", "c"),
			Dir("wh/part"), File("wh/part/gone", "gone"), File("wh/part/kept", "kept"),
			Symlink("wh/link", "stays"), Symlink("wh/dirlink", "part"),
			File("wh/before", "lower"), File("wh/after", "lower"), File("wh/.wh", "a name that only begins like one"),
			Dir("wh/tree2"), File("wh/tree2/old", "old"),
			Dir("wh/gone-and-new"), File("wh/gone-and-new/old", "old"),
		},
		{
			Whiteout("wh/goes"), Whiteout("wh/returns"), Whiteout("wh/tree"), Whiteout("wh/part/gone"),
			Whiteout("wh/link"), Whiteout("wh/dirlink"), Whiteout("wh/never-was"),
			Whiteout("wh/before"), File("wh/before", "upper, after its whiteout"),
			File("wh/after", "upper, before its whiteout"), Whiteout("wh/after"),
		},
		{
			File("wh/returns", "second"), Dir("wh/tree"), File("wh/tree/new", "new"),
			Whiteout("wh/gone-and-new"), Dir("wh/gone-and-new"), File("wh/gone-and-new/new", "new"),
		},
		{Whiteout("wh/tree2")},
		{Dir("wh/tree2").With(0o700, 7, 8), File("wh/tree2/new", "new")},
	}
}

// opaques: directories whose lower content is hidden, marked before and after their own content.
func opaques() [][]Entry {
	var lower []Entry
	lower = append(lower, Dir("opq"))
	for _, d := range []string{"first", "last", "empty", "deep", "deep/er", "same-name", "unlisted"} {
		lower = append(lower, Dir("opq/"+d), File("opq/"+d+"/lower", "lower"), Dir("opq/"+d+"/sub"), File("opq/"+d+"/sub/lower", "lower"))
	}
	return [][]Entry{
		lower,
		{
			Dir("opq/first").With(0o711, 1, 2), Opaque("opq/first"), File("opq/first/upper", "upper"), Dir("opq/first/sub"), File("opq/first/sub/upper", "upper"),
			Dir("opq/last"), File("opq/last/upper", "upper"), Opaque("opq/last"),
			Dir("opq/empty"), Opaque("opq/empty"),
			Dir("opq/deep"), Dir("opq/deep/er"), Opaque("opq/deep/er"), File("opq/deep/er/upper", "upper"),
			Dir("opq/same-name"), Opaque("opq/same-name"), File("opq/same-name/lower", "upper, same name"),
			Opaque("opq/unlisted"), // its directory has no entry in this layer
			Dir("opq/new"), Opaque("opq/new"), File("opq/new/upper", "upper"),
		},
		{File("opq/first/third", "third"), Whiteout("opq/first/upper")},
		{Dir("opq/deep"), Opaque("opq/deep"), File("opq/deep/top", "top")},
	}
}

// replaced: every kind of file replaced by another, and back.
func replaced() [][]Entry {
	return [][]Entry{
		{
			Dir("re"), File("re/file-dir", "file"), File("re/file-dir-file", "file"),
			Dir("re/dir-file"), File("re/dir-file/in", "in"), Dir("re/dir-file/sub"), File("re/dir-file/sub/in", "in"),
			Dir("re/dir-file-dir"), File("re/dir-file-dir/old", "old"),
			Dir("re/dir-link"), File("re/dir-link/old", "old"), Dir("re/target"), File("re/target/in", "in"),
			Symlink("re/link-file", "target"), Symlink("re/link-link", "target"), File("re/file-link", "file"),
			File("re/file-file", "old, and longer than the new one"), fifo("re/fifo-file"), File("re/file-fifo", "file"),
			Dir("re/dir-dir").With(0o755, 1, 1), File("re/dir-dir/kept", "kept"),
		},
		{
			Dir("re/file-dir"), File("re/file-dir/in", "in"), Dir("re/file-dir-file"), File("re/file-dir-file/in", "in"),
			File("re/dir-file", "file now"), File("re/dir-file-dir", "file now"), Symlink("re/dir-link", "target"),
			File("re/link-file", "file now"), Symlink("re/link-link", "file-dir"), Symlink("re/file-link", "target"),
			File("re/file-file", "new"), File("re/fifo-file", "file now"), fifo("re/file-fifo"),
			Dir("re/dir-dir").With(0o1777, 2, 2),
		},
		{
			File("re/file-dir-file", "file again"), Dir("re/dir-file-dir"), File("re/dir-file-dir/new", "new"),
		},
	}
}

// hardlinks: within a layer, to a file of a lower one, and what becomes of them when one name goes.
func hardlinks() [][]Entry {
	return [][]Entry{
		{
			Dir("hl"), File("hl/a", "one file, three names").With(0o640, 3, 4), Hardlink("hl/b", "hl/a").With(0o640, 3, 4), Hardlink("hl/c", "hl/b").With(0o640, 3, 4),
			File("hl/lower", "linked from above"), File("hl/lower-goes", "linked from above, then gone"),
			File("hl/two-1", "two names"), Hardlink("hl/two-2", "hl/two-1"),
			File("hl/changes-1", "old"), Hardlink("hl/changes-2", "hl/changes-1"),
			Symlink("hl/symlink", "a"), Hardlink("hl/symlink-too", "hl/symlink"),
			Dir("hl/dir"), File("hl/dir/in", "in"), Hardlink("hl/dir/abs", "/hl/dir/in"), Hardlink("hl/dir/dot", "./hl/dir/in"), Hardlink("hl/dir/up", "hl/dir/../dir/in"),
			File("hl/xattr", "x").Xattr("user.k", "v"), Hardlink("hl/xattr-too", "hl/xattr").Xattr("user.k", "v"),
			File("hl/.empty", ""), Hardlink("hl/empty-too", "hl/.empty"),
			File("hl/suid", "s").With(0o4755, 0, 0), Hardlink("hl/suid-too", "hl/suid").With(0o4755, 0, 0),
		},
		{
			Hardlink("hl/upper", "hl/lower"), Hardlink("hl/upper-stays", "hl/lower-goes"),
			File("hl/changes-1", "new, so the other name keeps the old content"),
			Hardlink("hl/dir/upper", "hl/dir/in"), Hardlink("hl/c-again", "hl/c").With(0o640, 3, 4),
		},
		{Whiteout("hl/lower-goes"), Whiteout("hl/two-1"), Whiteout("hl/b")},
		{Hardlink("hl/third", "hl/upper-stays"), Hardlink("hl/a-again", "hl/a").With(0o640, 3, 4)},
		{File("hl/lower", "no link any more"), Opaque("hl/dir"), File("hl/dir/new", "new")},
		{Hardlink("hl/fresh", "hl/lower"), Hardlink("hl/lower2", "hl/upper")},
	}
}

// throughLinks: names that lead through a symbolic link of a lower layer, as they do where /bin has
// become one into /usr.
func throughLinks() [][]Entry {
	return [][]Entry{
		{
			Dir("via"), Dir("via/real"), File("via/real/old", "old"), File("via/real/goes", "goes"), Dir("via/real/sub"),
			Symlink("via/rel", "real"), Symlink("via/abs", "/via/real"), Symlink("via/twice", "rel"), Symlink("via/above", "../../../../via/real"),
		},
		{
			File("via/rel/by-rel", "by rel"), File("via/abs/by-abs", "by abs"), File("via/twice/by-twice", "by twice"), File("via/above/by-above", "by above"),
			Dir("via/rel/newdir"), File("via/rel/newdir/in", "in"), Hardlink("via/linked", "via/rel/old"), Whiteout("via/rel/goes"),
			File("via/rel/sub/in", "in"),
		},
	}
}

// attributes: modes, owners, times, extended attributes.
func attributes() []Entry {
	at := func(e Entry, t time.Time) Entry {
		e.ModTime = t
		e.Format = tar.FormatPAX
		return e
	}
	entries := []Entry{
		Dir("at"), File("at/suid", "s").With(0o4755, 0, 0), File("at/sgid", "s").With(0o2755, 0, 10), File("at/both", "s").With(0o6711, 1, 1),
		Dir("at/sticky").With(0o1777, 0, 0), Dir("at/sgid-dir").With(0o2775, 0, 20), File("at/none", "no bits").With(0, 0, 0), Dir("at/closed").With(0, 0, 0),
		File("at/uid", "u").With(0o600, 3_000_000, 4_000_000), File("at/nobody", "n").With(0o644, 65534, 65534),
		File("at/empty", ""), Dir("at/empty-dir"),
		at(File("at/nano", "t"), time.Unix(1_600_000_000, 123_456_789)), at(File("at/old", "t"), time.Unix(-86_400*365, 0)),
		at(File("at/future", "t"), time.Unix(1<<33, 5)), at(File("at/zero", "t"), time.Unix(0, 0)), at(Dir("at/dir-time"), time.Unix(1_234_567_890, 987_654_321)),
		at(Symlink("at/link-time", "nano"), time.Unix(1_111_111_111, 111_111_111)),
		File("at/cap", "c").With(0o755, 0, 0).Xattr("security.capability", CapSetuid),
		File("at/user", "x").Xattr("user.one", "1").Xattr("user.two", "2"),
		File("at/bytes", "x").Xattr("user.bytes", "\x00=\n\xff"), File("at/long", "x").Xattr("user.long", strings.Repeat("0123456789abcdef", 64)),
		File("at/equals", "x").Xattr("user.dots.and-dashes_ü", "v"),
		Dir("at/dir-x").Xattr("user.dir", "yes"), Dir("at/dir-time/in"),
	}
	many := File("at/many", "x")
	for i := range 40 {
		many = many.Xattr(fmt.Sprintf("user.n%02d", i), fmt.Sprint(i))
	}
	return append(entries, many)
}

// CapSetuid is the value of security.capability that gives a program cap_setuid, effective and
// permitted: version 2 of the kernel's struct vfs_cap_data.
const CapSetuid = "\x01\x00\x00\x02" + "\x80\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"

// names: long, odd and not text at all, in each dialect's way to write them.
func names() []Entry {
	long := strings.Repeat("n", 255)
	utf := strings.Repeat("é", 127) + "n" // 255 bytes
	deep := strings.Repeat("deep-directory/", 12)
	raw := func(name string) rawHeader {
		return rawHeader{name: name, typ: '0', mode: 0o644, mtime: Epoch.Unix()}
	}
	entries := []Entry{
		Dir("nm"), File("nm/"+long, "255 bytes"), File("nm/"+utf, "255 bytes of UTF-8"), Dir("nm/d"), File("nm/d/"+long, "again"),
		Symlink("nm/long-target", strings.Repeat("t", 255)), Symlink("nm/longer-target", strings.Repeat("../nm/", 600)+"d"),
		Hardlink("nm/long-hard", "nm/"+long),
	}
	for i, parts := 0, strings.Split(strings.TrimSuffix(deep, "/"), "/"); i < len(parts); i++ {
		entries = append(entries, Dir("nm/"+strings.Join(parts[:i+1], "/")))
	}
	prefix := "nm/deep-directory/deep-directory/deep-directory/deep-directory/deep-directory"
	return append(
		entries,
		File("nm/"+deep+"file", "path over 100 bytes, as PAX or with ustar's prefix"),
		rawEntry(rawHeader{name: "by-prefix", prefix: prefix, typ: '0', mode: 0o644, mtime: Epoch.Unix()}, "ustar's prefix"),
		gnuLong(raw("nm/"+deep+"by-gnu-"+strings.Repeat("g", 200)), "GNU's long name"),
		gnuLong(rawHeader{name: "nm/gnu-link", link: strings.Repeat("l", 300), typ: '2', mode: 0o777, mtime: Epoch.Unix()}, ""),
		paxEntry([][2]string{{"path", "nm/" + deep + "by-pax-" + strings.Repeat("p", 200)}, {"comment", "ignored"}}, raw("ignored"), "PAX path"),
		rawEntry(raw("nm/"+strings.Repeat("x", 97)), "exactly 100 bytes, no NUL"),
		rawEntry(raw("nm/latin-\xe9\xff"), "not UTF-8"),
		paxEntry([][2]string{{"hdrcharset", "BINARY"}, {"path", "nm/pax-latin-\xe9\xff"}}, raw("ignored"), "not UTF-8 in PAX"),
		rawEntry(rawHeader{name: "nm/link-\xfe", link: "latin-\xe9\xff", typ: '2', mode: 0o777, mtime: Epoch.Unix()}, ""),
		File("nm/new\nline", "n"), File("nm/ leading and trailing ", "s"), File("nm/back\\slash", "b"), File("nm/-rf", "d"),
		File("nm/...", "dots"), File("nm/*?[a]{b}$(c)`d`", "shell"), File("nm/\x01\x1b[31m", "control"), File("nm/ünïcödé-日本語-🐹", "u"), File("nm/e\u0301", "decomposed"),
		File("nm/é", "composed"), File("nm/UPPER", "U"), File("nm/upper", "u"), File("nm/.hidden", "h"), File("nm/tab\there", "t"), File("nm/colon:comma,", "c"),
	)
}

// devices: what an unprivileged unpack cannot make.
func devices() []Entry {
	dev := func(name string, typ byte, major, minor int64) Entry {
		return Entry{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o660, Gid: 6, ModTime: Epoch, Devmajor: major, Devminor: minor}}
	}
	return []Entry{
		Dir("dv"), dev("dv/null", tar.TypeChar, 1, 3), dev("dv/loop", tar.TypeBlock, 7, 0), dev("dv/large", tar.TypeBlock, 259, 70000),
		fifo("dv/fifo"), fifo("dv/fifo-2").With(0o600, 5, 5), dev("dv/agpgart", tar.TypeChar, 10, 175),
	}
}

func fifo(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o644, ModTime: Epoch}}
}

// The runs of sparse files. As GNU tar writes and wants them: all but the last a multiple of 512 bytes
// long, and one of no length where a file ends in a hole.
var (
	sparseFew  = []sparseRun{{0, 512}, {1 << 20, 1024}, {3 << 20, 0}}
	sparseMany = func() (runs []sparseRun) { // beyond the 4 in a header and the 21 of one more block
		for i := range int64(60) {
			runs = append(runs, sparseRun{i * 65536, 512})
		}
		return append(runs, sparseRun{60 * 65536, 0})
	}()
	sparseUnaligned = []sparseRun{{7, 512}, {5000, 1024}, {9999, 1}}
)

func sparseData(n int) string { return strings.Repeat("sparse-data.....", n/16+1)[:n] }

// sparse: holes as PAX writes them, in its three versions.
func sparse() []Entry {
	return []Entry{
		Dir("sp"),
		sparsePAX00("sp/pax00", 3<<20, sparseFew, sparseData(1536)), sparsePAX00("sp/pax00-many", 60*65536, sparseMany, sparseData(60*512)),
		sparsePAX01("sp/pax01", 3<<20, sparseFew, sparseData(1536)), sparsePAX01("sp/pax01-unaligned", 10000, sparseUnaligned, sparseData(1537)),
		sparsePAX10("sp/pax10", 3<<20, sparseFew, sparseData(1536)), sparsePAX10("sp/pax10-many", 60*65536, sparseMany, sparseData(60*512)),
		sparsePAX10("sp/pax10-unaligned", 10000, sparseUnaligned, sparseData(1537)),
		sparsePAX10("sp/zeros-3GiB", 3<<30, []sparseRun{{3 << 30, 0}}, ""),
		Hardlink("sp/linked", "sp/pax10"), File("sp/after", "the archive goes on"),
	}
}

// duplicates: one name twice in one layer; the later one counts.
func duplicates() []Entry {
	return []Entry{
		Dir("du"), File("du/file", "first, and longer than the second"), File("du/file", "second"),
		Dir("du/dir").With(0o700, 1, 1), File("du/dir/in", "in"), Dir("du/dir").With(0o755, 2, 2),
		File("du/becomes-link", "file"), Symlink("du/becomes-link", "file"),
		Symlink("du/becomes-file", "file"), File("du/becomes-file", "file"),
		File("du/hard", "first"), Hardlink("du/hard-too", "du/hard"), File("du/hard", "second, so the link keeps the first"),
		File("du/same", "same"), File("du/same", "same"), File("./du/spelled", "one way"), File("du//spelled", "another way"),
	}
}

// escapes: names that would leave the root were they taken literally.
func escapes() []Entry {
	return []Entry{
		Dir("es"), Dir("etc"), File("/es/absolute", "absolute"), File("../es/up", "up"), File("es/../../../es/up-inside", "up inside"), File("./es/dot", "dot"),
		File("es//double", "double"), Symlink("es/out", "../../../../../../etc"), File("es/out/muster-torture", "through a link that leads out"),
		Symlink("es/abs-out", "/etc"), File("es/abs-out/muster-torture-too", "through an absolute link"),
		Symlink("es/loop", "loop"), Symlink("es/dangling", "/nowhere/at/all"), Hardlink("es/hard-up", "../../es/dot"),
	}
}

// headers: other ways to write an entry.
func headers() []Entry {
	raw := rawHeader{typ: '0', mode: 0o644, mtime: Epoch.Unix()}
	v7, old, gnu, big, slash := raw, raw, raw, raw, raw
	v7.name, v7.format, v7.typ = "hd/v7", formatV7, 0
	old.name, old.typ = "hd/type-nul", 0
	gnu.name, gnu.format = "hd/gnu", formatGNU
	big.name, big.format, big.uid, big.mtime = "hd/base256", formatGNU, 1<<24, -5
	slash.name, slash.format, slash.typ, slash.mode = "hd/v7-directory/", formatV7, 0, 0o755
	return []Entry{
		Dir("hd"), rawEntry(v7, "v7"), rawEntry(old, "type NUL"), rawEntry(gnu, "gnu"), rawEntry(big, "base 256"), rawEntry(slash, ""),
		paxEntry([][2]string{{"uid", "5000000"}, {"gid", "6000000"}, {"uname", "no such user"}, {"mtime", "1500000000.5"}, {"atime", "1"}, {"ctime", "2"}},
			rawHeader{name: "hd/pax", typ: '0', mode: 0o604}, "pax"),
		paxEntry([][2]string{{"size", "8"}}, rawHeader{name: "hd/pax-size", typ: '0', mode: 0o644, mtime: Epoch.Unix()}, "by pax\n\n"),
		File("hd/type-in-mode", "a mode with file type bits").With(0o100644, 0, 0),
	}
}

// directories: what happens to a directory whose content changes in a layer that does not list it.
func directories() [][]Entry {
	return [][]Entry{
		{Dir("di").With(0o751, 9, 9), Dir("di/untouched"), Dir("di/meta").With(0o700, 1, 1), File("di/meta/in", "in")},
		{File("di/added", "added"), Dir("di/meta").With(0o555, 2, 2).Xattr("user.later", "yes")},
		{File("di/untouched/added", "added")},
	}
}
