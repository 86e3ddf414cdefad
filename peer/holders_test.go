package peer_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/peer/peertest"
	"github.com/muster-hpc/muster/ztoc"
)

func digest(i int) ztoc.Digest { return ztoc.DigestOf(fmt.Append(nil, i)) }

// TestRendezvous looks at balance, and at what a host more or less changes.
func TestRendezvous(t *testing.T) {
	var names []string
	for i := range 100 {
		names = append(names, fmt.Sprintf("node%03d", i))
	}
	load := map[string]int{}
	moved := 0
	for i := range 3000 {
		key := string(digest(i))
		three := peer.Rendezvous(key, names, 3)
		for _, n := range three {
			load[n]++
		}
		shuffled := slices.Concat(names[50:], names[:50], names[:10])
		if again := peer.Rendezvous(key, shuffled, 3); !slices.Equal(three, again) {
			t.Fatalf("%v and %v for the same names", three, again)
		}
		less := peer.Rendezvous(key, names[1:], 3)
		for _, n := range three {
			if n != names[0] && !slices.Contains(less, n) {
				t.Fatalf("%v without %s is %v", three, names[0], less)
			}
		}
		if !slices.Equal(less, three) {
			moved++
		}
	}
	for n, k := range load {
		if k < 45 || k > 150 { // 90 expected
			t.Errorf("%s has %d of 9000", n, k)
		}
	}
	if moved > 160 { // 90 expected
		t.Errorf("a host less moved %d of 3000", moved)
	}
}

func TestHolderTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := peer.NewHolderTable(3)
		ctx := t.Context()
		tell := func(from string, ttl time.Duration, gone []ztoc.Digest, have ...ztoc.Digest) error {
			_, err := h.Announce(ctx, from, peer.Announcement{Addr: from + ":1", Digests: have, Gone: gone, TTL: ttl})
			return err
		}
		find := func(d ztoc.Digest) string {
			a, err := h.Find(ctx, "x", peer.HoldersAsk{Digests: []ztoc.Digest{d}})
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprint(a.Holders[d])
		}
		tell("a", time.Minute, nil, digest(1), digest(2))
		tell("b", 2*time.Minute, nil, digest(1))
		if got := find(digest(1)); got != "[b (b:1) a (a:1)]" {
			t.Error(got)
		}
		time.Sleep(90 * time.Second)
		if got := find(digest(1)); got != "[b (b:1)]" {
			t.Error(got)
		}
		if h.Len() != 1 {
			t.Errorf("%d blobs are kept", h.Len())
		}
		tell("b", time.Minute, []ztoc.Digest{digest(1)})
		if got := find(digest(1)); got != "[]" {
			t.Error(got)
		}
		if err := tell("a", time.Minute, nil, digest(3), digest(4), digest(5), digest(6)); err == nil {
			t.Error("more blobs than the table holds")
		}
		if err := tell("a", time.Minute, nil, "sha256:../x"); err == nil {
			t.Error("not a digest")
		}
		for i := range 100 {
			tell(fmt.Sprint("n", i), time.Minute, nil, digest(3))
		}
		a, _ := h.Find(ctx, "x", peer.HoldersAsk{Digests: []ztoc.Digest{digest(3)}})
		if n := len(a.Holders[digest(3)]); n != peer.MaxHolders {
			t.Errorf("%d holders are told", n)
		}
	})
}

// TestDirectory has 64 hosts in one process, of which some hold a blob and some do not answer: each finds the holders, with three questions at most.
func TestDirectory(t *testing.T) {
	const n = 64
	m := peer.NewMemory()
	var hosts []peer.Host
	var servers []*peer.Server
	var dirs []*peer.Directory
	for i := range n {
		name := fmt.Sprintf("node%02d", i)
		table := peer.NewHolderTable(0)
		s, h := peertest.Serve(t, m.Host(name), name, "", peer.NotHere{}, peer.ServerOptions{}, func(s *peer.Server) {
			peer.Handle(s, peer.Announce, table.Announce)
			peer.Handle(s, peer.Holders, table.Find)
		})
		hosts, servers = append(hosts, h), append(servers, s)
		dirs = append(dirs, &peer.Directory{
			Client: peertest.Client(t, m.Host(name), peer.ClientOptions{}), Hosts: func() []peer.Host { return hosts }, Self: h, Table: table,
		})
	}
	blob := digest(1)
	// One of the three that keep the list is gone.
	gone := peer.Rendezvous(string(blob), func() (names []string) {
		for _, h := range hosts {
			names = append(names, h.Name)
		}
		return names
	}(), 1)[0]
	m.Cut(gone)
	ctx, cancel := context.WithTimeout(t.Context(), peertest.Patience)
	defer cancel()
	holders := 0
	for i := 0; i < n; i += 16 {
		if hosts[i].Name == gone {
			continue
		}
		holders++
		if err := dirs[i].Announce(ctx, []ztoc.Digest{blob}, nil); err != nil {
			t.Error(err)
		}
	}
	var before int64
	for _, s := range servers {
		before += s.Stats().Answers
	}
	for i := 1; i < n; i += 8 {
		if hosts[i].Name == gone {
			continue
		}
		if found := dirs[i].Find(ctx, []ztoc.Digest{blob, digest(2)}); len(found[blob]) != holders || len(found[digest(2)]) != 0 {
			t.Errorf("%s found %v", hosts[i], found)
		}
	}
	var answers int64
	for _, s := range servers {
		answers += s.Stats().Answers
	}
	if asked := answers - before; asked > 8*2*peer.DirectoryHosts {
		t.Errorf("%d questions for 8 hosts and 2 blobs", asked)
	}
}
