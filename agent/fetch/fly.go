package fetch

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// fly runs a flight.
func (c *Chain) fly(f *flight) {
	defer c.wg.Done()
	began := time.Now()
	first := f.start
	ask := ztoc.Range{Start: first, End: first}
	err := func() error {
		c.mu.Lock()
		ask = f.toCome()
		c.mu.Unlock()
		if ask.Empty() {
			return nil
		}
		c.event(Event{Kind: Started, Blob: f.b.ref, Range: ask, Class: f.class.String(), At: began})
		body, err := c.o.Origin.Blob(f.ctx, f.b.ref.Digest, ask)
		if err != nil {
			return err
		}
		stop := context.AfterFunc(f.ctx, func() { body.Close() }) // also frees a Read that does not heed the context
		defer func() {
			stop()
			body.Close()
		}()
		return c.receive(f, body)
	}()
	c.storeChunk(f)
	c.mu.Lock()
	f.cancel()
	f.release(f.claimed)
	c.running[f.class]--
	got := ztoc.Range{Start: first, End: f.pos}
	left := f.toCome()
	dead := f.dead
	f.remove()
	f.buf = nil
	if f.unstored {
		f.b.notKept(got)
	}
	if err != nil && !dead {
		f.b.wake(left, err)
	}
	c.pump()
	c.mu.Unlock()
	if dead {
		err = errors.Join(err, context.Canceled)
	}
	if !ask.Empty() {
		c.event(Event{Kind: Ended, Blob: f.b.ref, Range: got, Class: f.class.String(), At: time.Now(), Took: time.Since(began), Err: err})
	}
}

// receive reads the body until the flight's end, which may come nearer meanwhile.
func (c *Chain) receive(f *flight, body io.Reader) error {
	for {
		room, err := c.room(f)
		if err != nil || room == nil {
			return err
		}
		n, err := body.Read(room)
		if n > 0 && c.arrived(f, n) {
			c.storeChunk(f)
		}
		if err != nil {
			c.mu.Lock()
			left := f.toCome()
			c.mu.Unlock()
			if left.Empty() {
				return nil
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
}

// room is where the next bytes go; nil at the flight's end. It waits while a stream is too far ahead of its reader.
func (c *Chain) room(f *flight) ([]byte, error) {
	var stall *time.Timer
	for {
		c.mu.Lock()
		left := f.end - f.pos
		if left <= 0 {
			c.mu.Unlock()
			return nil, nil
		}
		awaited := f.b.awaited(f.toCome())
		if f.stream != nil && f.want.gone && !awaited {
			f.end = f.pos // the stream was closed; others only needed it to come this far
			c.mu.Unlock()
			return nil, nil
		}
		if f.stream == nil || awaited || f.pos < f.stream.pos+c.ahead(f) {
			if len(f.buf) == cap(f.buf) {
				f.grow()
			}
			room := f.buf[len(f.buf):cap(f.buf)]
			c.mu.Unlock()
			return room[:min(int64(len(room)), left)], nil
		}
		c.mu.Unlock()
		if stall == nil {
			stall = time.NewTimer(streamStall)
			defer stall.Stop()
		} else {
			stall.Reset(streamStall)
		}
		select {
		case <-f.moved:
		case <-f.ctx.Done():
			return nil, f.ctx.Err()
		case <-stall.C:
			c.mu.Lock()
			if !f.b.awaited(f.toCome()) {
				f.end = f.pos // the stream's next read that finds nothing makes another flight
			}
			c.mu.Unlock()
		}
	}
}

// ahead is how far a stream's flight may run ahead: less when only its own buffer holds the bytes.
func (c *Chain) ahead(f *flight) int64 {
	if f.unstored {
		return keepOther / 2
	}
	return c.o.Ahead
}

// grow makes room in a full buffer: the first one, or, when the store keeps nothing, a longer one up to
// a limit, from where the oldest chunk is forgotten.
func (f *flight) grow() {
	most := keepOther
	if f.class == demand {
		most = keepDemand
	}
	if cap(f.buf) < most {
		longer := make([]byte, len(f.buf), int64(cap(f.buf))+min(chunkSize, f.end-f.pos))
		copy(longer, f.buf)
		f.buf = longer
		return
	}
	n := copy(f.buf, f.buf[chunkSize:])
	f.buf = f.buf[:n]
	f.base += chunkSize
}

// arrived hands n new bytes to their waiters, and says whether a chunk is full.
func (c *Chain) arrived(f *flight, n int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := len(f.buf)
	f.buf = f.buf[:old+n]
	for w := range f.b.waiters {
		if !w.stored && w.take(f.pos, f.buf[old:]) {
			f.b.finish(w, nil)
		}
	}
	f.b.refetched(ztoc.Range{Start: f.pos, End: f.pos + int64(n)})
	f.pos += int64(n)
	c.stats.OriginBytes += int64(n)
	return !f.unstored && (len(f.buf) == cap(f.buf) || f.pos >= f.end)
}

// storeChunk stores what has arrived. Joiners read the buffer until it is in the store.
func (c *Chain) storeChunk(f *flight) {
	st := f.b.kept.get()
	c.mu.Lock()
	buf, base, skip := f.buf, f.base, f.unstored || len(f.buf) == 0
	c.mu.Unlock()
	if skip {
		return
	}
	kept := st != nil && st.WriteAt(buf, base) == nil
	c.event(Event{Kind: Arrived, Blob: f.b.ref, Range: ztoc.Range{Start: base, End: base + int64(len(buf))}, Class: f.class.String(), At: time.Now()})
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range f.rejected {
		if st != nil {
			st.Drop(r)
		}
	}
	if kept {
		for w := range f.b.waiters {
			if w.stored && w.take(base, buf) {
				f.b.finish(w, nil)
			}
		}
		f.base, f.buf = f.pos, f.buf[:0]
		f.release(ztoc.Range{Start: f.claimed.Start, End: f.base / blockSize * blockSize})
		return
	}
	f.unstored = true
	f.b.notKept(ztoc.Range{Start: base, End: base + int64(len(buf))})
	f.release(f.claimed) // nobody gains by waiting for it
	c.stats.UnstoredBytes += int64(len(buf))
	if f.class == prefetch && !f.dead && !f.b.awaited(f.toCome()) {
		f.remove() // fetched for nothing
		f.cancel()
	}
}

// notKept ends the wait of those who want r in the store.
func (b *blob) notKept(r ztoc.Range) {
	for w := range b.waiters {
		if w.stored && w.needs(r) {
			b.finish(w, ErrNotKept)
		}
	}
}
