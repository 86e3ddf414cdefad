package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A parent is this host's end of one connection of a child. listen reads what the child wants, send is the only one
// that writes, and the only one that uses blobs.
type parent struct {
	s    *Server
	conn *session
	wake chan struct{} // 1 deep: there is something for send to do

	priority ztoc.Priority // of all wants of the connection
	asker    Asker         // of the wants to come; used by listen only

	mu      sync.Mutex
	wants   map[uint32]*want // open ones
	fresh   []*want          // wants that send has not seen
	control []byte           // frames to be sent before any data; refused ones
	look    []item           // pieces whose state has to be found out
	ready   []item           // pieces to send, first come first
	gone    bool             // send has ended: it takes no more wants
}

type want struct {
	id     uint32
	asker  Asker
	digest ztoc.Digest
	blob   Blob
	stop   func() // ends Watch; set by send
	cut    cut

	// Guarded by parent.mu.
	state []state // of each piece
	left  int     // pieces that are not done
}

type item struct {
	w *want
	i uint32
}

type state uint8

const (
	stateLook  state = iota // in parent.look
	stateWait               // promised; Watch will tell
	stateReady              // in parent.ready
	stateDone               // sent, told as missing, or dropped
)

func (p *parent) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// listen reads the child's frames until the connection ends.
func (p *parent) listen(ctx context.Context) {
	var b [headerSize]byte
	for {
		if _, err := io.ReadFull(p.conn, b[:]); err != nil {
			return
		}
		h, err := parseHeader(b[:])
		if err == nil {
			err = p.hear(ctx, h)
		}
		if err != nil {
			if ctx.Err() == nil {
				p.s.o.Log.Warn("ranges", "from", p.conn.peer, "err", err)
			}
			return
		}
	}
}

func (p *parent) hear(ctx context.Context, h header) error {
	body, err := readPayload(p.conn, h.length)
	if err != nil {
		return err
	}
	switch h.kind {
	case kindHello:
		hello, err := parseHello(body)
		if err != nil {
			return err
		}
		if hello.Priority != p.priority {
			return fmt.Errorf("%w: a connection keeps its priority", ErrProtocol)
		}
		p.asker.Hello = hello
		return nil
	case kindWant:
		digest, rest, err := parseDigest(body)
		if err != nil {
			return err
		}
		ranges, err := parseRanges(rest)
		if err != nil {
			return err
		}
		c, err := newCut(ranges)
		if err != nil {
			return err
		}
		return p.want(ctx, &want{id: h.want, asker: p.asker, digest: digest, cut: c})
	case kindDrop:
		ranges, err := parseRanges(body)
		if err != nil {
			return err
		}
		p.drop(h.want, ranges)
		return nil
	}
	return fmt.Errorf("%w: a child sent frame kind %d", ErrProtocol, h.kind)
}

// want opens the blob of a new want and hands it to send.
func (p *parent) want(ctx context.Context, w *want) error {
	p.mu.Lock()
	twice := p.wants[w.id] != nil
	p.mu.Unlock()
	if twice {
		return fmt.Errorf("%w: want %d twice", ErrProtocol, w.id)
	}
	n := int64(w.cut.len())
	if p.s.pieces.Add(n) > p.s.o.Pieces {
		p.s.pieces.Add(-n)
		p.s.counts.refused.Add(1)
		p.refuse(w.id, ErrBusy)
		return nil
	}
	blob, err := p.open(ctx, w)
	if err != nil {
		p.s.pieces.Add(-n)
		p.s.counts.missing.Add(n)
		p.refuse(w.id, err)
		return nil
	}
	w.blob = blob
	w.state = make([]state, n)
	w.left = int(n)
	p.mu.Lock()
	gone := p.gone
	if !gone {
		p.wants[w.id] = w
		p.fresh = append(p.fresh, w)
	}
	p.mu.Unlock()
	if gone {
		p.s.pieces.Add(-n)
		blob.Close()
		return ErrClosed
	}
	p.poke()
	return nil
}

