package tree

import (
	"path"
	"strings"

	"github.com/muster-hpc/muster/ztoc"
)

// A name is one entry of a directory while layers are being merged. Names live in one slice and point at
// each other by index; 0 is the root, which is nobody's child, so 0 also means none.
type name struct {
	text   string
	parent uint32 // name of the directory
	inode  uint32
	child  uint32 // first child, of a directory
	next   uint32 // siblings, in no useful order
	prev   uint32
	upper  int32 // the last layer that brought this name or something beneath it; -1 for none
	hidden int32 // the last layer for which hideBeneath has been here; -1 for none
	depth  uint16
	length uint16 // of the path from the root, with its leading slash; 0 for the root
}

// An inode is what one or more names lead to.
type inode struct {
	entry *ztoc.Entry // nil for a directory that no layer brought
	layer int32
	seq   int32 // position of entry in its layer
	links uint32
	mode  uint32 // with type bits
	gid   uint32 // of a directory that no layer brought
}

// key finds a name in its directory.
type key struct {
	parent uint32
	text   string
}

// A merge is a tree as far as layers have been applied.
//
// It does what `umoci unpack` does to a real directory, entry by entry, in the same order, and where
// umoci would give up (and leave nothing) it refuses that one entry and says so.
type merge struct {
	names  []name
	inodes []inode
	find   map[key]uint32
	live   int // inodes with a name
	stats  Stats
	o      Options

	layer    int   // being applied
	layerEnd int64 // its inflated size, 0 when unknown
	seq      int   // of the entry in it

	// The directory of the last entry: archives list a directory's files together. Valid until a name is
	// removed, because only that can change what an existing path leads to.
	lastDir  string
	lastName uint32
	lastOK   bool

	pending []string // of walk: the part of the path that does not exist
	rest    []string // of walk: what is left of the path and of the links in it, innermost last
}

// implied is the mode of directories that no layer brought: 0777 less the usual umask. Their owner is root
// and their time 1970, where umoci has the time of the unpacking.
const implied = modeDir | 0o755

func newMerge(o Options, entries int) *merge {
	m := &merge{o: o, find: make(map[key]uint32, entries)}
	m.names = append(make([]name, 0, entries+1), name{upper: -1, hidden: -1})
	m.inodes = append(make([]inode, 0, entries+1), inode{mode: implied, links: 1})
	m.live = 1
	return m
}

// refusal says why an entry cannot be in the tree.
type refusal string

func (r refusal) Error() string { return string(r) }

// note records what became of the entry being applied.
func (m *merge) note(e *ztoc.Entry, reason string) {
	if len(m.stats.Notes) >= m.o.MaxNotes {
		m.stats.NotesCut++
		return
	}
	m.stats.Notes = append(m.stats.Notes, Note{Layer: m.layer, Seq: m.seq, Name: e.Name, Reason: reason})
}

// apply puts one entry into the tree.
func (m *merge) apply(e *ztoc.Entry) error {
	m.stats.Entries++
	err := m.put(e)
	if r, ok := err.(refusal); ok {
		m.stats.Skipped++
		m.note(e, string(r))
		return nil
	}
	return err
}

