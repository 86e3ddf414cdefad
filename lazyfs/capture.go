package lazyfs

import (
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
)

// A capture makes the warm file while the program starts: what readers get is at hand just then, so it costs a copy and a
// hash instead of inflating it again. A nil capture does nothing.
type capture struct {
	keep   func(write func(io.Writer) error) error
	layers []Layer

	over atomic.Bool // takes nothing more

	mu     sync.Mutex
	seen   coverage   // what was taken, each byte once
	pieces chan piece // nil until the first; sent to and closed under mu
	ended  chan error // outcome of keep
	worth  bool       // what came may be kept; false once it was too much
}

type piece struct {
	layer int
	off   int64
	b     []byte
}

const (
	capturePending = 64       // pieces between readers and the file; when the file is slower, pieces are left out
	longRead       = 32 << 20 // bytes of one file read in order from which on the rest of it is not taken: inflating ahead of such a reader is enough
	bulk           = 96 << 20 // bytes that one reader reads in order: no program starts like that
)

// errNotKept ends the writing of a warm file that is not wanted.
var errNotKept = errors.New("nothing worth keeping was read")

// take notes what was just answered: the bytes of w.plan, from the units in w.pins.
func (c *capture) take(w *scratch) {
	if c == nil || c.over.Load() {
		return
	}
	at, done := 0, int64(0) // position in w.where
	w.eachPiece(func(b []byte, hole bool) {
		for len(b) > 0 && !hole {
			x := w.where[at]
			n := min(int64(len(b)), x.n-done)
			c.add(x.layer, x.off+done, b[:n])
			b, done = b[n:], done+n
			if done == x.n {
				at, done = at+1, 0
			}
		}
	})
}

func (c *capture) add(layer int, off int64, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over.Load() {
		return
	}
	if c.pieces == nil {
		c.pieces, c.ended, c.worth = make(chan piece, capturePending), make(chan error, 1), true
		go func() { c.ended <- c.keep(c.write) }() // finish waits for it
	}
	before, tail := len(c.seen.ranges), int64(0)
	if before > 0 {
		tail = c.seen.ranges[before-1].End
	}
	c.seen.add(layer, off, off+int64(len(b)))
	if c.seen.full {
		c.stop(false)
		return
	}
	// New are the ranges that were appended, and what the last of before grew by.
	for i := max(before-1, 0); i < len(c.seen.ranges); i++ {
		r := c.seen.ranges[i]
		if i == before-1 {
			r.Start = tail
		}
		for r.Start < r.End {
			n := min(r.End-r.Start, WarmPiece)
			p := piece{layer, r.Start, append([]byte(nil), b[r.Start-off:][:n]...)}
			select {
			case c.pieces <- p:
			default:
			}
			r.Start += n
		}
	}
}

// write writes the file from the pieces as they come.
func (c *capture) write(w io.Writer) error {
	out, err := newWarmWriter(w)
	for p := range c.pieces {
		if err == nil {
			err = out.add(p.layer, p.off, p.b)
		}
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	worth := c.worth
	c.mu.Unlock()
	if !worth {
		return errNotKept
	}
	return out.end(c.layers)
}

// stop takes no more; called with mu held.
func (c *capture) stop(worth bool) {
	if c.over.CompareAndSwap(false, true) && c.pieces != nil {
		c.worth = worth
		close(c.pieces)
	}
}

// abandon gives up: what is being read is not the start of a program.
func (c *capture) abandon() {
	if c == nil || c.over.Load() {
		return
	}
	c.mu.Lock()
	c.stop(false)
	c.mu.Unlock()
}

// finish ends the file and waits until it is kept.
func (c *capture) finish(log *slog.Logger) {
	if c == nil {
		return
	}
	c.mu.Lock()
	c.stop(true)
	ended := c.ended
	c.mu.Unlock()
	if ended == nil {
		return
	}
	if err := <-ended; err != nil && !errors.Is(err, errNotKept) {
		log.Warn("no warm file is kept", "error", err)
	}
}
