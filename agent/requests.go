package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

var _ control.Agent = (*Agent)(nil)

// Status is the agent as the caller may see it: his own jobs, or all for root.
func (a *Agent) Status(_ context.Context, c control.Caller, q control.StatusRequest) (control.Status, error) {
	s := control.Status{
		Host: a.o.Name, Version: a.o.Version, Up: time.Since(a.began), Peers: a.peers(), Jobs: []control.JobStatus{},
		Store: control.StoreStatus{Dir: a.o.Store.Dir(), Quota: a.o.Store.Quota()},
	}
	if u, err := a.o.Store.Usage(); err == nil {
		s.Store.Used = u.Used
	}
	a.mu.Lock()
	s.Draining = a.draining
	jobs := make([]*job, 0, len(a.jobs))
	for _, j := range a.jobs {
		jobs = append(jobs, j)
	}
	a.mu.Unlock()
	for _, j := range jobs {
		o := j.asked()
		if (!a.mayActForOthers(c) && o.UID != c.UID) || (q.Job != "" && o.Job != q.Job) {
			continue
		}
		st, version, _ := j.status()
		r := j.answer(st, version)
		s.Bytes, s.Sent = s.Bytes.Add(st.Bytes), s.Sent+st.Sent
		s.Jobs = append(s.Jobs, control.JobStatus{
			Job: o.Job, Image: o.Image, UID: int64(o.UID), Digest: ztoc.Digest(r.Digest), Plan: r.Plan, Hosts: o.names(), Began: j.began, State: st,
		})
	}
	slices.SortFunc(s.Jobs, func(x, y control.JobStatus) int { return x.Began.Compare(y.Began) })
	return s, nil
}

// errNoJob says that a mount asks for bytes of a job that the agent does not know.
var errNoJob = errors.New("no such job")

