package inflate

import "sync"

const (
	chunkSize = 2 << 20   // compressed bytes of a chunk, but in some tests: markers take up less of a large one
	pieceSize = 1 << 20   // inflated bytes of a piece, about
	maxPieces = 16        // a chunk that inflates to more is left to one core
	wideSize  = 2 << 20   // inflated bytes of a chunk until its window must be known
	stepSize  = 128 << 10 // inflated bytes until a worker looks about
)

// A piece is inflated data with the window before it: buf[windowSize:][:n].
type piece struct {
	buf [windowSize + pieceSize + maxMatch + slack]byte
	n   int
	crc uint32
}

var pieces = sync.Pool{New: func() any { return new(piece) }}

// newPiece is an empty piece; free gives it back.
func (w *crew) newPiece() *piece {
	w.pieces.Add(1)
	p := pieces.Get().(*piece)
	p.n, p.crc = 0, 0
	return p
}

func (w *crew) free(p *piece) {
	w.pieces.Add(-1)
	pieces.Put(p)
}

// A window is the up to 32 KiB before a place: the last n bytes of b.
type window struct {
	b [windowSize]byte
	n int
}

// A mark is a place where inflating can be taken up again.
type mark struct {
	bit  int64 // offset in the file of the next bit
	out  int64 // inflated offset in the chunk
	ends int   // members of the chunk that end before
}

// A memberEnd is where a member ends.
type memberEnd struct {
	out       int64  // inflated offset in the chunk
	crc, size uint32 // as its trailer has them
}

// A chunk is a part of the file that one worker inflates: from the end of the chunk before to the first
// end of a block behind its own end.
type chunk struct {
	index int
	begin int64 // offset in the file of its first byte
	end   int64 // offset in the file of the next chunk; far for the last
	next  *chunk

	// Guarded by crew.mu.
	from  int64 // bit where the chunk before ends as far as is known, -1 if it is not
	guess int64 // bit where a block was found and decoding began, -1 if none

	window window        // at from; set before known is closed
	known  chan struct{} // closed when from and window are final

	// The outcome, set before done is closed.
	done   chan struct{}
	ok     bool // all that follows is right; else it is for one core to find what is wrong
	pieces []*piece
	marks  []mark
	ends   []memberEnd
	finish int64 // bit at which the chunk ends
	ended  bool  // behind a trailer that no member's header follows
}

func newChunk(index int, begin, size int64) *chunk {
	return &chunk{
		index: index, begin: begin, end: begin + size, from: -1, guess: -1,
		known: make(chan struct{}), done: make(chan struct{}),
	}
}

// freeAll gives c's pieces back.
func (w *crew) freeAll(c *chunk) {
	for _, p := range c.pieces {
		w.free(p)
	}
	c.pieces = nil
}

// isKnown reports whether from and window are final.
func (c *chunk) isKnown() bool {
	select {
	case <-c.known:
		return true
	default:
		return false
	}
}
