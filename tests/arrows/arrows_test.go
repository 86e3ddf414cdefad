// Package arrows keeps the arrows of docs/design.md section 3: which of our packages may import
// which, and which one owns each outside library. It lists what is allowed, so a new import is a
// decision that somebody writes down here.
package arrows

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/muster-hpc/muster/"

// allowed names, for each product package, the packages of ours that it may import, and why the list
// is not longer.
var allowed = map[string]struct {
	imports []string
	why     string
}{
	"ztoc/inflate":          {nil, "the decoder is arithmetic over bytes: it knows neither our words nor files"},
	"ztoc/twosum":           {nil, "a kernel for SHA-256: it knows bytes only"},
	"ztoc":                  {[]string{"ztoc/inflate", "ztoc/twosum"}, "ztoc holds the words everybody says; it imports nothing of ours but its decoder and its sums"},
	"lazyfs/tree":           {[]string{"ztoc"}, "the table knows nothing of FUSE, stores or networks"},
	"lazyfs":                {[]string{"lazyfs/tree", "ztoc"}, "the server reads through its own Blobs interface: it knows no store and no origin"},
	"lazyfs/mountd":         {[]string{"lazyfs", "lazyfs/tree", "ztoc", "agent/store"}, "a mount's process reads the store and links no registry client"},
	"agent/origin":          {[]string{"ztoc"}, "origin knows how to ask registries, not what is done with the answers"},
	"agent/store":           {[]string{"ztoc"}, "the store keeps ranges of blobs and knows nobody who fills or reads it"},
	"agent/fetch":           {[]string{"ztoc"}, "the chain sees store and origin through interfaces that it owns"},
	"agent/fetch/fetchtest": {[]string{"agent/fetch", "ztoc"}, "a conformance suite knows the interface it is about and nothing more"},
	"agent/control":         {[]string{"ztoc"}, "who asks the agent, hooks and mounts too, links the questions and the words, nothing else"},
	"agent/image": {
		[]string{"agent/origin", "agent/store", "agent/fetch", "lazyfs", "lazyfs/tree", "ztoc"},
		"image is the one place that puts an image together; mounting it is its caller's business",
	},
	"planner":           {[]string{"ztoc"}, "a plan is a pure function of a job spec: it knows digests and ranges, and nothing that two hosts could see differently"},
	"planner/sim":       {[]string{"planner", "costmodel", "ztoc"}, "simulated clusters run real plans and are held against the formulas; nothing in them moves"},
	"planner/sim/trees": {[]string{"planner/sim"}, "prints the tables of docs/trees.md"},
	"jobhooks":          {[]string{"agent/control"}, "a job and a verdict are words: hooks ask the agent, and know nothing behind it"},
	"jobhooks/slurm":    {[]string{"jobhooks", "jobhooks/hostlist", "agent/control"}, "one scheduler's language, as pure functions: files and processes are the command's business"},
	"jobhooks/hostlist": {nil, "a list of hosts is text: who reads one needs nothing else"},
	"costmodel":         {nil, "arithmetic over numbers that others bring: planner and cmd ask it, it asks nobody"},
	"chart":             {nil, "pages and charts know what is drawn, not what it means"},
	"report":            {[]string{"agent/control", "costmodel", "ztoc"}, "a report is arithmetic over what agents remember; fetching that and drawing it is others' business"},
	"agent": {
		[]string{
			"agent/control", "agent/fetch", "agent/image", "agent/origin", "agent/store", "peer", "planner",
			"lazyfs", "lazyfs/mountd", "lazyfs/tree", "ztoc",
		},
		"the daemon puts store, origin, planner and peers together; it knows no scheduler and no configuration file",
	},
	"configs":       {nil, "files for administrators, and nothing else"},
	"agent/runtime": {nil, "running a command over a root is about namespaces, not about images"},
	"peer":          {[]string{"ztoc"}, "the swarm carries bytes and asks through interfaces that it owns: it knows no plan, no store and no agent"},
	"peer/peertest": {[]string{"peer", "ztoc"}, "a conformance suite knows the interface it is about and nothing more"},
	"cmd/muster": {
		[]string{
			"agent/origin", "agent/store", "agent/fetch", "agent/image", "agent/runtime",
			"agent", "agent/control", "peer", "planner", "jobhooks", "jobhooks/hostlist", "jobhooks/slurm", "configs",
			"lazyfs", "lazyfs/tree", "lazyfs/mountd", "ztoc", "costmodel", "report", "chart", "tests/registry",
		},
		"the command puts packages together; the demo alone uses the test registry",
	},
}

