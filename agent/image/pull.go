package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

// maxPulls bounds how many layers are pulled at once: enough to keep a link and the cores busy, few
// enough that the windows and buffers of the builders do not add up.
const maxPulls = 4

// hugeLayer is the size from which spans are hugeSpan unless the configuration says otherwise: the table of a
// layer is in memory while it is built, and with small spans that of 20 GB would take 200 MB.
const (
	hugeLayer = 4 << 30
	hugeSpan  = 4 << 20
)

// pullTries is how often a layer is streamed when its bytes turn out wrong: a flipped bit on the way
// is repaired, a registry that serves something else is told apart from it.
const pullTries = 3

// pullMissing fetches the layers that have no view yet, the largest first, and builds their tables
// while they arrive.
func (o *opener) pullMissing(ctx context.Context, views []*view) error {
	var missing []int
	var bytes int64
	for i, v := range views {
		if v.ztoc == nil && duplicateOf(o.img.Layers, i) < 0 {
			missing = append(missing, i)
			bytes += o.img.Layers[i].Size
			o.Progress.expect(o.img.Layers[i].Digest, o.img.Layers[i].Size)
		}
	}
	// The largest layer decides when all are done, so it starts first.
	slices.SortStableFunc(missing, func(a, b int) int {
		return int(max(-1, min(1, o.img.Layers[b].Size-o.img.Layers[a].Size)))
	})
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxPulls)
	for _, i := range missing {
		// Beside many layers of one size one core each is best; a layer that outweighs the others would keep the
		// other cores waiting.
		cores := 1
		if 2*o.img.Layers[i].Size > bytes {
			cores = runtime.GOMAXPROCS(0)
		}
		g.Go(func() error { return o.pull(ctx, o.img.Layers[i], views[i], cores) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, v := range views {
		if first := duplicateOf(o.img.Layers, i); first >= 0 && v.ztoc == nil {
			v.use(views[first].ztoc, views[first].report.Mode, 0)
			v.report.Reason = "the same blob as a layer below"
		}
	}
	return nil
}

// pullAgain gives up on the tables that others made and pulls their layers.
func (o *opener) pullAgain(ctx context.Context, views []*view, cause error) error {
	for _, v := range views {
		if !v.report.Mode.Lazy() {
			continue
		}
		if err := o.Store.Delete(store.KindZtoc, v.report.Digest.Hex()); err != nil {
			return err
		}
		v.ztoc, v.report.Mode = nil, ""
		v.report.Reason = joinReason(v.report.Reason, cause.Error())
	}
	return o.pullMissing(ctx, views)
}

// pull streams one layer through the builder. A layer that has no restart points is read a second
// time, from the store, to be re-framed.
func (o *opener) pull(ctx context.Context, l origin.Descriptor, v *view, cores int) error {
	opts := o.buildOptions(l)
	opts.Cores = cores
	opts.Progress = o.Progress.layer(l.Digest)
	mode := ModePulled
	z, err := o.streamed(ctx, l, func(r io.Reader) (*ztoc.Ztoc, error) {
		z, _, err := ztoc.Build(r, opts)
		return z, err
	})
	if errors.Is(err, ztoc.ErrNoRestart) {
		mode = ModeDerived
		v.report.Reason = joinReason(v.report.Reason, err.Error())
		z, err = o.streamed(ctx, l, func(r io.Reader) (*ztoc.Ztoc, error) { return o.derive(r, opts) })
	}
	if err != nil {
		return fmt.Errorf("image %s: layer %s: %w", o.img.Ref, l.Digest, err)
	}
	if z.Blob == "" {
		z.Blob = l.Digest
	}
	if mode == ModeDerived {
		o.derived.enter(z.Blob, l)
	}
	v.use(o.keepZtoc(l.Digest, z), mode, 0)
	v.decode()
	return nil
}

func (o *opener) buildOptions(l origin.Descriptor) ztoc.BuildOptions {
	opts := ztoc.BuildOptions{SpanSize: o.SpanSize, Tool: o.Tool, Want: l.Digest}
	if opts.SpanSize == 0 && l.Size > hugeLayer {
		opts.SpanSize = hugeSpan
	}
	return opts
}

// streamed runs read over the bytes of l, again from the origin when they were not the right ones.
func (o *opener) streamed(ctx context.Context, l origin.Descriptor, read func(io.Reader) (*ztoc.Ztoc, error)) (*ztoc.Ztoc, error) {
	for try := 1; ; try++ {
		body, err := o.chain.Stream(ctx, l.Ref())
		if err != nil {
			return nil, err
		}
		z, err := read(body)
		body.Close()
		if !errors.Is(err, ztoc.ErrMismatch) && !errors.Is(err, ztoc.ErrInvalid) {
			return z, err
		}
		// Bytes that were wrong may still decode, and right ones may be malformed: only fetching the whole
		// layer again tells which it is, and what is malformed twice with one digest stays so.
		if reject := o.chain.Reject(l.Ref(), ztoc.Range{Start: 0, End: l.Size}, err); reject != nil || try == pullTries {
			return nil, errors.Join(err, reject)
		}
		o.Log.Warn("a layer did not match its digest, fetching it again", "layer", l.Digest, "try", try, "cause", err)
	}
}

func joinReason(a, b string) string {
	if a == "" {
		return b
	}
	return a + "; " + b
}
