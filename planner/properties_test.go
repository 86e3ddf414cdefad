package planner

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestEqualSpecsEqualPlans(t *testing.T) {
	for seed := range uint64(100) {
		s := random(rand.New(rand.NewPCG(seed, 4)))
		b, err := s.Encode()
		if err != nil {
			t.Fatal(err)
		}
		other, err := DecodeJobSpec(b)
		if err != nil {
			t.Fatal(err)
		}
		p, q := plan(t, s), plan(t, other)
		q.spec = p.spec
		if !reflect.DeepEqual(p, q) {
			t.Fatalf("seed %d: two plans of one spec differ", seed)
		}
	}
}

// TestEveryFieldCounts: whatever differs between two specs, their PlanIDs differ.
func TestEveryFieldCounts(t *testing.T) {
	change := map[string]func(*JobSpec){
		"planner":  func(s *JobSpec) { s.Planner++ },
		"job":      func(s *JobSpec) { s.Job += "0" },
		"image":    func(s *JobSpec) { s.Image += "0" },
		"manifest": func(s *JobSpec) { s.Manifest = s.Blobs[0].Digest },
		"piece":    func(s *JobSpec) { s.Params.Piece = 1 << 20 },
		"trees":    func(s *JobSpec) { s.Params.Trees = 5 },
		"fan-out":  func(s *JobSpec) { s.Params.Fanout = 5 },
		"seeds":    func(s *JobSpec) { s.Params.Seeds = 5 },
		"run":      func(s *JobSpec) { s.Params.Run = 5 },
		"digest":   func(s *JobSpec) { s.Blobs[1].Digest = s.Manifest },
		"size":     func(s *JobSpec) { s.Blobs[1].Size++ },
		"kind":     func(s *JobSpec) { s.Blobs[1].Kind = Meta },
		"ztoc":     func(s *JobSpec) { s.Blobs[1].Ztoc = s.Manifest },
		"order":    func(s *JobSpec) { slices.Reverse(s.Blobs) },
		"name":     func(s *JobSpec) { s.Hosts[1].Name += "0" },
		"addr":     func(s *JobSpec) { s.Hosts[1].Addr += "0" },
		"group":    func(s *JobSpec) { s.Hosts[1].Group = "0" },
		"seed":     func(s *JobSpec) { s.Hosts[1].Seed = false },
		"slow":     func(s *JobSpec) { s.Hosts[1].Slow = true },
		"hosts":    func(s *JobSpec) { slices.Reverse(s.Hosts) },
		"access":   func(s *JobSpec) { s.Access = []byte{0} },
		"nothing":  func(*JobSpec) {},
	}
	seen := map[PlanID]string{}
	for name, f := range change {
		s := job(3, 100, 200)
		f(s)
		if other, ok := seen[s.ID()]; ok {
			t.Errorf("%s and %s give one PlanID", name, other)
		}
		seen[s.ID()] = name
		if id, err := ParsePlanID(s.ID().String()); err != nil || id != s.ID() {
			t.Errorf("%s: %v", s.ID(), err)
		}
	}
}

// sent is what each host passes on, in bytes, and how many others it deals with.
func sent(p *Plan) (bytes []int64, peers []int) {
	n := len(p.Spec().Hosts)
	bytes, peers = make([]int64, n), make([]int, n)
	known := make([]int, n) // 1 + the host that was last seen to deal with it
	for h := range n {
		meet := func(other int) {
			if known[other] != h+1 {
				known[other] = h + 1
				peers[h]++
			}
		}
		for k := range p.Trees() {
			if q := p.Parent(k, h); q >= 0 {
				meet(q)
			}
			for c := range p.Children(k, h) {
				meet(c)
				bytes[h] += p.Bytes(k)
			}
		}
	}
	return bytes, peers
}

func uneven(bytes []int64) float64 {
	var most, sum int64
	for _, b := range bytes {
		most, sum = max(most, b), sum+b
	}
	if sum == 0 {
		return 1
	}
	return float64(most) * float64(len(bytes)) / float64(sum)
}

// image is layers as a Python image of 130 MB has them, with tables and small things.
var image = []int64{1 << 10, 7 << 10, 300 << 10, 28_230_000, 3_510_000, 12_300_000, 249, 80_000_000, 5_900_000, 32}

