package image

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/muster-hpc/muster/lazyfs/tree"
)

// The bounds of what is guessed about a Python program.
const (
	pythonModules  = 2048      // modules followed
	pythonSource   = 512 << 10 // bytes of one source file read for its imports
	pythonReaders  = 16        // source files read at once
	pythonVersions = 30        // minor versions looked for, from 3.0 on
)

// frozen is what the interpreter brings inside itself since 3.11.
var frozen = map[string]bool{
	"abc": true, "codecs": true, "io": true, "_collections_abc": true, "_sitebuiltins": true, "genericpath": true, "ntpath": true,
	"posixpath": true, "os": true, "site": true, "stat": true, "importlib.machinery": true, "importlib.util": true,
	"importlib._bootstrap": true, "importlib._bootstrap_external": true, "runpy": true, "zipimport": true,
}

var pythonName = regexp.MustCompile(`^python(?:3(?:\.([0-9]{1,2}))?)?$`)

// A python finds what a Python program imports: most jobs are one, and one that has no profile yet spends most of its
// start waiting for a few hundred small files, one after the other. They are known beforehand, because imports stand in
// the source: of the program, and of each module it imports. Many modules are read at once, so a start waits about as
// often as imports are nested, and not as often as there are modules.
//
// Only what is imported whatever happens counts: not inside functions and classes, nor for type checkers. What is
// imported otherwise (importlib, plugins, lazy modules) comes on demand.
type python struct {
	g       *guesser
	path    []string // where modules are looked for, in order
	tag     string   // of byte code and extension modules: cpython-311
	frozen  map[string]bool
	mu      sync.Mutex
	modules map[string]bool // asked for already; guarded by mu
}

// A pythonFile is a module that was found.
type pythonFile struct {
	name string // dotted
	pkg  string // what its relative imports start from
	file string
	row  tree.Row
	elf  bool
}

// python follows args if its program is a Python interpreter. hops are the paths its name leads through, links
// included: a virtual environment's modules lie beside a link.
func (g *guesser) python(ctx context.Context, hops, args []string) {
	minor := ""
	for _, h := range hops {
		m := pythonName.FindStringSubmatch(path.Base(h))
		if m == nil && minor == "" {
			return
		}
		if m != nil && m[1] != "" {
			minor = m[1]
		}
	}
	p := &python{g: g, modules: map[string]bool{}}
	source, module, dir := p.program(ctx, args)
	p.path = append(p.path, dir)
	p.path = append(p.path, strings.Split(envOf(g.env, "PYTHONPATH", ""), ":")...)
	for _, h := range hops {
		prefix := path.Join(path.Dir(h), "..")
		for v := pythonVersions; minor == "" && v >= 0; v-- {
			if _, ok := g.lookup(fmt.Sprintf("%s/lib/python3.%d/os.py", prefix, v)); ok {
				minor = fmt.Sprint(v)
			}
		}
		std := prefix + "/lib/python3." + minor
		p.path = append(p.path, std, std+"/lib-dynload", prefix+"/local/lib/python3."+minor+"/dist-packages", std+"/site-packages",
			prefix+"/lib/python3/dist-packages")
	}
	p.tag = "cpython-3" + minor
	if n, err := strconv.Atoi(minor); err == nil && n >= 11 {
		p.frozen = frozen
	}
	for _, name := range []string{"/etc/localtime", "/usr/lib/locale/C.utf8/LC_CTYPE", "/usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache"} {
		g.file(name)
	}
	names := append([]string{"encodings", "encodings.aliases", "encodings.utf_8", "sitecustomize", "usercustomize"}, module...)
	p.follow(ctx, append(names, imports(source, "", true)...))
}

