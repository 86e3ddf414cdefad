package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// An intake brings all pieces of a job's plan to this host: its own runs from the origin, the others from the parents that
// the plan names, and from whoever stands in for one that is passed over.
type intake struct {
	j     *job
	group *errgroup.Group
	ctx   context.Context

	cancel context.CancelCauseFunc

	pieces [][]planner.Piece // by tree

	mu    sync.Mutex
	feeds map[int]*feed        // by host, those that run
	no    map[int]map[int]bool // tree → hosts that said they will not bring it
}

// A feed is the stream from one parent. Guarded by intake.mu but for what is said.
type feed struct {
	in     *intake
	host   int
	trees  map[int]bool
	more   []int                   // trees added since the stream looked
	stream *peer.Stream            // nil until open
	give   context.CancelCauseFunc // ends the feed; the referee's
	got    atomic.Int64            // bytes
	wanted atomic.Int64            // bytes that it was asked for
	paces  paces                   // used by the referee only

	open       int  // wants that are not done; used by the feed's goroutine only
	introduced bool // the parent was handed the plan; used by the feed's goroutine only
}

// runsAtOnce is how many runs a root has under way: one on the wire, one whose request is on its way.
const runsAtOnce = 2

// take brings everything. It returns when every piece is in the store.
func (j *job) take(ctx context.Context) error {
	j.taking.Store(true)
	defer j.taking.Store(false)
	taking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g, ctx := errgroup.WithContext(taking)
	in := &intake{
		j: j, group: g, ctx: ctx, cancel: cancel, pieces: make([][]planner.Piece, j.plan.Trees()),
		feeds: map[int]*feed{}, no: map[int]map[int]bool{},
	}
	for x := range planner.Piece(j.plan.Pieces()) {
		t := j.plan.Tree(x)
		in.pieces[t] = append(in.pieces[t], x)
	}
	g.Go(in.runs)
	for t := range j.plan.Trees() {
		if j.plan.Root(t) != j.me {
			in.assign(t)
		}
	}
	g.Go(in.watch)
	g.Go(in.referee)
	err := g.Wait()
	if errors.Is(context.Cause(taking), errAllHere) {
		return nil // and what else ended, ended because of that
	}
	return err
}

// errAllHere ends what still waits when every piece has come, some of them another way.
var errAllHere = errors.New("everything is here")

// runs fetches what this host is the root of, in long requests: tables first, then what the program touches first, where that is known, then
// the rest in order.
func (in *intake) runs() error {
	j := in.j
	runs := j.plan.Runs(j.me)
	layers := slices.IndexFunc(runs, func(r planner.Run) bool { return j.spec.Blobs[r.Blob].Kind == planner.Layer })
	if layers < 0 {
		layers = len(runs)
	}
	if err := in.bringAll(runs[:layers]); err != nil {
		return err
	}
	runs = runs[layers:]
	if len(runs) > 0 {
		in.lookBehind(runs[0])
	}
	if first := in.start(runs); first != nil {
		began := time.Now()
		if err := in.bringAll(first); err != nil {
			return err
		}
		in.awaitStart(startWait + 2*time.Since(began))
	}
	return in.bringAll(runs)
}

// awaitStart leaves the links to those roots that still bring what the program touches first, until it is here, for a while.
func (in *intake) awaitStart(limit time.Duration) {
	ctx, cancel := context.WithTimeout(in.ctx, limit)
	defer cancel()
	for d, ranges := range in.j.start {
		for _, r := range ranges {
			if in.j.blobs[in.j.number(d)].wait(ctx, r) != nil {
				return
			}
		}
	}
}

