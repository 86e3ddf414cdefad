package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// join begins to gossip: to tell others of this host, and to hear of them.
func (a *Agent) join() error {
	o := *a.o.Gossip
	data, err := netip.ParseAddrPort(a.addr)
	if err != nil {
		return err
	}
	o.Self.Name, o.Self.Data, o.Self.Version = a.o.Name, data, a.o.Version
	o.Self.Epoch = uint64(a.began.UnixNano())
	if o.Log == nil {
		o.Log = a.log
	}
	g, err := peer.StartGossip(o)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gossip = g
	return nil
}

// members are the agents that gossip knows, this one among them.
func (a *Agent) members() (list []peer.Member) {
	a.mu.Lock()
	g := a.gossip
	a.mu.Unlock()
	if g == nil {
		return nil
	}
	list = g.Members()
	slices.SortFunc(list, func(x, y peer.Member) int { return strings.Compare(x.Name, y.Name) })
	return list
}

func (a *Agent) peers() []control.Peer {
	list := []control.Peer{}
	for _, m := range a.members() {
		list = append(list, control.Peer{Host: m.Name, Address: m.Data.String(), State: "alive"})
	}
	return list
}

// memberAddr is where gossip says that a host listens, or nothing.
func (a *Agent) memberAddr(name string) string {
	for _, m := range a.members() {
		if m.Name == name {
			return m.Data.String()
		}
	}
	return ""
}

// lookUp finds a host's address by name, one on the data network where that is limited.
func (a *Agent) lookUp(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, a.o.Ask)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return "", err
	}
	for _, ip := range ips {
		ip = ip.Unmap()
		if len(a.o.Data) == 0 || slices.ContainsFunc(a.o.Data, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			return ip.String(), nil
		}
	}
	return "", fmt.Errorf("none of its addresses %v is in the data networks %v", ips, a.o.Data)
}

// directory is how holders of blobs are found and told of; nil without gossip.
func (a *Agent) directory() *peer.Directory {
	if len(a.members()) < 2 {
		return nil
	}
	return &peer.Directory{
		Client: a.client, Self: peer.Host{Name: a.o.Name, Addr: a.addr}, Table: a.holders, TTL: holderTTL,
		Hosts: func() (hosts []peer.Host) {
			for _, m := range a.members() {
				hosts = append(hosts, m.Host())
			}
			return hosts
		},
	}
}

// Announcements of what this host has hold for holderTTL and are repeated three times as often.
const holderTTL = 3 * time.Minute

// announce tells the directory hosts what this host has, from time to time and when a layer is complete.
func (a *Agent) announce(ctx context.Context) {
	tick := time.NewTicker(holderTTL / 3)
	defer tick.Stop()
	for {
		if d := a.directory(); d != nil {
			ask, cancel := context.WithTimeout(ctx, a.o.Ask)
			if err := d.Announce(ask, a.complete(), nil); err != nil && !errors.Is(err, context.Canceled) {
				a.log.Debug("holders are not announced", "cause", err)
			}
			cancel()
		}
		select {
		case <-tick.C:
		case <-a.announced:
		case <-ctx.Done():
			return
		}
	}
}

// complete are the blobs of recorded images, and of jobs here, that are here whole.
func (a *Agent) complete() (list []ztoc.Digest) {
	seen := map[ztoc.Digest]bool{}
	add := func(ref ztoc.BlobRef) {
		if seen[ref.Digest] {
			return
		}
		seen[ref.Digest] = true
		h, err := a.shelf.open(ref)
		if err != nil {
			return
		}
		defer h.close()
		if h.blob.Complete() {
			list = append(list, ref.Digest)
		}
	}
	images, err := a.o.Store.Images()
	if err != nil {
		return nil
	}
	for _, im := range images {
		for _, b := range im.Blobs {
			if ref, ok := a.o.Store.Find(b.Digest); ok && ref == b {
				add(b)
			}
		}
	}
	a.mu.Lock()
	var jobs []*job
	for _, j := range a.plans {
		jobs = append(jobs, j)
	}
	a.mu.Unlock()
	for _, j := range jobs {
		for _, n := range j.layers() {
			add(j.spec.Blobs[n].BlobRef)
		}
	}
	return list
}

// haveNews has the holders announced soon.
func (a *Agent) haveNews() {
	select {
	case a.announced <- struct{}{}:
	default:
	}
}

// holdersOf are the hosts outside the job that have a layer whole, as far as the directory knows. It is asked once for all layers of a job.
func (j *job) holdersOf(ctx context.Context, d ztoc.Digest) []peer.Host {
	j.asking.Do(func() {
		dir := j.a.directory()
		if dir == nil {
			return
		}
		ctx, cancel := context.WithTimeout(ctx, holderWait)
		defer cancel()
		var layers []ztoc.Digest
		for _, n := range j.layers() {
			layers = append(layers, j.spec.Blobs[n].Digest)
		}
		j.holders = dir.Find(ctx, layers)
	})
	return j.holders[d]
}

// holderWait bounds what asking for holders may cost a stage.
const holderWait = 500 * time.Millisecond

// told takes a note from another host.
func (a *Agent) told(_ context.Context, from string, n peer.Note) (struct{}, error) {
	j := a.planned(n.Plan)
	if j == nil || j.plan.Host(from) < 0 {
		return struct{}{}, nil
	}
	if n.Kind == peer.NoteQuiet {
		j.quiet.Store(time.Now().Add(min(max(n.For, 0), time.Minute)).UnixNano())
	}
	return struct{}{}, nil
}

// tellAll passes a note on to all seeds of the job, without waiting for their answers.
func (j *job) tellAll(n peer.Note) {
	n.Plan = j.plan.ID().String()
	for _, i := range j.plan.Seeds() {
		if i == j.me {
			continue
		}
		j.notes.Go(func() {
			ctx, cancel := context.WithTimeout(j.ctx, j.a.o.Ask)
			defer cancel()
			_, _ = peer.Ask(ctx, j.a.client, j.hostAt(i), peer.Tell, n)
		})
	}
}

// SetGossipKeys changes the keys of a running agent: the first is for sending, all for receiving.
func (a *Agent) SetGossipKeys(keys [][]byte) error {
	a.mu.Lock()
	g := a.gossip
	a.mu.Unlock()
	if g == nil {
		return nil
	}
	return g.SetKeys(keys)
}