// program is what the interpreter runs: source text, or a module, and the directory its own modules lie in.
func (p *python) program(ctx context.Context, args []string) (source []byte, module []string, dir string) {
	for i := 0; i < len(args); i++ {
		switch a := args[i]; {
		case a == "-c" && i+1 < len(args):
			return []byte(args[i+1]), nil, p.g.workdir
		case strings.HasPrefix(a, "-c") && len(a) > 2:
			return []byte(a[2:]), nil, p.g.workdir
		case a == "-m" && i+1 < len(args):
			return nil, []string{"runpy", args[i+1], args[i+1] + ".__main__"}, p.g.workdir
		case a == "-W" || a == "-X":
			i++
		case !strings.HasPrefix(a, "-"):
			if !path.IsAbs(a) {
				a = path.Join("/", p.g.workdir, a)
			}
			row, ok := p.g.file(a)
			if !ok {
				return nil, nil, path.Dir(a)
			}
			return p.read(ctx, row), nil, path.Dir(a)
		}
	}
	return nil, nil, p.g.workdir
}

// follow finds modules and what they import. Several are read at once, in the order in which they were found.
func (p *python) follow(ctx context.Context, names []string) {
	var queue []pythonFile
	for _, n := range names {
		queue = append(queue, p.find(n)...)
	}
	done := make(chan []pythonFile, pythonReaders)
	for running := 0; len(queue) > 0 || running > 0; {
		for ; len(queue) > 0 && running < pythonReaders; queue = queue[1:] {
			running++
			f := queue[0]
			go func() { done <- p.load(ctx, f) }()
		}
		queue = append(queue, <-done...) // bounded: a load reads one bounded file, with ctx
		running--
	}
}

// load is the modules that f imports.
func (p *python) load(ctx context.Context, f pythonFile) (found []pythonFile) {
	if f.elf {
		p.g.libraries(ctx, f.row, path.Dir(f.file))
		return nil
	}
	for _, n := range imports(p.read(ctx, f.row), f.pkg, false) {
		found = append(found, p.find(n)...)
	}
	return found
}

func (p *python) read(ctx context.Context, row tree.Row) []byte {
	if ctx.Err() != nil || p.g.table.Size(row) == 0 {
		return nil
	}
	b := make([]byte, min(p.g.table.Size(row), pythonSource))
	n, _ := p.g.open(ctx, row).ReadAt(b, 0)
	return b[:n]
}

// find is the files of a dotted name that nobody asked for yet: importing a.b imports a.
func (p *python) find(name string) (files []pythonFile) {
	for at := 0; at < len(name); at++ {
		end := strings.IndexByte(name[at:], '.')
		if end < 0 {
			end = len(name) - at
		}
		at += end
		part := name[:at]
		p.mu.Lock()
		known := p.modules[part] || len(p.modules) >= pythonModules || p.frozen[part]
		p.modules[part] = true
		p.mu.Unlock()
		if known {
			continue
		}
		if f, ok := p.module(part); ok {
			files = append(files, f)
		}
	}
	return files
}

// module looks for a module as the interpreter would: a package, an extension, source.
func (p *python) module(name string) (f pythonFile, ok bool) {
	rel := strings.ReplaceAll(name, ".", "/")
	for _, dir := range p.path {
		base := path.Join("/", dir, rel)
		if row, ok := p.g.file(base + "/__init__.py"); ok {
			p.g.file(base + "/__pycache__/__init__." + p.tag + ".pyc")
			return pythonFile{name: name, pkg: name, file: base + "/__init__.py", row: row}, true
		}
		pkg, _ := cutLast(name)
		for _, arch := range []string{"." + p.tag + "-x86_64-linux-gnu", "." + p.tag + "-aarch64-linux-gnu", ".abi3", ""} {
			if row, ok := p.g.lookup(base + arch + ".so"); ok {
				return pythonFile{name: name, pkg: pkg, file: base + arch + ".so", row: row, elf: true}, true
			}
		}
		if row, ok := p.g.file(base + ".py"); ok {
			d, b := path.Split(base)
			p.g.file(d + "__pycache__/" + b + "." + p.tag + ".pyc")
			return pythonFile{name: name, pkg: pkg, file: base + ".py", row: row}, true
		}
	}
	return f, false
}

func cutLast(name string) (before, after string) {
	i := strings.LastIndexByte(name, '.')
	if i < 0 {
		return "", name
	}
	return name[:i], name[i+1:]
}