// lookBehind finds out whether this host is a root that begins late: its deputies have taken its place then, and have what they have brought.
func (in *intake) lookBehind(r planner.Run) {
	j := in.j
	_, piece := j.plan.Range(r.First)
	if j.blobs[r.Blob].has(piece) {
		return
	}
	p := make([]byte, piece.Len())
	for _, d := range j.plan.Deputies(j.plan.Tree(r.First)) {
		ctx, cancel := context.WithTimeout(in.ctx, lookBehindFor)
		err := j.a.client.Read(ctx, j.hostAt(d), j.hello(ztoc.Demand), j.spec.Blobs[r.Blob].Digest, p, piece.Start)
		cancel()
		if err == nil {
			j.a.log.Info("begun late: others have this host's part already", "job", j.id)
			j.begunLate.Store(true)
			return
		}
	}
}

// lookBehindFor bounds what lookBehind may cost, for each deputy.
const lookBehindFor = 200 * time.Millisecond

// start are the parts of the runs that the program touches first.
func (in *intake) start(runs []planner.Run) (first []planner.Run) {
	j := in.j
	if len(runs) == 0 || slices.ContainsFunc(j.spec.Blobs, func(b planner.Blob) bool {
		return b.Kind == planner.Layer && b.Ztoc == "" && b.Size >= image.WholeBelow
	}) {
		return nil // a first pull: everything is wanted from the beginning to the end
	}
	late := time.NewTimer(startWait)
	defer late.Stop()
	select {
	case <-j.started:
	case <-late.C:
		return nil
	case <-in.ctx.Done():
		return nil
	}
	for _, run := range runs {
		for _, r := range j.start[j.spec.Blobs[run.Blob].Digest] {
			// Whole pieces: only those are passed on.
			size := j.plan.PieceSize()
			r = run.Range.Intersect(ztoc.Range{Start: r.Start / size * size, End: (r.End + size - 1) / size * size})
			if n := len(first); !r.Empty() && n > 0 && first[n-1].Blob == run.Blob && first[n-1].Range.End+startGap*size >= r.Start {
				first[n-1].Range.End = max(first[n-1].Range.End, r.End)
			} else if !r.Empty() {
				first = append(first, planner.Run{Blob: run.Blob, Range: r})
			}
		}
	}
	return first
}

// startGap is how many pieces nobody needs yet are fetched rather than ask for what lies on both sides of them in two requests.
const startGap = 1

// startWait is how long a root waits to learn what is wanted first: the tables are under way.
const startWait = 2 * time.Second

func (in *intake) bringAll(runs []planner.Run) error {
	g, ctx := errgroup.WithContext(in.ctx)
	g.SetLimit(runsAtOnce)
	for _, r := range runs {
		g.Go(func() error { return in.bring(ctx, r.Blob, r.Range) })
	}
	return g.Wait()
}

// bring fetches a range through the chain: from the origin.
func (in *intake) bring(ctx context.Context, blob int, r ztoc.Range) error {
	j := in.j
	if err := j.chain.Ensure(ctx, j.spec.Blobs[blob].BlobRef, r, ztoc.Prefetch); err != nil {
		return fmt.Errorf("image %s: %w", j.spec.Image, err)
	}
	return nil
}

// missing is what is not here of a tree's pieces, by blob, merged.
func (in *intake) missing(t int) map[int][]ztoc.Range {
	out := map[int][]ztoc.Range{}
	for _, x := range in.pieces[t] {
		b, r := in.j.plan.Range(x)
		for _, m := range in.j.blobs[b].blob.Missing(r) {
			m = r.Intersect(m)
			if n := len(out[b]); n > 0 && out[b][n-1].End == m.Start {
				out[b][n-1].End = m.End
			} else {
				out[b] = append(out[b], m)
			}
		}
	}
	return out
}

