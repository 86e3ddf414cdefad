package cluster

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/report"
	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// report has a host report on jobs.
func (c *cluster) report(at *lab.Host, args ...string) (all []report.Report) {
	c.t.Helper()
	out, errs, code, err := at.Muster(c.t.Context(), append([]string{"report", "--json"}, args...)...)
	if err != nil || code != 0 {
		c.t.Fatalf("report %v: exit code %d, %v: %s", args, code, err, errs)
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		c.t.Fatalf("report %v: %v: %s", args, err, out)
	}
	return all
}

// A report has all hosts, with their phases and bytes; it is the same after restarts, and a user's own; its events make a model.
func TestReport(t *testing.T) {
	c := newCluster(t, 4, 200)
	c.start(lab.StartOptions{})
	h := c.Hosts[0]
	var jobs []string
	for _, name := range []string{"r1", "r2", "r3", "r4"} {
		i, sum := c.made(name, 5)
		job := "job-" + name
		r := c.stage(h, 0, i, "--hosts", c.Names(), "--ready", "complete", "--job", job)
		jobs = append(jobs, job)
		if name == "r1" {
			c.read(c.Hosts[2], mountOf(t, r, c.Hosts[2])).is(sum)
		}
	}
	// A mount tells of its first reader when it looks next.
	var first report.Report
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		first = c.report(c.Hosts[3], jobs[0])[0]
		if _, ok := first.Hosts[2].Phases["first exec"]; ok {
			break
		}
	}
	if first.Nodes != 4 || first.Ready != 4 || len(first.Hosts) != 4 || len(first.Silent) != 0 || first.Size == 0 || first.Layers == 0 {
		t.Errorf("report: %+v", first)
	}
	if first.ClockUnknown != 0 || first.ClockBound > 60 || first.Ratio < 1 || first.Idle > first.NodeSeconds {
		t.Errorf("report: %+v", first)
	}
	for n, x := range first.Hosts {
		for _, p := range report.Phases {
			if _, ok := x.Phases[p]; !ok && (p != "first exec" || n == 2) && p != "warm" {
				t.Errorf("%s: no %q in %v", x.Host, p, x.Phases)
			}
		}
		if x.Host != c.Hosts[n].Name || x.Bytes.Store+x.Bytes.Peer+x.Bytes.Origin < first.Size || x.Phases["mounted"] > x.Phases["complete"] {
			t.Errorf("host %d: %+v", n, x)
		}
	}

	// Agents that are started again remember, also jobs that are over.
	if _, errs, code, err := h.Muster(t.Context(), "unstage", jobs[0]); err != nil || code != 0 {
		t.Fatalf("unstage: %d %v %s", code, err, errs)
	}
	for _, x := range c.Hosts[:2] {
		if err := x.Stop(); err != nil {
			t.Error(err)
		}
	}
	c.start(lab.StartOptions{}, c.Hosts[:2]...)
	again := c.report(h, jobs[0])[0]
	if again.Ready != 4 || again.Hosts[1].Took != first.Hosts[1].Took || again.Hosts[2].Phases["first exec"] == 0 {
		t.Errorf("after restarts: %+v\nbefore: %+v", again, first)
	}
	// One that does not answer is named.
	c.Hosts[3].Kill()
	if less := c.report(h, jobs[1])[0]; len(less.Silent) != 1 || less.Silent[0].Host != c.Hosts[3].Name || less.Ready != 3 {
		t.Errorf("with a host gone: %+v", less)
	}
	c.start(lab.StartOptions{}, c.Hosts[3])

	// Others' jobs are nobody's business.
	visitor := h.Command("setpriv", "--reuid", "4244", "--regid", "4244", "--clear-groups", "--inh-caps", "+dac_override", "--ambient-caps", "+dac_override", binary, "--agent-socket", h.Socket(), "report", jobs[0])
	if out, err := visitor.CombinedOutput(); err == nil || !strings.Contains(string(out), "no stage of it by this user") {
		t.Errorf("another user's report: %v, %s", err, out)
	}

	// Events of all jobs make a model, and score it.
	dir := t.TempDir()
	events, model, page := filepath.Join(dir, "events.csv"), filepath.Join(dir, "model.json"), filepath.Join(dir, "report.html")
	args := append([]string{"--csv", events, "--html", page, "--instance", "hpc6a.48xlarge"}, jobs...)
	all := c.report(h, args...)
	if len(all) != 4 || all[3].Money == nil || all[3].Money.Total <= 0 {
		t.Errorf("%d reports, money %+v", len(all), all[len(all)-1].Money)
	}
	if e := all[3].Hosts[1].Earlier; e == nil || e.Stages != 3 {
		t.Errorf("earlier stages of a host: %+v", e)
	}
	if b, err := os.ReadFile(page); err != nil || !strings.Contains(string(b), "<svg") || !strings.Contains(string(b), c.Hosts[3].Name) {
		t.Errorf("page of %d bytes: %v", len(b), err)
	}
	for _, args := range [][]string{{"estimate", "fit", events, "-o", model}, {"estimate", "evaluate", "--model", model, events, "--json"}} {
		out, errs, code, err := h.Muster(t.Context(), args...)
		if err != nil || code != 0 {
			t.Fatalf("%v: %d %v %s", args, code, err, errs)
		}
		t.Logf("%s", out)
	}
}