// imports is the dotted names that Python source imports when it is loaded as (or in) package pkg, or run as the main
// program. From "from a import b" come a and a.b, because b may be a module. It reads lines, not the grammar: what it
// takes for an import and is none costs a look-up.
func imports(source []byte, pkg string, main bool) (names []string) {
	var (
		quote   string // that a string over several lines ends with
		skip    bool   // inside a block that is not run when the module is loaded
		skipTo  int    // its indentation
		pending string // a statement in parentheses, or one that goes on after a backslash
	)
	for line := range bytes.Lines(source) {
		text := string(bytes.TrimRight(line, " \t\r\n"))
		if quote != "" {
			_, rest, ends := strings.Cut(text, quote)
			if !ends {
				continue
			}
			quote = openQuote(rest)
			continue
		}
		if pending != "" {
			text = pending + " " + strings.TrimSpace(uncomment(text))
			pending = ""
		} else {
			words := strings.TrimLeft(text, " \t")
			if words == "" || words[0] == '#' {
				continue
			}
			indent := len(text) - len(words)
			if skip && indent > skipTo {
				quote = openQuote(words)
				continue
			}
			skip = passedOver(words, main)
			skipTo = indent
			quote = openQuote(words)
			text = uncomment(words)
		}
		if !strings.HasPrefix(text, "import ") && !strings.HasPrefix(text, "from ") && !strings.Contains(text, ";") {
			continue
		}
		if len(text) < 64<<10 && (strings.HasSuffix(text, "\\") || strings.Count(text, "(") > strings.Count(text, ")")) {
			pending = strings.TrimSuffix(text, "\\")
			continue
		}
		for _, statement := range strings.Split(text, ";") {
			names = append(names, imported(strings.TrimSpace(statement), pkg)...)
		}
	}
	return names
}

// passedOver reports whether a line begins a block that is not run when a module is loaded.
func passedOver(line string, main bool) bool {
	for _, head := range []string{"def ", "async ", "class ", "except", "if TYPE_CHECKING", "if typing.TYPE_CHECKING"} {
		if strings.HasPrefix(line, head) {
			return true
		}
	}
	return !main && strings.HasPrefix(line, "if __name__")
}

// openQuote is the triple quote that a line leaves open, or "".
func openQuote(line string) string {
	for {
		i := strings.IndexAny(line, `"'#`)
		if i < 0 || line[i] == '#' {
			return ""
		}
		q := line[i : i+1]
		if strings.HasPrefix(line[i:], q+q+q) {
			q += q + q
		}
		_, rest, closed := strings.Cut(line[i+len(q):], q)
		if !closed {
			if len(q) == 3 {
				return q
			}
			return ""
		}
		line = rest
	}
}

func uncomment(line string) string {
	before, _, _ := strings.Cut(line, "#")
	return strings.TrimRight(before, " \t")
}

// imported is the names of one statement.
func imported(statement, pkg string) (names []string) {
	if rest, ok := strings.CutPrefix(statement, "import "); ok {
		for _, n := range strings.Split(rest, ",") {
			if n = firstWord(n); n != "" {
				names = append(names, n)
			}
		}
		return names
	}
	rest, ok := strings.CutPrefix(statement, "from ")
	if !ok {
		return nil
	}
	from, what, ok := strings.Cut(rest, " import")
	if !ok {
		return nil
	}
	from = strings.TrimSpace(from)
	if trimmed := strings.TrimLeft(from, "."); len(trimmed) < len(from) {
		// One dot is the package itself, each further one the package around it.
		base := pkg
		for range len(from) - len(trimmed) - 1 {
			base, _ = cutLast(base)
		}
		from = strings.Trim(base+"."+trimmed, ".")
	}
	if from == "" {
		return nil
	}
	names = append(names, from)
	for _, n := range strings.Split(strings.Trim(what, " ()"), ",") {
		if n = firstWord(n); n != "" && n != "*" {
			names = append(names, from+"."+n)
		}
	}
	return names
}

// firstWord is the name in "name as other".
func firstWord(s string) string {
	f := strings.Fields(s)
	if len(f) == 0 || strings.ContainsAny(f[0], "/\x00\"'(") || strings.HasPrefix(f[0], ".") {
		return ""
	}
	return f[0]
}
