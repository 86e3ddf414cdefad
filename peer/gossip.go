package peer

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// GossipPort is where hosts gossip if nothing else is said.
const GossipPort = 7946

// GossipOptions say how a host gossips.
type GossipOptions struct {
	// Self is this host. Name is that of its certificate; Control is where it listens, on the control network (port 0:
	// any); Data is where its Server listens.
	Self Member
	// Keys encrypt gossip: the first for sending, all for receiving. At least one.
	Keys [][]byte
	// Seeds say whom to join. Nil: nobody, until Join.
	Seeds Seeds
	// Hosts is about how many hosts the cluster has. It chooses between quick news and cheap news, see tuningFor. Zero: as many as
	// Seeds name at the start.
	Hosts int
	// Budget is bytes/s that a host may spend on comparing its list with another's; at least 30 s lie between two times. Too high and
	// large clusters chatter, too low and hosts that missed news stay ignorant longer. Default 1 kB/s.
	Budget int64

	Log *slog.Logger // nil: none

	transport memberlist.NodeAwareTransport // of tests
}

// tuning is what depends on the size of a cluster.
//
// What a host sends in a second, in bytes on the wire (28 for UDP and IPv4 and 29 for encryption are in all of them):
//
//	probes     one ping and one ack each Probe: (130 + 110)/Probe
//	news       at most Fan packets of 1,400 bytes each Interval, and only while there is news: Fan · 1,428 / Interval
//	comparing  the whole list, N · 60 bytes compressed, to one host each Compare, and as much to one that asks: 2 · N · 60 / Compare,
//	           which Compare = max(30 s, 2 · N · 60 / Budget) bounds by Budget
//
// Up to 512 hosts that is 240 + 1,000 in the long run, and news may take 21 kB/s for as long as it lasts: for one host that comes,
// 12 times 150 bytes at each host. Beyond that news is what costs. When all N hosts are started at once, each has N
// pieces of news of 110 bytes to send Repeat · ⌈lg(N+1)⌉ times. So the rate is bounded instead: 120 + 2,856 + 1,000 = 4.0 kB/s at
// any N, and it takes as long as it takes: for 2,000 hosts 2,000 · 110 · 8 / 2,856 s = 10 minutes until the last piece has been sent
// for the last time. Pieces that were sent least go first, so nearly all is known long before. A host that fails is
// noticed after about 4 · lg N · Probe: 27 s at 2,000.
//
// Measured with 2,000 hosts in memory (TestGossipCost), mean over hosts and a minute: 2.6 kB/s when all start at once, and 94 % known after
// a minute, 99.5 % after two; 2.1 at rest; 2.0 when half of them fail at once. Only the seeds send more, and only in that first minute: each of
// four tells its list to 500 hosts, 183 kB/s. More seeds share that.
type tuning struct {
	Probe    time.Duration
	Interval time.Duration
	Fan      int
	Repeat   int
}

const quickHosts = 512

func tuningFor(hosts int) tuning {
	if hosts <= quickHosts {
		return tuning{Probe: time.Second, Interval: 200 * time.Millisecond, Fan: 3, Repeat: 4}
	}
	return tuning{Probe: 2 * time.Second, Interval: time.Second, Fan: 2, Repeat: 2}
}

// memberBytes is what one member costs in a compressed list.
const memberBytes = 60

// compareEvery is how often a host compares its list with another's.
func compareEvery(hosts int, budget int64) time.Duration {
	return max(30*time.Second, time.Duration(2*memberBytes*int64(hosts))*time.Second/time.Duration(budget))
}

// Gossip is this host's part in membership. It keeps a Roster of who is there, this host included. Close must be called.
type Gossip struct {
	*Roster
	o       GossipOptions
	list    *memberlist.Memberlist
	keyring *memberlist.Keyring
	sent    *meteredTransport
	cancel  context.CancelFunc
	wg      sync.WaitGroup // run

	mu   sync.Mutex
	self Member // what NodeMeta says
}

