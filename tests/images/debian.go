package images

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// The packages that make the roots, beyond Debian's minimal base, and how they are dealt into layers:
// each group is the packages named and whatever they need that no group before has.
var (
	pythonPackages = []string{"ca-certificates", "perl", "binutils", "python3", "libopenblas0-pthread", "python3-numpy"}
	pythonGroups   = []group{
		{"base", []string{"apt", "bash", "coreutils", "util-linux", "login", "passwd", "e2fsprogs"}, true},
		{"tools", []string{"ca-certificates", "perl", "binutils"}, false},
		{"python", []string{"python3"}, false},
		{"blas", []string{"libopenblas0-pthread", "libgfortran5"}, false},
		{"numpy", []string{"python3-numpy"}, false},
	}
	scipyPackages = append(pythonPackages, "python3-scipy")
	scipyGroups   = append(pythonGroups[:len(pythonGroups):len(pythonGroups)],
		group{"compiler", []string{"g++"}, false},
		group{"scipy", []string{"python3-scipy"}, false},
	)
)

// A group is a layer's name and the packages that start it.
type group struct {
	name      string
	seeds     []string
	essential bool // with the packages that Debian says every system has
}

// buildPython makes debian-python.
func buildPython(ctx context.Context, b *build) error {
	return buildDebian(ctx, b, "debian-python", "", pythonPackages, pythonGroups)
}

// buildScipy makes debian-scipy and one-layer.
func buildScipy(ctx context.Context, b *build) error {
	return buildDebian(ctx, b, "debian-scipy", "one-layer", scipyPackages, scipyGroups)
}

// buildDebian makes a Debian root with packages and writes it as image name, a layer for each group,
// one for what a site would add and one for what belongs to no package; and, if one is a name, as an
// image of one layer.
func buildDebian(ctx context.Context, b *build, name, one string, packages []string, groups []group) error {
	scratch, err := b.scratch()
	if err != nil {
		return err
	}
	archive := filepath.Join(scratch, "root.tar")
	if err := bootstrap(ctx, archive, packages); err != nil {
		return err
	}
	root, err := openRoot(archive)
	if err != nil {
		return err
	}
	defer root.close()
	p, err := root.deal(groups)
	if err != nil {
		return err
	}

	// The one big layer first: it takes as long as all others together.
	layers := make([]Blob, len(p))
	var single Blob
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, runtime.NumCPU()))
	if one != "" {
		g.Go(func() (err error) {
			single, err = root.writeLayer(ctx, scratch, root.all())
			return err
		})
	}
	for i, members := range p {
		g.Go(func() (err error) {
			layers[i], err = root.writeLayer(ctx, scratch, members)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	config := RunConfig{Env: []string{PathEnv, "LANG=C.UTF-8"}, Cmd: []string{"python3"}}
	if err := WriteImage(b.layout(name), Image{Layers: layers, Config: config, Comment: name}); err != nil {
		return err
	}
	if one == "" {
		return nil
	}
	return WriteImage(b.layout(one), Image{Layers: []Blob{single}, Config: config, Comment: one})
}

// suite is the release of Debian that the roots are made of.
const suite = "bookworm"

// bootstrap has mmdebstrap make a root with packages and write it as a tar archive to path.
func bootstrap(ctx context.Context, path string, packages []string) error {
	sources, err := aptSources(ctx)
	if err != nil {
		return err
	}
	cmd, err := command(ctx, "mmdebstrap", "mmdebstrap",
		"--quiet", "--variant=minbase", "--format=tar", "--include="+strings.Join(packages, ","), suite, path, "-")
	if err != nil {
		return err
	}
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", Epoch.Unix()), "LC_ALL=C")
	cmd.Stdin = strings.NewReader(sources)
	if out, err := run(cmd); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, tail(out, 2000))
	}
	return nil
}

// aptSources is where this machine's apt gets Debian packages from, as a sources.list.
func aptSources(ctx context.Context) (string, error) {
	list := func() (string, error) {
		cmd, err := command(ctx, "apt", "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)",
			"Created-By: Packages", "Origin: Debian")
		if err != nil {
			return "", err
		}
		out, err := run(cmd)
		if err != nil {
			return "", fmt.Errorf("asking apt for its sources: %w\n%s", err, tail(out, 2000))
		}
		lines := map[string]bool{}
		var b strings.Builder
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if len(f) != 4 || f[0] != suite && !strings.HasPrefix(f[0], suite+"-") || lines[line] {
				continue
			}
			lines[line] = true
			fmt.Fprintf(&b, "deb %s %s %s\n", f[1], f[2], f[3])
		}
		return b.String(), nil
	}
	sources, err := list()
	if err != nil || sources != "" {
		return sources, err
	}
	// apt knows whose packages a mirror has only after it has asked once.
	cmd, err := command(ctx, "apt", "apt-get", "update", "-qq")
	if err != nil {
		return "", err
	}
	if out, err := run(cmd); err != nil {
		return "", fmt.Errorf("apt-get update: %w\n%s", err, tail(out, 2000))
	}
	if sources, err = list(); err == nil && sources == "" {
		err = fmt.Errorf("this machine's apt has no mirror of Debian %s: the Debian test images need one", suite)
	}
	return sources, err
}

// command is a program that ends when ctx or this process does. A missing one is an error that names
// the Debian package to install.
func command(ctx context.Context, pkg, name string, args ...string) (*exec.Cmd, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("%s is missing: apt-get install %s (or run tests/setup)", name, pkg)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	return cmd, nil
}

// run runs cmd and returns all that it printed.
func run(cmd *exec.Cmd) (string, error) {
	// Pdeathsig is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// tail is the last n bytes of s.
func tail(s string, n int) string { return s[max(0, len(s)-n):] }
