package planner

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/muster-hpc/muster/ztoc"
)

// job is a spec of n like hosts that may all reach the origin, and blobs of these sizes.
func job(n int, sizes ...int64) *JobSpec {
	s := &JobSpec{Planner: Version, Job: "4711", Image: "registry.example/x:1", Manifest: ztoc.DigestOf([]byte("manifest"))}
	for i := range n {
		s.Hosts = append(s.Hosts, Host{Name: fmt.Sprintf("node%d", i+1), Addr: fmt.Sprintf("10.0.%d.%d:7464", i>>8, i&255), Seed: true})
	}
	for i, size := range sizes {
		s.Blobs = append(s.Blobs, Blob{BlobRef: ztoc.BlobRef{Digest: ztoc.DigestOf([]byte{byte(i), byte(i >> 8)}), Size: size}})
	}
	return s
}

func plan(t testing.TB, s *JobSpec) *Plan {
	t.Helper()
	p, err := New(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// random makes a spec of anything that is allowed.
func random(r *rand.Rand) *JobSpec {
	s := job(1 + r.IntN(200))
	for range r.IntN(30) {
		size := r.Int64N(1 << r.IntN(28))
		s.Blobs = append(s.Blobs, job(0, make([]int64, len(s.Blobs)+1)...).Blobs[len(s.Blobs)])
		s.Blobs[len(s.Blobs)-1].Size = size
	}
	groups, slow, seeds := 1+r.IntN(1+len(s.Hosts)), r.IntN(101), r.IntN(101)
	for i := range s.Hosts {
		h := &s.Hosts[i]
		if groups > 1 && r.IntN(10) > 0 {
			h.Group = fmt.Sprint(r.IntN(groups))
		}
		h.Slow, h.Seed = r.IntN(100) < slow, r.IntN(100) < seeds
	}
	if r.IntN(2) == 0 {
		s.Params = Params{Piece: int64(r.IntN(5)) * MinPiece * 16, Trees: r.IntN(70), Fanout: r.IntN(20), Seeds: r.IntN(20), Run: int64(r.IntN(20)) << 20}
	}
	return s
}

// TestEveryPieceOnce: whatever the job is, each tree reaches each host once from one root, with parents before their children in its order, and
// the runs are each piece once.
func TestEveryPieceOnce(t *testing.T) {
	for seed := range uint64(300) {
		s := random(rand.New(rand.NewPCG(seed, 1)))
		p := plan(t, s)
		n := len(s.Hosts)
		for k := range p.Trees() {
			ranks := make([]bool, n)
			edges := 0
			for h := range n {
				rank := p.Rank(k, h)
				if ranks[rank] {
					t.Fatalf("seed %d: two hosts of rank %d in tree %d", seed, rank, k)
				}
				ranks[rank] = true
				parent := p.Parent(k, h)
				if (parent < 0) != (rank == 0) || (parent < 0) != (h == p.Root(k)) {
					t.Fatalf("seed %d: host %d of rank %d in tree %d has parent %d", seed, h, rank, k, parent)
				}
				for c := range p.Children(k, h) {
					edges++
					if p.Parent(k, c) != h || !p.Before(k, h, c) || p.Before(k, c, h) {
						t.Fatalf("seed %d: %d is a child of %d in tree %d and does not know", seed, c, h, k)
					}
					if s.Hosts[h].Slow && h != p.Root(k) {
						t.Fatalf("seed %d: slow host %d passes on", seed, h)
					}
				}
				for _, a := range p.Ancestors(k, h) {
					if !p.Before(k, a, h) {
						t.Fatalf("seed %d: host %d would wait for %d in tree %d", seed, h, a, k)
					}
				}
			}
			if edges != n-1 {
				t.Fatalf("seed %d: tree %d has %d edges for %d hosts", seed, k, edges, n)
			}
		}
		seen := make([]int, p.Pieces())
		for h := range n {
			for _, run := range p.Runs(h) {
				var bytes int64
				for x := run.First; x < run.First+Piece(run.Count); x++ {
					seen[x]++
					blob, r := p.Range(x)
					bytes += r.Len()
					if blob != run.Blob || !run.Range.Contains(r) || p.Root(p.Tree(x)) != h || p.PieceAt(blob, r.End-1) != x {
						t.Fatalf("seed %d: piece %d, %v of blob %d, is not in run %+v of host %d", seed, x, r, blob, run, h)
					}
				}
				if bytes != run.Range.Len() {
					t.Fatalf("seed %d: run %+v has %d bytes", seed, run, bytes)
				}
			}
		}
		for x, times := range seen {
			if times != 1 {
				t.Fatalf("seed %d: piece %d is fetched %d times", seed, x, times)
			}
		}
	}
}
