package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// A source is where a job's chain takes from what the store has not: layers from the origin, what the resolver made from
// the resolver. When the origin cannot be reached, every host of the job is asked for what it has.
type source struct{ j *job }

var _ fetch.Origin = source{}

// Blob opens bytes r of a blob of the job.
func (s source) Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	j := s.j
	n := j.number(d)
	if n < 0 {
		return nil, fmt.Errorf("blob %s is not of image %s", d, j.spec.Image)
	}
	if j.spec.Blobs[n].Kind != planner.Layer {
		body, err := j.fromHosts(ctx, d, r, j.hostsNamed(planner.Resolver(j.id, j.a.resolvers(j.names()))))
		if err != nil {
			body, err = j.fromHosts(ctx, d, r, j.foremost(j.plan.Tree(j.plan.PieceAt(n, r.Start)), scrapeHosts))
		}
		if err != nil && j.a.o.Seed(j.a.o.Name) {
			body, err = j.remade(ctx, d, r, err)
		}
		return body, err
	}
	if hosts := j.holdersOf(ctx, d); len(hosts) > 0 {
		if body, err := j.fromHosts(ctx, d, r, hosts); err == nil {
			return body, nil
		}
	}
	if b := j.spec.Blobs[n]; b.Size < image.WholeBelow && b.Ztoc != "" { // the resolver has pulled it, most likely
		if body, err := j.fromHosts(ctx, d, r, j.hostsNamed(planner.Resolver(j.id, j.a.resolvers(j.names()))[:1])); err == nil {
			return body, nil
		}
	}
	if !j.a.o.Seed(j.a.o.Name) {
		return j.fromHosts(ctx, d, r, j.others())
	}
	if j.originGone.Load() || j.begunLate.Load() || j.substitute(n, r) { // somebody else may have it by now
		if body, err := j.fromHosts(ctx, d, r, j.others()); err == nil {
			return body, nil
		}
	}
	return s.fromOrigin(ctx, d, r)
}

// remade makes once more what the resolver has made, which is gone before it has passed it on: the same inputs give the same bytes.
func (j *job) remade(ctx context.Context, d ztoc.Digest, r ztoc.Range, cause error) (io.ReadCloser, error) {
	j.remaking.Lock()
	defer j.remaking.Unlock()
	if j.made[d] == nil {
		j.a.log.Warn("what the resolver has made is made again", "job", j.id, "cause", cause)
		_, made, err := j.a.resolve(ctx, j.asked())
		if err != nil {
			return nil, errors.Join(cause, err)
		}
		j.made = made
	}
	if int64(len(j.made[d])) < r.End {
		return nil, cause
	}
	return io.NopCloser(bytes.NewReader(j.made[d][r.Start:r.End])), nil
}

// fromOrigin opens bytes r of a layer at the origin, or, when that fails, at the other hosts.
func (s source) fromOrigin(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	j := s.j
	if err := j.beQuiet(ctx); err != nil {
		return nil, err
	}
	repo, err := j.repository()
	if err != nil {
		return nil, err
	}
	j.originRequests.Add(1)
	began := time.Now()
	body, err := repo.Blob(ctx, d, r)
	j.originWait.Add(int64(time.Since(began)))
	if err != nil {
		return s.instead(ctx, d, r, err)
	}
	return &counted{s: s, ctx: ctx, d: d, r: r, body: body}, nil
}

// instead looks for r at the other hosts when the origin has failed.
func (s source) instead(ctx context.Context, d ztoc.Digest, r ztoc.Range, cause error) (io.ReadCloser, error) {
	if ctx.Err() != nil {
		return nil, cause
	}
	s.j.originGone.Store(true)
	if errors.Is(cause, origin.ErrTooMany) {
		s.j.quiet.Store(time.Now().Add(quietFor).UnixNano())
		s.j.tellAll(peer.Note{Kind: peer.NoteQuiet, For: quietFor})
	}
	body, err := s.j.fromHosts(ctx, d, r, s.j.others())
	if err != nil {
		return nil, errors.Join(cause, err)
	}
	return body, nil
}