// open asks the Source. A Source that does not answer a reader in time is answered for.
func (p *parent) open(ctx context.Context, w *want) (Blob, error) {
	limit := opening
	if p.priority == ztoc.Demand {
		limit = decide
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	type answer struct {
		blob Blob
		err  error
	}
	c := make(chan answer, 1)
	p.s.wg.Go(func() {
		defer cancel()
		blob, err := p.s.source.Open(ctx, w.asker, w.digest)
		if err == nil && ctx.Err() != nil {
			// Whether the answer was still waited for or not, it came too late.
			blob.Close()
			err = ctx.Err()
		}
		c <- answer{blob, err}
	})
	select {
	case a := <-c:
		return a.blob, a.err
	case <-ctx.Done():
		select {
		case a := <-c: // both at once
			return a.blob, a.err
		default:
		}
		p.s.wg.Go(func() {
			if a := <-c; a.err == nil {
				a.blob.Close()
			}
		})
		return nil, context.Cause(ctx)
	}
}

func (p *parent) refuse(id uint32, err error) {
	p.mu.Lock()
	p.control = append(p.control, frame(header{kind: kindRefused, want: id, offset: refusal(err)}, nil)...)
	p.mu.Unlock()
	p.poke()
}

// drop marks the pieces that lie wholly in ranges as done.
func (p *parent) drop(id uint32, ranges []ztoc.Range) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.wants[id]
	if w == nil {
		return // it ended while the frame was on its way
	}
	for _, r := range ranges {
		w.cut.touching(r, func(i int) {
			if w.state[i] != stateDone && holds(ranges, w.cut.item(i)) {
				w.state[i] = stateDone
				w.left--
			}
		})
	}
	p.poke()
}

// arrived is what Watch calls: pieces of w that r touches may have become ready, or may not come.
func (p *parent) arrived(w *want, r ztoc.Range) {
	p.mu.Lock()
	woken := false
	w.cut.touching(r, func(i int) {
		if w.state[i] == stateWait {
			w.state[i] = stateLook
			p.look = append(p.look, item{w, uint32(i)})
			woken = true
		}
	})
	p.mu.Unlock()
	if woken {
		p.poke()
	}
}

// send writes until the connection ends.
func (p *parent) send(ctx context.Context) {
	defer p.quit()
	demand := p.priority == ztoc.Demand
	beat := time.NewTicker(Beat)
	defer beat.Stop()
	silent := true // nothing written since the last tick
	for ctx.Err() == nil {
		p.meet()
		it, out := p.next()
		if len(out) > 0 {
			silent = false
			if p.write(out) != nil {
				return
			}
		}
		if it.w != nil {
			silent = false
			if demand {
				p.s.demand.enter()
			}
			err := p.piece(ctx, it)
			if demand {
				p.s.demand.leave()
			}
			if err != nil {
				return
			}
			continue
		}
		if len(out) > 0 {
			continue
		}
		select {
		case <-p.wake:
		case <-beat.C:
			if silent && !demand && p.write(frame(header{kind: kindBeat}, nil)) != nil {
				return
			}
			silent = true
		case <-ctx.Done():
		}
	}
}

// quit closes what is open after the last use.
func (p *parent) quit() {
	p.mu.Lock()
	p.gone = true
	open := p.wants
	p.wants = nil
	p.mu.Unlock()
	if len(open) > 0 {
		p.s.counts.failed.Add(1)
	}
	for _, w := range open {
		p.end(w)
	}
}

func (p *parent) end(w *want) {
	if w.stop != nil {
		w.stop()
	}
	w.blob.Close()
	p.s.pieces.Add(-int64(w.cut.len()))
}

// meet begins to watch the blobs of new wants and finds the state of all pieces that have none.
func (p *parent) meet() {
	p.mu.Lock()
	fresh := p.fresh
	p.fresh = nil
	p.mu.Unlock()
	for _, w := range fresh {
		if p.priority == ztoc.Prefetch {
			w.stop = w.blob.Watch(func(r ztoc.Range) { p.arrived(w, r) })
		}
		missing := p.check(w, nil, 0, w.cut.len())
		p.tell(w, missing)
	}
	p.mu.Lock()
	look := p.look
	p.look = nil
	p.mu.Unlock()
	for i := 0; i < len(look); {
		// One frame tells all that one want misses.
		w, missing := look[i].w, []ztoc.Range(nil)
		for ; i < len(look) && look[i].w == w; i++ {
			missing = p.check(w, missing, int(look[i].i), int(look[i].i)+1)
		}
		p.tell(w, missing)
	}
}