func (m *merge) put(e *ztoc.Entry) error {
	dir, base := split(e.Name)
	if base == "" {
		if e.Type != ztoc.TypeDir {
			return refusal("the root must be a directory")
		}
		m.noteXattrs(e, modeDir)
		m.inodes[m.names[0].inode] = m.newInode(e, modeDir)
		m.inodes[m.names[0].inode].links = 1
		return nil
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return m.whiteout(dir, base)
	}
	typ, ok := typeBits[e.Type]
	if !ok {
		return refusal("unknown type of entry")
	}
	if len(base) > maxName {
		return refusal("name is longer than 255 bytes")
	}
	if strings.IndexByte(base, 0) >= 0 {
		return refusal("name has a NUL byte")
	}
	var link uint32 // inode to link to
	switch e.Type {
	case ztoc.TypeReg:
		if err := m.checkContent(e); err != nil {
			return err
		}
	case ztoc.TypeSymlink:
		switch {
		case e.Linkname == "":
			return refusal("symbolic link without a target")
		case len(e.Linkname) > maxTarget:
			return refusal("symbolic link's target is longer than 4095 bytes")
		case strings.IndexByte(e.Linkname, 0) >= 0:
			return refusal("symbolic link's target has a NUL byte")
		}
	case ztoc.TypeHardlink:
		n, err := m.linkTarget(e.Linkname)
		if err != nil {
			return err
		}
		link = m.names[n].inode
	}
	at, err := m.makeDirectory(dir, len(base))
	if err != nil {
		return err
	}
	if e.Type != ztoc.TypeHardlink {
		m.noteXattrs(e, typ)
	}
	if n, ok := m.find[key{at, base}]; ok {
		old := m.names[n].inode
		switch {
		case e.Type == ztoc.TypeHardlink && !m.findsWithout(n, e.Linkname):
			return refusal("hard link to itself, or to a file reached through what it replaces")
		case e.Type == ztoc.TypeDir && m.inodes[old].mode&modeType == modeDir:
			m.inodes[old] = m.newInode(e, modeDir)
			m.touch(n)
			return nil
		}
		m.remove(n)
	}
	if e.Type != ztoc.TypeHardlink {
		if link, err = m.addInode(m.newInode(e, typ)); err != nil {
			return err
		}
	}
	m.touch(m.addName(at, base, link))
	return nil
}

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

var typeBits = map[ztoc.EntryType]uint32{
	ztoc.TypeReg:      modeReg,
	ztoc.TypeDir:      modeDir,
	ztoc.TypeSymlink:  modeLink,
	ztoc.TypeHardlink: 0,
	ztoc.TypeChar:     modeChar,
	ztoc.TypeBlock:    modeBlock,
	ztoc.TypeFifo:     modeFifo,
}

// split cleans an entry's name beneath the root and cuts it into directory and last element; both are
// empty for the root.
func split(s string) (dir, base string) {
	s = strings.Trim(strings.TrimPrefix(s, "./"), "/")
	if !clean(s) {
		s = path.Clean("/" + s)[1:]
	}
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		return s[:i], s[i+1:]
	}
	return "", s
}

// clean reports whether s has no empty, "." or ".." element. Nearly all names are clean, and path.Clean
// allocates.
func clean(s string) bool {
	dots := 0 // in the element so far, -1 when it has other bytes; its length is what matters
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '/':
			if dots >= 0 && dots <= 2 {
				return false
			}
			dots = 0
		case c == '.' && dots >= 0:
			dots++
		default:
			dots = -1
		}
	}
	return dots < 0 || dots > 2
}

func (m *merge) newInode(e *ztoc.Entry, typ uint32) inode {
	mode := typ | uint32(e.Mode)&modePerm
	if typ == modeLink {
		mode = modeLink | 0o777 // Linux has no other
	}
	return inode{entry: e, layer: int32(m.layer), seq: int32(m.seq), mode: mode}
}

func (m *merge) addInode(i inode) (uint32, error) {
	if m.live >= m.o.MaxInodes {
		return 0, errTooMany(m.o.MaxInodes)
	}
	m.live++
	m.inodes = append(m.inodes, i)
	return uint32(len(m.inodes) - 1), nil
}

func (m *merge) addName(parent uint32, text string, ino uint32) uint32 {
	n := uint32(len(m.names))
	first := m.names[parent].child
	m.names[parent].child = n
	m.names = append(m.names, name{
		text: text, parent: parent, inode: ino, next: first, upper: -1, hidden: -1,
		depth: m.names[parent].depth + 1, length: m.names[parent].length + 1 + uint16(len(text)),
	})
	if first != 0 {
		m.names[first].prev = n
	}
	m.inodes[ino].links++
	m.find[key{parent, text}] = n
	return n
}

// touch marks n and all directories above it as brought by the current layer, so that no whiteout of this
// layer removes them.
func (m *merge) touch(n uint32) {
	for l := int32(m.layer); n != 0 && m.names[n].upper != l; n = m.names[n].parent {
		m.names[n].upper = l
	}
}

