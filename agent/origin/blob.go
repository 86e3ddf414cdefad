package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

func (r *remote) Blob(ctx context.Context, d ztoc.Digest, rng ztoc.Range) (io.ReadCloser, error) {
	if _, err := ztoc.ParseDigest(string(d)); err != nil {
		return nil, usage(string(d), "not a digest", "")
	}
	all := rng == ztoc.Range{}
	if rng.Start < 0 || !all && rng.Empty() {
		return nil, usage(rng.String(), "not a range of a blob", "")
	}
	b := &body{r: r, d: d, next: rng.Start, end: rng.End, size: -1, p: newPatience(r.c.o.MaxWait), no: map[*endpoint]*refusal{}}
	b.ctx, b.cancel = context.WithCancelCause(ctx)
	if all {
		b.end = -1
	}
	if err := b.open(); err != nil {
		b.cancel(err)
		return nil, err
	}
	return b, nil
}

// Reject has the blob asked for elsewhere from now on, where there is an elsewhere: what the last one gave of it was wrong.
func (r *remote) Reject(d ztoc.Digest, _ ztoc.Range, _ error) {
	if e := r.up.giver(d); e != nil {
		e.reject(d)
	}
}

// body reads [next, end) of a blob, over as many responses as it takes.
type body struct {
	r      *remote
	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	d      ztoc.Digest

	mu   sync.Mutex // held by Read, and by Close once it has ended what Read waits for
	next int64
	end  int64 // -1: the blob's size, not known yet
	size int64 // of the blob as answers tell it; -1: not told
	p    *patience
	no   map[*endpoint]*refusal // said something impossible: not asked again
	a    *answer                // positioned at next; nil between two responses
	w    *watched
	err  error // sticky
}

// Read gives the next bytes. A response that breaks, stalls or trickles is given up and the rest asked
// for again, perhaps elsewhere; io.EOF comes only after the last byte asked for.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.err == nil {
		if b.next == b.end {
			b.finish(nil)
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		if b.a == nil {
			if b.err = b.open(); b.err != nil {
				break
			}
			continue
		}
		n, err := b.w.Read(p[:min(int64(len(p)), b.end-b.next)])
		b.next += int64(n)
		if n > 0 {
			b.p.progress()
			if err != nil && b.next < b.end {
				b.broke(err)
			}
			if b.next == b.end {
				b.finish(nil)
			}
			return n, nil
		}
		if err != nil {
			b.broke(err)
		}
	}
	return 0, b.err
}

// Close ends the request under way. It may be called while another goroutine reads, which then gets an error.
func (b *body) Close() error {
	b.cancel(errClosed)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.a != nil {
		b.finish(errClosed)
	}
	if b.err == nil {
		b.err = errClosed
	}
	return nil
}

var errClosed = errors.New("closed by the reader")

// finish gives up the response; without an error its connection is used again if it has ended.
func (b *body) finish(err error) {
	if b.a == nil {
		return
	}
	if err == nil && (b.a.ContentLength < 0 || b.w.left > 4<<10) {
		err = errClosed // an unknown or long rest is not read: the connection is cheaper than that
	}
	b.a.rec.Bytes = b.w.n
	rec := err
	if rec == errClosed {
		rec = nil
	}
	if err != nil {
		b.a.Body.Close()
		b.a.rec.Err = rec
		b.a.done()
	} else {
		b.a.drop(nil)
	}
	b.a, b.w = nil, nil
}

