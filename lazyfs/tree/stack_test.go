package tree_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/tests/e2e/compare"
	"github.com/muster-hpc/muster/ztoc"
	"golang.org/x/sys/unix"
)

// A member is one entry of a layer, as a tar archive writes it.
type member struct {
	tar.Header
	body string
}

// A stack is an image as the members of its layers, bottom to top.
type stack [][]member

var epoch = time.Unix(1_000_000_000, 0)

func (s stack) String() string {
	var b strings.Builder
	for i, l := range s {
		fmt.Fprintf(&b, "layer %d\n", i)
		for _, m := range l {
			fmt.Fprintf(&b, "  %c %q mode %#o %d:%d", m.Typeflag, m.Name, m.Mode, m.Uid, m.Gid)
			if m.Linkname != "" {
				fmt.Fprintf(&b, " -> %q", m.Linkname)
			}
			if m.body != "" {
				fmt.Fprintf(&b, " %d bytes", len(m.body))
			}
			if m.PAXRecords != nil {
				fmt.Fprintf(&b, " %q", m.PAXRecords)
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// archive writes one layer.
func archive(t testing.TB, l []member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i, m := range l {
		h := m.Header
		h.Format = tar.FormatPAX
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(m.body))
		}
		if h.ModTime.IsZero() {
			h.ModTime = epoch.Add(time.Duration(i) * time.Second)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%q: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(m.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// entries reads an archive back as a ztoc would have it.
func entries(t testing.TB, b []byte) []ztoc.Entry {
	t.Helper()
	var out []ztoc.Entry
	src := bytes.NewReader(b)
	r := tar.NewReader(src)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		e := ztoc.Entry{
			Name: h.Name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode, UID: h.Uid, GID: h.Gid,
			ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor,
			Offset: int64(len(b) - src.Len()),
		}
		e.Type = map[byte]ztoc.EntryType{
			tar.TypeReg: ztoc.TypeReg, tar.TypeDir: ztoc.TypeDir, tar.TypeSymlink: ztoc.TypeSymlink,
			tar.TypeLink: ztoc.TypeHardlink, tar.TypeChar: ztoc.TypeChar, tar.TypeBlock: ztoc.TypeBlock,
			tar.TypeFifo: ztoc.TypeFifo,
		}[h.Typeflag]
		for k, v := range h.PAXRecords {
			e.PAX = append(e.PAX, ztoc.Record{Key: k, Value: v})
		}
		slices.SortFunc(e.PAX, func(a, b ztoc.Record) int { return cmp.Compare(a.Key, b.Key) })
		out = append(out, e)
	}
}

// layers are the layers of s and their archives.
func layers(t testing.TB, s stack) ([]tree.Layer, [][]byte) {
	t.Helper()
	var ls []tree.Layer
	var archives [][]byte
	for i, l := range s {
		b := archive(t, l)
		archives = append(archives, b)
		ls = append(ls, tree.Layer{
			LayerRef: tree.LayerRef{
				Blob: ztoc.BlobRef{Digest: ztoc.DigestOf(b), Size: int64(len(b))},
				Ztoc: fmt.Sprint("ztoc ", i), Size: int64(len(b)),
			},
			Entries: entries(t, b),
		})
	}
	return ls, archives
}

// build makes and opens the table of s.
func build(t testing.TB, ls []tree.Layer) (*tree.Table, tree.Stats) {
	t.Helper()
	var w bytes.Buffer
	st, err := tree.Build(&w, ls, tree.Options{MaxNotes: 10000})
	if err != nil {
		t.Fatal(err)
	}
	tab, err := tree.Open(w.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return tab, st
}

// listing is what compare.Walk would list of a mount of tab.
func listing(t testing.TB, tab *tree.Table, archives [][]byte, p tree.Presentation) compare.Listing {
	t.Helper()
	var out compare.Listing
	rows := map[string]tree.Row{}
	var walk func(path string, r tree.Row)
	walk = func(path string, r tree.Row) {
		a := tab.Attr(r, p)
		e := compare.Entry{
			Path: cmp.Or(path, "/"), Mode: a.Mode, Nlink: uint64(a.Nlink), UID: a.UID, GID: a.GID,
			Sec: a.Mtime, Nsec: int64(a.Nsec), Target: string(tab.Readlink(r)),
		}
		rows[e.Path] = r
		switch a.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			e.Size = a.Size
			e.Sum = sum(t, tab, archives, r)
		case unix.S_IFLNK:
			e.Size = a.Size
		case unix.S_IFCHR, unix.S_IFBLK:
			e.Rdev = uint64(a.Rdev)
		}
		for _, n := range strings.Split(string(tab.AppendXattrNames(nil, r, p)), "\x00") {
			if n == "" {
				continue
			}
			v, ok := tab.Getxattr(r, []byte(n), p)
			if !ok {
				t.Fatalf("%q lists xattr %q and has none", path, n)
			}
			e.Xattrs = append(e.Xattrs, compare.Xattr{Name: n, Value: string(v)})
		}
		slices.SortFunc(e.Xattrs, func(a, b compare.Xattr) int { return cmp.Compare(a.Name, b.Name) })
		if tab.HasXattrs(r, p) != (len(e.Xattrs) > 0) {
			t.Fatalf("%q: HasXattrs %v, but has %d", path, tab.HasXattrs(r, p), len(e.Xattrs))
		}
		out = append(out, e)
		for i := range tab.Dirents(r) {
			d := tab.Dirent(r, i, p)
			if got, ok := tab.Lookup(r, d.Name); !ok || got != d.Row {
				t.Fatalf("%q: readdir says row %d, lookup %d, %v", path, d.Row, got, ok)
			}
			if m := tab.Mode(d.Row, p) & unix.S_IFMT; m != d.Mode {
				t.Fatalf("%q: readdir says type %#o, stat %#o", path, d.Mode, m)
			}
			if tab.IsDir(d.Row) && tab.Parent(d.Row) != r {
				t.Fatalf("%q: .. of %q is row %d", path, d.Name, tab.Parent(d.Row))
			}
			walk(path+"/"+string(d.Name), d.Row)
		}
	}
	walk("", tree.Root)
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	first := map[tree.Row]string{}
	for i := range out {
		e := &out[i]
		r := rows[e.Path]
		if e.Nlink > 1 && e.Mode&unix.S_IFMT != unix.S_IFDIR {
			if first[r] == "" {
				first[r] = e.Path
			}
			e.Link = first[r]
		}
		if tab.IsDir(r) {
			if got := string(tab.AppendPath(nil, r)); got != e.Path {
				t.Fatalf("path of %q is %q", e.Path, got)
			}
		}
	}
	return out
}

func sum(t testing.TB, tab *tree.Table, archives [][]byte, r tree.Row) string {
	t.Helper()
	h := sha256.New()
	if tab.IsReg(r) { // and not a device shown as one
		for at := int64(0); ; {
			x := tab.Extent(r, at)
			if x.Len == 0 {
				break
			}
			if x.Layer < 0 {
				h.Write(make([]byte, x.Len))
			} else {
				h.Write(archives[x.Layer][x.Offset : x.Offset+x.Len])
			}
			at += x.Len
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// unpack has umoci unpack the image of these layers and lists the result. An error is umoci's.
func unpack(t testing.TB, archives [][]byte, rootless bool) (compare.Listing, time.Time, error) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // rootless umoci has to reach it
		t.Fatal(err)
	}
	layout(t, dir, archives)
	return unpackLayout(t, dir, rootless)
}

// unpackLayout has umoci unpack the latest image of a layout and lists the result.
func unpackLayout(t testing.TB, image string, rootless bool) (compare.Listing, time.Time, error) {
	t.Helper()
	if _, err := exec.LookPath("umoci"); err != nil {
		t.Fatal("umoci is missing: apt-get install umoci")
	}
	if os.Getuid() != 0 {
		t.Fatal("this test unpacks images with their real owners: run it as root")
	}
	dir, err := os.MkdirTemp("", "muster-umoci-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/out", 0o755); err != nil {
		t.Fatal(err)
	}
	// The umask decides on the mode of directories that no layer has an entry for.
	const script = `umask 022; exec "$@"`
	args := []string{"-c", script, "sh"}
	if rootless {
		if err := os.Chown(dir+"/out", user.uid, user.gid); err != nil {
			t.Fatal(err)
		}
		args = append(args, "setpriv", fmt.Sprint("--reuid=", user.uid), fmt.Sprint("--regid=", user.gid), "--clear-groups")
	}
	args = append(args, "umoci", "raw", "unpack", "--image", image+":latest")
	if rootless {
		args = append(args, "--rootless")
	}
	start := time.Now().Add(-10 * time.Millisecond) // file systems take their time from a coarse clock
	c := exec.Command("/bin/sh", append(args, dir+"/out/root")...)
	c.Env = append(os.Environ(), "HOME=/nonexistent", "TMPDIR="+dir)
	if out, err := c.CombinedOutput(); err != nil {
		return nil, start, fmt.Errorf("umoci: %w: %s", err, out)
	}
	l, err := compare.Walk(t.Context(), dir+"/out/root", compare.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l, start, nil
}

var user = struct{ uid, gid int }{4711, 4712}

// layout writes an OCI layout with one image of uncompressed layers, tagged latest.
func layout(t testing.TB, dir string, archives [][]byte) {
	t.Helper()
	type descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int               `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	if err := os.MkdirAll(dir+"/blobs/sha256", 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(mediaType string, b []byte) descriptor {
		d := ztoc.DigestOf(b)
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Hex()), b, 0o644); err != nil {
			t.Fatal(err)
		}
		return descriptor{MediaType: mediaType, Digest: string(d), Size: len(b)}
	}
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ids, descs := []string{}, []descriptor{}
	for _, a := range archives {
		d := put("application/vnd.oci.image.layer.v1.tar", a)
		ids, descs = append(ids, d.Digest), append(descs, d)
	}
	config := put("application/vnd.oci.image.config.v1+json", marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids},
	}))
	manifest := put("application/vnd.oci.image.manifest.v1+json", marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descs,
	}))
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": "latest"}
	for name, v := range map[string]any{
		"oci-layout": map[string]string{"imageLayoutVersion": "1.0.0"},
		"index.json": map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), marshal(v), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