// A counted is a body from the origin.
type counted struct {
	s    source
	ctx  context.Context
	d    ztoc.Digest
	r    ztoc.Range // still to come
	body io.ReadCloser
}

func (c *counted) Read(p []byte) (int, error) {
	began := time.Now()
	n, err := c.body.Read(p)
	c.s.j.originWait.Add(int64(time.Since(began)))
	if n > 0 {
		j := c.s.j
		j.originGone.Store(false)
		j.got(fromOrigin, int64(n))
		c.r.Start += int64(n)
	}
	if err != nil && !errors.Is(err, io.EOF) && !c.r.Empty() {
		body, other := c.s.instead(c.ctx, c.d, c.r, err)
		if other != nil {
			return n, other
		}
		_ = c.body.Close()
		c.body, err = body, nil
	}
	return n, err
}

func (c *counted) Close() error { return c.body.Close() }

// maxHeld bounds what one question for bytes brings into memory, bytes. What lies behind it comes in a stream.
const maxHeld = 256 << 10

// fromHosts reads r from the first of some hosts that has it.
func (j *job) fromHosts(ctx context.Context, d ztoc.Digest, r ztoc.Range, hosts []peer.Host) (io.ReadCloser, error) {
	h := &hostsReader{j: j, ctx: ctx, d: d, r: r, hosts: hosts}
	if err := h.fill(); err != nil {
		return nil, err
	}
	return h, nil
}

// A hostsReader asks the hosts one after the other for the next bytes. Whoever has them is asked for all that follow, in one stream, until that ends
// or does not go on where it should; then all are asked again.
type hostsReader struct {
	j      *job
	ctx    context.Context
	d      ztoc.Digest
	r      ztoc.Range // still to fetch
	hosts  []peer.Host
	buf    []byte // of fill; kept for the next one
	got    []byte // to be read: of buf, or of the stream until its next event
	stream *peer.Stream
}

func (h *hostsReader) fill() error {
	n := min(maxHeld-h.r.Start%maxHeld, h.r.Len())
	if h.buf == nil {
		h.buf = make([]byte, min(maxHeld, h.r.Len()))
	}
	p := h.buf[:n]
	var errs error = peer.ErrNotHere
	for _, host := range h.hosts {
		ctx, cancel := context.WithTimeout(h.ctx, h.j.a.o.Ask)
		err := h.j.a.client.Read(ctx, host, h.j.hello(ztoc.Demand), h.d, p, h.r.Start)
		cancel()
		if err == nil {
			h.j.peerRequests.Add(1)
			h.take(p)
			if h.r.Len() > maxHeld {
				h.open(host)
			}
			return nil
		}
		if h.ctx.Err() != nil {
			return context.Cause(h.ctx)
		}
		if !errors.Is(err, peer.ErrNotHere) {
			errs = err
		}
	}
	if host, ok := h.j.fetchedBy(h.ctx, h.d, ztoc.Range{Start: h.r.Start, End: h.r.Start + n}); ok {
		ctx, cancel := context.WithTimeout(h.ctx, h.j.a.o.Ask)
		defer cancel()
		if err := h.j.a.client.Read(ctx, host, h.j.hello(ztoc.Demand), h.d, p, h.r.Start); err == nil {
			h.j.peerRequests.Add(1)
			h.take(p)
			return nil
		}
	}
	return fmt.Errorf("%s [%d, +%d) at none of %d hosts: %w", h.d, h.r.Start, len(p), len(h.hosts), errs)
}

// bringers is how many seeds are asked to fetch what this host cannot.
const bringers = 3

// fetchedBy has another seed fetch bytes that this host cannot get, and says which: the origin may only have closed itself to this one, which has
// been started again and has the user's credentials no more.
func (j *job) fetchedBy(ctx context.Context, d ztoc.Digest, r ztoc.Range) (peer.Host, bool) {
	n := j.number(d)
	if n < 0 || j.spec.Blobs[n].Kind != planner.Layer || !j.originGone.Load() {
		return peer.Host{}, false
	}
	asked := 0
	for _, i := range j.plan.Seeds() {
		if i == j.me || j.isLate(i) || asked == bringers {
			continue
		}
		asked++
		ask, cancel := context.WithTimeout(ctx, j.a.o.Ask)
		_, err := peer.Ask(ask, j.a.client, j.hostAt(i), bringQuestion, bringAsk{Plan: j.plan.ID().String(), Blob: n, Range: r})
		cancel()
		if err == nil {
			return j.hostAt(i), true
		}
	}
	return peer.Host{}, false
}