// assign gives a tree to the nearest of its ancestors that is not passed over, or, when there is none, to the origin.
func (in *intake) assign(t int) {
	j := in.j
	if in.ctx.Err() != nil || len(in.missing(t)) == 0 {
		return
	}
	for _, h := range j.plan.Ancestors(t, j.me) {
		in.mu.Lock()
		no := in.no[t][h]
		in.mu.Unlock()
		if no || j.isLate(h) {
			continue
		}
		in.give(h, t)
		return
	}
	in.group.Go(func() error {
		in.scrape(t)
		for b, ranges := range in.missing(t) {
			for _, r := range ranges {
				if err := in.bring(in.ctx, b, r); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// scrape takes what the first hosts of a tree's order have of it, for a while. Whoever has passed over all that stand before it has most likely
// erred: the tree's pieces are among the hosts, or will be. Its deputies do not wait: it is for them to fetch them.
func (in *intake) scrape(t int) {
	j := in.j
	if j.plan.Root(t) == j.me || slices.Contains(j.plan.Deputies(t), j.me) {
		return
	}
	hosts := j.foremost(t, scrapeHosts)
	for try := range scrapeTries {
		for b, ranges := range in.missing(t) {
			for _, r := range ranges {
				for r.Start < r.End {
					piece := ztoc.Range{Start: r.Start, End: min(r.End, (r.Start/j.plan.PieceSize()+1)*j.plan.PieceSize())}
					r.Start = piece.End
					if err := j.takeFrom(in.ctx, b, piece, hosts); err != nil && in.ctx.Err() != nil {
						return
					}
				}
			}
		}
		if len(in.missing(t)) == 0 || try == scrapeTries-1 {
			return
		}
		select {
		case <-time.After(scrapeEvery):
		case <-in.ctx.Done():
			return
		}
	}
}

const (
	scrapeHosts = 16
	scrapeTries = 6
	scrapeEvery = 500 * time.Millisecond
)

// takeFrom brings a range from the first of some hosts that has it now.
func (j *job) takeFrom(ctx context.Context, blob int, r ztoc.Range, hosts []peer.Host) error {
	b := j.spec.Blobs[blob].BlobRef
	body, err := j.fromHosts(ctx, b.Digest, r, hosts)
	if err != nil {
		return err
	}
	defer body.Close()
	p := make([]byte, r.Len())
	if _, err := io.ReadFull(body, p); err != nil {
		return err
	}
	return j.chain.Give(b, p, r.Start)
}

// give adds a tree to the feed of a host, which is begun if need be.
func (in *intake) give(h, t int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f := in.feeds[h]
	if f == nil {
		f = &feed{in: in, host: h, trees: map[int]bool{}}
		in.feeds[h] = f
		in.group.Go(func() error { return f.run() })
	}
	f.trees[t] = true
	f.more = append(f.more, t) // asked for after the next frame, which comes within peer.Beat
}

// run takes what a parent sends until nothing is left to want of it. An error of the parent is not one of the stage: its trees
// go to others.
func (f *feed) run() error {
	in, j := f.in, f.in.j
	began := time.Now()
	err := f.receive()
	in.mu.Lock()
	delete(in.feeds, f.host)
	var left []int
	for t := range f.trees {
		left = append(left, t)
		if err == nil && !slices.Contains(f.more, t) { // it has said that this was all
			in.refuse(t, f.host)
		}
	}
	slices.Sort(left)
	in.mu.Unlock()
	switch {
	case in.ctx.Err() != nil:
		return context.Cause(in.ctx)
	case errors.Is(err, errNotKept):
		return err
	case err != nil:
		j.passOver(f.host, err.Error(), time.Since(began))
	}
	for _, t := range left {
		in.assign(t) // nothing to do where all has come
	}
	return nil
}

// errNotKept ends a stage whose bytes the store does not take.
var errNotKept = errors.New("the store does not keep what arrives")

func (f *feed) receive() error {
	in, j := f.in, f.in.j
	ctx, cancel := context.WithCancelCause(in.ctx)
	defer cancel(nil)
	s, err := j.a.client.Open(ctx, j.hostAt(f.host), j.hello(ztoc.Prefetch))
	if err != nil {
		return err
	}
	defer func() {
		b, waited := s.Pace()
		j.paced.Add(b)
		j.peerWait.Add(int64(waited))
		s.Close()
	}()
	j.peerRequests.Add(1)
	in.mu.Lock()
	f.stream, f.give = s, cancel
	in.mu.Unlock()
	for {
		if err := f.ask(); err != nil {
			return err
		}
		if f.open == 0 {
			return nil
		}
		e, err := s.Next()
		if err != nil {
			return err
		}
		switch e.Kind {
		case peer.Bytes:
			if err := f.bytes(e); err != nil {
				return err
			}
		case peer.Missing:
			f.refused(j.number(e.Digest), e.Ranges)
		case peer.Done:
			f.open--
		case peer.Refused:
			f.open--
			if err := f.introduce(e.Err); err != nil {
				return err
			}
		}
	}
}

// ask wants what was added since it looked.
func (f *feed) ask() error {
	in, j := f.in, f.in.j
	in.mu.Lock()
	more := f.more
	f.more = nil
	s := f.stream
	in.mu.Unlock()
	all := map[int][]ztoc.Range{}
	for _, t := range more {
		for b, ranges := range in.missing(t) {
			all[b] = append(all[b], ranges...)
		}
	}
	for b := range j.spec.Blobs { // in the order in which blobs are wanted
		ranges := all[b]
		for len(ranges) > 0 {
			n := min(len(ranges), peer.MaxRanges/2)
			if _, err := s.Want(j.spec.Blobs[b].Digest, ranges[:n]); err != nil {
				return err
			}
			f.open++
			for _, r := range ranges[:n] {
				f.wanted.Add(r.Len())
			}
			ranges = ranges[n:]
		}
	}
	return nil
}

// bytes stores what came.
func (f *feed) bytes(e peer.Event) error {
	j := f.in.j
	b := j.number(e.Digest)
	if b < 0 {
		return fmt.Errorf("%w: bytes of another blob", peer.ErrProtocol)
	}
	if err := j.chain.Give(j.spec.Blobs[b].BlobRef, e.Data, e.Range.Start); err != nil {
		return fmt.Errorf("%w: %w", errNotKept, err)
	}
	j.brought(b, e.Range, f.host)
	j.got(fromPeer, e.Range.Len())
	f.got.Add(e.Range.Len())
	return nil
}

// refused gives the trees that the parent will not bring to the next ancestor.
func (f *feed) refused(blob int, ranges []ztoc.Range) {
	in, j := f.in, f.in.j
	if blob < 0 {
		return
	}
	trees := map[int]bool{}
	for _, r := range ranges {
		for x := j.plan.PieceAt(blob, r.Start); x <= j.plan.PieceAt(blob, r.End-1); x++ {
			trees[j.plan.Tree(x)] = true
		}
	}
	for t := range trees {
		in.mu.Lock()
		in.refuse(t, f.host)
		mine := f.trees[t]
		delete(f.trees, t)
		in.mu.Unlock()
		if mine {
			in.assign(t)
		}
	}
}

// refuse notes that a host will not bring (more of) a tree. The caller holds in.mu.
func (in *intake) refuse(t, host int) {
	if in.no[t] == nil {
		in.no[t] = map[int]bool{}
	}
	in.no[t][host] = true
}

// introduce hands the plan to a parent that does not know it, once, and asks again.
func (f *feed) introduce(why error) error {
	in, j := f.in, f.in.j
	if f.introduced || !errors.Is(why, peer.ErrNotHere) {
		return why
	}
	f.introduced = true
	if _, err := peer.Ask(in.ctx, j.a.client, j.hostAt(f.host), peer.Begin, j.encoded); err != nil {
		return err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	f.more = f.more[:0]
	for t := range f.trees {
		f.more = append(f.more, t)
	}
	return nil
}

// watch ends the intake when all is here.
func (in *intake) watch() error {
	for _, h := range in.j.blobs {
		if err := h.wait(in.ctx, h.whole()); err != nil {
			return err
		}
	}
	in.cancel(errAllHere)
	return nil
}
