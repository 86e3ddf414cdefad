package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// An EventKind is what Next has to say.
type EventKind uint8

// The kinds of Event.
const (
	// Bytes: Event.Data is what the blob has at Event.Range, if the parent is honest.
	Bytes EventKind = iota + 1
	// Missing: the parent will not bring Event.Ranges. Ask somebody else.
	Missing
	// Done: nothing more comes for this Want; all of it was Bytes or Missing, or was dropped.
	Done
	// Refused: nothing comes for this Want, because of Event.Err (ErrNotHere, ErrDenied, ErrBusy).
	Refused
	// Waiting: the parent lives and has nothing to send now.
	Waiting
)

// An Event is one thing that a parent said.
type Event struct {
	Kind   EventKind
	Want   uint32 // number of the Want it belongs to; 0 with Waiting
	Digest ztoc.Digest
	Range  ztoc.Range
	Data   []byte // valid until the next call of Next
	Ranges []ztoc.Range
	Err    error
}

// A Stream is a child's connection to one parent. One goroutine may call Next while another calls Want, Drop or Close.
type Stream struct {
	host   Host
	conn   *session
	c      *Client
	unbind func() bool // ends what ties the stream to the context of Open
	ctx    context.Context
	buf    []byte // of Next; FrameSize
	head   [headerSize]byte

	rate     meter // used by Next only
	prefetch bool

	writing sync.Mutex // held while a frame is written
	mu      sync.Mutex
	last    uint32
	wants   map[uint32]*asked
	closed  bool
	err     error // what ended Next; used by Next only
}

// asked is a Want at the child.
type asked struct {
	digest ztoc.Digest
	ranges []ztoc.Range
	left   int64 // bytes that may still come: more is a parent that sends things twice
}

// Host is the parent.
func (s *Stream) Host() Host { return s.host }

// Want asks for ranges of a blob, in any order. What comes of it bears the number that is returned. At most MaxRanges
// ranges after merging, and MaxPieces pieces.
func (s *Stream) Want(d ztoc.Digest, ranges []ztoc.Range) (uint32, error) {
	return s.want(nil, d, ranges)
}

// want writes a Want behind prefix.
func (s *Stream) want(prefix []byte, d ztoc.Digest, ranges []ztoc.Range) (uint32, error) {
	ranges, err := normal(ranges)
	if err != nil {
		return 0, err
	}
	if len(ranges) == 0 || len(ranges) > MaxRanges {
		return 0, fmt.Errorf("peer: a want of %d ranges", len(ranges))
	}
	if _, err := newCut(ranges); err != nil {
		return 0, err
	}
	body, err := appendDigest(nil, d)
	if err != nil {
		return 0, err
	}
	w := &asked{digest: d, ranges: ranges}
	for _, r := range ranges {
		w.left += r.Len()
	}
	s.mu.Lock()
	s.last++
	id := s.last
	s.wants[id] = w // before it is sent: the answer may be quicker than this goroutine
	s.mu.Unlock()
	return id, s.write(append(prefix, frame(header{kind: kindWant, want: id}, appendRanges(body, ranges))...))
}

// Drop takes back the pieces of a Want that lie wholly in ranges, because they came from elsewhere. Some may still arrive.
func (s *Stream) Drop(want uint32, ranges []ztoc.Range) error {
	ranges, err := normal(ranges)
	if err != nil || len(ranges) == 0 {
		return err
	}
	if len(ranges) > MaxRanges {
		return fmt.Errorf("peer: %d ranges dropped at once", len(ranges))
	}
	return s.write(frame(header{kind: kindDrop, want: want}, appendRanges(nil, ranges)))
}

func (s *Stream) write(b []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.conn.SetWriteDeadline(time.Now().Add(s.c.o.Stall))
	if _, err := s.conn.Write(b); err != nil {
		return s.failure(err)
	}
	return nil
}

// Close ends the stream. What was wanted and has not come will not come.
func (s *Stream) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.unbind()
	s.c.forget(s)
	return s.conn.Close()
}

// failure says what an error of the connection means.
func (s *Stream) failure(err error) error {
	s.mu.Lock()
	closed, open := s.closed, len(s.wants)
	s.mu.Unlock()
	switch {
	case s.ctx.Err() != nil:
		err = context.Cause(s.ctx)
	case closed:
		err = ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("%w: nothing for %v", ErrSlow, s.c.o.Stall)
	case errors.Is(err, ErrSlow), errors.Is(err, ErrProtocol), errors.Is(err, ErrBusy):
	default:
		err = fmt.Errorf("%w with %d wants open: %w", ErrTruncated, open, err)
	}
	return fmt.Errorf("%s: %w", s.host, err)
}

