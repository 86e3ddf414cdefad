package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// A tableState is the table of a layer that the image came without.
type tableState struct {
	done   chan struct{} // closed when the rest is set
	ref    ztoc.BlobRef  // of the packed table, a blob of the shelf; zero: each host derives its own view
	by     string        // who built it
	err    error
	proven bool // the layer's digest was checked on the way
}

// maxTable bounds a packed table that is taken into memory, bytes.
const maxTable = 1 << 30

// tableOf is the state of a layer's table, made when it is first asked for.
func (j *job) tableOf(layer ztoc.Digest) *tableState {
	v, _ := j.tables.LoadOrStore(layer, &tableState{done: make(chan struct{})})
	return v.(*tableState)
}

// index sees to it that every layer has its table in the store. It returns when they are there; layers that each host derives its own view
// of are waited for whole.
func (j *job) index(ctx context.Context, img origin.Image) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range img.Layers {
		n := j.number(l.Digest)
		if n < 0 {
			return fmt.Errorf("layer %s is not in the plan: %w", l.Digest, ztoc.ErrMismatch)
		}
		if image.KeptTable(j.a.o.Store, l) != nil {
			j.settle(l.Digest, tableState{})
			continue
		}
		g.Go(func() error { return j.table(ctx, n, l) })
	}
	return g.Wait()
}

// table brings one layer's table: the plan's blob, else built here by the layer's indexer, else asked of it.
func (j *job) table(ctx context.Context, n int, l origin.Descriptor) error {
	if d := j.spec.Blobs[n].Ztoc; d != "" {
		h := j.blobs[j.number(d)]
		if err := h.wait(ctx, h.whole()); err != nil {
			return err
		}
		packed, err := h.read()
		if err == nil && ztoc.DigestOf(packed) != d {
			err = fmt.Errorf("table %s: %w", d, ztoc.ErrMismatch)
		}
		if err != nil {
			return err
		}
		return image.KeepTable(j.a.o.Store, l, packed)
	}
	var errs []error
	for _, i := range j.plan.Indexers(n, indexers) {
		if i == j.me {
			return j.build(ctx, n, l)
		}
		asking, stop := context.WithCancelCause(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			j.watchIndexer(asking, stop, i, n)
		}()
		err := j.askTable(asking, i, n, l)
		late := context.Cause(asking)
		stop(nil)
		<-done
		if err == nil || ctx.Err() != nil {
			return err
		}
		if errors.Is(late, errIndexerLate) {
			err = late
		}
		errs = append(errs, err)
		j.a.log.Warn("an indexer is passed over", "job", j.id, "layer", l.Digest, "host", j.spec.Hosts[i].Name, "cause", err)
	}
	j.a.log.Warn("building a table that others should have built", "job", j.id, "layer", l.Digest, "cause", errors.Join(errs...))
	return j.build(ctx, n, l)
}

// errIndexerLate says that a host is not waited for any more to build a table.
var errIndexerLate = errors.New("it is late with the table")

// watchIndexer ends a question for a table when the host that builds it is passed over, or should have built it long ago: it inflates what it gets
// as it comes, so it should have the table a little later than this host has the layer.
func (j *job) watchIndexer(ctx context.Context, stop context.CancelCauseFunc, i, n int) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	h := j.blobs[n]
	patience := indexerLate + time.Duration(h.ref.Size)*time.Second/indexerRate
	var whole time.Time // since when the layer is here
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if whole.IsZero() && h.has(h.whole()) {
			whole = time.Now()
		}
		if j.isLate(i) || !whole.IsZero() && time.Since(whole) > patience {
			stop(errIndexerLate)
			return
		}
	}
}

// An indexer is late indexerLate, and a second for each indexerRate bytes of the layer, after the layer is here.
const (
	indexerLate = 3 * time.Second
	indexerRate = 20 << 20
)

// indexers is how many hosts are asked for a table before this one builds it itself.
const indexers = 2

