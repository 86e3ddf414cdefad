package images

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

// A root is a Debian root file system in a tar archive: its members in the archive's order, and
// which package each belongs to.
type root struct {
	f       *os.File
	members []member
	byName  map[string]int      // index into members
	owners  map[string][]string // packages that have the path, from dpkg's lists
	pkgs    map[string]*pkg
}

// A member is a file of the root. Body is read from the archive unless it is replaced.
type member struct {
	hdr  *tar.Header
	off  int64
	body []byte
}

// A pkg is what dpkg's status says of a package.
type pkg struct {
	name      string
	needs     [][]string // alternatives
	essential bool
}

// openRoot reads the archive at path.
func openRoot(path string) (*root, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r := &root{f: f, byName: map[string]int{}, owners: map[string][]string{}}
	if err := r.read(); err != nil {
		f.Close()
		return nil, fmt.Errorf("reading the root: %w", err)
	}
	return r, nil
}

func (r *root) close() { r.f.Close() }

// read lists the members, without those that are the machine's and not the image's, and reads dpkg's
// data base.
func (r *root) read() error {
	tr := tar.NewReader(r.f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := strings.Trim(strings.TrimPrefix(h.Name, "./"), "/")
		var body []byte
		switch {
		case name == "", name == ".", strings.HasPrefix(name, "dev/"):
			continue // runtimes fill /dev; images of Debian have it empty
		case name == "etc/hostname", name == "etc/resolv.conf", name == "etc/apt/sources.list":
			body = []byte("# set by whoever runs this image\n")
			h.Size = int64(len(body))
		}
		off, err := r.f.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		// Of the headers only what docker's layers have; a directory's time is whenever something was
		// last put into it, which says nothing.
		n := &tar.Header{
			Typeflag: h.Typeflag, Name: name, Size: h.Size, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid,
			ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor,
		}
		switch h.Typeflag {
		case tar.TypeDir:
			n.Name += "/"
			n.ModTime = Epoch
		case tar.TypeLink:
			n.Linkname = strings.TrimPrefix(h.Linkname, "./")
		case tar.TypeSymlink:
			n.Linkname = h.Linkname
		}
		if n.ModTime.After(Epoch) {
			n.ModTime = Epoch
		}
		for k, v := range h.PAXRecords {
			if strings.HasPrefix(k, "SCHILY.xattr.") {
				if n.PAXRecords == nil {
					n.PAXRecords = map[string]string{}
				}
				n.PAXRecords[k] = v
			}
		}
		if _, ok := r.byName[name]; ok {
			continue // a directory that several layers list
		}
		r.byName[name] = len(r.members)
		r.members = append(r.members, member{n, off, body})
	}
	if err := r.readStatus(); err != nil {
		return err
	}
	return r.readLists()
}

// open reads the file called name.
func (r *root) open(name string) (io.Reader, error) {
	i, ok := r.byName[name]
	if !ok {
		return nil, fmt.Errorf("the root has no %s", name)
	}
	m := r.members[i]
	if m.body != nil {
		return bytes.NewReader(m.body), nil
	}
	return io.NewSectionReader(r.f, m.off, m.hdr.Size), nil
}

// readStatus reads what packages there are and what they need.
func (r *root) readStatus() error {
	f, err := r.open("var/lib/dpkg/status")
	if err != nil {
		return err
	}
	r.pkgs = map[string]*pkg{}
	provides := map[string]*pkg{}
	var p *pkg
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		key, value, _ := strings.Cut(s.Text(), ": ")
		switch key {
		case "Package":
			p = &pkg{name: value}
			r.pkgs[value] = p
		case "Essential":
			p.essential = p.essential || value == "yes"
		case "Priority":
			p.essential = p.essential || value == "required"
		case "Depends", "Pre-Depends":
			for _, d := range strings.Split(value, ",") {
				var alternatives []string
				for _, a := range strings.Split(d, "|") {
					alternatives = append(alternatives, packageName(a))
				}
				p.needs = append(p.needs, alternatives)
			}
		case "Provides":
			for _, v := range strings.Split(value, ",") {
				provides[packageName(v)] = p
			}
		}
	}
	for name, p := range provides {
		if r.pkgs[name] == nil {
			r.pkgs[name] = p
		}
	}
	return s.Err()
}

// packageName is the name in a term of a dependency: without version and architecture.
func packageName(s string) string {
	s = strings.TrimSpace(s)
	if i := strings.IndexAny(s, " (:"); i >= 0 {
		s = s[:i]
	}
	return s
}

// readLists reads which package has which path.
func (r *root) readLists() error {
	const dir = "var/lib/dpkg/info/"
	for _, m := range r.members {
		if !strings.HasPrefix(m.hdr.Name, dir) || !strings.HasSuffix(m.hdr.Name, ".list") {
			continue
		}
		owner := packageName(strings.TrimSuffix(m.hdr.Name[len(dir):], ".list"))
		f, err := r.open(m.hdr.Name)
		if err != nil {
			return err
		}
		s := bufio.NewScanner(f)
		for s.Scan() {
			p := r.canonical(strings.TrimPrefix(s.Text(), "/"))
			r.owners[p] = append(r.owners[p], owner)
		}
		if err := s.Err(); err != nil {
			return err
		}
	}
	return nil
}

// canonical is where a path of a package lies in a root whose /bin, /lib… are links into /usr.
func (r *root) canonical(p string) string {
	top, rest, ok := strings.Cut(p, "/")
	if !ok {
		return p
	}
	if i, ok := r.byName[top]; ok && r.members[i].hdr.Typeflag == tar.TypeSymlink {
		return path.Join(r.members[i].hdr.Linkname, rest)
	}
	return p
}

