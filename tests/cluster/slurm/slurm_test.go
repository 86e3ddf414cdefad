package slurm_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/cluster/slurm"
	"github.com/muster-hpc/muster/tests/images"
)

// The program and the plug-in under test, built once.
var binary, plugin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "muster-slurm-")
	if err == nil {
		err = os.Chmod(dir, 0o755) // users run what is in it
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary, plugin = filepath.Join(dir, "muster"), filepath.Join(dir, "plugin")
	build := exec.Command("go", "build", "-o", binary, "../../../cmd/muster")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building muster: %v\n%s", err, out)
		return 1
	}
	if err := slurm.BuildPlugin("../../..", plugin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// A cluster is a Slurm in a test.
type cluster struct {
	*slurm.Cluster
	t testing.TB
}

func newCluster(t testing.TB, nodes int, conf string) *cluster {
	t.Helper()
	dir := t.TempDir()
	for d := dir; len(d) > len(os.TempDir()); d = filepath.Dir(d) { // users work in it
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c, err := slurm.New(t.Context(), slurm.Options{Nodes: nodes, Dir: dir, Muster: binary, Plugin: plugin, Conf: conf})
	if err != nil {
		for _, f := range []string{"slurmctld.log", "h0/slurmctld.out", "h1/slurmd.log", "h1/slurmd.out", "h1/agent.log", "h0/munged.out"} {
			b, _ := os.ReadFile(filepath.Join(dir, f))
			t.Logf("-- %s\n%s", f, b[max(0, len(b)-4000):])
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "slurmctld.log"))
			t.Logf("-- slurmctld.log\n%s", b[max(0, len(b)-6000):])
			t.Log(c.Logs("slurmd.log", 4000))
			t.Log(c.Logs("agent.log", 2000))
		}
		c.Close()
	})
	return &cluster{c, t}
}

// push copies a test image to the cluster's registry.
func (c *cluster) push(name string) string {
	c.t.Helper()
	dir, err := images.Get(name)
	if err != nil {
		c.t.Fatal(err)
	}
	ref, err := c.Push(c.t.Context(), name, dir)
	if err != nil {
		c.t.Fatal(err)
	}
	return ref
}

// ok runs a command as ada, which has to succeed, and gives the lines of its output, sorted.
func (c *cluster) ok(name string, args ...string) []string {
	c.t.Helper()
	r := c.Run(c.Users[0], name, args...)
	c.t.Logf("%s %s: code %d\n%s%s", name, strings.Join(args, " "), r.Code, r.Out, r.Err)
	if r.Code != 0 {
		c.t.Fatalf("%s %s: code %d", name, strings.Join(args, " "), r.Code)
	}
	lines := strings.Split(strings.TrimSpace(r.Out), "\n")
	slices.Sort(lines)
	return lines
}

// idle waits until every node is idle again: no job, nothing drained.
func (c *cluster) idle() {
	c.t.Helper()
	if err := c.Await(c.t.Context(), 2*time.Minute, "idle nodes", func() bool {
		out, err := c.Slurm("sinfo", "-h", "-t", "idle", "-o", "%D")
		return err == nil && strings.TrimSpace(out) == fmt.Sprint(len(c.Nodes))
	}); err != nil {
		out, _ := c.Slurm("sinfo", "-N", "-o", "%N %T %E")
		c.t.Errorf("%v:\n%s", err, out)
	}
}

// clean waits until no node has anything of a job any more, and all are idle.
func (c *cluster) clean() {
	c.t.Helper()
	left := map[string]string{}
	if err := c.Await(c.t.Context(), 2*time.Minute, "end of epilogs", func() bool {
		clear(left)
		for _, h := range c.Nodes {
			script := "grep 'fuse.muster\\|muster-root' /proc/mounts; cd " + h.Dir + " && ls jobs mounts 2>/dev/null | grep -v :$"
			out, _ := h.Command("sh", "-c", script).CombinedOutput()
			if s := strings.TrimSpace(string(out)); s != "" {
				left[h.Name] = s
			}
		}
		return len(left) == 0
	}); err != nil {
		c.t.Errorf("%v: left behind: %q", err, left)
	}
	c.idle()
}

func TestSlurm(t *testing.T) {
	c := newCluster(t, 4, "")
	ref := c.push("debian-python")

	t.Run("numpy on every node", func(t *testing.T) {
		c.t = t
		program := `import numpy, os; print(os.uname().nodename, os.getuid(), numpy.arange(5).sum(), numpy.__file__, os.environ["GREETING"], os.getcwd(), sep="|")`
		lines := c.ok("env", "GREETING=hi", "srun", "-N4", "--image="+ref, "python3", "-c", program)
		for i, h := range c.Nodes {
			if want := fmt.Sprintf("%s|4711|10|/usr/lib/python3/dist-packages/numpy/__init__.py|hi|%s", h.Name, c.Users[0].Home); lines[i] != want {
				t.Errorf("%q, want %q", lines[i], want)
			}
		}
		c.clean()
	})
}