// remove takes name n and everything beneath it out of the tree.
func (m *merge) remove(n uint32) {
	m.lastOK = false
	d := m.names[n]
	if d.prev != 0 {
		m.names[d.prev].next = d.next
	} else {
		m.names[d.parent].child = d.next
	}
	if d.next != 0 {
		m.names[d.next].prev = d.prev
	}
	// Depth first without recursion: a directory is dropped when its last child is.
	for at := n; ; {
		if c := m.names[at].child; c != 0 {
			m.names[at].child = m.names[c].next
			at = c
			continue
		}
		d := &m.names[at]
		delete(m.find, key{d.parent, d.text})
		ino := &m.inodes[d.inode]
		if ino.links--; ino.links == 0 {
			m.live--
			ino.entry = nil
		}
		d.inode = gone
		if at == n {
			return
		}
		at = d.parent
	}
}

// gone is the inode of a name that was removed.
const gone = 1<<32 - 1

// findsWithout reports whether a hard link's target would still be found without name n.
func (m *merge) findsWithout(n uint32, target string) bool {
	d := m.names[n]
	delete(m.find, key{d.parent, d.text})
	m.lastOK = false
	_, err := m.linkTarget(target)
	m.lastOK = false
	m.find[key{d.parent, d.text}] = n
	return err == nil
}

func (m *merge) isDir(n uint32) bool { return m.inodes[m.names[n].inode].mode&modeType == modeDir }

// whiteout removes what lower layers have at, or for an opaque directory beneath, a name.
func (m *merge) whiteout(dir, base string) error {
	m.stats.Whiteouts++
	switch base[len(whiteoutPrefix):] {
	case "", ".", "..":
		return refusal("whiteout of no name") // umoci would remove the directory, or the one above
	}
	at, err := m.directory(dir)
	if err == errAbsent || err == errNotInDir {
		return nil
	}
	if err != nil {
		return err
	}
	if base == opaqueName {
		m.hideBeneath(at)
		return nil
	}
	n, ok := m.find[key{at, base[len(whiteoutPrefix):]}]
	if !ok {
		return nil
	}
	if m.names[n].upper != int32(m.layer) {
		m.remove(n)
		return nil
	}
	m.hideBeneath(n)
	return nil
}

// hideBeneath removes what lower layers have beneath n. What this layer brought has brought its
// directories too, so only those need to be searched further.
func (m *merge) hideBeneath(n uint32) {
	stack := []uint32{n}
	for len(stack) > 0 {
		at := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if m.names[at].hidden == int32(m.layer) {
			continue // what came since is this layer's
		}
		m.names[at].hidden = int32(m.layer)
		for c := m.names[at].child; c != 0; {
			next := m.names[c].next
			if m.names[c].upper != int32(m.layer) {
				m.remove(c)
			} else if m.names[c].child != 0 {
				stack = append(stack, c)
			}
			c = next
		}
	}
}

const (
	// errAbsent says that a path does not exist, and was not to be made.
	errAbsent   = refusal("does not exist")
	errNotInDir = refusal("its directory is not a directory")
	errLinkLoop = refusal("too many symbolic links in its path")
	errLongName = refusal("a directory in its path has a name longer than 255 bytes")
	errNul      = refusal("a directory in its path has a NUL byte")
	errTooLong  = refusal("path is longer than 4095 bytes")

	setgid = 0o2000

	// mergeLinks bounds the symbolic links in one path, as umoci does; mergeSteps the elements of a path
	// after following them, so that an archive of paths through long links takes bounded time.
	mergeLinks = 255
	mergeSteps = 4096
)