// TestEvenWork: up to 64 like hosts send the same amount within a tenth, however many of them may reach the origin.
func TestEvenWork(t *testing.T) {
	worst := 0.0
	for n := 2; n <= 64; n++ {
		for _, seeds := range []int{n, 16, 4, 2} {
			s := job(n, image...)
			for i := range s.Hosts {
				s.Hosts[i].Seed = i < seeds
			}
			bytes, _ := sent(plan(t, s))
			u := uneven(bytes)
			worst = max(worst, u)
			if u > 1.1 {
				t.Errorf("%d hosts, %d seeds: max ÷ mean is %.3f", n, min(n, seeds), u)
			}
		}
		// A single seed has to send everything once, which is more than its share.
		s := job(n, image...)
		for i := range s.Hosts {
			s.Hosts[i].Seed = i == n/2
		}
		bytes, _ := sent(plan(t, s))
		if u, least := uneven(bytes), float64(n)/float64(n-1); u > max(1.1, 1.001*least) {
			t.Errorf("%d hosts, one seed: max ÷ mean is %.3f, %.3f is possible", n, u, least)
		}
	}
	t.Logf("worst: %.3f", worst)
}

// TestPeers: no host deals with more than 64 others, at any size, in groups or not.
func TestPeers(t *testing.T) {
	for _, n := range []int{1, 2, 64, 65, 66, 100, 129, 333, 1000, 10_000, 16_384} {
		for _, size := range []int{0, 8, 24, 40} {
			for _, seeds := range []int{n, n / 3, 2, 0} {
				if n > 1000 && (size == 8 || size == 40 || seeds == 0) {
					continue
				}
				s := job(n, image...)
				for i := range s.Hosts {
					s.Hosts[i].Seed = i%7 < 3 && i < seeds || seeds == n
					s.Hosts[i].Slow = i%101 == 5
					if size > 0 {
						s.Hosts[i].Group = fmt.Sprint(i / size)
					}
				}
				bytes, peers := sent(plan(t, s))
				if most := slices.Max(peers); most > 64 {
					t.Errorf("%d hosts in groups of %d, %d may be seeds: one has %d peers", n, size, seeds, most)
				}
				fast := slices.Clone(bytes)
				for i, h := range s.Hosts {
					if h.Slow {
						fast[i] = 0
					}
				}
				// Groups come first; and two seeds in one small group make that group send to all others. Nothing can be even
				// among two.
				limit := 1.1
				switch {
				case seeds == 2 || n == 2:
					limit = 2
				case size > 0:
					limit = 1.5
				case n > 64: // a slot more or less is a quarter of what a host sends
					limit = 1.35
				}
				if u := uneven(fast); u > limit {
					t.Errorf("%d hosts in groups of %d, %d may be seeds: max ÷ mean is %.3f", n, size, seeds, u)
				}
			}
		}
	}
}

// TestGroupsOnce: a piece enters a group that does not hold the root once.
func TestGroupsOnce(t *testing.T) {
	s := job(200, image...)
	for i := range s.Hosts {
		s.Hosts[i].Group = fmt.Sprint(i * i % 13)
		s.Hosts[i].Slow = i%9 == 0
	}
	p := plan(t, s)
	for k := range p.Trees() {
		entered := map[string]int{}
		for h, host := range s.Hosts {
			if q := p.Parent(k, h); q < 0 || s.Hosts[q].Group != host.Group {
				entered[host.Group]++
			}
		}
		for g, times := range entered {
			if times != 1 {
				t.Errorf("tree %d enters group %s %d times", k, g, times)
			}
		}
	}
}

// TestSeeds: roots are hosts that may reach the origin, one for each group before two for one, and no more than asked for.
func TestSeeds(t *testing.T) {
	s := job(100, image...)
	for i := range s.Hosts {
		s.Hosts[i].Seed, s.Hosts[i].Group = i%3 == 0, fmt.Sprint(i/10)
		s.Hosts[i].Slow = i == 0
	}
	p := plan(t, s)
	groups := map[string]int{}
	requests := 0
	for _, h := range p.Seeds() {
		groups[s.Hosts[h].Group]++
		requests += len(p.Runs(h))
		if !s.Hosts[h].Seed || s.Hosts[h].Slow {
			t.Errorf("host %d is a seed", h)
		}
	}
	if len(p.Seeds()) != DefaultSeeds || len(groups) != 10 || !p.FromOrigin() {
		t.Errorf("%d seeds in groups %v", len(p.Seeds()), groups)
	}
	for g, n := range groups {
		if n > 2 {
			t.Errorf("%d seeds in group %s", n, g)
		}
	}
	// One per 8 MiB, and one more where a run crosses from one blob to the next.
	if most := int(s.size()/DefaultRun) + len(s.Blobs) + 1; requests > most {
		t.Errorf("%d requests, expected %d at most", requests, most)
	}

	for i := range s.Hosts {
		s.Hosts[i].Seed = false
	}
	if p := plan(t, s); p.FromOrigin() || len(p.Seeds()) != DefaultSeeds {
		t.Errorf("without a route to the origin: %d roots, from origin %v", len(p.Seeds()), p.FromOrigin())
	}
	s.Hosts[0].Seed = true // the slow one is the only one
	if p := plan(t, s); !p.FromOrigin() || !slices.Equal(p.Seeds(), []int{0}) {
		t.Errorf("only the slow host has a route: seeds are %v", p.Seeds())
	}
	s.Blobs = nil
	if p := plan(t, s); p.Pieces() != 0 || len(p.Runs(0)) != 0 {
		t.Error("nothing to fetch, and pieces")
	}
}