// Read gives a mount bytes that the store has not, and takes its word that some were wrong.
func (a *Agent) Read(ctx context.Context, c control.Caller, q control.ReadRequest, send func([]byte) error) error {
	a.mu.Lock()
	j := a.jobs[q.Job]
	a.mu.Unlock()
	if j == nil {
		return &control.Error{Text: fmt.Sprintf("job %s: %v on host %s", q.Job, errNoJob, a.o.Name), Code: 3}
	}
	if o := j.asked(); !c.Root() && c.UID != o.UID {
		return fmt.Errorf("%w: job %s is another user's", control.ErrRefused, q.Job)
	}
	if err := j.thaw(ctx); err != nil {
		return err
	}
	n := j.number(q.Blob.Digest)
	if n < 0 || q.Range.Start < 0 || q.Range.End > j.spec.Blobs[n].Size {
		return &control.Error{Text: fmt.Sprintf("blob %s %v is not of job %s", q.Blob.Digest, q.Range, q.Job), Code: 1}
	}
	if q.Wrong != "" {
		return j.wrong(ctx, n, q.Range, q.Wrong)
	}
	buf := make([]byte, min(readStep, q.Range.Len()))
	for off := q.Range.Start; off < q.Range.End; {
		p := buf[:min(int64(len(buf)), q.Range.End-off)]
		if q.Ahead {
			j.awaitStage(ctx, n, ztoc.Range{Start: off, End: off + int64(len(p))})
		}
		if err := j.demand(ctx, n, p, off); err != nil {
			return err
		}
		if err := send(p); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// awaitStage waits for bytes as long as the stage is about to bring them: fetched for a mount that reads ahead they would cost requests of
// their own, on every host.
func (j *job) awaitStage(ctx context.Context, n int, r ztoc.Range) {
	for began := time.Now(); j.taking.Load() && time.Since(began) < aheadPatience && ctx.Err() == nil; {
		turn, cancel := context.WithTimeout(ctx, time.Second)
		err := j.blobs[n].wait(turn, r)
		cancel()
		if err == nil {
			return
		}
	}
}

// aheadPatience bounds awaitStage.
const aheadPatience = time.Minute

// readStep is how many bytes of a Read are in memory at once.
const readStep = 256 << 10

// demand reads for somebody who waits: from the store, from the hosts that stand before this one in the plan, or through the chain. A piece that
// nobody has yet is brought by the root of its tree, so that it leaves the origin once.
func (j *job) demand(ctx context.Context, n int, p []byte, off int64) error {
	h := j.blobs[n]
	if h.blob.ReadAt(p, off) == nil {
		return nil
	}
	hello := j.hello(ztoc.Demand)
	t := j.plan.Tree(j.plan.PieceAt(n, off))
	for _, i := range slices.Backward(j.plan.Ancestors(t, j.me)) { // the root first: it has everything first
		if j.isLate(i) || j.gaveUp.Load() {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, j.a.o.Ask)
		err := j.a.client.Read(ask, j.hostAt(i), hello, j.spec.Blobs[n].Digest, p, off)
		if errors.Is(err, peer.ErrNotHere) && i == j.plan.Root(t) {
			bring := bringAsk{Plan: hello.Plan, Blob: n, Range: ztoc.Range{Start: off, End: off + int64(len(p))}}
			if _, err = peer.Ask(ask, j.a.client, j.hostAt(i), bringQuestion, bring); err == nil {
				err = j.a.client.Read(ask, j.hostAt(i), hello, j.spec.Blobs[n].Digest, p, off)
			}
		}
		cancel()
		if err == nil {
			j.got(fromPeer, int64(len(p)))
			j.peerRequests.Add(1)
			_ = j.chain.Give(j.spec.Blobs[n].BlobRef, p, off) // whole blocks of it
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return j.chain.ReadAt(ctx, j.spec.Blobs[n].BlobRef, p, off, ztoc.Demand)
}

// bringQuestion asks the root of a tree to fetch bytes now, before their turn, or any seed, when the asker cannot.
var bringQuestion = peer.Question[bringAsk, struct{}]{Name: "Bring"}

type bringAsk struct {
	Plan  string     `json:"plan"`
	Blob  int        `json:"blob"`
	Range ztoc.Range `json:"range"`
}

// maxBring bounds what may be asked for at once, bytes.
const maxBring = 4 << 20

func (a *Agent) answerBring(ctx context.Context, from string, q bringAsk) (struct{}, error) {
	j := a.planned(q.Plan)
	if j == nil || q.Blob < 0 || q.Blob >= len(j.blobs) {
		return struct{}{}, peer.ErrNotHere
	}
	b := j.spec.Blobs[q.Blob]
	if j.plan.Host(from) < 0 {
		return struct{}{}, peer.ErrDenied
	}
	if q.Range.Start < 0 || q.Range.End > b.Size || q.Range.Empty() || q.Range.Len() > maxBring || b.Kind != planner.Layer {
		return struct{}{}, fmt.Errorf("%w: %v of blob %d", peer.ErrProtocol, q.Range, q.Blob)
	}
	if j.originGone.Load() && j.substitute(q.Blob, q.Range) {
		return struct{}{}, peer.ErrNotHere // two who cannot would ask each other
	}
	return struct{}{}, j.chain.Ensure(ctx, b.BlobRef, q.Range, ztoc.Demand)
}

// wrong looks at bytes that a reader says are wrong. If they are, they are dropped, and who brought them is not asked again if he gives wrong ones
// once more: what is wrong may as well be this host's disk, or the mount that says so. Bytes that cannot be judged are dropped, and nobody is
// blamed.
func (j *job) wrong(ctx context.Context, n int, r ztoc.Range, cause string) error {
	if r.Empty() {
		return nil
	}
	bad, judged := j.wrongIn(n, r)
	if judged && len(bad) == 0 {
		j.a.log.Warn("a mount says that bytes are wrong, and they are not", "job", j.id, "layer", j.spec.Blobs[n].Digest, "range", r, "cause", cause)
		return nil
	}
	for _, host := range j.guilty(ctx, n, bad) {
		j.passOver(host, "sent wrong bytes", 0)
		j.a.audit("wrong-bytes", "job", j.id, "layer", j.spec.Blobs[n].Digest, "source", j.spec.Hosts[host].Name, "cause", cause)
	}
	for x := j.plan.PieceAt(n, r.Start); x <= j.plan.PieceAt(n, r.End-1); x++ {
		j.setBrought(x, originHost)
	}
	return j.chain.Reject(j.spec.Blobs[n].BlobRef, r, errors.New(cause))
}

func itoa[T ~uint32 | ~int](n T) string { return strconv.FormatInt(int64(n), 10) }
