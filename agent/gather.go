package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// Stage begins an order on all its hosts and tells how they come along, until each is ready or has failed. When the client goes away the
// stage goes on.
func (a *Agent) Stage(ctx context.Context, c control.Caller, q control.StageRequest, tell func(control.StageEvent) error) error {
	began := time.Now()
	o, err := a.orderOf(ctx, c, q)
	if err != nil {
		a.audit("refused", "image", q.Image, "caller", c.String(), "cause", err.Error())
		a.metrics.stages.WithLabelValues("refused").Inc()
		return err
	}
	a.audit("stage-asked", "job", o.Job, "image", o.Image, "uid", o.UID, "caller", c.String(), "hosts", len(o.Hosts))
	watched := o.Hosts
	if q.Here {
		watched = slices.DeleteFunc(slices.Clone(o.Hosts), func(h peer.Host) bool { return h.Name != a.o.Name })
	}
	g := &gathering{
		a: a, o: o, began: began, hosts: watched, states: make([]control.HostState, len(watched)), silent: make([]bool, len(watched)), fresh: make(chan struct{}, 1),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, h := range watched {
		g.states[i] = control.HostState{Host: h.Name, Phase: control.PhaseWaiting}
		wg.Go(func() { g.follow(ctx, i) })
	}
	defer cancel()
	if err := g.show(ctx, tell); err != nil {
		return err
	}
	r := g.report()
	return tell(control.StageEvent{Report: &r})
}

// orderOf checks a request and makes it an order.
func (a *Agent) orderOf(ctx context.Context, c control.Caller, q control.StageRequest) (order, error) {
	o := order{Job: q.Job, Image: q.Image, Platform: q.Platform, UID: c.UID, GID: c.GID, NoMount: q.NoMount, Timeout: q.Timeout, Secret: q.Secret}
	if q.UID >= 0 && uint32(q.UID) != c.UID {
		if !a.mayActForOthers(c) {
			return o, fmt.Errorf("%w: uid %d cannot stage for uid %d", control.ErrRefused, c.UID, q.UID)
		}
		o.UID, o.GID = uint32(q.UID), uint32(max(q.GID, 0))
	}
	ref, err := origin.ParseReference(q.Image)
	if err != nil {
		return o, err
	}
	o.Image = ref.String()
	if ref.Layout != "" && int(o.UID) != os.Geteuid() {
		// The agent's rights are not the user's: it would read, and show him, what he may not.
		return o, fmt.Errorf("%w: %s: an agent of uid %d reads no path for uid %d; push the image to a registry, or use 'muster mount'", control.ErrRefused, o.Image, os.Geteuid(), o.UID)
	}
	if a.o.Images != nil {
		if err := a.o.Images(o.Image); err != nil {
			return o, fmt.Errorf("%w: %w", control.ErrRefused, err)
		}
	}
	if o.Ready, err = control.ParseReady(string(q.Ready)); err != nil {
		return o, &control.Error{Text: err.Error(), Code: 2}
	}
	hosts := q.Hosts
	if len(hosts) == 0 {
		hosts = []string{a.o.Name}
	}
	for _, h := range hosts {
		host, err := a.hostOf(ctx, h)
		if err != nil {
			return o, err
		}
		if slices.ContainsFunc(o.Hosts, func(x peer.Host) bool { return x.Name == host.Name }) {
			return o, &control.Error{Text: "host " + host.Name + " is named twice", Code: 2}
		}
		o.Hosts = append(o.Hosts, host)
	}
	if !o.has(a.o.Name) {
		return o, &control.Error{Text: fmt.Sprintf("this host, %s, is not among the hosts %s: ask an agent of the job", a.o.Name, strings.Join(q.Hosts, ",")), Code: 2}
	}
	if o.Job == "" {
		o.Job = "muster-" + store.Key(itoa(o.UID) + " " + o.Image + " " + strings.Join(o.names(), " "))[:10]
	}
	return o, nil
}

// mayActForOthers reports whether a caller may stage, and end stages, for other users.
func (a *Agent) mayActForOthers(c control.Caller) bool {
	return c.Root() || slices.Contains(a.o.Admins, c.UID)
}

// hostOf is a host as it is dialled, of "name" or "name=address:port".
func (a *Agent) hostOf(ctx context.Context, s string) (peer.Host, error) {
	name, addr, given := strings.Cut(s, "=")
	if name == "" || len(name) > peer.MaxName {
		return peer.Host{}, &control.Error{Text: fmt.Sprintf("%q is not a host", s), Code: 2}
	}
	switch {
	case given:
	case name == a.o.Name:
		addr = a.addr
	default:
		if addr = a.memberAddr(name); addr == "" {
			ip, err := a.lookUp(ctx, name)
			if err != nil {
				return peer.Host{}, &control.Error{Text: fmt.Sprintf("host %s: %v; gossip does not know it either", name, err), Code: 2}
			}
			addr = net.JoinHostPort(ip, fmt.Sprint(a.o.Port))
		}
	}
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return peer.Host{}, &control.Error{Text: fmt.Sprintf("host %s: address %q: %v", name, addr, err), Code: 2}
	}
	return peer.Host{Name: name, Addr: addr}, nil
}

// A gathering watches an order on hosts.
type gathering struct {
	a     *Agent
	o     order
	hosts []peer.Host // those that are watched
	began time.Time
	fresh chan struct{} // capacity 1: a state has changed

	mu      sync.Mutex
	states  []control.HostState
	silent  []bool // the host did not answer the last question
	changed map[int]bool
	digest  string
	plan    string
}

