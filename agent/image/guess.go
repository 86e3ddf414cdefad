package image

import (
	"bytes"
	"context"
	"debug/elf"
	"io"
	"path"
	"strings"
	"sync"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// The bounds of a guess: it reads what a stranger made, on the way to a start that somebody waits for.
const (
	guessFiles   = 8192    // files followed
	guessFile    = 8 << 20 // bytes of one file wanted ahead: programs page in sparsely, beyond it demand decides
	guessScript  = 256     // bytes read for "#!"
	guessLinks   = 4       // interpreters of interpreters
	guessDynamic = 4 << 20 // bytes of an ELF file read to find its libraries, through sections that lie anywhere
	guessObjects = 256     // libraries of one program followed
)

// A guesser finds what a command will probably touch first: the program, its interpreter, the loader,
// the libraries it is linked with, and what a Python program imports. It follows only names in the tree; whatever is odd ends the
// guess, never the mount.
type guesser struct {
	table *tree.Table
	open  func(ctx context.Context, row tree.Row) io.ReaderAt
	// found is called for each file, the most urgent first, with the parts of it that will be touched; nil: its
	// beginning, or all of it. It may be called from several goroutines at once.
	found   func(row tree.Row, parts []ztoc.Range)
	env     []string
	workdir string

	mu   sync.Mutex
	seen map[tree.Row]bool // guarded by mu
}

// guess finds the files that running args would touch.
func (g *guesser) guess(ctx context.Context, args []string) {
	if len(args) == 0 {
		return
	}
	for _, name := range []string{"/etc/ld.so.cache", "/etc/passwd", "/etc/nsswitch.conf"} {
		g.file(name)
	}
	g.program(ctx, args, 0)
}

// lookup is the regular file that name leads to.
func (g *guesser) lookup(name string) (tree.Row, bool) {
	row, err := g.table.Resolve(name, true)
	return row, err == nil && g.table.IsReg(row)
}

// first notes that row was found, and reports whether that is news.
func (g *guesser) first(row tree.Row) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.seen[row] || len(g.seen) >= guessFiles {
		return false
	}
	g.seen[row] = true
	return true
}

// file adds the regular file that name leads to.
func (g *guesser) file(name string) (tree.Row, bool) {
	row, ok := g.lookup(name)
	if ok && g.first(row) {
		g.found(row, nil)
	}
	return row, ok
}

func (g *guesser) program(ctx context.Context, args []string, depth int) {
	if depth > guessLinks || len(args) == 0 || ctx.Err() != nil {
		return
	}
	candidates := []string{args[0]}
	if !strings.Contains(args[0], "/") {
		candidates = nil
		for _, dir := range strings.Split(envOf(g.env, "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ":") {
			candidates = append(candidates, path.Join("/", dir, args[0]))
		}
	}
	for _, c := range candidates {
		row, ok := g.lookup(c)
		if !ok {
			continue
		}
		if interp, ok := shebang(g.open(ctx, row)); ok {
			g.file(c)
			if len(interp) > 1 {
				g.program(ctx, interp[:1], depth+1)
				interp = interp[1:]
			}
			g.program(ctx, append(append(interp, c), args[1:]...), depth+1)
			return
		}
		g.libraries(ctx, row, path.Dir(c))
		g.python(ctx, g.hops(c), args[1:])
		return
	}
}

// hops is the paths that name leads through, itself first: a chain of symbolic links, as far as it goes by whole names.
func (g *guesser) hops(name string) []string {
	hops := []string{name}
	for range guessLinks {
		row, err := g.table.Resolve(name, false)
		if err != nil {
			break
		}
		to := string(g.table.Readlink(row))
		if to == "" {
			break
		}
		if !path.IsAbs(to) {
			to = path.Join(path.Dir(name), to)
		}
		name = to
		hops = append(hops, name)
	}
	return hops
}

// shebang is the interpreter line of a script: the interpreter, and for env(1) the program it finds.
func shebang(r io.ReaderAt) ([]string, bool) {
	var head [guessScript]byte
	n, _ := r.ReadAt(head[:], 0)
	line, _, _ := bytes.Cut(head[:n], []byte("\n"))
	rest, ok := bytes.CutPrefix(line, []byte("#!"))
	if !ok {
		return nil, false
	}
	words := strings.Fields(string(rest))
	if len(words) > 1 && path.Base(words[0]) == "env" && !strings.HasPrefix(words[1], "-") {
		return words[:2], true
	}
	return words[:min(1, len(words))], true
}

// libraries adds the ELF file row, its loader and libraries, and theirs.
func (g *guesser) libraries(ctx context.Context, row tree.Row, dir string) {
	type object struct {
		row tree.Row
		dir string
	}
	queue := []object{{row, dir}}
	add := func(row tree.Row, dir string) {
		if len(queue) < guessObjects {
			queue = append(queue, object{row, dir})
		}
	}
	for ; len(queue) > 0 && ctx.Err() == nil; queue = queue[1:] {
		o := queue[0]
		if !g.first(o.row) {
			continue
		}
		large := g.table.Size(o.row) > guessFile
		if !large {
			g.found(o.row, nil)
		}
		e := dynamic(g.open(ctx, o.row), o.dir)
		if large {
			g.found(o.row, e.touched)
		}
		if e.interp != "" {
			g.file(e.interp)
		}
		for _, lib := range e.needed {
			for _, d := range append(e.search, libraryDirs...) {
				if row, ok := g.lookup(path.Join("/", d, lib)); ok {
					add(row, d)
					break
				}
			}
		}
	}
}

// libraryDirs are where loaders of the distributions in use look, without reading ld.so.cache.
var libraryDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib",
}

