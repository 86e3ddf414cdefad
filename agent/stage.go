package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/planner"
)

// stage is the whole flow on one host: a plan, its pieces, the tables, the mount, the proof.
func (j *job) stage(ctx context.Context) error {
	j.phase("resolve")
	if err := j.freeze(ctx); err != nil {
		return err
	}
	close(j.frozen)
	j.point(control.PointResolved)

	j.phase("fetch")
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return j.takeWhenIdle(ctx) }) // every piece into the store, and on to others as they come
	g.Go(func() error {                               // the tables, and with them the tree
		img, err := j.meta(ctx)
		if err != nil {
			return err
		}
		if err := j.index(ctx, img); err != nil {
			return err
		}
		j.point(control.PointIndexed)
		j.findStart(ctx, img)
		if err := j.present(ctx, img); err != nil {
			return err
		}
		return j.warm(ctx)
	})
	g.Go(func() error { return j.check(ctx) }) // each layer's digest
	if err := g.Wait(); err != nil {
		return err
	}
	j.opens()
	j.reached(control.Complete)
	j.record()
	j.a.haveNews()
	return nil
}

// run stages and records how it ended.
func (j *job) run() {
	defer close(j.over)
	limit := j.asked().Timeout
	if limit <= 0 {
		limit = stageTimeout
	}
	ctx, cancel := context.WithCancelCause(j.ctx)
	defer cancel(nil)
	defer time.AfterFunc(limit, func() { // what comes after the asked readiness has all the time in the world
		if s, _, _ := j.status(); !s.Done() {
			cancel(fmt.Errorf("not staged within %v: %w", limit, context.DeadlineExceeded))
		}
	}).Stop()
	err := j.stage(ctx)
	if err == nil {
		j.a.log.Info("staged", "job", j.id, "image", j.asked().Image, "took", time.Since(j.began))
		return
	}
	if c := context.Cause(ctx); c != nil && !errors.Is(err, c) {
		err = c
	}
	select {
	case <-j.frozen:
		j.giveUp()
	default:
		j.failed = err
		close(j.frozen)
	}
	if errors.Is(err, errUnstaged) || errors.Is(err, errStopped) {
		return
	}
	if s, _, _ := j.status(); s.Done() { // as ready as was asked for; readers bring what is missing
		j.a.log.Warn("an image is not complete", "job", j.id, "image", j.asked().Image, "cause", err)
		return
	}
	j.fail(err)
}

// fail records that the job has failed on this host.
func (j *job) fail(err error) {
	j.a.log.Error("a stage failed", "job", j.id, "image", j.asked().Image, "cause", err)
	j.a.audit("stage-failed", "job", j.id, "image", j.asked().Image, "uid", j.asked().UID, "cause", err.Error())
	j.a.metrics.stages.WithLabelValues("failed").Inc()
	code := j.a.o.ExitCode(err)
	var told *control.Error
	if errors.As(err, &told) {
		code = told.Code
	}
	took := time.Since(j.began)
	j.phase(control.PhaseFailed)
	j.change(func(s *control.HostState) { s.Error, s.Code, s.Took = err.Error(), code, took })
	j.measured()
	j.record()
}

// reached notes a readiness. The order is done when it is the one that was asked for.
func (j *job) reached(r control.Ready) {
	took, asked := time.Since(j.began), j.asked()
	done := false
	j.change(func(s *control.HostState) {
		if readyLevel[r] > readyLevel[s.Ready] {
			s.Ready = r
		}
		s.Phases = append(s.Phases, control.Phase{Name: control.PointReady + string(r), Start: took, End: took})
		done = !s.Done() && readyLevel[s.Ready] >= readyLevel[asked.Ready]
	})
	if !done {
		return
	}
	j.change(func(s *control.HostState) {
		s.Phase, s.Took, s.Present = control.PhaseDone, took, s.Total
		if s.Ready != control.Complete {
			s.Present = min(s.Total, j.fromStore.Load()+j.fromPeer.Load()+j.fromOrigin.Load())
		}
		for i := range s.Phases {
			if s.Phases[i].End == 0 {
				s.Phases[i].End = took
			}
		}
	})
	j.a.metrics.stages.WithLabelValues("done").Inc()
	j.a.metrics.took.Observe(took.Seconds())
	j.measured()
	j.record()
	j.a.audit("stage", "job", j.id, "image", j.asked().Image, "digest", string(j.spec.Manifest), "uid", j.asked().UID, "ready", string(r), "seconds", took.Seconds())
}

// readyLevel orders what an order may ask for.
var readyLevel = map[control.Ready]int{control.Mounted: 1, control.Warm: 2, control.Complete: 3}

// meta waits for the resolved image, checks it, and has the store know it.
func (j *job) meta(ctx context.Context) (origin.Image, error) {
	h := j.blobs[0] // the resolver puts it first
	if err := h.wait(ctx, h.whole()); err != nil {
		return origin.Image{}, err
	}
	b, err := h.read()
	if err != nil {
		return origin.Image{}, err
	}
	img, err := image.DecodeImage(b, j.spec.Manifest)
	if err != nil {
		return img, err
	}
	image.Keep(j.a.o.Store, img, j.asked().Platform)
	return img, nil
}

// findStart finds out what the program will touch first, and lets the roots fetch that first.
func (j *job) findStart(ctx context.Context, img origin.Image) {
	defer close(j.started)
	for i, b := range j.spec.Blobs {
		if b.Kind != planner.Meta || i == 0 {
			continue
		}
		h := j.blobs[i]
		if h.wait(ctx, h.whole()) != nil {
			return
		}
		profile, err := h.read()
		if err == nil {
			err = image.KeepProfile(j.a.o.Store, img, profile)
		}
		if err != nil {
			j.a.log.Info("a start-up profile is not used", "job", j.id, "cause", err)
		}
	}
	j.start, _ = image.StartRanges(j.a.o.Store, img)
	var bytes, pieces int64
	for d, ranges := range j.start {
		n := j.number(d)
		last := planner.Piece(-1)
		for _, r := range ranges {
			bytes += r.Len()
			for x := max(j.plan.PieceAt(n, r.Start), last+1); x <= j.plan.PieceAt(n, r.End-1); x++ {
				last = x
				pieces++
			}
		}
	}
	j.a.log.Info("what the program touches first", "job", j.id, "bytes", bytes, "pieces", pieces, "of", j.plan.Pieces())
}

// warm waits for what the program will touch first. Where nothing is known of that, only all of the image is warm.
func (j *job) warm(ctx context.Context) error {
	if j.start == nil {
		return nil
	}
	for d, ranges := range j.start {
		h := j.blobs[j.number(d)]
		for _, r := range ranges {
			if err := h.wait(ctx, r); err != nil {
				return err
			}
		}
	}
	j.reached(control.Warm)
	return nil
}

// present mounts the image, unless only its bytes are wanted.
func (j *job) present(ctx context.Context, img origin.Image) error {
	select {
	case <-j.ordered: // a plan may be followed before the order has come
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if j.asked().NoMount || j.a.o.Mounts == "" {
		j.reached(control.Mounted)
		return nil
	}
	began := time.Now()
	if err := j.mountImage(ctx, img); err != nil {
		return err
	}
	j.mark("mount", began)
	j.reached(control.Mounted)
	return nil
}

// stageTimeout bounds a stage whose order does not.
const stageTimeout = time.Hour
