package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// healTries is how often a layer that is wrong is repaired before it is given up.
const healTries = 3

// tableWait is how long a host whose layer is wrong waits for the table of whoever builds it.
const tableWait = 30 * time.Second

// heal finds out which host's bytes of a layer are wrong, drops them, and fetches them from the origin. The layer has arrived whole,
// or does so first. With a table each span tells by itself; without, one piece of each source is fetched again and compared, and when that
// shows nothing, all of the layer is: so one host, which builds the table, does that, and the others wait for what it finds out, and take the
// right bytes from it, the first time.
func (j *job) heal(ctx context.Context, n, try int, building bool, cause error) error {
	b, h := j.spec.Blobs[n], j.blobs[n]
	if err := h.wait(ctx, h.whole()); err != nil {
		return err
	}
	layer := origin.Descriptor{Digest: b.Digest, Size: b.Size}
	if !building && image.KeptTable(j.a.o.Store, layer) == nil {
		late := time.NewTimer(tableWait)
		defer late.Stop()
		select {
		case <-j.tableOf(b.Digest).done:
		case <-late.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	j.healing.Lock()
	defer j.healing.Unlock()
	// Two may have found the same: the one that inflates and the one that hashes.
	if sum, err := hashed(h.inOrder(ctx)); err != nil || sum == b.Digest {
		return err
	}
	bad, err := j.wrongPieces(ctx, n)
	if err != nil {
		return err
	}
	liars := map[int]int64{}
	for _, x := range bad {
		_, r := j.plan.Range(x)
		liars[j.broughtBy(x)] += r.Len()
		h.blob.Drop(r)
	}
	for host, wrong := range liars {
		name := "the origin"
		if host >= 0 {
			name = j.spec.Hosts[host].Name
			j.passOver(host, "sent wrong bytes", 0)
		}
		j.a.log.Error("bytes of a layer were wrong and are fetched again", "job", j.id, "layer", b.Digest, "source", name, "bytes", wrong, "cause", cause)
		j.a.audit("wrong-bytes", "job", j.id, "layer", b.Digest, "source", name, "bytes", wrong)
		j.a.metrics.wrong.Add(float64(wrong))
	}
	for _, x := range bad {
		_, r := j.plan.Range(x)
		j.setBrought(x, originHost)
		var p []byte
		err := peer.ErrNotHere
		if !building && try == 0 {
			p, err = j.fromBuilder(ctx, n, r)
		}
		if err != nil {
			p, err = j.proper(ctx, n, r)
		}
		if err == nil {
			err = j.chain.Give(b.BlobRef, p, r.Start)
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", b.Digest, err)
		}
	}
	return nil
}

// wrongPieces are the pieces of a layer that have to be fetched again.
func (j *job) wrongPieces(ctx context.Context, n int) ([]planner.Piece, error) {
	from, to := j.plan.BlobPieces(n)
	var all []planner.Piece
	for x := from; x < to; x++ {
		all = append(all, x)
	}
	layer := origin.Descriptor{Digest: j.spec.Blobs[n].Digest, Size: j.spec.Blobs[n].Size}
	packed := image.KeptTable(j.a.o.Store, layer)
	if packed == nil {
		packed = j.tableSomewhere(ctx, layer)
	}
	if packed != nil {
		if bad := j.wrongSpans(n, packed); len(bad) > 0 {
			return bad, nil
		}
	}
	// One piece of each source, against the origin's.
	bySource := map[int][]planner.Piece{}
	for _, x := range all {
		bySource[j.broughtBy(x)] = append(bySource[j.broughtBy(x)], x)
	}
	var bad []planner.Piece
	for host, list := range bySource {
		if host == originHost {
			continue
		}
		same, err := j.sameAtOrigin(ctx, n, list[len(list)/2])
		if err != nil {
			return nil, err
		}
		if !same {
			bad = append(bad, list...)
		}
	}
	if len(bad) == 0 { // whoever lied did it elsewhere: nothing is believed
		bad = all
	}
	slices.Sort(bad)
	return bad, nil
}

// askedForTables is how many hosts are asked whether they have a table.
const askedForTables = 8

// tableSomewhere is the table of a layer that another host of the job has, from an earlier time or because it was faster; nil when none tells
// soon. It need not be true: it only says which pieces to fetch again, and the layer's digest has the last word.
func (j *job) tableSomewhere(ctx context.Context, l origin.Descriptor) []byte {
	ctx, cancel := context.WithTimeout(ctx, j.a.o.Ask)
	defer cancel()
	others := j.others()
	others = others[:min(len(others), askedForTables)]
	found := make(chan []byte, len(others))
	for _, host := range others {
		go func() {
			var packed []byte
			a, err := peer.Ask(ctx, j.a.client, host, tableQuestion, peer.ZtocAsk{Layer: l.Digest, Plan: j.plan.ID().String(), Grant: j.shown})
			if err == nil && a.Ref.Digest != "" {
				packed, _ = j.a.client.Blob(ctx, host, j.hello(ztoc.Prefetch), a.Ref, maxTable)
			}
			found <- packed
		}()
	}
	for range others {
		if packed := <-found; packed != nil {
			return packed
		}
	}
	return nil
}

// wrongIn are the spans of a layer that r touches and that do not match its table. judged is false when there is no table, or not all of them are
// here.
func (j *job) wrongIn(n int, r ztoc.Range) (bad []badSpan, judged bool) {
	z, err := ztoc.Unpack(image.KeptTable(j.a.o.Store, origin.Descriptor{Digest: j.spec.Blobs[n].Digest, Size: j.spec.Blobs[n].Size}))
	if err != nil {
		return nil, false
	}
	for i := range z.NumSpans() {
		s := z.Span(i)
		if s.Blob.Start >= r.End || s.Blob.End <= r.Start {
			continue
		}
		in := make([]byte, s.Blob.Len())
		if j.blobs[n].blob.ReadAt(in, s.Blob.Start) != nil {
			return nil, false
		}
		judged = true
		if !spanMatches(z, i, in) {
			bad = append(bad, badSpan{z, i})
		}
	}
	return bad, judged
}

// A badSpan is a span of a table that does not match its bytes here.
type badSpan struct {
	z *ztoc.Ztoc
	i int
}

// guilty are the hosts that brought bytes of wrong spans, and have wrong ones there now. Who cannot be asked is not guilty.
func (j *job) guilty(ctx context.Context, n int, bad []badSpan) (hosts []int) {
	for _, b := range bad {
		r := b.z.Span(b.i).Blob
		for x := j.plan.PieceAt(n, r.Start); x <= j.plan.PieceAt(n, r.End-1); x++ {
			host := j.broughtBy(x)
			if host < 0 || slices.Contains(hosts, host) {
				continue
			}
			p := make([]byte, r.Len())
			ask, cancel := context.WithTimeout(ctx, j.a.o.Ask)
			err := j.a.client.Read(ask, j.hostAt(host), j.hello(ztoc.Demand), j.spec.Blobs[n].Digest, p, r.Start)
			cancel()
			if err == nil && !spanMatches(b.z, b.i, p) {
				hosts = append(hosts, host)
			}
		}
	}
	return hosts
}

// spanMatches reports whether bytes are those of a table's span.
func spanMatches(z *ztoc.Ztoc, i int, in []byte) bool {
	return z.Inflate(make([]byte, z.Span(i).Out.Len()), i, in) == nil
}

// wrongSpans are the pieces in which spans of the table do not match.
func (j *job) wrongSpans(n int, packed []byte) []planner.Piece {
	z, err := ztoc.Unpack(packed)
	if err != nil {
		return nil
	}
	found := map[planner.Piece]bool{}
	for i := range z.NumSpans() {
		s := z.Span(i)
		in := make([]byte, s.Blob.Len())
		if j.blobs[n].blob.ReadAt(in, s.Blob.Start) == nil && spanMatches(z, i, in) {
			continue
		}
		for x := j.plan.PieceAt(n, s.Blob.Start); x <= j.plan.PieceAt(n, max(s.Blob.Start, s.Blob.End-1)); x++ {
			found[x] = true
		}
	}
	var bad []planner.Piece
	for x := range found {
		bad = append(bad, x)
	}
	return bad
}

// sameAtOrigin reports whether the origin has the same bytes for a piece.
func (j *job) sameAtOrigin(ctx context.Context, n int, x planner.Piece) (bool, error) {
	_, r := j.plan.Range(x)
	theirs, err := j.proper(ctx, n, r)
	if err != nil {
		return false, err
	}
	ours := make([]byte, r.Len())
	return j.blobs[n].blob.ReadAt(ours, r.Start) == nil && bytes.Equal(ours, theirs), nil
}

// proper reads r of a layer from the origin, and from other hosts, which may have it from a liar, only when that fails. A host that may not ask
// the origin has nobody else.
func (j *job) proper(ctx context.Context, n int, r ztoc.Range) ([]byte, error) {
	d, p := j.spec.Blobs[n].Digest, make([]byte, r.Len())
	var body io.ReadCloser
	var err error
	if j.a.o.Seed(j.a.o.Name) {
		body, err = source{j}.fromOrigin(ctx, d, r)
	} else {
		body, err = j.fromHosts(ctx, d, r, j.others())
	}
	if err != nil {
		return nil, err
	}
	defer body.Close()
	_, err = io.ReadFull(body, p)
	return p, err
}

// fromBuilder reads r of a layer from the host that has built its table, and so has seen its digest match.
func (j *job) fromBuilder(ctx context.Context, n int, r ztoc.Range) ([]byte, error) {
	t := j.tableOf(j.spec.Blobs[n].Digest)
	select {
	case <-t.done:
	default:
		return nil, peer.ErrNotHere
	}
	i := j.plan.Host(t.by)
	if i < 0 || i == j.me {
		return nil, peer.ErrNotHere
	}
	body, err := j.fromHosts(ctx, j.spec.Blobs[n].Digest, r, []peer.Host{j.hostAt(i)})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	p := make([]byte, r.Len())
	_, err = io.ReadFull(body, p)
	return p, err
}

// broughtBy is who brought a piece.
func (j *job) broughtBy(x planner.Piece) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	if h, ok := j.from[x]; ok {
		return h
	}
	return originHost
}

func (j *job) setBrought(x planner.Piece, host int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.from[x] = host
}
