package report_test

import (
	"bytes"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/report"
)

const second = time.Second

var began = time.Date(2026, 11, 22, 1, 2, 3, 0, time.UTC)

// stageOf is a stage of n like hosts: each begins 10 ms after the one before, and takes 10 s for 100 MB, of which 90 come from others.
func stageOf(n int) (control.Record, []control.HostRecords) {
	stage := control.Record{ID: "job/1", Job: "job", Image: "registry/app:1", Asked: control.Complete, Layers: 3}
	var all []control.HostRecords
	for i := range n {
		name := fmt.Sprintf("node%04d", i)
		stage.Hosts = append(stage.Hosts, name+"=10.0.0.1:7464")
		at := func(point string, t time.Duration) control.Phase {
			return control.Phase{Name: point, Start: t, End: t}
		}
		all = append(all, control.HostRecords{Host: name, Records: []control.Record{{
			ID: "job/1", Job: "job", Began: began.Add(time.Duration(i) * 10 * time.Millisecond), Bound: time.Duration(1+i%3) * time.Millisecond, Layers: 3,
			State: control.HostState{
				Host: name, Phase: control.PhaseDone, Ready: control.Complete, Total: 100e6, Took: 10 * second, Sent: 90e6,
				Bytes: control.Sources{Peer: 90e6, Origin: 10e6, OriginRequests: 2},
				Phases: []control.Phase{
					at(control.PointResolved, second/5), at(control.PointFirstByte, second/2), at(control.PointIndexed, 2*second),
					at("ready mounted", 3*second), at("ready warm", 4*second), at("ready complete", 10*second),
				},
			},
			Work: control.Work{Write: second, Written: 100e6, Origin: 2 * second, Peer: 8 * second, Paced: 90e6, Busy: 0.3},
		}}})
	}
	return stage, all
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > 1e-9*math.Max(1, math.Abs(want)) {
		t.Errorf("%s is %g, want %g", what, got, want)
	}
}

func TestReport(t *testing.T) {
	stage, hosts := stageOf(4)
	hosts[3].Records[0].State.Took = 12 * second
	r, err := report.Of(stage, hosts, 3.6)
	if err != nil {
		t.Fatal(err)
	}
	near(t, "skew", r.StartSkew, 0.03)
	near(t, "makespan", r.Makespan, 12.03)
	near(t, "median", r.Median, 10)
	near(t, "ratio", r.Ratio, 1.2)
	near(t, "node-seconds", r.NodeSeconds, 48.12)
	near(t, "idle", r.Idle, 48.12-42)
	near(t, "money", r.Money.Total, 0.04812)
	near(t, "bound", r.ClockBound, 0.003)
	near(t, "mounted", r.Hosts[1].Phases["mounted"], 3.01)
	if r.Nodes != 4 || r.Ready != 4 || r.Size != 100e6 || r.Bytes.Origin != 40e6 || r.Bytes.Sent != 360e6 || r.Began != began {
		t.Errorf("%+v", r)
	}
	if _, ok := r.Hosts[0].Phases["first exec"]; ok {
		t.Error("a phase that nobody saw")
	}

	// Hosts that failed, that were not reached, whose clock is not known.
	hosts[0].Records[0].State.Phase, hosts[0].Records[0].State.Error = control.PhaseFailed, "disk full"
	hosts[1] = control.HostRecords{Host: hosts[1].Host, Error: "connection refused"}
	hosts[2].Records[0].Bound = -1
	if r, err = report.Of(stage, hosts, 0); err != nil {
		t.Fatal(err)
	}
	if r.Ready != 2 || r.Failed != 1 || len(r.Silent) != 1 || r.Silent[0].Why != "connection refused" || r.ClockUnknown != 1 || r.Money != nil || len(r.Hosts) != 3 {
		t.Errorf("%+v", r)
	}
	near(t, "node-seconds of those that got ready", r.NodeSeconds, 2*r.Makespan)
	if _, err := report.Of(stage, []control.HostRecords{{Host: "node0000", Error: "gone"}}, 0); err == nil {
		t.Error("a report of nothing")
	}
}

