package tree

import (
	"path"
	"strings"
)

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