// An elfStart is what starting an ELF file touches.
type elfStart struct {
	interp  string       // its loader
	needed  []string     // names of its libraries
	search  []string     // directories it wants searched for them first
	touched []ztoc.Range // what the loader reads and writes of it: tables, and data to be relocated
}

// dynamic reads what starting an ELF file in directory dir touches. Nothing for what is not ELF, or is broken.
func dynamic(r io.ReaderAt, dir string) (e elfStart) {
	defer func() {
		// debug/elf promises no safety against hostile files; a guess may fail, a mount may not.
		if recover() != nil {
			e = elfStart{}
		}
	}()
	f, err := elf.NewFile(&budgetReader{r: r, left: guessDynamic})
	if err != nil {
		return e
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			b := make([]byte, p.Filesz)
			if _, err := p.ReadAt(b, 0); err == nil {
				e.interp = string(bytes.TrimRight(b, "\x00"))
			}
		}
	}
	e.touched = append(e.touched, ztoc.Range{End: 4096})
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_ALLOC == 0 || s.Type == elf.SHT_NOBITS || s.Offset > 1<<40 || s.FileSize > 1<<40 {
			continue
		}
		switch s.Type {
		case elf.SHT_DYNSYM, elf.SHT_STRTAB, elf.SHT_HASH, elf.SHT_GNU_HASH, elf.SHT_GNU_VERSYM, elf.SHT_GNU_VERNEED,
			elf.SHT_GNU_VERDEF, elf.SHT_RELA, elf.SHT_REL:
		default:
			if s.Flags&elf.SHF_WRITE == 0 {
				continue
			}
		}
		e.touched = append(e.touched, ztoc.Range{Start: int64(s.Offset), End: int64(s.Offset + s.FileSize)})
	}
	e.needed, _ = f.DynString(elf.DT_NEEDED)
	e.needed = e.needed[:min(len(e.needed), guessObjects)]
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		paths, _ := f.DynString(tag)
		for _, p := range paths {
			for _, d := range strings.Split(p, ":") {
				e.search = append(e.search, strings.NewReplacer("$ORIGIN", dir, "${ORIGIN}", dir).Replace(d))
			}
		}
	}
	return e
}

// A budgetReader fails after its budget is read: section tables may point anywhere, as often as they
// like.
type budgetReader struct {
	r    io.ReaderAt
	left int
}

func (b *budgetReader) ReadAt(p []byte, off int64) (int, error) {
	if len(p) > b.left {
		return 0, io.ErrUnexpectedEOF
	}
	b.left -= len(p)
	return b.r.ReadAt(p, off)
}

func envOf(env []string, name, unset string) string {
	for _, e := range env {
		if k, v, ok := strings.Cut(e, "="); ok && k == name {
			return v
		}
	}
	return unset
}
