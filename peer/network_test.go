package peer_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/peer/peertest"
)

// cluster makes a CA and a function that gives identities of it.
func cluster(t testing.TB) func(name string) *peer.Identity {
	t.Helper()
	ca := t.TempDir()
	if err := peer.Init(ca); err != nil {
		t.Fatal(err)
	}
	return func(name string) *peer.Identity {
		t.Helper()
		dir := t.TempDir()
		issue(t, ca, name, time.Hour, dir)
		id, err := peer.LoadIdentity(dir)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
}

func issue(t testing.TB, ca, name string, life time.Duration, dir string) {
	t.Helper()
	i, err := peer.Issue(ca, name, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, life)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Write(dir); err != nil {
		t.Fatal(err)
	}
}

func TestNetworks(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		peertest.TestNetwork(t, func(*testing.T) peertest.Pair {
			m := peer.NewMemory()
			return peertest.Pair{A: m.Host("a"), B: m.Host("b")}
		})
	})
	t.Run("tcp", func(t *testing.T) {
		peertest.TestNetwork(t, func(t *testing.T) peertest.Pair {
			of := cluster(t)
			return peertest.Pair{A: peer.NewTCP(of("a"), peer.TCPOptions{}), B: peer.NewTCP(of("b"), peer.TCPOptions{}), Addr: "127.0.0.1:0"}
		})
	})
	t.Run("tcp over IPv6", func(t *testing.T) {
		peertest.TestNetwork(t, func(t *testing.T) peertest.Pair {
			of := cluster(t)
			return peertest.Pair{A: peer.NewTCP(of("a"), peer.TCPOptions{}), B: peer.NewTCP(of("b"), peer.TCPOptions{}), Addr: "[::1]:0"}
		})
	})
}
