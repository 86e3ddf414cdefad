package sim

import (
	"math"
	"math/rand/v2"
	"slices"
)

// A Cluster is hosts, links and an origin as Simulate takes them. Rates are bytes per second, times seconds; a rate of 0 is never the limit.
type Cluster struct {
	Hosts  []Host
	Groups []float64 // rate at which each group of hosts sends to the others, and receives from them
	Origin Origin
	Hop    float64 // from a byte's leaving one host to its coming to another
	// Overhead is bytes on a link for each byte of an image: frames, TLS, TCP and IP. 0: 1.
	Overhead float64
	// Shared is processors that all hosts have together, as in a test on one machine; 0: each host has its own.
	Shared float64
	// Silence is how long a host waits for a dead one until it looks elsewhere.
	Silence float64
}

// A Host is one machine.
type Host struct {
	Up, Down float64 // of its link
	Group    int     // index of Cluster.Groups, -1: none
	Disk     float64 // at which it writes
	CPU      float64 // processor seconds per byte that it receives: for sending, receiving and hashing it
	Inflate  float64 // compressed bytes per second of an indexer
	Start    float64 // when it begins; whoever has a plan may begin before
	Dies     float64 // when it is gone; 0: never. Negative: before anything
}

// An Origin is a registry.
type Origin struct {
	Rate       float64 // to all together
	Connection float64 // to one connection
	Latency    float64 // of a request until its first byte
	Requests   float64 // per second that it takes
}

// Uniform is n like hosts with links of one rate, and an origin with one of such a rate times ratio. Where group is not 0, so many hosts at a time
// share an uplink to the others that carries 1/over of what they could send together.
func Uniform(n int, rate, ratio float64, group int, over float64) *Cluster {
	c := &Cluster{
		Hosts: make([]Host, n), Hop: 0.0002, Overhead: 1.044, Silence: 2,
		Origin: Origin{Rate: rate * ratio, Latency: 0.02, Requests: 100},
	}
	for i := range c.Hosts {
		// Disks are page caches here; processors as measured on one machine (docs/trees.md).
		c.Hosts[i] = Host{Up: rate, Down: rate, Group: -1, Disk: 1e9, CPU: 3.5e-9, Inflate: 150e6}
		if group > 0 {
			c.Hosts[i].Group = i / group
		}
	}
	for i := 0; group > 0 && i < n; i += group {
		c.Groups = append(c.Groups, float64(min(group, n-i))*rate/over)
	}
	return c
}

// Trouble slows a share of the hosts' links by factor and lets another share die in the first seconds, at random but the same each time. The first host
// is spared.
func (c *Cluster) Trouble(slow, factor, dying, within float64) *Cluster {
	r := rand.New(rand.NewPCG(1, uint64(len(c.Hosts))))
	for i := range c.Hosts {
		h := &c.Hosts[i]
		switch x := r.Float64(); {
		case i == 0:
		case x < slow:
			h.Up, h.Down = h.Up/factor, h.Down/factor
		case x < slow+dying:
			h.Dies = math.Max(r.Float64()*within, 1e-6)
		}
	}
	return c
}

// Outcome is what a simulation has seen.
type Outcome struct {
	Done     []float64 // when each host had everything; 0 for those that died
	Origin   float64   // bytes that left the origin
	Requests int       // to the origin
	Sent     []float64 // bytes that each host has sent
	Events   int       // that were simulated
	Passed   int       // times that a host passed another one over
}

// Makespan is when the last host that lives had everything.
func (o *Outcome) Makespan() (last float64) {
	for _, d := range o.Done {
		last = max(last, d)
	}
	return last
}

// Uneven is the slowest host's time over the median host's.
func (o *Outcome) Uneven() float64 {
	list := o.lived()
	slices.Sort(list)
	return o.Makespan() / list[len(list)/2]
}

// lived are the times of hosts that live.
func (o *Outcome) lived() (list []float64) {
	for _, d := range o.Done {
		if d > 0 {
			list = append(list, d)
		}
	}
	return list
}

// server is something that does one thing after the other: a link, a disk, a processor.
type server struct{ free float64 }

// serve takes work of so many seconds that comes at t, and says when it begins and ends.
func (s *server) serve(t, seconds float64) (from, to float64) {
	from = max(t, s.free)
	s.free = from + seconds
	return from, s.free
}

// over is a/b, 0 where b is no limit.
func over(a, b float64) float64 {
	if b <= 0 {
		return 0
	}
	return a / b
}