func (g *gathering) set(i int, s control.HostState, digest, plan string) {
	g.mu.Lock()
	g.states[i] = s
	if g.changed == nil {
		g.changed = map[int]bool{}
	}
	g.changed[i] = true
	g.digest, g.plan = cmp.Or(digest, g.digest), cmp.Or(plan, g.plan)
	g.mu.Unlock()
	select {
	case g.fresh <- struct{}{}:
	default:
	}
}

// follow begins the order on one host and follows it to the end.
func (g *gathering) follow(ctx context.Context, i int) {
	h := g.hosts[i]
	id := g.o.id()
	fail := func(err error) {
		if ctx.Err() == nil {
			g.set(i, control.HostState{Host: h.Name, Phase: control.PhaseFailed, Error: err.Error(), Code: g.a.o.ExitCode(err), Took: time.Since(g.began)}, "", "")
		}
	}
	here := h.Name == g.a.o.Name
	var err error
	if here {
		_, err = g.a.begin(g.o)
	} else {
		err = g.beginAt(ctx, h)
	}
	if err != nil {
		fail(fmt.Errorf("host %s: %w", h.Name, err))
		return
	}
	version, silent, gone := -1, time.Now(), false
	for {
		var r stateAnswer
		if here {
			r, err = g.a.stateOf(ctx, stateAsk{id, version, g.every()})
		} else {
			ask, cancel := context.WithTimeout(ctx, g.every()+answerWait)
			r, err = peer.Ask(ask, g.a.client, h, stateQuestion, stateAsk{id, version, g.every()})
			gone = ask.Err() == nil
			cancel()
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && g.over(i, time.Since(silent), gone):
			fail(fmt.Errorf("host %s: no answer for %v: %w", h.Name, time.Since(silent).Round(time.Second), err))
			return
		case errors.Is(err, peer.ErrNotHere) && !here: // its agent was started again in the middle
			if err := g.beginAt(ctx, h); err != nil {
				fail(fmt.Errorf("host %s: %w", h.Name, err))
				return
			}
			version = -1
		case err != nil:
			select {
			case <-time.After(stateEvery):
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			continue
		}
		silent, version = time.Now(), r.Version
		g.mu.Lock()
		g.silent[i] = false
		g.mu.Unlock()
		r.State.Host = h.Name
		g.set(i, r.State, r.Digest, r.Plan)
		if r.State.Done() {
			return
		}
	}
}

// every is how often a host tells how it comes along: with many hosts less often, so that listening stays cheap. The end is told at once.
func (g *gathering) every() time.Duration {
	return min(max(stateEvery, time.Duration(len(g.hosts))*3*time.Millisecond), 5*time.Second)
}

// How long a host may be silent: until it has taken the order, after that, and, when only silent hosts are left to wait for, while nobody listens
// there. The last one is how much a host that dies costs the others at most; an agent that is being started again has about that time. A host that
// listens and does not answer may only be stopped for a moment.
const (
	hostAbsent  = 30 * time.Second
	hostSilence = 15 * time.Second
	lastSilence = 1500 * time.Millisecond
	answerWait  = 2 * time.Second // of one question
)

// over reports whether a host that has been silent for so long is given up. gone says that nobody listens there, as against one who does not answer.
func (g *gathering) over(i int, silent time.Duration, gone bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.silent[i] = true
	for k, s := range g.states {
		if !s.Done() && !g.silent[k] {
			return silent > hostSilence
		}
	}
	return silent > hostSilence || gone && silent > lastSilence
}

// beginAt has another host begin, asking again while it cannot be reached.
func (g *gathering) beginAt(ctx context.Context, h peer.Host) error {
	for began := time.Now(); ; {
		_, err := peer.Ask(ctx, g.a.client, h, stageQuestion, g.o)
		if err == nil || ctx.Err() != nil || errors.Is(err, peer.ErrDenied) || time.Since(began) > min(hostAbsent, cmp.Or(g.a.o.Absent, hostAbsent)) {
			return err
		}
		select {
		case <-time.After(stateEvery):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// show tells what changes until all hosts are done.
func (g *gathering) show(ctx context.Context, tell func(control.StageEvent) error) error {
	for {
		select {
		case <-g.fresh:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		g.mu.Lock()
		var e control.StageEvent
		for i := range g.changed {
			e.Hosts = append(e.Hosts, g.states[i])
		}
		g.changed = nil
		left := slices.ContainsFunc(g.states, func(s control.HostState) bool { return !s.Done() })
		g.mu.Unlock()
		slices.SortFunc(e.Hosts, func(a, b control.HostState) int { return cmp.Compare(a.Host, b.Host) })
		if len(e.Hosts) > 0 {
			if err := tell(e); err != nil {
				return err
			}
		}
		if !left {
			return nil
		}
	}
}

// report sums up.
func (g *gathering) report() control.Report {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := control.Report{
		Job: g.o.Job, Image: g.o.Image, Digest: ztoc.Digest(g.digest), Plan: g.plan, Ready: g.o.Ready, Makespan: time.Since(g.began), Hosts: g.states,
	}
	var took []time.Duration
	for _, s := range g.states {
		r.Bytes = r.Bytes.Add(s.Bytes)
		r.Size = max(r.Size, s.Total)
		if s.Phase == control.PhaseFailed {
			r.Failed++
			continue
		}
		took = append(took, s.Took)
	}
	if len(took) > 0 {
		slices.Sort(took)
		r.Median, r.Slowest = took[len(took)/2], took[len(took)-1]
		r.Ratio = float64(r.Slowest) / float64(max(r.Median, 1))
	}
	return r
}