// owners says where an outside library may be imported, tests and everything under tests/ included
// where it says so.
var owners = []struct {
	library string
	in      []string
	tests   bool // may *_test.go files and packages under tests/ use it too
	why     string
}{
	{"github.com/hanwen/go-fuse", []string{"lazyfs"}, false, "the FUSE protocol is lazyfs' subject alone"},
	{"github.com/google/go-containerregistry", []string{"agent/origin"}, true, "only origin talks to registries, so only origin has to get tokens and redirects right"},
	{"github.com/klauspost/compress", []string{"ztoc"}, true, "how layers are compressed is ztoc's subject alone"},
	{"github.com/google/flatbuffers", []string{"ztoc"}, false, "SOCI's file format is ztoc's subject alone"},
	{"github.com/hashicorp/memberlist", []string{"peer"}, false, "membership is one file of peer; nothing else needs gossip to be up"},
	{"google.golang.org/grpc", []string{"peer", "agent/control"}, false, "gRPC carries questions: between hosts, and on the local socket"},
	{"github.com/prometheus", []string{"agent"}, false, "what the agent counts is told in one file of it"},
	{"github.com/spf13/cobra", []string{"cmd/muster"}, false, "flags and commands live in cmd and nowhere else"},
	{"github.com/spf13/pflag", []string{"cmd/muster"}, false, "flags and commands live in cmd and nowhere else"},
	{"github.com/spf13/viper", []string{"cmd/muster"}, false, "the configuration file is known to cmd only"},
}

// A mount lives long and there are many on a host: what its process links is memory on every one.
var notLinked = map[string][]string{
	"lazyfs/mountd": {"github.com/google/go-containerregistry", "github.com/hashicorp/memberlist", "github.com/prometheus"},
	"lazyfs":        {"net/http"},
	"ztoc":          {"net", "net/http"},
}

type pkg struct {
	ImportPath                               string
	Imports, TestImports, XTestImports, Deps []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,TestImports,XTestImports,Deps", module+"...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module)
		all = append(all, p)
	}
	if len(all) < 3 {
		t.Fatalf("go list found only %d packages", len(all))
	}
	return all
}

func TestArrows(t *testing.T) {
	for _, p := range list(t) {
		if strings.HasPrefix(p.ImportPath, "tests/") {
			continue // what tests are made of may use everything
		}
		rule, known := allowed[p.ImportPath]
		if !known {
			t.Errorf("package %s is not in the list: say in docs/design.md section 3 what it is for, and here what it may import", p.ImportPath)
			continue
		}
		for _, i := range p.Imports {
			ours, ok := strings.CutPrefix(i, module)
			if ok && !slices.Contains(rule.imports, ours) {
				t.Errorf("%s imports %s: %s", p.ImportPath, ours, rule.why)
			}
		}
	}
}

func TestOneLibraryOneOwner(t *testing.T) {
	under := func(importPath, library string) bool {
		return importPath == library || strings.HasPrefix(importPath, library+"/")
	}
	for _, p := range list(t) {
		for _, o := range owners {
			product := slices.ContainsFunc(p.Imports, func(i string) bool { return under(i, o.library) })
			test := slices.ContainsFunc(slices.Concat(p.TestImports, p.XTestImports), func(i string) bool { return under(i, o.library) })
			if strings.HasPrefix(p.ImportPath, "tests/") {
				product, test = false, product || test
			}
			if slices.Contains(o.in, p.ImportPath) {
				continue
			}
			if product || (test && !o.tests) {
				t.Errorf("%s imports %s, which belongs to %s: %s", p.ImportPath, o.library, strings.Join(o.in, ", "), o.why)
			}
		}
	}
}

func TestNotLinked(t *testing.T) {
	for _, p := range list(t) {
		for _, d := range p.Deps {
			for _, bad := range notLinked[p.ImportPath] {
				if d == bad || (strings.Contains(bad, ".") && strings.HasPrefix(d, bad)) {
					t.Errorf("%s links %s, which it must not: a mount's process stays small, and ztoc touches no network", p.ImportPath, d)
				}
			}
		}
	}
}