// take has p be read next.
func (h *hostsReader) take(p []byte) {
	h.got = p
	h.r.Start += int64(len(p))
	h.j.got(fromPeer, int64(len(p)))
}

// open begins a stream of what is still to fetch. Without one it comes piece by piece.
func (h *hostsReader) open(host peer.Host) {
	s, err := h.j.a.client.Open(h.ctx, host, h.j.hello(ztoc.Prefetch))
	if err != nil {
		return
	}
	if _, err := s.Want(h.d, []ztoc.Range{h.r}); err != nil {
		_ = s.Close()
		return
	}
	h.j.peerRequests.Add(1)
	h.stream = s
}

// next waits for the stream's next bytes, and closes it when it has none.
func (h *hostsReader) next() {
	for {
		e, err := h.stream.Next()
		switch {
		case err == nil && e.Kind == peer.Waiting:
			continue
		case err == nil && e.Kind == peer.Bytes && e.Range.Start == h.r.Start:
			h.take(e.Data)
			return
		}
		_ = h.stream.Close()
		h.stream = nil
		return
	}
}

func (h *hostsReader) Read(p []byte) (int, error) {
	if len(h.got) == 0 {
		if h.r.Empty() {
			return 0, io.EOF
		}
		if h.stream != nil {
			h.next()
		}
		if len(h.got) == 0 {
			if err := h.fill(); err != nil {
				return 0, err
			}
		}
	}
	n := copy(p, h.got)
	h.got = h.got[n:]
	return n, nil
}

func (h *hostsReader) Close() error {
	if h.stream != nil {
		_ = h.stream.Close()
		h.stream = nil
	}
	return nil
}

// substitute reports whether r is fetched here only because hosts of the plan were passed over.
func (j *job) substitute(n int, r ztoc.Range) bool {
	return j.plan.Root(j.plan.Tree(j.plan.PieceAt(n, r.Start))) != j.me
}

// others are the job's hosts but this one, and those that are passed over last.
func (j *job) others() (hosts []peer.Host) {
	var late []peer.Host
	for i := range j.spec.Hosts {
		switch {
		case i == j.me:
		case j.isLate(i):
			late = append(late, j.hostAt(i))
		default:
			hosts = append(hosts, j.hostAt(i))
		}
	}
	return append(hosts, late...)
}

// foremost are the n hosts that stand first in a tree's order, without this one: those that have its pieces first.
func (j *job) foremost(tree, n int) (hosts []peer.Host) {
	ranked := make([]int, len(j.spec.Hosts))
	for i := range ranked {
		ranked[j.plan.Rank(tree, i)] = i
	}
	for _, i := range ranked {
		if i != j.me && len(hosts) < n {
			hosts = append(hosts, j.hostAt(i))
		}
	}
	return hosts
}

// hostsNamed are some of the job's hosts, without this one.
func (j *job) hostsNamed(names []string) (hosts []peer.Host) {
	for _, n := range names {
		if i := j.plan.Host(n); i >= 0 && i != j.me {
			hosts = append(hosts, j.hostAt(i))
		}
	}
	return hosts
}

// quietFor is how long all leave the origin alone when it has said 429 to one and not how long.
const quietFor = 2 * time.Second

// beQuiet waits until the origin may be asked again.
func (j *job) beQuiet(ctx context.Context) error {
	t := time.NewTimer(time.Until(time.Unix(0, j.quiet.Load())))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (j *job) names() []string {
	names := make([]string, len(j.spec.Hosts))
	for i, h := range j.spec.Hosts {
		names[i] = h.Name
	}
	return names
}