// broke notes that a response ended before its time.
func (b *body) broke(err error) {
	if b.ctx.Err() != nil {
		b.err = context.Cause(b.ctx)
		b.finish(b.err)
		return
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	b.r.c.n.resumed.Add(1)
	e, t0, signed := b.a.e, b.a.t0, b.a.signed
	b.finish(bare(err))
	e.dropSigned(b.d, signed)
	e.failed(t0)
	b.p.tries++
}

// open asks for what is left.
func (b *body) open() error {
	if b.p.tries > 1 { // a first break is resumed at once
		if time.Since(b.p.since) > b.p.max {
			return &Error{Op: "blob " + string(b.d), Image: b.r.ref.String(), Host: b.r.up.registry, Message: fmt.Sprintf("connections break without a byte (tried %d times)", b.p.tries), Err: ErrUnreachable}
		}
		if err := sleep(b.ctx, jitter(b.p.tries-2)); err != nil {
			return err
		}
	}
	c := &call{
		kind: KindBlob, op: "blob " + string(b.d), path: "blobs/" + string(b.d), need: needPull, digest: b.d,
		tried: b.p.tries,
	}
	if b.next > 0 || b.end >= 0 {
		c.rng = ztoc.Range{Start: b.next, End: b.end}
		last := ""
		if b.end >= 0 {
			last = fmt.Sprint(b.end - 1)
		}
		c.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-%s", b.next, last)}}
		c.status = []int{http.StatusPartialContent}
	}
	for {
		a, err := b.r.doExcept(b.ctx, c, b.p, b.no)
		if err != nil {
			return err
		}
		skip, err := b.accept(c, a)
		if err == nil {
			b.r.up.answered(b.d, a.e)
			b.a, b.w = a, &watched{a: a, left: a.ContentLength, min: b.r.c.o.MinRate, window: b.r.c.o.RateWindow}
			if err := b.skip(skip); err != nil {
				b.broke(err)
				if b.err != nil {
					return b.err
				}
				return b.open()
			}
			return nil
		}
		sentinel := ErrProtocol
		if errors.Is(err, ErrDigest) {
			sentinel = ErrDigest
		}
		b.no[a.e] = a.refuse(b.r, c, elsewhere, sentinel, strings.TrimPrefix(err.Error(), ErrDigest.Error()+": "), "tell the administrator of "+a.rec.Host)
		a.e.failed(a.t0)
	}
}

// accept checks that a holds what was asked for, and says how many bytes come before it.
func (b *body) accept(c *call, a *answer) (skip int64, err error) {
	if enc := a.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return 0, fmt.Errorf("it re-encodes blobs as %.20q", enc)
	}
	if strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") {
		return 0, errors.New("a web page instead of a blob; is there a login page between us?")
	}
	size := int64(-1)
	if a.StatusCode == http.StatusOK {
		size = a.ContentLength
		if b.next > 0 {
			a.e.noRange.Store(true)
			skip = b.next
		}
	} else {
		cr, ok := parseContentRange(a.Header.Get("Content-Range"))
		switch {
		case !ok:
			return 0, fmt.Errorf("an unreadable Content-Range: %s", clean(a.Header.Get("Content-Range")))
		case cr.start != b.next:
			return 0, fmt.Errorf("bytes from %d were asked for, bytes from %d came", b.next, cr.start)
		case b.end >= 0 && cr.end > b.end:
			return 0, fmt.Errorf("bytes up to %d were asked for, bytes up to %d came", b.end, cr.end)
		case a.ContentLength >= 0 && a.ContentLength != cr.end-cr.start:
			return 0, fmt.Errorf("%d bytes in a Content-Range of %d", a.ContentLength, cr.end-cr.start)
		}
		size = cr.size
	}
	if size >= 0 && b.size >= 0 && size != b.size {
		return 0, fmt.Errorf("%w: the blob had %d bytes before, now %d", ErrDigest, b.size, size)
	}
	if size >= 0 && b.end > size {
		return 0, fmt.Errorf("%w: the blob has %d bytes there, byte %d was asked for", ErrDigest, size, b.end-1)
	}
	if b.end < 0 && size < 0 {
		return 0, errors.New("it does not tell the blob's size")
	}
	if b.end < 0 {
		b.end = size
	}
	if size >= 0 {
		b.size = size
	}
	return skip, nil
}

// skip reads and drops what a server sends that ignores Range.
func (b *body) skip(n int64) error {
	buf := make([]byte, min(n, 64<<10))
	for n > 0 {
		k, err := b.w.Read(buf[:min(n, int64(len(buf)))])
		n -= int64(k)
		b.r.c.n.skipped.Add(int64(k))
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}

// watched reads a response's body and gives up on one that stalls or trickles while somebody waits.
// Time in which nobody reads does not count: a slow reader is not a slow server.
type watched struct {
	a      *answer
	n      int64 // read
	left   int64 // by Content-Length; negative: not told
	min    int64 // bytes per second; 0: any rate will do
	window time.Duration
	timer  *time.Timer // runs only while a Read waits

	busy  time.Duration // spent waiting in this window
	got   int64         // bytes in this window
	moved int64         // the whole host's count at the window's start
	began time.Time     // of the window
}

var (
	errStalled  = errors.New("the server stopped sending")
	errTrickles = errors.New("the server sends too slowly")
)

func (w *watched) Read(p []byte) (int, error) {
	e := w.a.e
	t0 := time.Now()
	stop := w.a.stop
	if w.timer == nil {
		w.timer = time.AfterFunc(e.idle, func() { stop(errStalled) })
	} else {
		w.timer.Reset(e.idle)
	}
	e.active.Add(1)
	n, err := w.a.Body.Read(p)
	active := e.active.Add(-1) + 1
	stalled := !w.timer.Stop()
	w.n += int64(n)
	w.left -= int64(n)
	e.moved.Add(int64(n))
	if err != nil && err != io.EOF {
		if stalled {
			err = errStalled
		}
		return n, err
	}
	if w.min == 0 || err != nil {
		return n, err
	}
	if w.began.IsZero() {
		w.began, w.moved = t0, e.moved.Load()-int64(n)
	}
	w.busy += time.Since(t0)
	w.got += int64(n)
	if w.busy >= w.window {
		if w.trickles(active) {
			return n, errTrickles
		}
		w.busy, w.got, w.began = 0, 0, time.Time{}
	}
	return n, err
}

// trickles judges a window. A connection is slow if it is below the floor and either alone in that (the
// others of this host get four times as much), or the whole host is below it. In the latter case
// reconnecting may not help, so the floor sinks: a registry that is slow as a whole is put up with.
func (w *watched) trickles(active int64) bool {
	e := w.a.e
	floor := float64(e.floor.Load())
	rate := float64(w.got) / w.busy.Seconds()
	if rate >= floor {
		if rate >= float64(w.min) {
			e.floor.Store(w.min)
		}
		return false
	}
	whole := float64(e.moved.Load()-w.moved) / time.Since(w.began).Seconds()
	if active > 1 && whole >= floor && rate > whole/float64(active)/4 {
		return false
	}
	if !e.mirror {
		e.floor.Store(int64(floor / 4))
	}
	return true
}
