package report

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/costmodel"
)

// A Report is one stage of a job when it is looked back at.
type Report struct {
	Job    string        `json:"job"`
	Stage  string        `json:"stage"` // its ID
	Image  string        `json:"image"`
	Digest string        `json:"digest,omitempty"`
	Asked  control.Ready `json:"asked"` // the readiness that was waited for
	Began  time.Time     `json:"began"` // the first host, by the clock of the agent that was asked
	Size   int64         `json:"size"`  // of the layers, compressed
	Layers int           `json:"layers"`

	Nodes  int      `json:"nodes"`  // hosts of the job
	Ready  int      `json:"ready"`  // of them, as ready as asked
	Failed int      `json:"failed"` // of them, failed
	Silent []Silent `json:"silent"` // of them, without a record

	// ClockBound is how far the hosts' times may be off against each other; ClockUnknown counts hosts for which that is not known.
	ClockBound   float64 `json:"clockBound"`
	ClockUnknown int     `json:"clockUnknown"`

	StartSkew float64 `json:"startSkew"` // from the first host's start to the last's
	Makespan  float64 `json:"makespan"`  // from the first host's start until the last one was ready
	Median    float64 `json:"median"`    // of the hosts' own times
	Slowest   float64 `json:"slowest"`
	Ratio     float64 `json:"slowestOverMedian"`

	// NodeSeconds are from the first start until the last host was ready, of all ready hosts; Idle is the part of them in which hosts
	// stood ready, or had not been told to begin yet.
	NodeSeconds float64 `json:"nodeSeconds"`
	Idle        float64 `json:"idleNodeSeconds"`
	Money       *Money  `json:"money,omitempty"` // nil: no price was given

	Bytes Sources `json:"bytes"`
	Hosts []Host  `json:"hosts"` // in the job's order
	Slow  []Slow  `json:"slow"`  // slowest first
}

// Sources is control's, and what was passed on.
type Sources struct {
	control.Sources
	Sent int64 `json:"sent"`
}

// Money is what the hosts cost meanwhile, in dollars.
type Money struct {
	PerHour float64 `json:"perHour"` // and host; given
	Total   float64 `json:"total"`   // NodeSeconds
	Idle    float64 `json:"idle"`
}

// Silent is a host that has told nothing, and why.
type Silent struct {
	Host string `json:"host"`
	Why  string `json:"why"`
}

// A Host is what one host did.
type Host struct {
	Host  string        `json:"host"`
	Error string        `json:"error,omitempty"`
	Start float64       `json:"start"` // after the first host's
	Took  float64       `json:"took"`  // from its start until it was as ready as asked, or failed
	Ready control.Ready `json:"ready"` // by now
	Mount string        `json:"mount,omitempty"`
	// Phases are when what the names say was reached, after the first host's start. What was not reached is not there.
	Phases  map[string]float64 `json:"phases"`
	Bytes   Sources            `json:"bytes"`
	Late    []control.LatePeer `json:"late,omitempty"` // hosts that it passed over
	Work    control.Work       `json:"work"`
	Bound   float64            `json:"clockBound"`        // negative: not known
	Earlier *Earlier           `json:"earlier,omitempty"` // nil: nothing to compare with
}

// end is when the host was as ready as asked.
func (h Host) end() float64 { return h.Start + h.Took }

// Phases are the names that [Host.Phases] may have, in the order in which they are usually reached.
var Phases = []string{"resolved", "first byte", "indexed", "mounted", "warm", "complete", "first exec"}

// points are where Phases stand in a record.
var points = map[string]string{
	"resolved": control.PointResolved, "first byte": control.PointFirstByte, "indexed": control.PointIndexed,
	"mounted": control.PointReady + string(control.Mounted), "warm": control.PointReady + string(control.Warm),
	"complete": control.PointReady + string(control.Complete), "first exec": control.PointFirstExec,
}

// Earlier is how a host did in stages before this one, beside those hosts of this job that were in them too.
type Earlier struct {
	Stages int     `json:"stages"` // with at least minCommon hosts of this job
	Slow   int     `json:"slow"`   // of them, how many it was slow in
	Factor float64 `json:"factor"` // median of its time ÷ the median host's
}

// Always reports whether a host that is slow now was slow in most stages before.
func (e *Earlier) Always() bool { return e != nil && e.Stages >= 2 && 2*e.Slow > e.Stages }

// minCommon is how many hosts two stages have to have in common to be compared.
const minCommon = 3

// ErrEmpty says that no host has a record of the stage.
var ErrEmpty = errors.New("no host has a record")

