package report

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/costmodel"
)

// SlowAbove is how many times the median host's time a slow host takes: what 1 to 2 of 100 hosts of the study are beyond.
const SlowAbove = 1.18

// slowLeast is by how many seconds a host has to be slower besides: below, it is noise.
const slowLeast = 0.25

// A Cause is why a host was slow.
type Cause string

// The causes.
const (
	CauseParent  Cause = "late parent" // it waited for hosts that it passed over then
	CauseDisk    Cause = "disk"
	CauseOrigin  Cause = "origin"
	CauseLink    Cause = "link"
	CauseCPU     Cause = "CPU"
	CauseUnknown Cause = "not known"
)

// A Slow is a host that was slow.
type Slow struct {
	Host   string  `json:"host"`
	Factor float64 `json:"factor"` // of the median host's time
	More   float64 `json:"more"`   // seconds than the median host
	Cause  Cause   `json:"cause"`
	Why    string  `json:"why"` // with numbers, for people
	Always bool    `json:"always"`
}

// slowHosts finds slow hosts and what stands out of their work.
func slowHosts(r *Report) []Slow {
	all := r.done()
	out := []Slow{}
	if len(all) < 2 {
		return out
	}
	mid := middle(all)
	for _, h := range all {
		more := h.Took - r.Median
		if h.Took <= SlowAbove*r.Median || more < slowLeast {
			continue
		}
		s := Slow{Host: h.Host, Factor: h.Took / r.Median, More: more, Always: h.Earlier.Always()}
		if s.Cause, s.Why = why(h, mid, more); s.Cause == CauseUnknown {
			s.Why += lostIn(h, all)
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Slow) int { return cmp.Or(-cmp.Compare(a.Factor, b.Factor), cmp.Compare(a.Host, b.Host)) })
	return out
}

// A worked is what of a host's time can be told apart: seconds, and bytes per second.
type worked struct {
	late, write, origin   float64
	writes, origins, pace float64
	busy                  float64
}

func workOf(h Host) worked {
	w := worked{
		write: h.Work.Write.Seconds(), origin: h.Work.Origin.Seconds(), busy: h.Work.Busy,
		writes: rate(h.Work.Written, h.Work.Write.Seconds()), origins: rate(h.Bytes.Origin, h.Work.Origin.Seconds()), pace: rate(h.Work.Paced, h.Work.Peer.Seconds()),
	}
	for _, l := range h.Late {
		w.late += l.Waited.Seconds()
	}
	return w
}

func rate(bytes int64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(bytes) / seconds
}

// middle is the median of all hosts in each respect.
func middle(all []Host) worked {
	of := func(f func(worked) float64) float64 {
		var v []float64
		for _, h := range all {
			if x := f(workOf(h)); x > 0 {
				v = append(v, x)
			}
		}
		if len(v) == 0 {
			return 0
		}
		return costmodel.Quantile(v, 0.5)
	}
	// Rates are compared with those that had any; times with all.
	time := func(f func(worked) float64) float64 {
		var v []float64
		for _, h := range all {
			v = append(v, f(workOf(h)))
		}
		return costmodel.Quantile(v, 0.5)
	}
	return worked{
		late: time(func(w worked) float64 { return w.late }), write: time(func(w worked) float64 { return w.write }),
		origin: time(func(w worked) float64 { return w.origin }), busy: time(func(w worked) float64 { return w.busy }),
		writes: of(func(w worked) float64 { return w.writes }), origins: of(func(w worked) float64 { return w.origins }), pace: of(func(w worked) float64 { return w.pace }),
	}
}

// What counts as outstanding.
const (
	enough   = 0.5  // of the time that a host took longer, that a cause explains
	lower    = 0.75 // of the others' rate
	busyHost = 0.9  // share of the processors
	busyMore = 1.25 // times the median host's share
)

// why names what explains most of the time that a host took longer.
//
//   - Times (late parents, writing, waiting for the origin) explain what they are above the median host's, where their rate is lower too.
//     Writing and waiting happen many at once, so a time is believed up to what the host took longer.
//   - A low pace of pieces that were on their way, from all parents together, is the host's own link, unless its processors were busy.
func why(h Host, mid worked, more float64) (Cause, string) {
	w := workOf(h)
	type found struct {
		cause Cause
		share float64
		text  string
	}
	var list []found
	if s := w.late - mid.late; s > 0 && len(h.Late) > 0 {
		l := slices.MaxFunc(h.Late, func(a, b control.LatePeer) int { return cmp.Compare(a.Waited, b.Waited) })
		list = append(list, found{CauseParent, s, fmt.Sprintf("waited %.1f s for hosts that it passed over, most for %s: %s", w.late, l.Host, l.Why)})
	}
	if s := w.write - mid.write; s > 0 && w.writes < lower*mid.writes {
		list = append(list, found{CauseDisk, s, fmt.Sprintf("its disk took %s, the median host's %s; its processors waited %.0f %% of the time for disks", mbs(w.writes), mbs(mid.writes), 100*h.Work.IOWait)})
	}
	if s := w.origin - mid.origin; s > 0 && h.Bytes.Origin > 0 && (mid.origins == 0 || w.origins <= lower*mid.origins || mid.origin == 0) {
		list = append(list, found{CauseOrigin, s, fmt.Sprintf("waited %.1f s for %.1f MB from the origin (%s)", w.origin, float64(h.Bytes.Origin)/1e6, mbs(w.origins))})
	}
	cpu := w.busy >= busyHost && w.busy >= busyMore*mid.busy
	if w.pace > 0 && w.pace < lower*mid.pace && !cpu {
		list = append(list, found{CauseLink, float64(h.Work.Paced) * (1/w.pace - 1/mid.pace), fmt.Sprintf("pieces came at %s from all parents, at the median host at %s", mbs(w.pace), mbs(mid.pace))})
	}
	if len(list) > 0 {
		best := slices.MaxFunc(list, func(a, b found) int { return cmp.Compare(min(a.share, more), min(b.share, more)) })
		if best.share >= enough*more {
			return best.cause, best.text
		}
	}
	if cpu {
		return CauseCPU, fmt.Sprintf("its processors were busy %.0f %% of the time, the median host's %.0f %%", 100*w.busy, 100*mid.busy)
	}
	return CauseUnknown, "nothing that was measured stands out"
}

// lostIn says on the way to which phase a host lost most against the median host.
func lostIn(h Host, all []Host) string {
	// took is the time between the phase before and this one, where a host has both in this order.
	took := func(h Host, p string) (float64, bool) {
		end, ok := h.Phases[p]
		from := h.Start
		for _, q := range Phases {
			if t, has := h.Phases[q]; has && t < end {
				from = max(from, t)
			}
		}
		return end - from, ok
	}
	most, where := 0.0, ""
	for _, p := range Phases {
		mine, ok := took(h, p)
		var others []float64
		for _, o := range all {
			if t, ok := took(o, p); ok {
				others = append(others, t)
			}
		}
		if lost := mine - costmodel.Quantile(others, 0.5); ok && lost > most && h.Phases[p] <= h.end()+1e-6 {
			most, where = lost, p
		}
	}
	if where == "" {
		return ""
	}
	return fmt.Sprintf("; %.2f s of it were lost before %q", most, where)
}

func mbs(rate float64) string { return fmt.Sprintf("%.3g MB/s", rate/1e6) }
