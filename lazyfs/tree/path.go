package tree

import "strings"

// Resolve finds the inode that an absolute or relative path names, from the root, following symbolic
// links within the tree (".." at the root stays there). The last element is followed too when follow is
// set. Errors are ErrNotExist, ErrNotDir and ErrLoop. It allocates.
func (t *Table) Resolve(path string, follow bool) (Row, error) {
	at, links := Root, 0
	for rest := path; ; {
		rest = strings.TrimLeft(rest, "/")
		if rest == "" {
			if strings.HasSuffix(path, "/") && !t.IsDir(at) {
				return 0, ErrNotDir
			}
			return at, nil
		}
		name, tail, _ := strings.Cut(rest, "/")
		if !t.IsDir(at) {
			return 0, ErrNotDir
		}
		rest = tail
		switch name {
		case ".":
			continue
		case "..":
			at = t.Parent(at)
			continue
		}
		next, ok := t.Lookup(at, []byte(name))
		if !ok {
			return 0, ErrNotExist
		}
		target := t.Readlink(next)
		if target == nil || (rest == "" && !follow) {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return 0, ErrLoop
		}
		if target[0] == '/' {
			at = Root
		}
		rest = string(target) + "/" + rest
	}
}