// StartGossip begins to gossip and to join the seeds. It does not wait until anybody has been reached: everything else works
// without.
func StartGossip(o GossipOptions) (*Gossip, error) {
	if err := checkName(o.Self.Name); err != nil {
		return nil, err
	}
	if len(o.Keys) == 0 {
		return nil, errors.New("gossip needs a key")
	}
	if a := o.Self.Control.Addr(); !a.IsValid() || a.IsUnspecified() {
		return nil, fmt.Errorf("gossip needs an address of its own, not %v: others are told where it is", o.Self.Control)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Budget <= 0 {
		o.Budget = 1000
	}
	if o.Seeds == nil {
		o.Seeds = SeedList()
	}
	keyring, err := memberlist.NewKeyring(o.Keys, o.Keys[0])
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	if o.Hosts == 0 {
		seeds, _ := o.Seeds(ctx) // they are asked again by run
		o.Hosts = len(seeds)
	}
	logger := log.New(slogWriter{o.Log}, "", 0)
	transport := o.transport
	if transport == nil {
		nt, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
			BindAddrs: []string{o.Self.Control.Addr().String()}, BindPort: int(o.Self.Control.Port()), Logger: logger,
		})
		if err != nil {
			cancel()
			return nil, err
		}
		transport = nt
		o.Self.Control = netip.AddrPortFrom(o.Self.Control.Addr(), uint16(nt.GetAutoBindPort()))
	}
	g := &Gossip{Roster: &Roster{}, o: o, keyring: keyring, cancel: cancel, self: o.Self, sent: metered(transport)}

	t := tuningFor(o.Hosts)
	c := memberlist.DefaultLANConfig()
	c.Name = o.Self.Name
	c.RequireNodeNames = false
	c.Transport = g.sent
	c.BindAddr, c.BindPort = o.Self.Control.Addr().String(), int(o.Self.Control.Port())
	c.AdvertiseAddr, c.AdvertisePort = c.BindAddr, c.BindPort
	c.Keyring = keyring
	c.Label = "muster"
	c.ProbeInterval, c.ProbeTimeout = t.Probe, t.Probe/2
	c.GossipInterval, c.GossipNodes, c.RetransmitMult = t.Interval, t.Fan, t.Repeat
	c.PushPullInterval = 0                   // run does it, as often as the number of hosts allows
	c.DeadNodeReclaimTime = 10 * time.Second // a host that was installed anew may have another address
	c.Delegate, c.Events, c.Alive, c.Conflict = delegate{g}, delegate{g}, delegate{g}, delegate{g}
	c.Logger = logger
	if g.list, err = memberlist.Create(c); err != nil {
		cancel()
		transport.Shutdown()
		return nil, err
	}
	g.wg.Go(func() { g.run(ctx) })
	return g, nil
}

// Control is where this host listens for gossip.
func (g *Gossip) Control() netip.AddrPort { return g.o.Self.Control }

// Sent is the bytes sent since the start, headers of UDP and IPv4 included.
func (g *Gossip) Sent() int64 { return g.sent.bytes.Load() }

// Update changes what others hear of this host: Data, Version, Rate and Epoch of m.
func (g *Gossip) Update(m Member) error {
	g.mu.Lock()
	g.self.Data, g.self.Version, g.self.Rate, g.self.Epoch = m.Data, m.Version, m.Rate, m.Epoch
	g.mu.Unlock()
	return g.list.UpdateNode(5 * time.Second)
}