// TestDeputies: a root can be stood in for, by others that may reach the origin first.
func TestDeputies(t *testing.T) {
	s := job(20, image...)
	for i := range s.Hosts {
		s.Hosts[i].Seed = i < 5
	}
	p := plan(t, s)
	for k := range p.Trees() {
		last := len(s.Hosts) - 1
		for h := range s.Hosts {
			if p.Rank(k, h) != last {
				continue
			}
			a := p.Ancestors(k, h)
			deputies := 0
			for _, x := range a {
				if s.Hosts[x].Seed && x != p.Root(k) {
					deputies++
				}
			}
			if !slices.Contains(a, p.Root(k)) || a[0] != p.Parent(k, h) || deputies < Deputies {
				t.Errorf("tree %d: the last host has ancestors %v, %d deputies", k, a, deputies)
			}
		}
	}
}

// TestNoWaitCycle: hosts plan from specs that differ in any way, ask anybody for anything, and wait where the rule lets them. Nobody ever waits for
// himself, over however many others.
func TestNoWaitCycle(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 5))
		base := random(r)
		base.Hosts = base.Hosts[:min(len(base.Hosts), 24)]
		if len(base.Hosts) < 2 || base.size() == 0 {
			continue
		}
		// A few specs, each host with one of them; all name the same hosts, in any order.
		specs := make([]*Plan, 4)
		for i := range specs {
			s := *base
			s.Hosts = slices.Clone(base.Hosts)
			for range r.IntN(4) {
				h := &s.Hosts[r.IntN(len(s.Hosts))]
				switch r.IntN(5) {
				case 0:
					h.Seed = !h.Seed
				case 1:
					h.Slow = !h.Slow
				case 2:
					h.Group += "x"
				case 3:
					r.Shuffle(len(s.Hosts), func(a, b int) { s.Hosts[a], s.Hosts[b] = s.Hosts[b], s.Hosts[a] })
				case 4:
					s.Params.Trees = 1 + r.IntN(30)
				}
			}
			specs[i] = plan(t, &s)
		}
		mine := map[string]*Plan{}
		for _, h := range base.Hosts {
			mine[h.Name] = specs[r.IntN(len(specs))]
		}
		// Who waits for whom, over a byte: any host asks any other, and is made to wait whenever the rule allows it.
		type wants struct {
			host string
			blob int
			off  int64
		}
		waits := map[wants][]wants{}
		for range 200 {
			blob := r.IntN(len(base.Blobs))
			if base.Blobs[blob].Size == 0 {
				continue
			}
			off := r.Int64N(base.Blobs[blob].Size)
			for _, a := range base.Hosts {
				asks := mine[a.Name]
				for _, b := range base.Hosts {
					if a.Name == b.Name {
						continue
					}
					p := mine[b.Name] // who is asked decides, by his own plan
					tree := p.Tree(p.PieceAt(blob, off))
					if p.MayWait(asks.ID(), tree, p.Host(b.Name), p.Host(a.Name)) {
						from := wants{a.Name, blob, off}
						waits[from] = append(waits[from], wants{b.Name, blob, off})
					}
				}
			}
		}
		const open, done = 1, 2
		state := map[wants]int{}
		var visit func(w wants) bool
		visit = func(w wants) bool {
			switch state[w] {
			case open:
				return false
			case done:
				return true
			}
			state[w] = open
			for _, next := range waits[w] {
				if !visit(next) {
					return false
				}
			}
			state[w] = done
			return true
		}
		for w := range waits {
			if !visit(w) {
				t.Fatalf("seed %d: %v waits for itself", seed, w)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for name, f := range map[string]func(*JobSpec){
		"no host":        func(s *JobSpec) { s.Hosts = nil },
		"host twice":     func(s *JobSpec) { s.Hosts[1].Name = s.Hosts[0].Name },
		"no name":        func(s *JobSpec) { s.Hosts[1].Name = "" },
		"control":        func(s *JobSpec) { s.Hosts[1].Name = "a\nb" },
		"not UTF-8":      func(s *JobSpec) { s.Hosts[1].Name = "\xff" },
		"long name":      func(s *JobSpec) { s.Hosts[1].Name = strings.Repeat("a", MaxName+1) },
		"no port":        func(s *JobSpec) { s.Hosts[1].Addr = "10.0.0.1" },
		"no job":         func(s *JobSpec) { s.Job = "" },
		"no manifest":    func(s *JobSpec) { s.Manifest = "" },
		"digest":         func(s *JobSpec) { s.Blobs[0].Digest = "sha256:../../etc/passwd" },
		"blob twice":     func(s *JobSpec) { s.Blobs[1].Digest = s.Blobs[0].Digest },
		"negative":       func(s *JobSpec) { s.Blobs[0].Size = -1 },
		"too large":      func(s *JobSpec) { s.Blobs[0].Size = 1 << 62 },
		"too many":       func(s *JobSpec) { s.Blobs[0].Size, s.Params.Piece = MaxPieces*MinPiece, MinPiece },
		"kind":           func(s *JobSpec) { s.Blobs[0].Kind = kinds },
		"table of meta":  func(s *JobSpec) { s.Blobs[0].Kind, s.Blobs[0].Ztoc = Meta, s.Manifest },
		"odd piece":      func(s *JobSpec) { s.Params.Piece = MinPiece + 1 },
		"negative trees": func(s *JobSpec) { s.Params.Trees = -1 },
		"many seeds":     func(s *JobSpec) { s.Params.Seeds = MaxSeeds + 1 },
		"grant":          func(s *JobSpec) { s.Access = make([]byte, MaxAccess+1) },
	} {
		s := job(3, 1<<20, 2<<20)
		f(s)
		if _, err := s.Encode(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: Encode says %v", name, err)
		}
		if _, err := New(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: New says %v", name, err)
		}
	}
	s := job(3, 1<<20)
	s.Planner++
	if _, err := New(s); !errors.Is(err, ErrVersion) {
		t.Errorf("a spec of another version: %v", err)
	}
}

// TestIndexers: layers without a table are built by different hosts as far as there are, none of them slow.
func TestIndexers(t *testing.T) {
	s := job(6, image...)
	s.Hosts[2].Slow = true
	s.Blobs[0].Kind, s.Blobs[1].Kind, s.Blobs[2].Kind = Meta, Meta, Table
	s.Blobs[3].Ztoc = s.Blobs[2].Digest
	p := plan(t, s)
	seen := map[int]bool{}
	for _, b := range []int{7, 5, 8, 4, 6} { // by size
		x := p.Indexer(b)
		if x < 0 || x == 2 || seen[x] && len(seen) < 5 {
			t.Errorf("blob %d is built by host %d, after %v", b, x, seen)
		}
		seen[x] = true
		if l := p.Indexers(b, 99); len(l) != 5 || l[0] != x {
			t.Errorf("blob %d: indexers %v", b, l)
		}
	}
	for b := range 4 {
		if p.Indexer(b) != -1 {
			t.Errorf("blob %d needs no table", b)
		}
	}
}

// TestRendezvous: a member that goes moves only what was its own, and shares are about even.
func TestRendezvous(t *testing.T) {
	var all []string
	for i := range 40 {
		all = append(all, fmt.Sprint("node", i))
	}
	had := map[string]int{}
	for key := range 2000 {
		k := fmt.Sprint(key)
		three := Rendezvous(k, all, 3)
		had[three[0]]++
		without := slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == three[0] })
		r := rand.New(rand.NewPCG(uint64(key), 6))
		r.Shuffle(len(without), func(i, j int) { without[i], without[j] = without[j], without[i] })
		if got := Rendezvous(k, without, 2); !slices.Equal(got, three[1:]) {
			t.Fatalf("without %s: %v, expected %v", three[0], got, three[1:])
		}
	}
	for name, n := range had {
		if n < 20 || n > 90 {
			t.Errorf("%s has %d of 2000 keys", name, n)
		}
	}
	if got := Rendezvous("x", all[:2], 5); len(got) != 2 {
		t.Errorf("five of two: %v", got)
	}
}

// BenchmarkNew is what a host spends before its first request: 10,000 hosts, 20,000 pieces.
func BenchmarkNew(b *testing.B) {
	s := job(10_000, 20_000<<20)
	s.Params.Piece = 1 << 20
	for i := range s.Hosts {
		s.Hosts[i].Group = fmt.Sprint(i / 32)
	}
	encoded, err := s.Encode()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		s, err := DecodeJobSpec(encoded)
		if err != nil {
			b.Fatal(err)
		}
		p := plan(b, s)
		for k := range p.Trees() {
			_ = p.Ancestors(k, 7777)
			for range p.Children(k, 7777) {
			}
		}
	}
}