// Of makes the report of one stage: of what the agent said of it, which names the hosts, and of what each host has answered. price is dollars per
// hour and host, 0 when it is not known.
func Of(stage control.Record, answers []control.HostRecords, price float64) (*Report, error) {
	r := &Report{
		Job: stage.Job, Stage: stage.ID, Image: stage.Image, Digest: string(stage.Digest), Asked: stage.Asked, Layers: stage.Layers,
		Nodes: len(stage.Hosts), Silent: []Silent{}, Hosts: []Host{}, Slow: []Slow{},
	}
	records := map[string]control.Record{}
	whys := map[string]string{}
	earlier := map[string][]control.Earlier{}
	for _, a := range answers {
		whys[a.Host] = a.Error
		earlier[a.Host] = a.Earlier
		for _, c := range a.Records {
			if old, ok := records[a.Host]; c.ID == stage.ID && (!ok || old.Began.Before(c.Began)) {
				records[a.Host] = c
			}
		}
	}
	for _, c := range records {
		if r.Began.IsZero() || c.Began.Before(r.Began) {
			r.Began = c.Began
		}
	}
	if r.Began.IsZero() {
		why := ""
		for _, a := range answers {
			if a.Error != "" {
				why = ": " + a.Host + ": " + a.Error
				break
			}
		}
		return nil, fmt.Errorf("stage %s: %w%s", stage.ID, ErrEmpty, why)
	}
	factors := earlierOf(earlier)
	for _, name := range hostNames(stage.Hosts) {
		c, ok := records[name]
		if !ok {
			r.Silent = append(r.Silent, Silent{name, cmp.Or(whys[name], "it remembers nothing of this stage")})
			continue
		}
		r.add(c, factors[name])
	}
	r.sum(price)
	r.Slow = slowHosts(r)
	return r, nil
}

// hostNames are the names in "name=address" or "name".
func hostNames(hosts []string) []string {
	names := make([]string, len(hosts))
	for i, h := range hosts {
		names[i] = control.HostName(h)
	}
	return names
}

// add enters one host.
func (r *Report) add(c control.Record, e *Earlier) {
	h := Host{
		Host: c.State.Host, Error: c.State.Error, Start: c.Began.Sub(r.Began).Seconds(), Took: c.State.Took.Seconds(), Ready: c.State.Ready, Mount: c.State.Mount,
		Phases: map[string]float64{}, Bytes: Sources{c.State.Bytes, c.State.Sent}, Late: c.State.Late, Work: c.Work, Bound: c.Bound.Seconds(), Earlier: e,
	}
	for _, name := range Phases {
		if t, ok := c.State.At(points[name]); ok {
			h.Phases[name] = h.Start + t.Seconds()
		}
	}
	if c.Bound < 0 {
		h.Bound = -1
		r.ClockUnknown++
	} else {
		r.ClockBound = max(r.ClockBound, h.Bound)
	}
	r.Size, r.Layers = max(r.Size, c.State.Total), max(r.Layers, c.Layers)
	r.Bytes.Sources, r.Bytes.Sent = r.Bytes.Add(c.State.Bytes), r.Bytes.Sent+c.State.Sent
	switch c.State.Phase {
	case control.PhaseDone:
		r.Ready++
	case control.PhaseFailed:
		r.Failed++
		h.Error = cmp.Or(h.Error, "it failed")
	default:
		h.Error = cmp.Or(h.Error, "not ready yet: "+c.State.Phase)
	}
	r.Hosts = append(r.Hosts, h)
}

// done are the hosts that got ready.
func (r *Report) done() (list []Host) {
	for _, h := range r.Hosts {
		if h.Error == "" {
			list = append(list, h)
		}
	}
	return list
}

// sum computes what is said of all hosts together.
func (r *Report) sum(price float64) {
	var took []float64
	for _, h := range r.Hosts {
		r.StartSkew = max(r.StartSkew, h.Start)
	}
	for _, h := range r.done() {
		took = append(took, h.Took)
		r.Makespan = max(r.Makespan, h.end())
		r.Slowest = max(r.Slowest, h.Took)
	}
	if len(took) == 0 {
		return
	}
	r.Median = costmodel.Quantile(took, 0.5)
	if r.Median > 0 {
		r.Ratio = r.Slowest / r.Median
	}
	for _, t := range took {
		r.NodeSeconds += r.Makespan
		r.Idle += r.Makespan - t
	}
	if price > 0 {
		r.Money = &Money{price, r.NodeSeconds / 3600 * price, r.Idle / 3600 * price}
	}
}

// earlierOf compares hosts in the stages that they had before: only those that enough of them had together tell anything.
func earlierOf(earlier map[string][]control.Earlier) map[string]*Earlier {
	type one struct {
		host string
		took float64
	}
	stages := map[string][]one{}
	for host, list := range earlier {
		seen := map[string]bool{}
		for _, e := range list {
			key := e.ID + "|" + string(e.Asked)
			if !seen[key] && e.Took > 0 { // the newest of a stage that was asked for twice
				seen[key] = true
				stages[key] = append(stages[key], one{host, e.Took.Seconds()})
			}
		}
	}
	factors := map[string][]float64{}
	for _, hosts := range stages {
		if len(hosts) < minCommon {
			continue
		}
		var took []float64
		for _, h := range hosts {
			took = append(took, h.took)
		}
		m := costmodel.Quantile(took, 0.5)
		for _, h := range hosts {
			factors[h.host] = append(factors[h.host], h.took/m)
		}
	}
	out := map[string]*Earlier{}
	for host, f := range factors {
		e := &Earlier{Stages: len(f), Factor: costmodel.Quantile(f, 0.5)}
		for _, x := range f {
			if x > SlowAbove {
				e.Slow++
			}
		}
		out[host] = e
	}
	return out
}

// SlowestHosts are the hosts that took longest, at most n, slowest first; hosts that failed before all.
func (r *Report) SlowestHosts(n int) []Host {
	list := slices.Clone(r.Hosts)
	slices.SortStableFunc(list, func(a, b Host) int {
		return cmp.Or(-cmp.Compare(min(1, len(a.Error)), min(1, len(b.Error))), -cmp.Compare(a.end(), b.end()))
	})
	return list[:min(n, len(list))]
}
