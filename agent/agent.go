package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/peer"
)

// Options say what an agent is made of. Zero values give the defaults where one is named; the others must be set.
type Options struct {
	Name    string // the scheduler's node name, which stands in the certificate
	Version string
	Store   *store.Store
	// Repository opens an image's repository. secret is what the origin is shown for the user, host → "user:password"; nil: what the
	// agent itself may show.
	Repository func(ref string, secret map[string]string) (origin.Repository, error)

	Network peer.Network
	Listen  []string // addresses for other agents; the first is the one to be told to others
	Port    int      // where hosts listen that are named without an address
	Gossip  *peer.GossipOptions

	Socket  string   // for commands and mounts; empty: none
	Mounts  string   // directory of mount points
	Metrics string   // address of /metrics and /healthz; empty: none
	Admins  []uint32 // user ids that may stage for others, besides root

	// Data limits the networks that hosts' addresses are looked up in; empty: all.
	Data []netip.Prefix

	// Seed says which hosts may reach the origin; nil: all. It has to say the same on all hosts.
	Seed func(host string) bool
	// Group says what is close to each other (a rack, a leaf switch); nil: nothing is known.
	Group func(host string) string

	SpanSize  int64 // of tables built here; 0: the default
	NoIndex   bool  // no index beside the image is looked for
	Tool      string
	MountConf MountConf
	Prestage  []string
	Images    func(ref string) error // whether an image may be staged at all; nil: every one

	// FetchOn has stages go on while a job's tasks run here; ServeOthers has their hosts' bytes passed on meanwhile.
	FetchOn, ServeOthers bool

	// Requests is the most requests to the origin at once, for each job. Default 4: with 16 seeds that is 64 connections.
	Requests int
	// Patience is how long a stage goes on asking an origin that fails. Default 1 minute.
	Patience time.Duration
	// Introduce is how long a host that is asked for an unknown plan waits for it. Default 500 ms.
	Introduce time.Duration
	// Absent is how long Stage waits for a host that cannot be reached. Default 30 s.
	Absent time.Duration
	// Ask bounds a short question to another host. Default 3 s.
	Ask time.Duration
	// Drain is how long SIGTERM waits for stages under way. Default 20 s.
	Drain time.Duration
	// Peer are the bounds of connections to other agents.
	Peer  peer.ClientOptions
	Serve peer.ServerOptions

	ExitCode func(error) int // of errors that go to commands; nil: 1
	Log      *slog.Logger
	Audit    *slog.Logger // a line per stage, refusal and push; nil: Log
}

