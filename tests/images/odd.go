package images

import (
	"archive/tar"
	"strings"
)

// oddLayers is torture-odd, bottom first: what umoci 0.4.7 refuses, or unpacks with times of its own or
// in a way that containerd and Docker do not. The comments say what umoci does and what a reader of
// such an image can expect instead; the files named kept must be there whatever else is.
func oddLayers() [][]Entry {
	regular := rawHeader{typ: '0', mode: 0o644, mtime: Epoch.Unix()}
	contiguous := regular
	contiguous.name, contiguous.typ = "hd/contiguous", '7'
	unknown := regular
	unknown.name, unknown.typ = "hd/unknown-type", 'Z'
	otherMeta := rawHeader{name: "hl/other-meta", link: "hl/kept", typ: '1', mode: 0o600, uid: 7, mtime: 5}
	global := append(paxHeader('g', [][2]string{{"comment", "as git archive writes it"}}), rawEntry(rawHeader{name: "hd/global", typ: '0', mode: 0o644, mtime: Epoch.Unix()}, "after a global header").Raw...)
	char := func(name string, major, minor int64) Entry {
		return Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Mode: 0o644, ModTime: Epoch, Devmajor: major, Devminor: minor}}
	}
	return [][]Entry{
		{
			Dir("."), Dir("bin"), program("bin/say"), Dir("hl"), File("hl/goes", "goes"), File("hl/goes-now", "goes now"), File("hl/kept", "kept"),
			Dir("wh"), File("wh/kept", "kept"), File("wh/null", "kept, unless a reader takes 0:0 for a whiteout"), Dir("wh/overlay"), File("wh/overlay/kept", "kept"),
			Dir("ty"), File("ty/file", "a file, then the parent of another"),
		},
		// umoci: unknown typeflag 'S'. GNU tar and Go read it; each equals its twin, which is PAX 1.0.
		{
			Dir("sp"),
			sparseOldGNU("sp/few", 3<<20, sparseFew, sparseData(1536)), sparsePAX10("sp/few-twin", 3<<20, sparseFew, sparseData(1536)),
			sparseOldGNU("sp/many", 60*65536, sparseMany, sparseData(60*512)), sparsePAX10("sp/many-twin", 60*65536, sparseMany, sparseData(60*512)),
			sparseOldGNU("sp/unaligned", 10000, sparseUnaligned, sparseData(1537)), sparsePAX10("sp/unaligned-twin", 10000, sparseUnaligned, sparseData(1537)),
			sparseOldGNU("sp/hole", 1<<20, []sparseRun{{1 << 20, 0}}, ""), sparsePAX10("sp/hole-twin", 1<<20, []sparseRun{{1 << 20, 0}}, ""),
			File("sp/kept", "the archive goes on"),
		},
		// umoci: unknown typeflag. A contiguous file is a regular one; a global header belongs to no file; an
		// unknown type is to be read as a regular file, says POSIX, or skipped.
		{Dir("hd"), rawEntry(contiguous, "type 7"), {Raw: global}, rawEntry(unknown, "what is this?"), File("hd/kept", "kept")},
		// umoci: link: no such file or directory. There is nothing to link to: no file.
		{Whiteout("hl/goes")},
		{Hardlink("hl/to-gone", "hl/goes")},
		{Whiteout("hl/goes-now"), Hardlink("hl/to-goes-now", "hl/goes-now")},
		{Hardlink("hl/forward", "hl/later"), File("hl/later", "after the link to it")},
		{Hardlink("hl/to-dir", "wh"), Hardlink("hl/to-self", "hl/to-self"), Hardlink("hl/loop-a", "hl/loop-b"), Hardlink("hl/loop-b", "hl/loop-a"), Hardlink("hl/outside", "/proc/self/status")},
		// umoci keeps the target's owner and mode, as GNU tar does; Docker sets the link's on both.
		{rawEntry(otherMeta, "")},
		// umoci removes all of wh and then fails. Such a whiteout names nothing.
		{File("wh/.wh.", ""), File("wh/.wh..", ""), File("wh/.wh...", "")},
		// umoci makes files of AUFS's own records below the first, which others skip.
		{Dir(".wh..wh.plnk"), File(".wh..wh.plnk/1.2", "aufs"), File(".wh..wh.aufs", ""), Dir(".wh..wh.orph")},
		// What overlayfs takes for a whiteout and for an opaque directory, in an image that means them
		// literally: umoci makes them so.
		{char("wh/null", 0, 0), Dir("wh/overlay").Xattr("trusted.overlay.opaque", "y"), File("wh/overlay/new", "new")},
		// umoci: not a directory. containerd too.
		{File("ty/file/child", "below a file")},
		// umoci: refusing to change type of root directory; file name too long; no such file or directory.
		{File(".", "the root as a file"), Symlink("/", "/tmp"), rawEntry(regular, "no name at all")},
		{File("ty/"+strings.Repeat("n", 256), "256 bytes"), File(strings.Repeat("deep/", 1000)+"file", "5004 bytes"), Symlink("ty/target", strings.Repeat("t", 4096)), Symlink("ty/empty-target", "")},
		// umoci: operation not permitted, as the kernel says.
		{Symlink("ty/link", "file").Xattr("user.on-a-link", "1")},
		// umoci makes missing parents with the time of the unpack and mode 0755.
		{File("implicit/a/b/kept", "its directories have no entries")},
		{File("implicit/a/c/kept", "nor have these")},
		{Dir("implicit/a").With(0o700, 1, 1)},
		{Dir("kept"), File("kept/last", "the last layer")},
	}
}