// Next waits for what the parent says next. Errors are final: ErrTruncated, ErrSlow, ErrProtocol, ErrBusy, ErrClosed, or that of Open's
// context.
func (s *Stream) Next() (Event, error) {
	if s.err != nil {
		return Event{}, s.err
	}
	e, err := s.next()
	if err != nil {
		s.err = s.failure(err)
		s.c.ended(s, s.err)
		return Event{}, s.err
	}
	return e, nil
}

func (s *Stream) next() (Event, error) {
	if s.prefetch {
		s.c.demand.wait(s.ctx)
	}
	h, err := s.header()
	if err != nil {
		return Event{}, err
	}
	var w *asked
	if h.want != 0 {
		s.mu.Lock()
		w = s.wants[h.want]
		if h.kind == kindEnd || h.kind == kindRefused {
			delete(s.wants, h.want)
		}
		s.mu.Unlock()
		if w == nil {
			return Event{}, fmt.Errorf("%w: frame for want %d, which is not open", ErrProtocol, h.want)
		}
	}
	switch h.kind {
	case kindData:
		r := ztoc.Range{Start: int64(h.offset), End: int64(h.offset) + int64(h.length)}
		if w.left -= r.Len(); w.left < 0 || !holds(w.ranges, r) {
			return Event{}, fmt.Errorf("%w: %v was not wanted, or came before", ErrProtocol, r)
		}
		data := s.buf[:h.length]
		if err := s.read(data, true); err != nil {
			return Event{}, err
		}
		s.rate.more = h.flags&flagMore != 0
		s.c.counts.bytes.Add(int64(h.length))
		return Event{Kind: Bytes, Want: h.want, Digest: w.digest, Range: r, Data: data}, nil
	case kindMissing:
		body, err := readPayload(readerFunc(func(p []byte) (int, error) { return len(p), s.read(p, true) }), h.length)
		if err != nil {
			return Event{}, err
		}
		ranges, err := parseRanges(body)
		if err != nil {
			return Event{}, err
		}
		s.rate.more = false
		return Event{Kind: Missing, Want: h.want, Digest: w.digest, Ranges: ranges}, nil
	case kindEnd:
		return Event{Kind: Done, Want: h.want, Digest: w.digest}, nil
	case kindRefused:
		if w == nil {
			return Event{}, fmt.Errorf("%w: the connection was refused", cause(h.offset))
		}
		return Event{Kind: Refused, Want: h.want, Digest: w.digest, Err: fmt.Errorf("%s: %w", s.host, cause(h.offset))}, nil
	case kindBeat:
		return Event{Kind: Waiting}, nil
	}
	return Event{}, fmt.Errorf("%w: a parent sent frame kind %d", ErrProtocol, h.kind)
}

func (s *Stream) header() (header, error) {
	if err := s.read(s.head[:], s.rate.more); err != nil {
		return header{}, err
	}
	return parseHeader(s.head[:])
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// read fills p. Bytes of a piece under way have to come at the minimum rate; anything has to come within Stall.
func (s *Stream) read(p []byte, underWay bool) error {
	o := s.c.o
	for n := 0; n < len(p); {
		start := time.Now()
		s.conn.SetReadDeadline(start.Add(o.Stall))
		k, err := s.conn.Read(p[n:])
		n += k
		if underWay && s.rate.slow(o, k, time.Since(start)) {
			return fmt.Errorf("%w: under %d bytes/s for %v", ErrSlow, o.MinRate, o.Window)
		}
		if err != nil && n < len(p) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// A meter finds parents that trickle: it looks at the time spent waiting for bytes of a piece that the parent has begun.
type meter struct {
	more  bool // the piece goes on with the next frame, so the time until then counts
	bytes int64
	time  time.Duration

	allBytes, allTime atomic.Int64 // since the stream began
}

// Pace is how many bytes came of pieces that the parent had begun to send, and how long this end waited for them in all. What a parent waits
// for itself is not in it: so it tells slow parents from those that have nothing yet. It may be called from any goroutine.
func (s *Stream) Pace() (bytes int64, waited time.Duration) {
	return s.rate.allBytes.Load(), time.Duration(s.rate.allTime.Load())
}

func (m *meter) slow(o ClientOptions, n int, took time.Duration) bool {
	m.bytes += int64(n)
	m.time += took
	m.allBytes.Add(int64(n))
	m.allTime.Add(int64(took))
	if m.time < o.Window {
		return false
	}
	slow := float64(m.bytes) < float64(o.MinRate)*m.time.Seconds()
	m.bytes, m.time = 0, 0
	return slow
}