// build inflates a layer as its bytes arrive.
func (j *job) build(ctx context.Context, n int, l origin.Descriptor) (err error) {
	began := time.Now()
	defer func() {
		if err != nil {
			j.settle(l.Digest, tableState{err: err})
		}
	}()
	if err := j.a.inflate.Acquire(ctx, 1); err != nil {
		return err
	}
	defer j.a.inflate.Release(1)
	for try := 0; ; try++ {
		var packed []byte
		packed, err = image.BuildTable(j.blobs[n].inOrder(ctx), l, image.Options{SpanSize: j.a.o.SpanSize, Tool: j.a.o.Tool}, j.cores(l))
		switch {
		case errors.Is(err, image.ErrDerive):
			j.settle(l.Digest, tableState{by: j.a.o.Name})
			return j.blobs[n].wait(ctx, j.blobs[n].whole())
		case err != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case (errors.Is(err, ztoc.ErrMismatch) || errors.Is(err, ztoc.ErrInvalid)) && try < healTries:
			if err := j.heal(ctx, n, try, true, err); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		h, err := j.a.shelf.open(ztoc.BlobRef{Digest: ztoc.DigestOf(packed), Size: int64(len(packed))})
		if err == nil {
			j.keep(h)
			err = h.WriteAt(packed, 0)
		}
		if err == nil {
			err = image.KeepTable(j.a.o.Store, l, packed)
		}
		if err != nil {
			return err
		}
		j.settle(l.Digest, tableState{ref: h.ref, by: j.a.o.Name, proven: true})
		j.mark("index", began)
		j.a.metrics.indexed.Inc()
		return nil
	}
}

// cores is how many cores inflate a layer: all for one that outweighs the others.
func (j *job) cores(l origin.Descriptor) int {
	if 2*l.Size > j.size() {
		return runtime.GOMAXPROCS(0)
	}
	return 1
}

// askTable asks a host for a layer's table, waiting until it is built.
func (j *job) askTable(ctx context.Context, i, n int, l origin.Descriptor) error {
	a, err := peer.Ask(ctx, j.a.client, j.hostAt(i), tableQuestion, peer.ZtocAsk{Layer: l.Digest, Plan: j.plan.ID().String(), Grant: j.shown})
	if err != nil {
		return err
	}
	if a.Ref.Digest == "" {
		j.settle(l.Digest, tableState{by: a.Builder})
		return j.blobs[n].wait(ctx, j.blobs[n].whole())
	}
	packed, err := j.a.client.Blob(ctx, j.hostAt(i), j.hello(ztoc.Prefetch), a.Ref, maxTable)
	if err != nil {
		return err
	}
	j.peerRequests.Add(1)
	if err := image.KeepTable(j.a.o.Store, l, packed); err != nil {
		return err
	}
	h, err := j.a.shelf.open(a.Ref)
	if err != nil {
		return err
	}
	j.keep(h)
	if err := h.WriteAt(packed, 0); err != nil {
		return err
	}
	j.settle(l.Digest, tableState{ref: a.Ref, by: a.Builder})
	return nil
}

// tableQuestion is peer.Ztoc for those who wait until it is built.
var tableQuestion = func() peer.Question[peer.ZtocAsk, peer.ZtocAnswer] {
	q := peer.Ztoc
	q.Timeout = 30 * time.Minute
	return q
}()

// settle sets a table's state, once, and wakes who waits for it.
func (j *job) settle(layer ztoc.Digest, s tableState) {
	t := j.tableOf(layer)
	j.mu.Lock()
	defer j.mu.Unlock()
	select {
	case <-t.done:
	default:
		t.ref, t.by, t.err, t.proven = s.ref, s.by, s.err, s.proven
		close(t.done)
	}
}

// answerTable answers another host's question for a table.
func (a *Agent) answerTable(ctx context.Context, _ string, q peer.ZtocAsk) (peer.ZtocAnswer, error) {
	j := a.planned(q.Plan)
	if j == nil {
		if j = a.awaitPlan(ctx, q.Plan); j == nil {
			return peer.ZtocAnswer{}, peer.ErrNotHere
		}
	}
	if n := j.number(q.Layer); n < 0 || j.spec.Blobs[n].Kind != planner.Layer {
		return peer.ZtocAnswer{}, peer.ErrNotHere
	}
	t := j.tableOf(q.Layer)
	select {
	case <-t.done:
	case <-j.over:
		select {
		case <-t.done:
		default:
			return peer.ZtocAnswer{}, peer.ErrNotHere
		}
	case <-ctx.Done():
		return peer.ZtocAnswer{}, context.Cause(ctx)
	}
	if t.err != nil {
		return peer.ZtocAnswer{}, t.err
	}
	if t.by == "" { // it was kept here from an earlier time
		l := origin.Descriptor{Digest: q.Layer, Size: j.spec.Blobs[j.number(q.Layer)].Size}
		packed := image.KeptTable(a.o.Store, l)
		if packed == nil {
			return peer.ZtocAnswer{}, peer.ErrNotHere
		}
		h, err := a.shelf.open(ztoc.BlobRef{Digest: ztoc.DigestOf(packed), Size: int64(len(packed))})
		if err != nil {
			return peer.ZtocAnswer{}, err
		}
		j.keep(h)
		return peer.ZtocAnswer{Ref: h.ref, Builder: a.o.Name}, h.WriteAt(packed, 0)
	}
	return peer.ZtocAnswer{Ref: t.ref, Provisional: true, Builder: t.by}, nil
}

// keep holds a blob open until the job ends.
func (j *job) keep(h *held) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.extra = append(j.extra, h)
}

// check proves every layer: the SHA-256 of the whole blob, computed while it arrives.
func (j *job) check(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range j.layers() {
		g.Go(func() error { return j.prove(ctx, n) })
	}
	return g.Wait()
}

// prove hashes one layer, and heals it when it is wrong.
func (j *job) prove(ctx context.Context, n int) error {
	b := j.spec.Blobs[n]
	t := j.tableOf(b.Digest)
	if j.plan.Indexer(n) == j.me { // inflating it proves it
		select {
		case <-t.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if t.proven {
			j.blobs[n].hasProof()
			return nil
		}
	}
	if j.blobs[n].lately() {
		return nil
	}
	for try := 0; ; try++ {
		sum, err := hashed(j.blobs[n].inOrder(ctx))
		if err != nil {
			return err
		}
		if sum == b.Digest {
			j.blobs[n].hasProof()
			return nil
		}
		err = fmt.Errorf("layer %s: %w: it hashes to %s", b.Digest, ztoc.ErrMismatch, sum)
		if try == healTries {
			return err
		}
		if err := j.heal(ctx, n, try, false, err); err != nil {
			return err
		}
	}
}

// hashed is the digest of what r gives, computed on a thread that lets everything else go first.
func hashed(r io.Reader) (ztoc.Digest, error) {
	type result struct {
		d   ztoc.Digest
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and its priority with it
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 10)
		h := sha256.New()
		_, err := io.CopyBuffer(struct{ io.Writer }{h}, r, make([]byte, orderStep))
		done <- result{ztoc.DigestFromSum([sha256.Size]byte(h.Sum(nil))), err}
	}()
	v := <-done
	return v.d, v.err
}
