package agent_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// The test binary is also the process of the mounts that it makes.
func TestMain(m *testing.M) {
	mountd.Main(agent.BuildMount, func(error) int { return 1 })
	os.Exit(m.Run())
}

// TestMounts stages until mounted, reads through the mount what has not arrived, replaces the agent, and unstages.
func TestMounts(t *testing.T) {
	w := newWorld(t, 8<<20, 2<<20)
	mounts := func(i int, o *agent.Options) { o.Mounts = filepath.Join(w.dir, "mounts", o.Name) }
	nodes := w.swarm(2, mounts)
	stage := func(job string, ready control.Ready) *control.Report {
		return w.stage(nodes[0], 2, func(q *control.StageRequest) { q.Job, q.Ready, q.NoMount = job, ready, false })
	}
	end := func(job string) {
		if _, err := nodes[1].client.Unstage(t.Context(), control.UnstageRequest{Job: job}); err != nil {
			t.Error(err)
		}
	}
	r := stage("first", control.Complete)
	want := sums(t, r.Hosts[0].Mount)
	if len(want) < 100 {
		t.Fatalf("%d files", len(want))
	}
	end("first")
	if left, _ := filepath.Glob(filepath.Join(w.dir, "mounts", "*", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	// The tables are known now: the mount is there long before the bytes.
	for _, n := range nodes {
		w.forgetBytes(n)
	}
	w.proxy.ResetLog()
	w.proxy.SetRate(2 << 20)
	r = stage("second", control.Mounted)
	if r.Failed > 0 {
		t.Fatal("not mounted")
	}
	got := sums(t, r.Hosts[1].Mount)
	w.proxy.SetRate(0)
	// Asked for again, and for more than it was ready for, the same order is done when it is that.
	if r := stage("second", control.Complete); r.Failed > 0 || r.Hosts[0].Ready != control.Complete || r.Hosts[1].Ready != control.Complete {
		t.Errorf("asked for complete: %+v", r.Hosts)
	}
	for name, sum := range want {
		if got[name] != sum {
			t.Errorf("%s differs", name)
		}
	}
	w.originBytes(1.15)
	killMount(t, r.Hosts[1].Mount)

	// An agent that comes back finds its mounts.
	nodes[1].stop()
	if len(sums(t, r.Hosts[1].Mount)) != len(want) {
		t.Error("the mount is not served without its agent")
	}
	nodes[1] = w.start("n1", func(o *agent.Options) { mounts(1, o) })
	s, err := nodes[1].client.Status(t.Context(), control.StatusRequest{})
	if err != nil || len(s.Jobs) != 1 || s.Jobs[0].State.Mount != r.Hosts[1].Mount {
		t.Errorf("after a restart: %+v, %v", s.Jobs, err)
	}
	killMount(t, r.Hosts[1].Mount)
	if len(sums(t, r.Hosts[1].Mount)) != len(want) {
		t.Error("the mount is not served after its processes were killed")
	}
	end("second")
	if left, _ := filepath.Glob(filepath.Join(w.dir, "mounts", "*", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// killMount kills all processes of a mount at once, and wants it to answer all the same: the agent keeps it.
func killMount(t *testing.T, dir string) {
	t.Helper()
	var pids []int
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range all {
		if b, _ := os.ReadFile(name); strings.HasPrefix(string(b), "muster-mountd\x00") && strings.HasSuffix(string(b), "\x00"+dir+"\x00") {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			pids = append(pids, pid)
		}
	}
	if len(pids) != 2 {
		t.Errorf("processes of %s: %v", dir, pids)
	}
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // stopped first, so that none starts another
		for _, pid := range pids {
			if err := unix.Kill(pid, sig); err != nil {
				t.Error(err)
			}
		}
	}
	if err := unix.Statfs(dir, new(unix.Statfs_t)); err != nil {
		t.Errorf("after its processes were killed: %v", err)
	}
}

// sums reads every file below dir, by commands: the process that serves the mount must not be the one that reads it, and this is one
// that its agent lives in.
func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	out, err := command(t, "sh", "-c", "cd "+dir+" && find . -type f -print0 | xargs -0 sha256sum")
	if err != nil {
		t.Fatal(err)
	}
	return out
}
