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

	"github.com/muster-hpc/muster/tests/cluster/lab"
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

func newCluster(t testing.TB, o slurm.Options) *cluster {
	t.Helper()
	dir := t.TempDir()
	o.Dir, o.Muster, o.Plugin = dir, binary, plugin
	for d := dir; len(d) > len(os.TempDir()); d = filepath.Dir(d) { // users work in it
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c, err := slurm.New(t.Context(), o)
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

// index pushes an index beside an image, so that it can be mounted before its bytes are there.
func (c *cluster) index(name string) {
	c.t.Helper()
	store := filepath.Join(c.t.TempDir(), "store")
	cmd := exec.Command(binary, "--store-dir", store, "--quiet", "--origin-plain-http", c.Direct(), "index", "push", "--min-layer", "1", c.Direct()+"/"+name+":latest")
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("index push: %v: %s", err, out)
	}
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

// start starts the agent of a node again.
func (c *cluster) start(h *lab.Host) {
	c.t.Helper()
	if err := c.Start(c.t.Context(), lab.StartOptions{Set: c.Settings(nil)}, h); err != nil {
		c.t.Fatal(err)
	}
}

// idle waits until every node is idle again: no job, nothing drained.
func (c *cluster) idle() {
	c.t.Helper()
	if err := c.Await(c.t.Context(), bound, "idle nodes", func() bool {
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
	if err := c.Await(c.t.Context(), bound, "end of epilogs", func() bool {
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

// fails runs a command as ada, which must not succeed and whose standard error must have all of want.
func (c *cluster) fails(want []string, name string, args ...string) slurm.Result {
	c.t.Helper()
	r := c.Run(c.Users[0], name, args...)
	c.t.Logf("%s %s: code %d\n%s%s", name, strings.Join(args, " "), r.Code, r.Out, r.Err)
	if r.Code == 0 {
		c.t.Errorf("%s %s: code 0", name, strings.Join(args, " "))
	}
	for _, w := range want {
		if !strings.Contains(r.Err, w) {
			c.t.Errorf("%s does not say %q", name, w)
		}
	}
	return r
}

// batch submits a script as ada, whose lines after the first are given, and returns the job's ID and the file with its output.
func (c *cluster) batch(lines ...string) (id, out string) {
	c.t.Helper()
	home := c.Users[0].Home
	script := filepath.Join(home, fmt.Sprintf("job%d.sh", time.Now().UnixNano()))
	if err := os.WriteFile(script, []byte("#!/bin/bash\n"+strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		c.t.Fatal(err)
	}
	id = c.ok("sbatch", "--parsable", "--output="+script+".out", script)[0]
	return id, script + ".out"
}

// until waits until what Slurm knows of a job has all of want.
func (c *cluster) until(id string, want ...string) string {
	c.t.Helper()
	var out string
	if err := c.Await(c.t.Context(), bound, fmt.Sprintf("job with %q", want), func() bool {
		out, _ = c.Slurm("scontrol", "show", "job", id)
		return !slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(out, w) })
	}); err != nil {
		c.t.Fatalf("%v: %s", err, out)
	}
	return out
}

// finished waits for the end of a job and gives the lines of its output.
func (c *cluster) finished(id, out string) []string {
	c.t.Helper()
	c.until(id, "JobState=COMPLETED")
	b, err := os.ReadFile(out)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Logf("%s", b)
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// cancel ends a job.
func (c *cluster) cancel(id string) {
	c.t.Helper()
	if _, err := c.Slurm("scancel", id); err != nil {
		c.t.Error(err)
	}
}

// bound is how long anything may take: much longer than it should, so that a busy machine is no failure.
const bound = 2 * time.Minute

// inside prints where a task finds itself.
const inside = `import os; print(os.uname().nodename, os.getuid(), os.path.exists("/etc/apt/sources.list.d"), os.environ.get("MUSTER_JOB"))`

func TestSlurm(t *testing.T) {
	c := newCluster(t, slurm.Options{Nodes: 4})
	ref := c.push("debian-python")
	// What only the host has, and the image has not.
	const hostOnly = "/usr/sbin/slurmd"

	run := func(name string, f func()) {
		t.Run(name, func(t *testing.T) {
			was := c.t
			c.t = t
			defer func() { c.t = was }()
			f()
			c.clean()
		})
	}

	run("numpy on every node", func() {
		program := `import numpy, os; print(os.uname().nodename, os.getuid(), numpy.arange(5).sum(), numpy.__file__, os.environ["GREETING"], os.getcwd(), sep="|")`
		lines := c.ok("env", "GREETING=hi", "srun", "-N4", "--image="+ref, "python3", "-c", program)
		for i, h := range c.Nodes {
			if want := fmt.Sprintf("%s|4711|10|/usr/lib/python3/dist-packages/numpy/__init__.py|hi|%s", h.Name, c.Users[0].Home); lines[i] != want {
				c.t.Errorf("%q, want %q", lines[i], want)
			}
		}
	})

	run("muster doctor", func() {
		if out, err := c.Muster(c.Nodes[0], "doctor", ref); err != nil {
			c.t.Errorf("%v: %s", err, out)
		} else {
			c.t.Log(out)
		}
		file := filepath.Join(c.Nodes[0].Dir, "spank_muster.so")
		if err := os.Rename(file, file+".gone"); err != nil {
			c.t.Fatal(err)
		}
		out, err := c.Muster(c.Nodes[0], "doctor", strings.Replace(ref, "debian-python", "no-such-thing", 1))
		if err == nil || !strings.Contains(out, "the plug-in: stat "+c.Dir) || !strings.Contains(out, "404") || strings.Count(out, "\nfail ") != 2 {
			c.t.Errorf("%v: %s", err, out)
		}
		if err := os.Rename(file+".gone", file); err != nil {
			c.t.Fatal(err)
		}
	})

	run("a batch script", func() {
		id, out := c.batch("#SBATCH -N4 --image="+ref, `echo "script $SLURM_JOB_ID"; ls -d `+hostOnly+` "$MUSTER_ROOTFS/usr/lib/python3"`,
			`srun -l sh -c 'ls `+hostOnly+` 2>&1; id -un; echo "$MUSTER_JOB $PATH"; test -w /tmp && touch /new "$HOME/new-$SLURM_PROCID" && echo writable'`,
			"srun -N1 -n1 --image=none ls "+hostOnly)
		lines := c.finished(id, out)
		if lines[0] != "script "+id || !strings.HasSuffix(lines[1], "/rootfs/usr/lib/python3") || lines[2] != hostOnly || lines[len(lines)-1] != hostOnly {
			c.t.Errorf("%q", lines)
		}
		for i := range c.Nodes {
			var mine []string
			for _, l := range lines {
				if s, ok := strings.CutPrefix(l, fmt.Sprintf("%d: ", i)); ok {
					mine = append(mine, s)
				}
			}
			if len(mine) != 4 || !strings.Contains(mine[0], "No such file") || mine[1] != "ada" || !strings.HasPrefix(mine[2], "slurm-"+id+" /usr/local/sbin:") || mine[3] != "writable" {
				c.t.Errorf("task %d: %q", i, mine)
			}
			if _, err := os.Stat(filepath.Join(c.Users[0].Home, fmt.Sprintf("new-%d", i))); err != nil {
				c.t.Error(err)
			}
		}
		if _, err := os.Stat("/new"); err == nil {
			c.t.Error("a task has written into the host's root")
		}
	})

	run("a comment, without the plug-in's option", func() {
		lines := c.ok("srun", "-N2", "--comment=a note, image="+ref, "sh", "-c", "ls -d "+hostOnly+" $MUSTER_ROOTFS/usr/lib/python3")
		if len(lines) != 4 || !strings.Contains(strings.Join(lines, " "), "/rootfs/usr/lib/python3") {
			c.t.Errorf("%q", lines)
		}
	})

	run("an image of a step's own", func() {
		c.ok("salloc", "-N2", "srun", "--image="+ref, "python3", "-c", inside)
	})

	run("F33 a wrong image", func() {
		wrong := strings.Replace(ref, "debian-python", "no-such-thing", 1)
		id, _ := c.batch("#SBATCH -N4 --image="+wrong, "srun hostname")
		job := c.until(id, "JobState=PENDING", "held", "AdminComment=muster:")
		for _, want := range []string{wrong, "h1", "404", "check name and tag"} {
			if !strings.Contains(job, want) {
				c.t.Errorf("what the owner reads has no %q: %s", want, job)
			}
		}
		c.cancel(id)
		if r := c.fails([]string{wrong, "404", "check name and tag", "node h1"}, "srun", "-N2", "--image="+wrong, "hostname"); strings.Contains(r.Out, "h1") {
			c.t.Error("a task ran outside of its image")
		}
	})

	run("F33 a name that is none", func() {
		c.fails([]string{"blanks"}, "srun", "--image=a b", "hostname")
		id, _ := c.batch("#SBATCH -N1 --image=UPPER/case", "srun hostname")
		c.until(id, "JobState=PENDING", "held", "AdminComment=muster:", "lower case")
		c.cancel(id)
		id, _ = c.batch("#SBATCH -N1 --image=oci:/root", "srun hostname")
		c.until(id, "JobState=PENDING", "held", "AdminComment=muster:", "from a registry")
		c.cancel(id)
	})

	run("a node without the plug-in", func() {
		file := filepath.Join(c.Nodes[2].Dir, "spank_muster.so")
		if err := os.Rename(file, file+".gone"); err != nil {
			c.t.Fatal(err)
		}
		r := c.fails([]string{"h3: task 2: Exited with exit code 1"}, "srun", "-N4", "--image="+ref, "python3", "-c", inside)
		if strings.Contains(r.Out, "h3 4711") {
			c.t.Error("a task ran outside of its image")
		}
		if !strings.Contains(r.Out, "node h3 has not entered it, its Slurm plug-in is missing") {
			c.t.Error("nobody says why")
		}
		// What has no image does not care.
		if lines := c.ok("srun", "-N4", "hostname"); len(lines) != 4 {
			c.t.Errorf("%q", lines)
		}
		if err := os.Rename(file+".gone", file); err != nil {
			c.t.Fatal(err)
		}
	})

	run("an agent is killed", func() {
		home := c.Users[0].Home
		id, out := c.batch("#SBATCH -N4 --image="+ref, "srun -l sh -c 'touch "+home+"/runs-$SLURM_PROCID; while [ ! -e "+home+"/go ]; do sleep 0.1; done; python3 -c \"import numpy; print(numpy.ones(3).sum())\"'")
		if err := c.Await(c.t.Context(), bound, "tasks", func() bool {
			found, _ := filepath.Glob(home + "/runs-*")
			return len(found) == 4
		}); err != nil {
			c.t.Fatal(err)
		}
		c.Nodes[1].Kill()
		if err := os.WriteFile(home+"/go", nil, 0o644); err != nil {
			c.t.Fatal(err)
		}
		lines := c.finished(id, out)
		slices.Sort(lines)
		if fmt.Sprint(lines) != "[0: 3.0 1: 3.0 2: 3.0 3: 3.0]" {
			c.t.Errorf("%q", lines)
		}
		c.clean() // the epilog has released without an agent
		// A new job finds none: it is queued again, and nothing runs outside.
		id, _ = c.batch("#SBATCH -w h2 --image="+ref, "srun hostname")
		c.until(id, "JobState=PENDING", "Restarts=1", "AdminComment=muster:", "no agent answers")
		c.cancel(id)
		c.fails([]string{"no agent answers"}, "srun", "-w", "h2", "--image="+ref, "hostname")
		// What has no image does not care.
		c.ok("srun", "-w", "h2", "hostname")
		c.clean()
		c.start(c.Nodes[1])
		c.ok("srun", "-w", "h2", "--image="+ref, "python3", "-c", inside)
	})

	run("two users", func() {
		done := make(chan slurm.Result)
		go func() { done <- c.Run(c.Users[1], "srun", "-N2", "--image="+ref, "python3", "-c", inside) }()
		mine := c.ok("srun", "-N2", "--image="+ref, "python3", "-c", inside)
		if r := <-done; strings.Count(r.Out, " 4712 True ") != 2 || strings.Count(strings.Join(mine, "\n"), " 4711 True ") != 2 {
			c.t.Errorf("%+v %q", r, mine)
		}
	})

	run("what a user may not", func() {
		home := c.Users[1].Home
		if err := os.WriteFile(home+"/secret", []byte("of bob\n"), 0o600); err != nil {
			c.t.Fatal(err)
		}
		// Another user's directory, directly and by the way out of one's own.
		c.fails([]string{"permission denied"}, "srun", "--image="+ref, "--image-bind="+home+"/secret:/data", "cat", "/data")
		c.fails([]string{"Permission denied"}, "srun", "--image="+ref, "--image-bind="+home+":/data", "ls", "/data")
		// A target stays in the image, wherever it points to: this one would be the host's /etc.
		c.ok("srun", "--image="+ref, "--image-bind=/usr/share:/tmp/../../../etc/alternatives", "true")
		// A setuid program of the image, of the user's own making, and root's own: none gives anything.
		lines := c.ok("srun", "--image="+ref, "sh", "-c", `cp /bin/sh /var/lib/sh; chmod 4755 /var/lib/sh; /var/lib/sh -p -c 'id -u'; su -c id root </dev/null 2>&1; grep NoNewPrivs /proc/self/status; mknod /dev/shm/sda b 8 0 2>&1; cat /etc/shadow 2>&1; mount -t tmpfs x /mnt 2>&1 && echo mounted; true`)
		text := strings.Join(lines, "\n")
		for _, want := range []string{"4711", "NoNewPrivs:\t1", "Operation not permitted"} {
			if !strings.Contains(text, want) {
				c.t.Errorf("no %q", want)
			}
		}
		if strings.Contains(text, "uid=0") || strings.Contains(text, "\n0\n") || strings.Contains(text, "mounted") {
			c.t.Error("a user became root")
		}
	})

	run("a job without an image", func() {
		// Whatever muster does, or is: nothing of it is on the way.
		if err := os.Rename(binary, binary+".gone"); err != nil {
			c.t.Fatal(err)
		}
		defer os.Rename(binary+".gone", binary) //nolint:errcheck // the next tests say so
		if lines := c.ok("srun", "-N4", "hostname"); len(lines) != 4 {
			c.t.Errorf("%q", lines)
		}
		id, out := c.batch("#SBATCH -N4 --comment=whatever", "env | grep MUSTER; srun hostname")
		if lines := c.finished(id, out); len(lines) != 4 {
			c.t.Errorf("%q", lines)
		}
	})

	t.Run("taken out again", func(t *testing.T) {
		c.t = t
		if err := c.Install("--undo"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Slurm("scontrol", "reconfigure"); err != nil {
			t.Error(err)
		}
		c.idle()
		c.ok("srun", "-N4", "hostname")
		c.fails([]string{"unrecognized option"}, "srun", "--image=x", "hostname")
		for _, name := range []string{"hooks", "here/spank_muster.so"} {
			if _, err := os.Stat(filepath.Join(c.Dir, "etc", name)); err == nil {
				t.Errorf("%s is still there", name)
			}
		}
	})
}

// TestF31BlockedReaders cancels a job whose tasks all wait for bytes that nobody can bring.
func TestF31BlockedReaders(t *testing.T) {
	c := newCluster(t, slurm.Options{Nodes: 2, OriginRate: 40})
	ref := c.push("debian-python")
	c.index("debian-python")
	home := c.Users[0].Home
	id, _ := c.batch("#SBATCH -N2 -n8 --image="+ref, "while [ ! -e "+home+"/go ]; do sleep 0.1; done",
		"srun -n8 sh -c 'touch "+home+"/began-$SLURM_PROCID; cat /usr/bin/* /usr/lib/x86_64-linux-gnu/* >"+home+"/read-$SLURM_PROCID'")
	c.until(id, "JobState=RUNNING")
	if err := c.Await(t.Context(), bound, "mounts", func() bool {
		for _, h := range c.Nodes {
			if _, err := os.Lstat(filepath.Join(h.Dir, "jobs", "slurm-"+id+".rootfs")); err != nil {
				return false
			}
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.OriginCut(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(home+"/go", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// Until nothing moves any more.
	size := func() (n int64) {
		files, _ := filepath.Glob(home + "/read-*")
		for _, f := range files {
			if st, err := os.Stat(f); err == nil {
				n += st.Size()
			}
		}
		return n
	}
	last, same := int64(-1), time.Now()
	if err := c.Await(t.Context(), bound, "standstill", func() bool {
		if n := size(); n != last {
			last, same = n, time.Now()
		}
		return time.Since(same) > 3*time.Second
	}); err != nil {
		t.Fatal(err)
	}
	if out, _ := c.Slurm("squeue", "-h", "-o", "%T"); !strings.Contains(out, "RUNNING") {
		t.Fatalf("the job does not wait: %q", out)
	}
	cancelled := time.Now()
	c.cancel(id)
	c.clean()
	t.Logf("%d bytes were read; the nodes were clean and idle %v after scancel", last, time.Since(cancelled).Round(100*time.Millisecond))
	if t.Failed() {
		return
	}
	if err := c.OriginHeal(); err != nil {
		t.Fatal(err)
	}
	c.ok("srun", "-N2", "--image="+ref, "true")
	c.clean()
}
