package peer

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
)

// A memNet is a network for gossip in memory, made for time that does not pass by itself (testing/synctest): packets to
// hosts that are not there are lost, as are those between hosts that cut keeps apart.
type memNet struct {
	mu    sync.Mutex
	nodes map[string]*memTransport
	cut   func(from, to string) bool
}

type memTransport struct {
	n       *memNet
	addr    string
	packets chan *memberlist.Packet
	streams chan net.Conn
}

func newMemNet() *memNet { return &memNet{nodes: map[string]*memTransport{}} }

func (n *memNet) at(addr string) *memTransport {
	t := &memTransport{n: n, addr: addr, packets: make(chan *memberlist.Packet, 256), streams: make(chan net.Conn, 64)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.nodes[addr] = t
	return t
}

func (n *memNet) split(cut func(from, to string) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
}

func (t *memTransport) to(addr string) *memTransport {
	t.n.mu.Lock()
	defer t.n.mu.Unlock()
	if t.n.nodes[t.addr] != t || (t.n.cut != nil && t.n.cut(t.addr, addr)) {
		return nil
	}
	return t.n.nodes[addr]
}

func (t *memTransport) FinalAdvertiseAddr(ip string, port int) (net.IP, int, error) {
	return net.ParseIP(ip), port, nil
}

func (t *memTransport) WriteTo(b []byte, addr string) (time.Time, error) {
	now := time.Now()
	if d := t.to(addr); d != nil {
		select {
		case d.packets <- &memberlist.Packet{Buf: bytes.Clone(b), From: memoryAddr(t.addr), Timestamp: now}:
		default: // a full socket buffer
		}
	}
	return now, nil
}

func (t *memTransport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}
func (t *memTransport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *memTransport) StreamCh() <-chan net.Conn           { return t.streams }

func (t *memTransport) DialTimeout(addr string, _ time.Duration) (net.Conn, error) {
	d := t.to(addr)
	if d == nil {
		return nil, fmt.Errorf("no route to %s", addr)
	}
	a, b := net.Pipe()
	select {
	case d.streams <- b:
		return a, nil
	default:
		return nil, fmt.Errorf("%s is full", addr)
	}
}

func (t *memTransport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, d)
}

func (t *memTransport) Shutdown() error {
	t.n.mu.Lock()
	defer t.n.mu.Unlock()
	if t.n.nodes[t.addr] == t {
		delete(t.n.nodes, t.addr)
	}
	return nil
}

var key1, key2 = bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)

func memberAt(i int) Member {
	return Member{
		Name: fmt.Sprintf("node%05d", i), Control: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), GossipPort),
		Data: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 7464), Version: "1.0.0", Rate: 3, Epoch: 1,
	}
}

