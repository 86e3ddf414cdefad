package sim

import (
	"math"
	"testing"

	"github.com/muster-hpc/muster/planner"
)

// bare is a cluster in which nothing but links takes time.
func bare(n int, rate, ratio float64) *Cluster {
	c := Uniform(n, rate, ratio, 0, 0)
	c.Overhead, c.Hop, c.Origin.Latency, c.Origin.Requests = 1, 0, 0, 0
	for i := range c.Hosts {
		c.Hosts[i].CPU, c.Hosts[i].Disk = 0, 0
	}
	return c
}

func planned(t testing.TB, s *planner.JobSpec) *planner.Plan {
	t.Helper()
	p, err := planner.New(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func simulated(t testing.TB, p *planner.Plan, c *Cluster) *Outcome {
	t.Helper()
	o, err := Simulate(p, c)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func size(blobs []int64) (n float64) {
	for _, b := range blobs {
		n += float64(b)
	}
	return n
}

// TestSimulate: where only links take time, queues give what sharing them fairly gives, within a tenth; every byte leaves the origin about once,
// every copy is sent by somebody, and nothing is faster than links allow. (With few parents one of them may be passed over for nothing.)
func TestSimulate(t *testing.T) {
	for _, n := range []int{1, 2, 4, 8, 16, 32} {
		for _, ratio := range []float64{0.5, 1, 4} {
			p := planned(t, Spec(n, 0, planner.Params{}, true, Image...))
			l := Like(n, 12.5e6)
			l.Origin *= ratio
			o, want := simulated(t, p, bare(n, 12.5e6, ratio)), Run(p, l).Makespan()
			if got := o.Makespan(); math.Abs(got/want-1) > 0.1 || got < SwarmOf(p, l).OneCopy()*0.999 {
				t.Errorf("%d hosts, origin's link %g times theirs: %.2f s, shared links %.2f s, limit %.2f s", n, ratio, got, want, SwarmOf(p, l).OneCopy())
			}
			var sent float64
			for h := range n {
				sent += o.Sent[h]
			}
			if all := size(Image); math.Abs(o.Origin/all-1) > 0.02 || math.Abs(sent-float64(n-1)*all) > 0.02*float64(n)*all {
				t.Errorf("%d hosts: %g bytes left the origin, hosts sent %g, %d passed over", n, o.Origin, sent, o.Passed)
			}
		}
	}
}

// TestGrowth is the goal: on 1,024 hosts as on 16, also behind uplinks that carry a quarter. make sim shows 16,384.
func TestGrowth(t *testing.T) {
	for _, group := range []int{0, 32} {
		few := simulated(t, planned(t, Spec(16, group, planner.Params{}, true, Image...)), Uniform(16, 12.5e6, 1, group, 4))
		many := simulated(t, planned(t, Spec(1024, group, planner.Params{}, true, Image...)), Uniform(1024, 12.5e6, 1, group, 4))
		if got := many.Makespan() / few.Makespan(); got > 1.5 || many.Origin > 1.03*size(Image) {
			t.Errorf("groups of %d: 1,024 hosts take %.2f times as long as 16, %.2f images leave the origin", group, got, many.Origin/size(Image))
		}
	}
}

// Hosts that are gone, die or are slow cost the others something, but not everything; whoever lives has the image in the end.
func TestTrouble(t *testing.T) {
	const n, rate = 64, 12.5e6
	p := planned(t, Spec(n, 0, planner.Params{}, true, Image...))
	well := simulated(t, p, Uniform(n, rate, 1, 0, 0)).Makespan()
	for name, trouble := range map[string]func(*Cluster){
		"one is absent":     func(c *Cluster) { c.Hosts[p.Root(5)].Dies = -1 },
		"a root dies":       func(c *Cluster) { c.Hosts[p.Root(5)].Dies = 4 },
		"four die":          func(c *Cluster) { c.Hosts[9].Dies, c.Hosts[20].Dies, c.Hosts[33].Dies, c.Hosts[50].Dies = 1, 3, 5, 7 },
		"one begins late":   func(c *Cluster) { c.Hosts[7].Start = 5 },
		"one's link is bad": func(c *Cluster) { c.Hosts[11].Up = rate / 20 },
	} {
		c := Uniform(n, rate, 1, 0, 0)
		trouble(c)
		o := simulated(t, p, c)
		for h, d := range o.Done {
			if (d > 0) != (c.Hosts[h].Dies == 0) {
				t.Errorf("%s: host %d was done at %g", name, h, d)
			}
		}
		if got := o.Makespan(); got > 2*well || o.Origin > 1.5*size(Image) {
			t.Errorf("%s: %.1f s where %.1f is well, %.2f images from the origin, %d passed over", name, got, well, o.Origin/size(Image), o.Passed)
		}
	}
	// The one whose own link is slow is the last, and the others hardly notice.
	c := Uniform(n, rate, 1, 0, 0)
	c.Hosts[11].Up, c.Hosts[11].Down = rate/4, rate/4
	o := simulated(t, p, c)
	if o.Makespan() != o.Done[11] || o.Done[12] > 1.5*well {
		t.Errorf("makespan %.1f s, the slow host %.1f, another %.1f; well %.1f", o.Makespan(), o.Done[11], o.Done[12], well)
	}
}

// A layer without a table has it built by one host, from which all ask it: that one's link is what many hosts wait for.
func TestTables(t *testing.T) {
	p := planned(t, Spec(256, 0, planner.Params{}, false, Image...))
	c := Uniform(256, 12.5e6, 1, 0, 0)
	o := simulated(t, p, c)
	least := 255 * tableShare * float64(Image[3]) / 12.5e6
	if o.Makespan() < least {
		t.Errorf("%.1f s, but sending the largest table to all takes %.1f", o.Makespan(), least)
	}
	c.Hosts[p.Indexer(3)].Dies = 5
	if o := simulated(t, p, c); o.Makespan() < least {
		t.Errorf("with the indexer gone: %.1f s", o.Makespan())
	}
}

// A plan gives the same each time.
func TestSame(t *testing.T) {
	p := planned(t, Spec(100, 10, planner.Params{}, true, Image...))
	a, b := simulated(t, p, Uniform(100, 12.5e6, 1, 10, 4).Trouble(0.1, 4, 0.05, 8)), simulated(t, p, Uniform(100, 12.5e6, 1, 10, 4).Trouble(0.1, 4, 0.05, 8))
	if a.Makespan() != b.Makespan() || a.Events != b.Events || a.Origin != b.Origin {
		t.Errorf("%g and %g s, %d and %d events", a.Makespan(), b.Makespan(), a.Events, b.Events)
	}
}

func BenchmarkSimulate(b *testing.B) {
	p := planned(b, Spec(1024, 0, planner.Params{}, true, Image...))
	c := Uniform(1024, 12.5e6, 1, 0, 0)
	var events int
	for b.Loop() {
		events += simulated(b, p, c).Events
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(events), "ns/event")
}
