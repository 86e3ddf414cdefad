package cluster

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/registry"
)

// mountOf is where a host has the image of a report.
func mountOf(t testing.TB, r *control.Report, h *lab.Host) string {
	t.Helper()
	for _, s := range r.Hosts {
		if s.Host == h.Name && s.Mount != "" {
			return s.Mount
		}
	}
	t.Fatalf("%s has no mount", h.Name)
	return ""
}

// The agent is killed while somebody reads what has not come yet: he waits for the next agent and sees no error.
func TestF1AgentIsKilledUnderReaders(t *testing.T) {
	c := newCluster(t, 2, 80)
	i, sum := c.made("f1", 15)
	c.index("f1")
	c.start(lab.StartOptions{})
	r := c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "mounted")
	h := c.Hosts[1]
	reader := c.read(h, mountOf(t, r, h))
	h.Kill()
	c.start(lab.StartOptions{}, h)
	reader.is(sum)
	c.read(h, mountOf(t, r, h)).is(sum)
}

// A private image's credentials are in memory only. A restarted agent goes on without them: from the other hosts.
func TestF7RestartBetweenColdReadsOfAPrivateImage(t *testing.T) {
	c := newCluster(t, 2, 80)
	i, sum := c.made("f7", 15)
	c.index("f7")
	if _, err := c.RequireTokens(registry.TokenOptions{User: "alice", Password: "secret"}); err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{})
	c.logIn(c.Hosts[0])
	r := c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "mounted")
	h := c.Hosts[1]
	h.Kill()
	c.start(lab.StartOptions{}, h)
	c.read(h, mountOf(t, r, h)).is(sum)
}

// SIGTERM, which is what systemctl sends to the agent alone: the mounts stay, and the next agent stages the same image without a pull.
func TestF2F5StopAndStart(t *testing.T) {
	c := newCluster(t, 2, 200)
	i, sum := c.made("f5", 9)
	c.start(lab.StartOptions{})
	r := c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete", "--job", "one")
	for _, h := range c.Hosts {
		if err := h.Stop(); err != nil {
			t.Error(err)
		}
		c.read(h, mountOf(t, r, h)).is(sum)
	}
	c.start(lab.StartOptions{})
	c.Origin.ResetLog()
	for _, job := range []string{"one", "two"} {
		again := c.stage(c.Hosts[1], 0, i, "--hosts", c.Names(), "--ready", "complete", "--job", job)
		for _, h := range c.Hosts {
			c.read(h, mountOf(t, again, h)).is(sum)
		}
	}
	c.atMost(i, 0.01)
	for _, h := range c.Hosts {
		_, stderr, code, err := h.Muster(t.Context(), "unstage", "one", "--here")
		if err != nil || code != 0 {
			t.Errorf("unstage on %s: exit code %d, %v: %s", h.Name, code, err, stderr)
		}
	}
}

// One job's record is damaged and the registry is gone: the agent starts, the other job is there, both mounts work.
func TestF3DamagedRecord(t *testing.T) {
	c := newCluster(t, 1, 0)
	a, sumA := c.made("f3a", 3)
	b, sumB := c.made("f3b", 3)
	c.start(lab.StartOptions{})
	h := c.Hosts[0]
	mountA := mountOf(t, c.stage(h, 0, a, "--ready", "complete", "--job", "a"), h)
	records := func() map[string]bool {
		all, _ := filepath.Glob(filepath.Join(h.Store(), "state", "jobs", "*.json"))
		set := map[string]bool{}
		for _, r := range all {
			set[r] = true
		}
		return set
	}
	ofA := records()
	if len(ofA) != 1 {
		t.Fatalf("records of one job: %v", ofA)
	}
	mountB := mountOf(t, c.stage(h, 0, b, "--ready", "complete", "--job", "b"), h)
	if err := h.Stop(); err != nil {
		t.Error(err)
	}
	for r := range ofA {
		if err := os.WriteFile(r, []byte(`{"id": "a/`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.OriginCut(); err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{})
	s, err := h.Agent().Status(t.Context(), control.StatusRequest{})
	if err != nil || len(s.Jobs) != 1 || s.Jobs[0].Job != "b" {
		t.Errorf("jobs after the start: %+v, %v", s.Jobs, err)
	}
	c.read(h, mountA).is(sumA)
	c.read(h, mountB).is(sumB)
}

// Agents boot before the network does: they run, and a stage that is asked for meanwhile succeeds when the registry is there.
func TestF4RegistryComesLater(t *testing.T) {
	c := newCluster(t, 2, 200)
	i, _ := c.made("f4", 6)
	if err := c.OriginCut(); err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{Set: map[string]string{"origin.resolve-patience": "1m"}})
	healed := make(chan error, 1)
	go func() { time.Sleep(2 * time.Second); healed <- c.OriginHeal() }()
	c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete")
	if err := <-healed; err != nil {
		t.Fatal(err)
	}
	c.once(i)
	c.complete(i, c.Hosts...)
}