func TestCauses(t *testing.T) {
	for _, c := range []struct {
		want   report.Cause
		change func(*control.Record)
	}{
		{report.CauseUnknown, func(*control.Record) {}},
		{report.CauseParent, func(r *control.Record) {
			r.State.Late = []control.LatePeer{{Host: "node0002", Why: "nothing for 4.0 s", Waited: 6 * second}}
		}},
		{report.CauseDisk, func(r *control.Record) { r.Work.Write = 9 * second }},
		{report.CauseOrigin, func(r *control.Record) { r.Work.Origin = 9 * second }},
		{report.CauseLink, func(r *control.Record) { r.Work.Peer = 30 * second }},
		{report.CauseCPU, func(r *control.Record) { r.Work.Peer, r.Work.Busy = 30*second, 0.99 }},
		// What explains little is no reason.
		{report.CauseUnknown, func(r *control.Record) { r.Work.Write = 3 * second }},
	} {
		stage, hosts := stageOf(16)
		slow := &hosts[5].Records[0]
		slow.State.Took = 18 * second
		c.change(slow)
		r, err := report.Of(stage, hosts, 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Slow) != 1 || r.Slow[0].Host != "node0005" || r.Slow[0].Cause != c.want || math.Abs(r.Slow[0].Factor-1.8) > 1e-9 {
			t.Errorf("want %q: %+v", c.want, r.Slow)
		}
	}
	stage, hosts := stageOf(16)
	if r, err := report.Of(stage, hosts, 0); err != nil || len(r.Slow) != 0 {
		t.Errorf("%+v, %v", r.Slow, err)
	}
}

// The same host was slow before.
func TestEarlier(t *testing.T) {
	stage, hosts := stageOf(8)
	hosts[2].Records[0].State.Took = 15 * second
	for i := range hosts {
		for k := range 4 {
			took := 20 * second
			if i == 2 && k != 1 {
				took = 30 * second
			}
			hosts[i].Earlier = append(hosts[i].Earlier, control.Earlier{ID: fmt.Sprint("old/", k), Took: took, Asked: control.Mounted})
		}
	}
	hosts[0].Earlier = append(hosts[0].Earlier, control.Earlier{ID: "alone/1", Took: second}) // nobody to compare with
	r, err := report.Of(stage, hosts, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Slow) != 1 || !r.Slow[0].Always {
		t.Errorf("%+v", r.Slow)
	}
	if e := r.Hosts[2].Earlier; e == nil || e.Stages != 4 || e.Slow != 3 || e.Factor != 1.5 {
		t.Errorf("%+v", e)
	}
	if e := r.Hosts[0].Earlier; e == nil || e.Stages != 4 || e.Slow != 0 {
		t.Errorf("%+v", e)
	}
}

// Events are read back by the cost model.
func TestEvents(t *testing.T) {
	stage, hosts := stageOf(5)
	hosts[4].Records[0].State.Bytes = control.Sources{Store: 100e6}
	r, err := report.Of(stage, hosts, 0)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := costmodel.WriteEvents(&b, report.Events(r, report.Site{Experiment: "here", Instance: "hpc6a.48xlarge"})); err != nil {
		t.Fatal(err)
	}
	events, err := costmodel.ReadEvents(&b)
	if err != nil || len(events) != 5 {
		t.Fatalf("%d events, %v", len(events), err)
	}
	e := events[1]
	if e.Strategy != "muster-complete" || e.NewBytes != 100e6 || e.Pull != 10 || e.Start != 0.01 || e.ClusterNodes != 5 || e.Suspect || e.Layers != 3 || e.Node != "node0001" {
		t.Errorf("%+v", e)
	}
	if !events[4].Suspect || events[4].NewBytes != 0 {
		t.Errorf("%+v", events[4])
	}
}