// directory finds the directory that the clean path dir leads to, symbolic links followed within the root;
// errAbsent when it does not exist, with m.pending as walk leaves it and the directory that does.
func (m *merge) directory(dir string) (uint32, error) {
	if m.lastOK && m.lastDir == dir {
		return m.lastName, nil
	}
	at, err := m.walk(dir)
	if err != nil {
		return 0, err
	}
	if !m.isDir(at) {
		return 0, errNotInDir
	}
	if len(m.pending) > 0 {
		return at, errAbsent
	}
	m.lastDir, m.lastName, m.lastOK = dir, at, true
	return at, nil
}

// makeDirectory is directory, but makes what is missing, if there is room in a path for a name of size bytes
// beneath it.
func (m *merge) makeDirectory(dir string, size int) (uint32, error) {
	at, err := m.directory(dir)
	if err == errAbsent {
		for _, text := range m.pending {
			size += 1 + len(text)
		}
	} else if err != nil {
		return 0, err
	}
	if int(m.names[at].length)+1+size > maxPath {
		return 0, errTooLong
	}
	if err == nil {
		return at, nil
	}
	for _, text := range m.pending {
		up := &m.inodes[m.names[at].inode]
		i := inode{mode: implied}
		if up.mode&setgid != 0 { // as mkdir(2) does
			i.mode |= setgid
			i.gid = up.group()
		}
		ino, err := m.addInode(i)
		if err != nil {
			return 0, err
		}
		at = m.addName(at, text, ino)
	}
	m.lastDir, m.lastName, m.lastOK = dir, at, true
	return at, nil
}

// walk follows the clean path dir as far as it exists: to the name it returns, from where m.pending are
// the elements that are missing. "..", which only a symbolic link's target can have, is the directory
// above, also of what is missing.
func (m *merge) walk(dir string) (uint32, error) {
	m.pending = m.pending[:0]
	m.rest = append(m.rest[:0], dir)
	at, links, steps := uint32(0), 0, 0
	for len(m.rest) > 0 {
		top := &m.rest[len(m.rest)-1]
		if *top == "" {
			m.rest = m.rest[:len(m.rest)-1]
			continue
		}
		var text string
		text, *top, _ = strings.Cut(*top, "/")
		if steps++; steps > mergeSteps {
			return 0, errLinkLoop
		}
		switch {
		case text == "" || text == ".":
			continue
		case text == "..":
			if k := len(m.pending); k > 0 {
				m.pending = m.pending[:k-1]
			} else {
				at = m.names[at].parent
			}
			continue
		case len(text) > maxName:
			return 0, errLongName
		case strings.IndexByte(text, 0) >= 0:
			return 0, errNul
		}
		if len(m.pending) > 0 {
			m.pending = append(m.pending, text)
			continue
		}
		n, ok := m.find[key{at, text}]
		if !ok {
			m.pending = append(m.pending, text)
			continue
		}
		i := &m.inodes[m.names[n].inode]
		if i.mode&modeType != modeLink {
			at = n
			continue
		}
		if links++; links > mergeLinks {
			return 0, errLinkLoop
		}
		target := i.entry.Linkname
		if target[0] == '/' {
			at = 0
		}
		m.rest = append(m.rest, target)
	}
	return at, nil
}

// linkTarget is the name that a hard link's target leads to. The last element is not followed: a hard link to
// a symbolic link is one.
func (m *merge) linkTarget(target string) (uint32, error) {
	dir, base := split(target)
	if base == "" {
		return 0, refusal("hard link to a directory")
	}
	at, err := m.directory(dir)
	switch err {
	case nil:
	case errAbsent, errNotInDir:
		return 0, refusal("hard link to a file that does not exist")
	default:
		return 0, err
	}
	n, ok := m.find[key{at, base}]
	if !ok {
		return 0, refusal("hard link to a file that does not exist")
	}
	if m.isDir(n) {
		return 0, refusal("hard link to a directory")
	}
	return n, nil
}

// group is the inode's gid.
func (i *inode) group() uint32 {
	if i.entry == nil {
		return i.gid
	}
	return id(i.entry.GID)
}

// id is an entry's uid or gid as chown(2) takes it: 32 bits, and all ones change nothing.
func id(n int) uint32 {
	if uint32(n) == 1<<32-1 {
		return 0
	}
	return uint32(n)
}