// SetKeys changes the keys: the first is for sending, all are for receiving. To rotate while hosts gossip, first add the new key behind the old
// one on all hosts, then put it first on all, then leave the old one out.
func (g *Gossip) SetKeys(keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("gossip needs a key")
	}
	for _, k := range keys {
		if err := g.keyring.AddKey(k); err != nil {
			return err
		}
	}
	if err := g.keyring.UseKey(keys[0]); err != nil {
		return err
	}
	for _, k := range g.keyring.GetKeys() {
		if !slices.ContainsFunc(keys, func(x []byte) bool { return string(x) == string(k) }) {
			if err := g.keyring.RemoveKey(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// Join joins hosts that the caller knows of, as a job's host list; it says how many were reached.
func (g *Gossip) Join(ctx context.Context, hosts []string) (int, error) {
	reached := 0
	var errs []error
	for _, h := range hosts {
		if err := g.join(ctx, h); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", h, err))
		} else {
			reached++
		}
	}
	if reached > 0 {
		return reached, nil
	}
	return 0, errors.Join(errs...)
}

// join compares lists with one host.
func (g *Gossip) join(ctx context.Context, host string) error {
	addrs, err := resolve(ctx, host, GossipPort)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if a == g.o.Self.Control {
			continue
		}
		if _, err = g.list.Join([]string{a.String()}); err == nil {
			return nil
		}
	}
	return err
}

// run joins, and compares lists from time to time.
//
//  1. Until anybody is there, one seed after the other is tried, in random order, slower and slower up to every 30 s.
//  2. Then, each compareEvery, the list is compared with a member, which brings what gossip has lost; and each time
//     with a seed that is not there, if there is one: that is how two halves of a partition find each other again.
func (g *Gossip) run(ctx context.Context) {
	pause := time.Second
	// All hosts of a cluster are switched on at the same moment.
	g.sleep(ctx, time.Duration(rand.Int64N(int64(time.Duration(g.o.Hosts)*5*time.Millisecond+1))))
	for ctx.Err() == nil {
		alone := len(g.Members()) <= 1
		joined := g.seed(ctx, alone)
		switch {
		case alone && !joined:
			g.sleep(ctx, pause/2+rand.N(pause))
			pause = min(pause*3/2, 30*time.Second)
			continue
		case !alone:
			if others := g.others(); len(others) > 0 {
				m := others[rand.IntN(len(others))]
				if err := g.join(ctx, m.Control.String()); err != nil && ctx.Err() == nil {
					g.o.Log.Debug("gossip: compare", "with", m.Name, "err", err)
				}
			}
		}
		pause = time.Second
		every := compareEvery(len(g.Members()), g.o.Budget)
		g.sleep(ctx, every/2+rand.N(every))
	}
}

func (g *Gossip) sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// seed joins one seed that is not a member: any that answers when this host is alone, else one at random is tried.
func (g *Gossip) seed(ctx context.Context, alone bool) bool {
	seeds, err := g.o.Seeds(ctx)
	if err != nil {
		g.o.Log.Warn("gossip: seeds", "err", err)
	}
	seeds = slices.Clone(seeds) // the list is its owner's
	rand.Shuffle(len(seeds), func(i, j int) { seeds[i], seeds[j] = seeds[j], seeds[i] })
	known := map[netip.AddrPort]bool{g.o.Self.Control: true}
	for _, m := range g.Members() {
		known[m.Control] = true
	}
	for _, s := range seeds {
		addrs, err := resolve(ctx, s, GossipPort)
		if err != nil || !slices.ContainsFunc(addrs, func(a netip.AddrPort) bool { return !known[a] }) {
			continue
		}
		if err = g.join(ctx, s); err == nil {
			return true
		}
		g.o.Log.Debug("gossip: join", "seed", s, "err", err)
		if !alone || ctx.Err() != nil {
			return false
		}
	}
	return false
}

func (g *Gossip) others() []Member {
	return slices.DeleteFunc(g.Members(), func(m Member) bool { return m.Name == g.o.Self.Name })
}

// Leave tells the others that this host goes, and waits until one of them has been told.
func (g *Gossip) Leave(ctx context.Context) error {
	g.cancel() // run must not join again
	limit := 5 * time.Second
	if d, ok := ctx.Deadline(); ok {
		limit = max(time.Millisecond, time.Until(d))
	}
	return g.list.Leave(limit)
}

// Close ends gossip. Without Leave, the others take this host for failed.
func (g *Gossip) Close() error {
	g.cancel()
	g.wg.Wait()
	return g.list.Shutdown()
}

// delegate is what memberlist calls. It does so with locks held, so nothing here calls memberlist.
type delegate struct{ g *Gossip }

func (d delegate) NodeMeta(int) []byte {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	return appendMeta(nil, d.g.self)
}
func (delegate) NotifyMsg([]byte)                {}
func (delegate) GetBroadcasts(int, int) [][]byte { return nil }
func (delegate) LocalState(bool) []byte          { return nil }
func (delegate) MergeRemoteState([]byte, bool)   {}

func (d delegate) member(n *memberlist.Node) (Member, error) {
	a, ok := netip.AddrFromSlice(n.Addr)
	if !ok {
		return Member{}, fmt.Errorf("%w: %s has no address", ErrProtocol, n.Name)
	}
	return parseMeta(Member{Name: n.Name, Control: netip.AddrPortFrom(a.Unmap(), n.Port)}, n.Meta)
}

// NotifyAlive keeps members out whose words are not understood.
func (d delegate) NotifyAlive(n *memberlist.Node) error {
	if err := checkName(n.Name); err != nil {
		return err
	}
	_, err := d.member(n)
	return err
}

func (d delegate) NotifyJoin(n *memberlist.Node) {
	if m, err := d.member(n); err == nil { // NotifyAlive has looked at it
		d.g.Set(m)
	}
}
func (d delegate) NotifyUpdate(n *memberlist.Node) { d.NotifyJoin(n) }
func (d delegate) NotifyLeave(n *memberlist.Node)  { d.g.Remove(n.Name) }

func (d delegate) NotifyConflict(existing, other *memberlist.Node) {
	d.g.o.Log.Error("gossip: two hosts have the same name", "name", existing.Name, "one", existing.Address(), "other", other.Address())
}

// slogWriter takes memberlist's lines, "[WARN] memberlist: …".
type slogWriter struct{ log *slog.Logger }

func (w slogWriter) Write(p []byte) (int, error) {
	line := strings.TrimSpace(string(p))
	level := slog.LevelDebug
	for tag, l := range map[string]slog.Level{"[WARN]": slog.LevelInfo, "[ERR]": slog.LevelInfo} {
		if rest, ok := strings.CutPrefix(line, tag); ok {
			line, level = strings.TrimSpace(rest), l
		}
	}
	w.log.Log(context.Background(), level, line)
	return len(p), nil
}

// A meteredTransport counts what goes out.
type meteredTransport struct {
	memberlist.NodeAwareTransport
	bytes   atomic.Int64
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
	wg      sync.WaitGroup
}

const udpHeaders = 28 // IPv4

func metered(t memberlist.NodeAwareTransport) *meteredTransport {
	m := &meteredTransport{NodeAwareTransport: t, streams: make(chan net.Conn), done: make(chan struct{})}
	m.wg.Go(func() { // ended by Shutdown
		for {
			select {
			case c := <-t.StreamCh():
				select {
				case m.streams <- &meteredConn{c, m}:
				case <-m.done:
					c.Close()
					return
				}
			case <-m.done:
				return
			}
		}
	})
	return m
}

func (m *meteredTransport) WriteTo(b []byte, addr string) (time.Time, error) {
	m.bytes.Add(int64(len(b)) + udpHeaders)
	return m.NodeAwareTransport.WriteTo(b, addr)
}

func (m *meteredTransport) WriteToAddress(b []byte, addr memberlist.Address) (time.Time, error) {
	m.bytes.Add(int64(len(b)) + udpHeaders)
	return m.NodeAwareTransport.WriteToAddress(b, addr)
}

func (m *meteredTransport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return m.meter(m.NodeAwareTransport.DialTimeout(addr, timeout))
}

func (m *meteredTransport) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return m.meter(m.NodeAwareTransport.DialAddressTimeout(addr, timeout))
}

func (m *meteredTransport) meter(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return &meteredConn{c, m}, nil
}

func (m *meteredTransport) StreamCh() <-chan net.Conn { return m.streams }

func (m *meteredTransport) Shutdown() error {
	err := m.NodeAwareTransport.Shutdown()
	m.once.Do(func() { close(m.done) })
	m.wg.Wait()
	return err
}

type meteredConn struct {
	net.Conn
	m *meteredTransport
}

func (c *meteredConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.m.bytes.Add(int64(n))
	return n, err
}
