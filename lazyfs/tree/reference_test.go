package tree_test

import (
	"archive/tar"
	"cmp"
	"math/rand/v2"
	"path"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/tests/e2e/compare"
	"golang.org/x/sys/unix"
)

// A reference merges layers the slow way: a map from clean absolute path to file, every question answered by
// looking at all paths. It is for stacks whose entries all can be unpacked.
type reference map[string]*refFile

type refFile struct {
	m     member
	group *int // shared by the names of one file
	upper int  // last layer that brought it or something beneath it
}

func merged(s stack) reference {
	r := reference{"/": {m: member{Header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}}, group: new(int)}}
	for i, l := range s {
		for _, m := range l {
			r.apply(i+1, m)
		}
	}
	return r
}

// real resolves all symbolic links in p, and lexically what does not exist.
func (r reference) real(p string) string {
	done, rest := "/", strings.Split(strings.Trim(p, "/"), "/")
	for len(rest) > 0 {
		next := path.Join(done, rest[0])
		rest = rest[1:]
		if f := r[next]; f != nil && f.m.Typeflag == tar.TypeSymlink {
			if strings.HasPrefix(f.m.Linkname, "/") {
				done = "/"
			}
			rest = append(strings.Split(f.m.Linkname, "/"), rest...)
			continue
		}
		done = next
	}
	return done
}

func (r reference) removeAll(p string) {
	for q := range r {
		if q == p || strings.HasPrefix(q, p+"/") {
			delete(r, q)
		}
	}
}

func (r reference) apply(layer int, m member) {
	name := path.Clean("/" + m.Name)
	if name == "/" {
		r["/"].m = m
		return
	}
	dir, base := r.real(path.Dir(name)), path.Base(name)
	at := path.Join(dir, base)
	if base == ".wh..wh..opq" {
		for q, f := range r {
			if q != dir && (dir == "/" || strings.HasPrefix(q, dir+"/")) && f.upper != layer {
				delete(r, q)
			}
		}
		return
	}
	if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
		at = path.Join(dir, hidden)
		for q, f := range r {
			if (q == at || strings.HasPrefix(q, at+"/")) && f.upper != layer {
				delete(r, q)
			}
		}
		return
	}
	for p := dir; ; p = path.Dir(p) { // from below; what exists stays
		if r[p] != nil {
			r.inherit(dir, p)
			break
		}
	}
	old := r[at]
	if old != nil && old.m.Typeflag == tar.TypeDir && m.Typeflag == tar.TypeDir {
		old.m = m
	} else {
		r.removeAll(at)
		f := &refFile{m: m, group: new(int)}
		if m.Typeflag == tar.TypeLink {
			to := path.Clean("/" + m.Linkname)
			*f = *r[path.Join(r.real(path.Dir(to)), path.Base(to))]
		}
		r[at] = f
	}
	for p := at; p != "/"; p = path.Dir(p) {
		r[p].upper = layer
	}
}

// inherit makes the directories from p, which exists, down to dir.
func (r reference) inherit(dir, p string) {
	for p != dir {
		up := r[p].m
		rest := strings.TrimPrefix(strings.TrimPrefix(dir, p), "/")
		p = path.Join(p, strings.Split(rest, "/")[0])
		m := member{Header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}}
		if up.Mode&0o2000 != 0 {
			m.Mode, m.Gid = 0o2755, up.Gid
		}
		r[p] = &refFile{m: m, group: new(int)}
	}
}

