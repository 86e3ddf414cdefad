package image

import (
	"bytes"
	"context"
	"debug/elf"
	"io"
	"path"
	"strings"

	"github.com/muster-hpc/muster/lazyfs/tree"
)

// The bounds of a guess: it reads what a stranger made, on the way to a start that somebody waits for.
const (
	guessFiles   = 256     // files followed
	guessFile    = 8 << 20 // bytes of one file wanted ahead: programs page in sparsely, beyond it demand decides
	guessScript  = 256     // bytes read for "#!"
	guessLinks   = 4       // interpreters of interpreters
	guessDynamic = 1 << 20 // bytes of an ELF file read to find its libraries, through sections that lie anywhere
)

// A guesser finds what a command will probably touch first: the program, its interpreter, the loader
// and the libraries it is linked with. It follows only names in the tree; whatever is odd ends the
// guess, never the mount.
type guesser struct {
	table *tree.Table
	open  func(ctx context.Context, row tree.Row) io.ReaderAt
	found func(row tree.Row) // called for each file, most urgent first
	env   []string
	seen  map[tree.Row]bool
}

// guess finds the files that running args would touch.
func (g *guesser) guess(ctx context.Context, args []string) {
	if len(args) == 0 {
		return
	}
	for _, name := range []string{"/etc/ld.so.cache", "/etc/passwd", "/etc/nsswitch.conf"} {
		g.file(name)
	}
	g.program(ctx, args[0], 0)
}

// file adds the regular file that name leads to.
func (g *guesser) file(name string) (tree.Row, bool) {
	row, err := g.table.Resolve(name, true)
	if err != nil || !g.table.IsReg(row) {
		return 0, false
	}
	if g.seen[row] {
		return row, false
	}
	if len(g.seen) >= guessFiles {
		return 0, false
	}
	g.seen[row] = true
	g.found(row)
	return row, true
}

func (g *guesser) program(ctx context.Context, name string, depth int) {
	if depth > guessLinks || ctx.Err() != nil {
		return
	}
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = nil
		for _, dir := range strings.Split(envOf(g.env, "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ":") {
			candidates = append(candidates, path.Join("/", dir, name))
		}
	}
	for _, c := range candidates {
		row, ok := g.file(c)
		if !ok {
			continue
		}
		r := g.open(ctx, row)
		if interp, ok := shebang(r); ok {
			for _, word := range interp {
				g.program(ctx, word, depth+1)
			}
			return
		}
		g.libraries(ctx, r, path.Dir(c))
		return
	}
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

// libraries adds the loader and the libraries of the ELF file r, and theirs.
func (g *guesser) libraries(ctx context.Context, r io.ReaderAt, dir string) {
	type object struct {
		r   io.ReaderAt
		dir string
	}
	for queue := []object{{r, dir}}; len(queue) > 0 && ctx.Err() == nil; queue = queue[1:] {
		interp, needed, search := dynamic(queue[0].r, queue[0].dir)
		if interp != "" {
			g.file(interp)
		}
		for _, lib := range needed {
			for _, d := range append(search, libraryDirs...) {
				if row, ok := g.file(path.Join("/", d, lib)); ok {
					queue = append(queue, object{g.open(ctx, row), d})
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

// dynamic reads what an ELF file is linked with: its loader, the names of its libraries and the
// directories it wants searched first. Nothing for what is not ELF, or is broken.
func dynamic(r io.ReaderAt, dir string) (interp string, needed, search []string) {
	defer func() {
		// debug/elf promises no safety against hostile files; a guess may fail, a mount may not.
		if recover() != nil {
			interp, needed, search = "", nil, nil
		}
	}()
	f, err := elf.NewFile(&budgetReader{r: r, left: guessDynamic})
	if err != nil {
		return "", nil, nil
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			b := make([]byte, p.Filesz)
			if _, err := p.ReadAt(b, 0); err == nil {
				interp = string(bytes.TrimRight(b, "\x00"))
			}
		}
	}
	needed, _ = f.DynString(elf.DT_NEEDED)
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		paths, _ := f.DynString(tag)
		for _, p := range paths {
			for _, d := range strings.Split(p, ":") {
				search = append(search, strings.NewReplacer("$ORIGIN", dir, "${ORIGIN}", dir).Replace(d))
			}
		}
	}
	return interp, needed[:min(len(needed), guessFiles)], search
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