func (n *memNet) start(t *testing.T, o GossipOptions) *Gossip {
	t.Helper()
	if o.Keys == nil {
		o.Keys = [][]byte{key1}
	}
	o.transport = n.at(o.Self.Control.String())
	g, err := StartGossip(o)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func count(g *Gossip) int { return len(g.Members()) }

// TestGossip plays a small cluster in time that is not real.
func TestGossip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		seeds := SeedList(memberAt(0).Control.String(), memberAt(1).Control.Addr().String()) // the second with the usual port
		var g []*Gossip
		for i := range 8 {
			g = append(g, n.start(t, GossipOptions{Self: memberAt(i), Seeds: seeds}))
		}
		all := func(when string, want int) {
			t.Helper()
			for i, x := range g {
				if x != nil && count(x) != want {
					t.Errorf("%s: host %d knows %d members, want %d", when, i, count(x), want)
				}
			}
		}
		// News may be lost; the next comparison of lists, less than a minute later, brings it.
		time.Sleep(4 * time.Minute)
		all("after start", 8)
		if m, ok := g[7].Lookup("node00003"); !ok || m != memberAt(3) {
			t.Errorf("node 7 knows node 3 as %+v", m)
		}

		// What a host says of itself changes.
		var mu sync.Mutex
		var events []MemberEvent
		stop := g[5].Watch(func(e MemberEvent) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, e)
		})
		m := memberAt(2)
		m.Epoch, m.Rate = 9, 1
		if err := g[2].Update(m); err != nil {
			t.Error(err)
		}
		time.Sleep(3 * time.Minute)
		if got, _ := g[5].Lookup(m.Name); got != m {
			t.Errorf("node 2 is known as %+v, want %+v", got, m)
		}

		// Keys change while all talk.
		for _, keys := range [][][]byte{{key1, key2}, {key2, key1}, {key2}} {
			for _, x := range g {
				if err := x.SetKeys(keys); err != nil {
					t.Fatal(err)
				}
				time.Sleep(100 * time.Millisecond) // not all at the same moment
			}
			time.Sleep(90 * time.Second)
			all(fmt.Sprintf("with %d keys", len(keys)), 8)
		}

		// A stranger with another key is nobody.
		stranger := n.start(t, GossipOptions{Self: memberAt(100), Seeds: seeds})
		time.Sleep(30 * time.Second)
		all("with a stranger", 8)
		if count(stranger) != 1 {
			t.Errorf("the stranger knows %d members", count(stranger))
		}
		stranger.Close()

		// One leaves on purpose: all know at once. One fails: all know after a while. It comes back.
		if err := g[6].Leave(t.Context()); err != nil {
			t.Error(err)
		}
		g[6].Close()
		g[6] = nil
		time.Sleep(3 * time.Minute)
		all("after one left", 7)
		g[7].Close()
		g[7] = nil
		time.Sleep(4 * time.Minute)
		all("after one failed", 6)
		g[7] = n.start(t, GossipOptions{Self: memberAt(7), Seeds: seeds, Keys: [][]byte{key2}})
		time.Sleep(4 * time.Minute)
		all("after it came back", 7)
		stop()
		mu.Lock()
		kinds := ""
		for _, e := range events {
			kinds += fmt.Sprintf("%d:%s ", e.Kind, e.Member.Name)
		}
		mu.Unlock()
		if want := "2:node00002 3:node00006 3:node00007 1:node00007 "; kinds != want {
			t.Errorf("events %s, want %s", kinds, want)
		}

		// The seeds on one side, long enough to be given up, then together again.
		n.split(func(from, to string) bool {
			return (from < memberAt(3).Control.String()) != (to < memberAt(3).Control.String())
		})
		time.Sleep(5 * time.Minute)
		for i, x := range g {
			if x != nil && count(x) != map[bool]int{true: 3, false: 4}[i < 3] {
				t.Errorf("parted: host %d knows %d members", i, count(x))
			}
		}
		n.split(nil)
		time.Sleep(6 * time.Minute)
		all("healed", 7)

		for _, x := range g {
			if x != nil {
				x.Close()
			}
		}
		time.Sleep(time.Minute) // memberlist's goroutines end with their timers
	})
}

// TestGossipCost counts what a host sends when all hosts are started at once, at rest, and when half of them fail at once and
// come back together. 2,000 hosts take minutes of processor time, so there are 64 unless MUSTER_LONG is set (make e2e-long).
func TestGossipCost(t *testing.T) {
	hosts := 64
	if os.Getenv("MUSTER_LONG") != "" {
		hosts = 2000
	}
	const limit = 5000 // bytes/s
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		var seeds []string
		for i := range 4 {
			seeds = append(seeds, memberAt(i*hosts/4).Control.String())
		}
		g := make([]*Gossip, hosts)
		begin := func(i int) {
			// The settings of a large cluster, whatever the number here.
			g[i] = n.start(t, GossipOptions{Self: memberAt(i), Seeds: SeedList(seeds...), Hosts: max(hosts, quickHosts+1)})
		}
		last := make([]int64, hosts)
		phase := func(what string, minutes int) {
			for m := range minutes {
				time.Sleep(time.Minute)
				var sum, most int64
				here, known := 0, 0
				for i, x := range g {
					if x == nil {
						continue
					}
					d := x.Sent() - last[i]
					last[i] += d
					sum += d
					most = max(most, d)
					here++
					known += count(x)
				}
				mean := float64(sum) / float64(here) / 60
				t.Logf("%s, minute %d: %d hosts; bytes/s sent: mean %.0f, most %.0f; a host knows %.1f hosts", what, m+1, here, mean, float64(most)/60, float64(known)/float64(here))
				if mean > limit {
					t.Errorf("%s, minute %d: %.0f bytes/s for each host, want at most %d", what, m+1, mean, limit)
				}
			}
		}
		// News that is lost comes with the next comparison of lists, minutes later in large clusters.
		nearly := func() {
			t.Helper()
			for i, x := range g {
				if count(x) < hosts*95/100 {
					t.Errorf("host %d knows %d of %d", i, count(x), hosts)
					return
				}
			}
		}
		for i := range hosts {
			begin(i)
		}
		phase("all start at once", 2)
		nearly()
		phase("rest", 1)
		for i := 1; i < hosts; i += 2 {
			g[i].Close()
			g[i], last[i] = nil, 0
		}
		phase("half of them gone", 1)
		for i := 1; i < hosts; i += 2 {
			begin(i)
		}
		phase("back again", 2)
		nearly()
		for _, x := range g {
			x.Close()
		}
		time.Sleep(time.Minute)
	})
}