// listing is the reference as compare would list it, without content and times.
func (r reference) listing() compare.Listing {
	links, subdirs := map[*int]uint64{}, map[string]uint64{}
	for p, f := range r {
		links[f.group]++
		if p != "/" && f.m.Typeflag == tar.TypeDir {
			subdirs[path.Dir(p)]++
		}
	}
	var out compare.Listing
	for p, f := range r {
		e := compare.Entry{Path: p, Mode: uint32(f.m.Mode) & 0o7777, Nlink: links[f.group], UID: uint32(f.m.Uid), GID: uint32(f.m.Gid)}
		switch f.m.Typeflag {
		case tar.TypeReg:
			e.Mode |= unix.S_IFREG
			e.Size = int64(len(f.m.body))
		case tar.TypeDir:
			e.Mode |= unix.S_IFDIR
			e.Nlink = 2 + subdirs[p]
		case tar.TypeSymlink:
			e.Mode = unix.S_IFLNK | 0o777
			e.Target = f.m.Linkname
			e.Size = int64(len(e.Target))
		case tar.TypeFifo:
			e.Mode |= unix.S_IFIFO
		case tar.TypeChar, tar.TypeBlock:
			e.Mode |= map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK}[f.m.Typeflag]
			e.Rdev = unix.Mkdev(uint32(f.m.Devmajor), uint32(f.m.Devminor))
		}
		out = append(out, e)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	first := map[*int]string{}
	for i := range out {
		f := r[out[i].Path]
		if f.m.Typeflag != tar.TypeDir && links[f.group] > 1 {
			first[f.group] = cmp.Or(first[f.group], out[i].Path)
			out[i].Link = first[f.group]
		}
	}
	return out
}

func plain(l compare.Listing) compare.Listing {
	l = slices.Clone(l)
	for i := range l {
		l[i].Sum, l[i].Xattrs = "", nil
	}
	return l
}

// TestMergeIsAsTheReference merges many random stacks both ways.
func TestMergeIsAsTheReference(t *testing.T) {
	for seed := range 1500 {
		r := rand.New(rand.NewPCG(uint64(seed), 3))
		s := randomStack(r)
		if seed%10 == 0 { // longer layers, more of them
			for range 5 {
				s = append(s, randomStack(r)...)
			}
		}
		ls, _ := layers(t, s)
		_, st := build(t, ls)
		good := stack{}
		for i, l := range s {
			var keep []member
			for k, m := range l {
				if !slices.ContainsFunc(st.Notes, func(n tree.Note) bool { return n.Layer == i && n.Seq == k && !strings.HasPrefix(n.Reason, "xattr") }) {
					keep = append(keep, m)
				}
			}
			good = append(good, keep)
		}
		ls, archives := layers(t, good)
		tab, st := build(t, ls)
		if st.Skipped > 0 {
			t.Fatalf("seed %d: entries skipped that were not before: %v\n%s", seed, st.Notes, s)
		}
		got, want := plain(listing(t, tab, archives, asImage)), merged(good).listing()
		if d := compare.Diff(got, want, compare.DiffOptions{IgnoreTimes: true}); len(d) > 0 {
			t.Fatalf("seed %d:\n%s\n%s", seed, strings.Join(d, "\n"), good)
		}
		if st.Inodes != int64(tab.Len()) || st.Dirents != int64(len(got)-1) {
			t.Fatalf("seed %d: totals %+v of %d names", seed, st.Totals, len(got))
		}
	}
}

// TestRefusedEntriesLeaveNothingBehind merges random stacks with and without the entries that are refused.
func TestRefusedEntriesLeaveNothingBehind(t *testing.T) {
	for seed := range 500 {
		s := randomStack(rand.New(rand.NewPCG(uint64(seed), 4)))
		ls, archives := layers(t, s)
		tab, st := build(t, ls)
		all := listing(t, tab, archives, asImage)
		for _, n := range slices.Backward(st.Notes) {
			if strings.HasPrefix(n.Reason, "xattr") {
				continue
			}
			if n.Name != ls[n.Layer].Entries[n.Seq].Name {
				t.Fatalf("note %+v is of %q", n, ls[n.Layer].Entries[n.Seq].Name)
			}
			ls[n.Layer].Entries = slices.Delete(ls[n.Layer].Entries, n.Seq, n.Seq+1)
		}
		tab, _ = build(t, ls)
		if d := compare.Diff(listing(t, tab, archives, asImage), all, compare.DiffOptions{}); len(d) > 0 {
			t.Fatalf("seed %d:\n%s\n%s", seed, strings.Join(d, "\n"), s)
		}
	}
}
