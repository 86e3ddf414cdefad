package tree_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/ztoc"
)

// load reads the layers of a test image, with entries as ztoc finds them, and what they inflate to.
func load(t testing.TB, name string) (dir string, ls []tree.Layer, archives [][]byte) {
	t.Helper()
	dir, err := images.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(d ztoc.Digest) []byte {
		b, err := os.ReadFile(filepath.Join(dir, "blobs/sha256", d.Hex()))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	parse := func(b []byte, v any) {
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	type descriptor struct{ Digest ztoc.Digest }
	var index struct{ Manifests []descriptor }
	var manifest struct{ Layers []descriptor }
	b, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	parse(b, &index)
	parse(blob(index.Manifests[0].Digest), &manifest)
	for _, d := range manifest.Layers {
		b := blob(d.Digest)
		z, _, err := ztoc.Build(bytes.NewReader(b), ztoc.BuildOptions{})
		if err != nil {
			t.Fatal(err)
		}
		es, err := z.Entries()
		if err != nil {
			t.Fatal(err)
		}
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		archive, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, archive)
		ls = append(ls, tree.Layer{LayerRef: tree.LayerRef{Size: z.InflatedSize}, Entries: es})
	}
	return dir, ls, archives
}

// TestOddImage is the image of what umoci refuses, or treats as nobody else does: everything that can be in a
// file system is, and the rest is noted with its reason.
func TestOddImage(t *testing.T) {
	_, ls, archives := load(t, "torture-odd")
	tab, st := build(t, ls)
	var notes []string
	for _, n := range st.Notes {
		notes = append(notes, fmt.Sprintf("%.20s: %s", n.Name, n.Reason))
	}
	want := []string{
		"hl/to-gone: hard link to a file that does not exist",
		"hl/to-goes-now: hard link to a file that does not exist",
		"hl/forward: hard link to a file that does not exist",
		"hl/to-dir: hard link to a directory",
		"hl/to-self: hard link to a file that does not exist",
		"hl/loop-a: hard link to a file that does not exist",
		"hl/loop-b: hard link to a file that does not exist",
		"hl/outside: hard link to a file that does not exist",
		"wh/.wh.: whiteout of no name",
		"wh/.wh..: whiteout of no name",
		"wh/.wh...: whiteout of no name",
		"ty/file/child: its directory is not a directory",
		".: the root must be a directory",
		"/: the root must be a directory",
		": the root must be a directory",
		"ty/nnnnnnnnnnnnnnnnn: name is longer than 255 bytes",
		"deep/deep/deep/deep/: path is longer than 4095 bytes",
		"ty/target: symbolic link's target is longer than 4095 bytes",
		"ty/empty-target: symbolic link without a target",
		`ty/link: xattr "user.on-a-link" is not possible on this type of file`,
	}
	if strings.Join(notes, "\n") != strings.Join(want, "\n") {
		t.Errorf("notes:\n%s\nwant:\n%s", strings.Join(notes, "\n"), strings.Join(want, "\n"))
	}
	list := listing(t, tab, archives, asImage)
	sums := map[string]string{}
	for _, e := range list {
		sums[e.Path] = e.Sum
	}
	for _, kept := range []string{
		"/hl/kept", "/hl/later", "/wh/kept", "/wh/null", "/wh/overlay/kept", "/wh/overlay/new", "/ty/file", "/ty/link",
		"/sp/kept", "/hd/kept", "/hd/contiguous", "/hd/global", "/implicit/a/b/kept", "/implicit/a/c/kept", "/kept/last",
	} {
		if _, ok := sums[kept]; !ok {
			t.Errorf("%s is missing", kept)
		}
	}
	for _, sparse := range []string{"few", "many", "unaligned", "hole"} {
		if s := sums["/sp/"+sparse]; s == "" || s != sums["/sp/"+sparse+"-twin"] {
			t.Errorf("sparse file %s has content %q, its twin %q", sparse, s, sums["/sp/"+sparse+"-twin"])
		}
	}
}
