package tree

import (
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

// put does what umoci does for one entry: clear the name, unless a directory stays, then make what it says.
// Everything that can be refused is refused before anything is changed.
func (m *merge) put(e *ztoc.Entry) error {
	dir, base := split(e.Name)
	if base == "" {
		if e.Type != ztoc.TypeDir {
			return refusal("the root must be a directory")
		}
		m.noteXattrs(e, modeDir)
		m.changeDirectory(0, e)
		return nil
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return m.whiteout(dir, base)
	}
	typ, err := m.check(e, base)
	if err != nil {
		return err
	}
	var link uint32 // inode to link to
	if e.Type == ztoc.TypeHardlink {
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
			m.changeDirectory(n, e)
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

// check refuses an entry that no file system could hold, and returns its type bits, 0 for a hard link.
func (m *merge) check(e *ztoc.Entry, base string) (uint32, error) {
	typ, ok := typeBits[e.Type]
	switch {
	case !ok:
		return 0, refusal("unknown type of entry")
	case len(base) > maxName:
		return 0, refusal("name is longer than 255 bytes")
	case strings.IndexByte(base, 0) >= 0:
		return 0, refusal("name has a NUL byte")
	case e.Type == ztoc.TypeReg:
		return typ, m.checkContent(e)
	case e.Type != ztoc.TypeSymlink:
		return typ, nil
	case e.Linkname == "":
		return 0, refusal("symbolic link without a target")
	case len(e.Linkname) > maxTarget:
		return 0, refusal("symbolic link's target is longer than 4095 bytes")
	case strings.IndexByte(e.Linkname, 0) >= 0:
		return 0, refusal("symbolic link's target has a NUL byte")
	}
	return typ, nil
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

func (m *merge) newInode(e *ztoc.Entry, typ uint32) inode {
	mode := typ | uint32(e.Mode)&modePerm
	if typ == modeLink {
		mode = modeLink | 0o777 // Linux has no other
	}
	return inode{entry: e, layer: int32(m.layer), seq: int32(m.seq), mode: mode}
}

// changeDirectory gives directory n what e says of it; it keeps its names.
func (m *merge) changeDirectory(n uint32, e *ztoc.Entry) {
	i := &m.inodes[m.names[n].inode]
	links := i.links
	*i = m.newInode(e, modeDir)
	i.links = links
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