func (o Options) withDefaults() Options {
	set := func(d *time.Duration, def time.Duration) {
		if *d <= 0 {
			*d = def
		}
	}
	set(&o.Patience, time.Minute)
	set(&o.Introduce, 500*time.Millisecond)
	set(&o.Ask, 3*time.Second)
	set(&o.Drain, 20*time.Second)
	if o.Requests <= 0 {
		o.Requests = 4
	}
	if o.Seed == nil {
		o.Seed = func(string) bool { return true }
	}
	if o.Group == nil {
		o.Group = func(string) string { return "" }
	}
	if o.ExitCode == nil {
		o.ExitCode = func(error) int { return 1 }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Audit == nil {
		o.Audit = o.Log
	}
	return o
}

// An Agent is the daemon. New makes it, Run runs it.
type Agent struct {
	o       Options
	log     *slog.Logger
	began   time.Time
	shelf   *shelf
	client  *peer.Client
	server  *peer.Server
	metrics *metrics
	keeper  *mountd.Keeper      // of the mounts
	history *history            // of stages
	inflate *semaphore.Weighted // how many layers are inflated at once

	ctx    context.Context // of all jobs
	cancel context.CancelCauseFunc
	jobsWG sync.WaitGroup

	holders   *peer.HolderTable // what this host knows as a directory host
	announced chan struct{}     // capacity 1: there is something new to announce

	addr string // where other hosts find this one; set by Start

	open     sync.Map // ztoc.Digest → time.Time: when the origin gave it to anybody
	refusals sync.Map // host → time.Time: when the last refusal was told of

	mu           sync.Mutex
	gossip       *peer.Gossip    // nil: none
	jobs         map[string]*job // by order id
	plans        map[string]*job // by plan id, those whose plan is known
	news         chan struct{}   // closed and replaced when one of them changes
	tasks        map[string]bool // jobs whose tasks run here
	tasksChanged chan struct{}   // closed and replaced when tasks do
	draining     bool
	drained      chan struct{} // closed when drain has returned
}

// errStopped ends jobs when the agent does.
var errStopped = errors.New("the agent is being stopped")

// New makes an agent. Nothing listens yet.
func New(o Options) (*Agent, error) {
	o = o.withDefaults()
	if o.Name == "" || o.Store == nil || o.Repository == nil || o.Network == nil {
		return nil, errors.New("agent: a name, a store, repositories and a network are needed")
	}
	a := &Agent{
		o: o, log: o.Log, began: time.Now(), shelf: newShelf(o.Store), inflate: semaphore.NewWeighted(int64(runtime.GOMAXPROCS(0))),
		jobs: map[string]*job{}, plans: map[string]*job{}, tasks: map[string]bool{}, tasksChanged: make(chan struct{}), news: make(chan struct{}), drained: make(chan struct{}),
		holders: peer.NewHolderTable(0), announced: make(chan struct{}, 1),
		history: newHistory(o.Store),
		keeper:  mountd.NewKeeper(o.Log, o.MountConf.Log),
	}
	a.ctx, a.cancel = context.WithCancelCause(context.Background())
	a.metrics = newMetrics(a)
	a.client = peer.NewClient(o.Network, o.Peer)
	a.server = peer.NewServer(o.Network, a, o.Serve)
	a.handle()
	return a, nil
}

// Run serves until ctx ends, and then drains: no new stage is taken, those under way have Options.Drain to end. Mounts stay.
// ready is called once everything listens.
func (a *Agent) Run(ctx context.Context, ready func()) error {
	defer a.close()
	for i, addr := range a.o.Listen {
		at, err := a.server.Listen(addr)
		if err != nil {
			return fmt.Errorf("listen for other agents: %w", err)
		}
		if i == 0 {
			a.addr = at
		}
	}
	a.restore()
	g, gctx := errgroup.WithContext(ctx)
	if a.o.Socket != "" {
		l, err := control.Listen(a.o.Socket)
		if err != nil {
			return err
		}
		defer os.Remove(a.o.Socket)
		s := control.New(a, a.o.ExitCode)
		g.Go(func() error { return s.Serve(l) })
		g.Go(func() error {
			<-gctx.Done()
			a.drain()
			s.Stop()
			return nil
		})
	} else {
		g.Go(func() error { <-gctx.Done(); a.drain(); return nil })
	}
	if a.o.Metrics != "" {
		l, err := net.Listen("tcp", a.o.Metrics)
		if err != nil {
			return fmt.Errorf("listen for metrics: %w", err)
		}
		g.Go(func() error { return a.serveMetrics(gctx, l) })
	}
	if a.o.Gossip != nil {
		if err := a.join(); err != nil {
			a.log.Warn("no gossip: stages work from their host lists", "cause", err)
		}
	}
	g.Go(func() error { a.announce(gctx); return nil })
	if len(a.o.Prestage) > 0 {
		g.Go(func() error { _ = a.prestage(gctx, a.o.Prestage, nil); return nil })
	}
	a.log.Info("the agent is ready", "host", a.o.Name, "address", a.addr, "socket", a.o.Socket, "store", a.o.Store.Dir())
	if ready != nil {
		ready()
	}
	return g.Wait()
}

// drain waits for stages under way, a while.
func (a *Agent) drain() {
	defer close(a.drained)
	a.mu.Lock()
	a.draining = true
	var under []*job
	for _, j := range a.jobs {
		if s, _, _ := j.status(); !s.Done() {
			under = append(under, j)
		}
	}
	a.mu.Unlock()
	if len(under) > 0 {
		a.log.Info("draining", "stages", len(under), "for", a.o.Drain)
	}
	end := time.NewTimer(a.o.Drain)
	defer end.Stop()
	for _, j := range under {
		for {
			s, _, changed := j.status()
			if s.Done() {
				break
			}
			select {
			case <-changed:
				continue
			case <-end.C:
				return
			}
		}
	}
}

// close ends everything but the mounts.
func (a *Agent) close() {
	a.cancel(errStopped)
	a.jobsWG.Wait()
	a.keeper.Close() // the mounts go on
	if a.gossip != nil {
		_ = a.gossip.Close()
	}
	_ = a.client.Close()
	_ = a.server.Close()
	a.mu.Lock()
	jobs := a.jobs
	a.jobs, a.plans = map[string]*job{}, map[string]*job{}
	a.mu.Unlock()
	for _, j := range jobs {
		j.release()
	}
}

// Addr is where other agents find this one, once Run has called ready.
func (a *Agent) Addr() string { return a.addr }

// audit leaves a line about something that somebody may have to answer for.
func (a *Agent) audit(what string, about ...any) {
	a.o.Audit.Info("audit", append([]any{"event", what, "host", a.o.Name}, about...)...)
}

// begin gives the job of an order, which is begun unless it is under way.
func (a *Agent) begin(o order) (*job, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := o.id()
	if j := a.jobs[id]; j != nil {
		s, _, _ := j.status()
		over := false
		select {
		case <-j.over:
			over = true
		default:
		}
		switch {
		case s.Phase == control.PhaseFailed && !over:
			return j, nil
		case s.Phase != control.PhaseFailed && (!over || readyLevel[s.Ready] >= readyLevel[o.Ready]):
			j.adopt(o)
			return j, nil
		}
		a.forget(j) // it failed, or ended before it was what is wanted now: another try
		a.jobsWG.Go(j.release)
	}
	if a.draining || a.ctx.Err() != nil {
		return nil, fmt.Errorf("host %s: %w", a.o.Name, errStopped)
	}
	j := a.newJob(id, o)
	close(j.ordered)
	a.start(j)
	return j, nil
}

// start enters a job and runs it. The caller holds a.mu.
func (a *Agent) start(j *job) {
	a.jobs[j.id] = j
	a.wake()
	a.jobsWG.Go(j.run)
}

// forget takes a job off the lists. The caller holds a.mu.
func (a *Agent) forget(j *job) {
	if a.jobs[j.id] == j {
		delete(a.jobs, j.id)
	}
	if j.plan != nil && a.plans[j.plan.ID().String()] == j {
		delete(a.plans, j.plan.ID().String())
	}
}
