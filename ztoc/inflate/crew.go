package inflate

import (
	"io"
	"runtime"
	"sync"
	"sync/atomic"
)

// A crew is the workers that inflate chunks of one file, and what they share.
type crew struct {
	begin int64 // offset in the file of the first chunk
	size  int64 // of every chunk but the last
	ahead int   // a chunk's worker may read the input of so many chunks, counting its own
	most  int64 // pieces there may be
	tasks chan *chunk
	stop  chan struct{} // closed to stop
	slots chan struct{} // holds one for every worker that is not waiting
	wg    sync.WaitGroup

	pieces atomic.Int64 // in use

	mu   sync.Mutex // guards what follows and some of the chunks
	cond sync.Cond  // there is more input, or no more
	held int        // index of the first chunk whose input is in segs
	segs [][]byte   // input of chunks from held on, each size but the last
	have int64      // offset in the file of the end of the input so far
	eof  bool       // there will be no more
	lost int        // chunks in a row in which no block could be found
}

// newCrew makes a crew of n workers, which are yet to start, for a file from offset begin on, in chunks of
// size bytes.
func newCrew(begin, size int64, n int) *crew {
	w := &crew{
		begin: begin, size: size, have: begin, ahead: n + 2, tasks: make(chan *chunk, n+3), stop: make(chan struct{}),
		slots: make(chan struct{}, n), most: maxPieces * int64(n+3),
	}
	w.cond.L = &w.mu
	return w
}

// start starts the workers, one more than may be at work at a time: where one waits for the chunk before, another
// takes its place. end ends them.
func (w *crew) start() {
	for range cap(w.slots) + 1 {
		w.wg.Go(w.work)
	}
}

// work is what each worker does.
func (w *crew) work() {
	one := &worker{crew: w}
	defer func() {
		if one.wide != nil {
			wides.Put(&one.wide)
		}
	}()
	for {
		select {
		case c := <-w.tasks:
			w.slots <- struct{}{}
			one.inflate(c)
			<-w.slots
			runtime.Gosched() // the Reader is to go on first
		case <-w.stop:
			return
		}
	}
}

// end stops the workers and waits for them.
func (w *crew) end() {
	close(w.stop)
	w.mu.Lock()
	w.cond.Broadcast()
	w.mu.Unlock()
	w.wg.Wait()
}

func (w *crew) stopping() bool {
	select {
	case <-w.stop:
		return true
	default:
		return false
	}
}

// add puts n bytes of input, written to room's result, at the workers' disposal, eof if they are the last.
func (w *crew) add(n int, eof bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := len(w.segs) - 1
	w.segs[last] = w.segs[last][:len(w.segs[last])+n]
	w.have += int64(n)
	w.eof = eof
	w.cond.Broadcast()
}

// room is where the next input goes.
func (w *crew) room() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.segs)
	if n == 0 || len(w.segs[n-1]) == int(w.size) {
		w.segs = append(w.segs, segments.Get().(*[chunkSize]byte)[:0:w.size])
		n++
	}
	s := w.segs[n-1]
	return s[len(s):w.size]
}

var segments = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// drop lets go of the first chunk's input.
func (w *crew) drop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.size == chunkSize {
		segments.Put((*[chunkSize]byte)(w.segs[0][:chunkSize]))
	}
	w.segs = w.segs[1:]
	w.held++
}

// read copies input from off on to p, as input has it.
func (w *crew) read(c *chunk, off int64, p []byte) int { return copy(p, w.input(c, off)) }

// input is input from off on for chunk c, waiting for it: as much as there is in one piece. There is none
// when the file ends, off is too far ahead, or the crew is stopping. It stays as it is until the chunk it
// is in is dropped.
func (w *crew) input(c *chunk, off int64) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	for off >= w.have && !w.eof && !w.stopping() && off < w.begin+int64(c.index+w.ahead)*w.size {
		<-w.slots
		w.cond.Wait()
		w.mu.Unlock()
		w.slots <- struct{}{}
		w.mu.Lock()
	}
	if off >= w.have || w.stopping() {
		return nil
	}
	i, o := (off-w.begin)/w.size, (off-w.begin)%w.size
	return w.segs[int(i)-w.held][o:]
}

// fromOf is where the chunk before c ends as far as is known, -1 if it is not.
func (w *crew) fromOf(c *chunk) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return c.from
}

// await waits until c is known; false when the crew is stopping.
func (w *crew) await(c *chunk) bool {
	if c.isKnown() {
		return true
	}
	<-w.slots
	defer func() { w.slots <- struct{}{} }()
	select {
	case <-c.known:
		return true
	case <-w.stop:
		return false
	}
}

// tell notes that decoding c began at bit, where there is a block by all appearances.
func (w *crew) tell(c *chunk, bit int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.guess = bit
}

// search notes whether the start of a block was found in a chunk.
func (w *crew) search(found bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lost++
	if found {
		w.lost = 0
	}
}

// useless reports that looking for blocks is a waste of time.
func (w *crew) useless() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lost >= 3
}

// hand ends c at bit, the end of a block behind its end, unless the next chunk was begun further on.
func (w *crew) hand(c *chunk, bit int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.next.guess > bit {
		return false
	}
	c.next.from = bit
	return true
}

// settled makes known where c ends, its window being set.
func (w *crew) settled(c *chunk) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.next.from = c.finish
	close(c.next.known)
}

// rest reads the input from off on and then from r, or if err is set returns that.
func (w *crew) rest(off int64, r io.Reader, err error) io.Reader {
	if s, ok := r.(*source); ok && len(s.bufs) == 0 {
		r = s.r
	}
	s := &source{r: r, err: err}
	for i, seg := range w.segs {
		at := w.begin + int64(w.held+i)*w.size
		if n := max(0, off-at); n < int64(len(seg)) {
			s.bufs = append(s.bufs, seg[n:])
		}
	}
	return s
}

// A source is what was read ahead and the reader that it came from.
type source struct {
	bufs [][]byte
	r    io.Reader
	err  error // came with the last of bufs
}

func (s *source) Read(p []byte) (int, error) {
	if len(s.bufs) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		return s.r.Read(p)
	}
	n := copy(p, s.bufs[0])
	if s.bufs[0] = s.bufs[0][n:]; len(s.bufs[0]) == 0 {
		s.bufs = s.bufs[1:]
	}
	return n, nil
}