// TestGossipReal joins over UDP and TCP on loopback, both families, with seeds from a file.
func TestGossipReal(t *testing.T) {
	for _, addr := range []string{"127.0.0.1", "::1"} {
		t.Run(addr, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "seeds")
			var g []*Gossip
			for i := range 3 {
				m := memberAt(i)
				m.Control = netip.AddrPortFrom(netip.MustParseAddr(addr), 0)
				x, err := StartGossip(GossipOptions{Self: m, Keys: [][]byte{key1}, Seeds: AllSeeds(SeedFile(filepath.Join(t.TempDir(), "none")), SeedFile(file))})
				if err != nil {
					t.Fatal(err)
				}
				defer x.Close()
				g = append(g, x)
				if i == 0 {
					if err := os.WriteFile(file, []byte("# seeds\n"+x.Control().String()+" # the first\n"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for _, x := range g {
				for count(x) < 3 {
					if ctx.Err() != nil {
						t.Fatalf("%d members after a minute", count(x))
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
			if n, err := g[1].Join(ctx, []string{g[2].Control().String()}); n != 1 || err != nil {
				t.Errorf("joined %d, %v", n, err)
			}
		})
	}
}

func TestMeta(t *testing.T) {
	for _, m := range []Member{
		memberAt(1),
		{Name: "x", Control: netip.MustParseAddrPort("[fd00::1]:1"), Data: netip.MustParseAddrPort("[fd00::1]:2"), Epoch: 1 << 60},
		{Name: "x", Control: netip.MustParseAddrPort("10.0.0.1:1"), Data: netip.MustParseAddrPort("[fd00::1]:2"), Version: "12345678901234567890123456789012"},
	} {
		b := appendMeta(nil, m)
		got, err := parseMeta(Member{Name: m.Name, Control: m.Control}, b)
		if err != nil || got != m {
			t.Errorf("%+v came back as %+v, %v", m, got, err)
		}
		if len(b) > 64 {
			t.Errorf("%d bytes", len(b))
		}
		for i := range b {
			if got, err := parseMeta(Member{Name: m.Name, Control: m.Control}, b[:i]); err == nil && got.Version == m.Version {
				t.Errorf("%d of %d bytes are taken for all", i, len(b))
			}
		}
	}
}

func TestChoose(t *testing.T) {
	p := netip.MustParsePrefix
	interfaces := map[string][]netip.Prefix{
		"eth0": {p("10.0.0.7/16"), p("fe80::1/64")},
		"ib0":  {p("fe80::2/64"), p("fd00::7/64"), p("10.9.0.7/24")},
		"ib1":  {p("fd00:1::7/64")},
	}
	for network, want := range map[string]string{
		"10.0.0.0/8": "10.0.0.7", "10.9.0.0/16": "10.9.0.7", "eth0": "10.0.0.7", "ib0": "10.9.0.7", "ib1": "fd00:1::7", "fd00::/16": "fd00::7",
		"ib2": "", "192.168.0.0/16": "",
	} {
		a, nets, err := choose(network, interfaces)
		if got := map[bool]string{true: a.String(), false: ""}[err == nil]; got != want {
			t.Errorf("%s: %s, want %s; %v", network, got, want, err)
		}
		if err == nil && len(nets) == 0 {
			t.Errorf("%s: no prefix", network)
		}
	}
	if a, _, err := ChooseAddr("127.0.0.0/8"); err != nil || a.String() != "127.0.0.1" {
		t.Errorf("%v, %v", a, err)
	}
}