// A plan is what each layer holds, bottom first, in the archive's order.
type plan [][]member

// deal splits the whole root into layers: one for each group, the last of which takes the packages
// that nothing needs; then what a site adds; then what no package has.
func (r *root) deal(groups []group) (plan, error) {
	layerOf, err := r.layers(groups)
	if err != nil {
		return nil, err
	}
	for name := range r.pkgs {
		if _, ok := layerOf[name]; !ok {
			layerOf[name] = len(groups) - 1
		}
	}
	p, err := r.pick(layerOf, len(groups)+1)
	if err != nil {
		return nil, err
	}
	return slices.Insert(p, len(groups), site()), nil
}

// part is the layers of groups alone, without the rest of the root.
func (r *root) part(groups []group) (plan, error) {
	layerOf, err := r.layers(groups)
	if err != nil {
		return nil, err
	}
	return r.pick(layerOf, len(groups))
}

// layers says which group each package comes in with, if any.
func (r *root) layers(groups []group) (map[string]int, error) {
	layerOf := map[string]int{}
	for i, g := range groups {
		var visit func(name string)
		visit = func(name string) {
			p := r.pkgs[name]
			if p == nil {
				return
			}
			if _, ok := layerOf[p.name]; ok {
				return
			}
			layerOf[p.name] = i
			for _, alternatives := range p.needs {
				for _, a := range alternatives {
					if r.pkgs[a] != nil {
						visit(a)
						break
					}
				}
			}
		}
		for _, s := range g.seeds {
			if r.pkgs[s] == nil {
				return nil, fmt.Errorf("the root lacks package %s", s)
			}
			visit(s)
		}
		if g.essential {
			for _, name := range slices.Sorted(maps.Keys(r.pkgs)) {
				if r.pkgs[name].essential {
					visit(name)
				}
			}
		}
	}
	return layerOf, nil
}

// pick deals members into n layers by their packages' layer; what belongs to no package that has one
// comes into layer len(groups), if n leaves room for it. Each layer has the directories that lead to its
// members; compiled Python goes with its source and a hard link with its target.
func (r *root) pick(layerOf map[string]int, n int) (plan, error) {
	none := 0
	for _, l := range layerOf {
		none = max(none, l+1)
	}
	assigned := make([]int, len(r.members))
	for i, m := range r.members {
		name := strings.TrimSuffix(m.hdr.Name, "/")
		if m.hdr.Typeflag == tar.TypeLink {
			name = m.hdr.Linkname
		}
		if dir, base := path.Split(name); strings.HasSuffix(base, ".pyc") && strings.HasSuffix(dir, "/__pycache__/") {
			stem, _, _ := strings.Cut(base, ".")
			name = path.Join(path.Dir(path.Clean(dir)), stem+".py")
		}
		assigned[i] = none
		for _, owner := range r.owners[name] {
			if l, ok := layerOf[owner]; ok {
				assigned[i] = min(assigned[i], l)
			}
		}
	}
	p := make(plan, n)
	for l := range p {
		in := make([]bool, len(r.members))
		for i, m := range r.members {
			if assigned[i] != l {
				continue
			}
			in[i] = true
			for dir := path.Dir(strings.TrimSuffix(m.hdr.Name, "/")); dir != "."; dir = path.Dir(dir) {
				d, ok := r.byName[dir]
				if !ok {
					return nil, fmt.Errorf("the root has %s without its directory", m.hdr.Name)
				}
				in[d] = true
			}
		}
		for i, m := range r.members {
			if in[i] {
				p[l] = append(p[l], m)
			}
		}
	}
	return p, nil
}

// all is every member of the root and of the site's layer, sorted by path.
func (r *root) all() []member {
	members := slices.Concat(r.members, site())
	slices.SortStableFunc(members, func(a, b member) int { return strings.Compare(a.hdr.Name, b.hdr.Name) })
	return slices.CompactFunc(members, func(a, b member) bool { return a.hdr.Name == b.hdr.Name })
}

// site is the small layer that somebody put on top of the distribution: a program of their own.
func site() []member {
	entries := []Entry{
		Dir("opt"),
		Dir("opt/muster"),
		File("opt/muster/solve.py", `#!/usr/bin/python3
# Solves a small linear system: what the demonstration runs.
import numpy
a = numpy.arange(9.0).reshape(3, 3) + numpy.eye(3)
print("numpy", numpy.__version__, "says", numpy.linalg.solve(a, numpy.ones(3)).round(3))
`).With(0o755, 0, 0),
	}
	var members []member
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.Body))
		members = append(members, member{hdr: &h, body: e.Body})
	}
	return members
}

// writeLayer writes members as a gzip layer into a new file of dir.
func (r *root) writeLayer(ctx context.Context, dir string, members []member) (Blob, error) {
	l, err := newLayerFile(dir)
	if err != nil {
		return Blob{}, err
	}
	// Both sides sum and compress in larger steps than tar's blocks.
	w := bufio.NewWriterSize(l, 1<<17)
	err = r.writeTar(ctx, w, members)
	if err == nil {
		err = w.Flush()
	}
	b, ferr := l.finish()
	return b, errors.Join(err, ferr)
}

// writeTar writes the archive of members to w.
func (r *root) writeTar(ctx context.Context, w io.Writer, members []member) error {
	tw := tar.NewWriter(w)
	for _, m := range members {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := *m.hdr
		if err := tw.WriteHeader(&h); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		var body io.Reader = bytes.NewReader(m.body)
		if m.body == nil {
			body = io.NewSectionReader(r.f, m.off, h.Size)
		}
		if _, err := io.Copy(tw, body); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	return tw.Close()
}
