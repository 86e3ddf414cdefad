package agent

import (
	"context"
	"fmt"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// Open is what other hosts take ranges from (peer.Source): every blob of the store that the asker may have (grant.go), and, of the jobs under
// way, what will be there. It answers from what there is; only for its own plan, and a host that stands behind this one in it, a piece is promised.
func (a *Agent) Open(ctx context.Context, from peer.Asker, d ztoc.Digest) (peer.Blob, error) {
	var j *job
	if from.Plan != "" {
		j = a.planned(from.Plan)
		if j == nil && from.Priority == ztoc.Prefetch {
			// The job may be on its way to this host.
			j = a.awaitPlan(ctx, from.Plan)
		}
		if j != nil && j.plan.Host(from.Name) < 0 {
			return nil, fmt.Errorf("%w: %s is no host of the job", peer.ErrDenied, from.Name)
		}
	}
	if from.Priority == ztoc.Prefetch && !a.serves(j) {
		return nil, peer.ErrBusy
	}
	h := a.shelf.find(d)
	if h == nil {
		return nil, peer.ErrNotHere
	}
	err := a.mayTake(ctx, from, j, d)
	if err != nil && j == nil && from.Plan != "" {
		// The job that says who may have it may be on its way here, whoever asks.
		if j = a.awaitPlan(ctx, from.Plan); j != nil && j.plan.Host(from.Name) >= 0 {
			err = a.mayTake(ctx, from, j, d)
		}
	}
	if err != nil {
		h.close()
		return nil, err
	}
	b := &served{held: h, a: a, number: -1, asker: -1}
	if j != nil {
		b.j, b.number, b.asker = j, j.number(d), j.plan.Host(from.Name)
	} else if from.Plan != "" && from.Priority == ztoc.Prefetch && !h.has(h.whole()) {
		// It asks for a plan that this host has never heard of, and for more than there is.
		h.close()
		return nil, peer.ErrNotHere
	}
	return b, nil
}

// A served is a blob that another host takes from.
type served struct {
	*held
	a      *Agent
	j      *job // of the asker's plan; nil: none
	number int  // of the blob in the plan
	asker  int
}

var (
	_ peer.Source = (*Agent)(nil)
	_ peer.Blob   = (*served)(nil)
)

// Have reports whether all of r is here.
func (b *served) Have(r ztoc.Range) bool { return b.has(r) }

// Promised reports whether the asker may wait for r.
func (b *served) Promised(r ztoc.Range) bool {
	if b.j == nil || b.number < 0 || b.j.given() {
		return false
	}
	for x := b.j.plan.PieceAt(b.number, r.Start); x <= b.j.plan.PieceAt(b.number, r.End-1); x++ {
		if !b.j.plan.Before(b.j.plan.Tree(x), b.j.me, b.asker) {
			return false
		}
	}
	return true
}

// ReadAt fills p from the store.
func (b *served) ReadAt(p []byte, off int64) error {
	if err := b.blob.ReadAt(p, off); err != nil {
		return err
	}
	if b.j != nil {
		b.j.sent.Add(int64(len(p)))
	}
	b.a.metrics.sent.Add(float64(len(p)))
	return nil
}

// Close ends the use.
func (b *served) Close() error {
	b.close()
	return nil
}

// given reports whether the job has given up, or is over: then it promises nothing any more.
func (j *job) given() bool { return j.ctx.Err() != nil || j.gaveUp.Load() }

// giveUp has those who wait for this host look elsewhere.
func (j *job) giveUp() {
	j.gaveUp.Store(true)
	for _, h := range j.blobs {
		h.tell(h.whole())
	}
}

// hostAt is a host of the plan as it is dialled.
func (j *job) hostAt(i int) peer.Host {
	h := j.spec.Hosts[i]
	return peer.Host{Name: h.Name, Addr: h.Addr}
}

// planned is the job with this plan, nil if there is none whose plan is known.
func (a *Agent) planned(id string) *job {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.plans[id]
}

// awaitPlan waits a moment for a job to come with this plan.
func (a *Agent) awaitPlan(ctx context.Context, id string) *job {
	if _, err := planner.ParsePlanID(id); err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.o.Introduce)
	defer cancel()
	for {
		a.mu.Lock()
		j, news := a.plans[id], a.news
		a.mu.Unlock()
		if j != nil {
			return j
		}
		select {
		case <-news:
		case <-ctx.Done():
			return nil
		}
	}
}