// check finds the state of the pieces [from, to) of w, and adds those that will not come to missing.
func (p *parent) check(w *want, missing []ztoc.Range, from, to int) []ztoc.Range {
	for i := from; i < to; i++ {
		// First the piece is made one that waits, then Have is asked: if it arrives between Have and the lines
		// after it, arrived finds it waiting and has it looked at again. The other way round it would wait for ever.
		p.mu.Lock()
		look := w.state[i] == stateLook
		if look {
			w.state[i] = stateWait
		}
		p.mu.Unlock()
		if !look {
			continue // dropped
		}
		r := w.cut.item(i)
		have := w.blob.Have(r)
		wait := !have && p.priority == ztoc.Prefetch && w.blob.Promised(r)
		if wait {
			continue
		}
		p.mu.Lock()
		switch {
		case w.state[i] != stateWait: // arrived or dropped meanwhile
		case have:
			w.state[i] = stateReady
			p.ready = append(p.ready, item{w, uint32(i)})
		default:
			w.state[i] = stateDone
			w.left--
			missing = append(missing, r)
		}
		p.mu.Unlock()
	}
	return missing
}

// tell queues what the child is told about w: what it will not get.
func (p *parent) tell(w *want, missing []ztoc.Range) {
	if len(missing) == 0 {
		return
	}
	p.s.counts.missing.Add(int64(len(missing)))
	merged, _ := normal(missing) // parts of wanted ranges, so within bounds
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(merged) > 0 {
		n := min(len(merged), MaxRanges)
		p.control = append(p.control, frame(header{kind: kindMissing, want: w.id}, appendRanges(nil, merged[:n]))...)
		merged = merged[n:]
	}
}

// next is what to write now: control frames, with the ends of wants that are answered, and a piece.
func (p *parent) next() (it item, out []byte) {
	p.mu.Lock()
	var ended []*want
	for len(p.ready) > 0 {
		it = p.ready[0]
		p.ready = p.ready[1:]
		if it.w.state[it.i] == stateReady {
			break
		}
		it = item{} // dropped
	}
	out = p.control
	p.control = nil
	for id, w := range p.wants {
		if w.left == 0 {
			out = append(out, frame(header{kind: kindEnd, want: id}, nil)...)
			delete(p.wants, id)
			ended = append(ended, w)
		}
	}
	p.mu.Unlock()
	for _, w := range ended {
		p.end(w)
	}
	return it, out
}

// piece sends one piece that was ready.
func (p *parent) piece(ctx context.Context, it item) error {
	r := it.w.cut.item(int(it.i))
	priority := p.priority
	var sent, missing ztoc.Range
	for at := r.Start; at < r.End && missing.Empty(); {
		if priority == ztoc.Prefetch {
			p.s.demand.wait(ctx)
		}
		select {
		case p.s.bufs[priority] <- nil:
		case <-ctx.Done():
			return ctx.Err()
		}
		buf := p.s.pool.Get().(*[]byte)
		n := min(r.End-at, FrameSize)
		h := header{kind: kindData, want: it.w.id, offset: uint64(at), length: uint32(n)}
		if at+n < r.End {
			h.flags = flagMore
		}
		err := it.w.blob.ReadAt((*buf)[headerSize:headerSize+n], at)
		if err != nil {
			// Evicted since it was looked at. What was sent is right all the same.
			missing = ztoc.Range{Start: at, End: r.End}
			err = nil
		} else {
			h.put(*buf)
			if err = p.write((*buf)[:headerSize+n]); err == nil {
				at += n
				sent = ztoc.Range{Start: r.Start, End: at}
			}
		}
		p.s.pool.Put(buf)
		<-p.s.bufs[priority]
		if err != nil {
			return err
		}
	}
	p.s.counts.bytes.Add(max(0, sent.Len()))
	if priority == ztoc.Demand {
		p.s.counts.demandBytes.Add(max(0, sent.Len()))
	}
	if !missing.Empty() {
		p.tell(it.w, []ztoc.Range{missing})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if it.w.state[it.i] != stateDone { // dropped while it was sent
		it.w.state[it.i] = stateDone
		it.w.left--
	}
	return nil
}

func (p *parent) write(b []byte) error {
	p.conn.SetWriteDeadline(time.Now().Add(p.s.o.Accept))
	err := p.conn.writeFrame(b)
	if err != nil && !errors.Is(err, ErrClosed) {
		p.s.o.Log.Info("ranges", "to", p.conn.peer, "err", err)
	}
	return err
}
