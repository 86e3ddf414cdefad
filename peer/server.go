package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// ServerOptions bound what a server gives. Zero values give the defaults.
type ServerOptions struct {
	// Conns is the most connections at once; PerHost is the most of one host. Too few and the hosts of wide plans are told ErrBusy;
	// each costs about 40 KiB. An eighth of Conns is kept for questions and demand. Default 1,024 and 32.
	Conns, PerHost int
	// Buffers is how many frames may be on their way into sockets at once, of FrameSize bytes each; demand has a quarter
	// more of its own. Default 64: 8 MiB.
	Buffers int
	// Pieces is the most pieces that may be wanted of this server at once, over all children: a byte of memory for each
	// that waits, 17 for each that is ready to be sent. Default 4 million.
	Pieces int64
	// Accept is how long one frame may take to be taken by the other end. Default 10 s: a child that takes less than
	// 13 KB/s is cut off.
	Accept time.Duration
	// Questions is the most questions being answered at once; the next is told ErrBusy. Default 256.
	Questions int

	Log *slog.Logger // nil: none
}

func (o ServerOptions) withDefaults() ServerOptions {
	set := func(v *int, def int) {
		if *v <= 0 {
			*v = def
		}
	}
	set(&o.Conns, 1024)
	set(&o.PerHost, 32)
	set(&o.Buffers, 64)
	set(&o.Questions, 256)
	if o.Pieces <= 0 {
		o.Pieces = 4 << 20
	}
	if o.Accept <= 0 {
		o.Accept = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// A Server answers other hosts. Close must be called.
type Server struct {
	net    Network
	source Source
	o      ServerOptions
	ask    *answerer

	ctx    context.Context // of all connections
	cancel context.CancelFunc
	wg     sync.WaitGroup // accept loops and connections

	demand gate        // held by answers to demand
	bufs   [2]chan any // tokens to hold a buffer, by ztoc.Priority
	pool   sync.Pool   // of *[]byte, headerSize+FrameSize
	pieces atomic.Int64

	mu        sync.Mutex
	closed    bool
	listeners []net.Listener
	conns     map[net.Conn]struct{}
	byHost    map[string]int
	named     int // connections in byHost

	counts serverCounts
}

// ServerStats count what a server did since it began.
type ServerStats struct {
	Conns       int   // connections now
	Pieces      int64 // pieces wanted now
	Refused     int64 // connections and wants over a bound
	Strangers   int64 // connections that ended in the handshake
	Bytes       int64 // of blobs, sent to children
	DemandBytes int64 // of them, for readers
	Missing     int64 // pieces that were wanted and not brought
	Failed      int64 // connections that ended with wants unanswered, by this end's fault or the other's
	Answers     int64 // questions answered
}

type serverCounts struct {
	refused, strangers, bytes, demandBytes, missing, failed, answers atomic.Int64
}

// NewServer makes a server that answers ranges from source. Questions are added by Handle, before Listen.
func NewServer(n Network, source Source, o ServerOptions) *Server {
	o = o.withDefaults()
	s := &Server{net: n, source: source, o: o, conns: map[net.Conn]struct{}{}, byHost: map[string]int{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.bufs[ztoc.Demand] = make(chan any, max(1, o.Buffers/4))
	s.bufs[ztoc.Prefetch] = make(chan any, o.Buffers)
	s.pool.New = func() any { b := make([]byte, headerSize+FrameSize); return &b }
	s.ask = newAnswerer(o.Questions, &s.counts)
	return s
}

// Listen begins to answer at addr ("10.0.0.7:7464"; port 0: any) and says where that is. It may be called for
// several addresses.
func (s *Server) Listen(addr string) (string, error) {
	l, err := s.net.listen(addr)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		l.Close()
		return "", ErrClosed
	}
	s.listeners = append(s.listeners, l)
	s.wg.Go(func() { s.accept(l) })
	return l.Addr().String(), nil
}

// Close ends all connections and waits for everything that was started.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.cancel()
	for _, l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.ask.close()
	s.wg.Wait()
	return nil
}

// Stats are the counts so far.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	conns := len(s.conns)
	s.mu.Unlock()
	c := &s.counts
	return ServerStats{
		Conns: conns, Pieces: s.pieces.Load(), Refused: c.refused.Load(), Strangers: c.strangers.Load(),
		Bytes: c.bytes.Load(), DemandBytes: c.demandBytes.Load(), Missing: c.missing.Load(), Failed: c.failed.Load(),
		Answers: c.answers.Load(),
	}
}

func (s *Server) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors, most likely: they come back when connections end.
			s.o.Log.Warn("accept", "err", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-s.ctx.Done():
				return
			}
			continue
		}
		if !s.take(conn) {
			conn.Close()
			continue
		}
		s.wg.Go(func() {
			defer s.leave(conn)
			s.serve(conn)
		})
	}
}

// take counts a connection that nobody has looked at yet. Twice Conns of them may be there, so that strangers who never
// finish a handshake, which is bounded in time, do not take the places of hosts.
func (s *Server) take(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= 2*s.o.Conns {
		s.counts.refused.Add(1)
		return false
	}
	s.conns[conn] = struct{}{}
	return true
}

func (s *Server) leave(conn net.Conn) {
	conn.Close()
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
}

// admit counts a connection of a known host; room is kept for questions and demand.
func (s *Server) admit(host string, prefetch bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := s.o.Conns
	if prefetch {
		limit -= limit / 8
	}
	if s.named >= limit || s.byHost[host] >= s.o.PerHost {
		s.counts.refused.Add(1)
		return fmt.Errorf("%w: %d connections, %d of %s", ErrBusy, s.named, s.byHost[host], host)
	}
	s.named++
	s.byHost[host]++
	return nil
}

func (s *Server) dismiss(host string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.named--
	if s.byHost[host]--; s.byHost[host] == 0 {
		delete(s.byHost, host)
	}
}

// serve is the life of one connection.
func (s *Server) serve(conn net.Conn) {
	ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
	ses, err := s.net.greet(ctx, conn)
	cancel()
	if err != nil {
		s.counts.strangers.Add(1)
		s.o.Log.Info("no handshake", "from", conn.RemoteAddr(), "err", err)
		return
	}
	if !ses.until.IsZero() {
		end := time.AfterFunc(time.Until(ses.until), func() { conn.Close() })
		defer end.Stop()
	}
	switch ses.proto {
	case protoAsk:
		if err := s.admit(ses.peer, false); err != nil {
			return // gRPC has no word for it before its preface; the asker sees a closed connection
		}
		defer s.dismiss(ses.peer)
		s.ask.serve(s.ctx, ses)
	case protoRanges:
		s.ranges(ses)
	}
}

// ranges answers one connection of a child.
func (s *Server) ranges(ses *session) {
	// The priority in the first hello decides which places the connection may take.
	ses.SetReadDeadline(time.Now().Add(5 * time.Second))
	hello, err := readHello(ses)
	if err != nil {
		return
	}
	ses.SetReadDeadline(time.Time{})
	if err := s.admit(ses.peer, hello.Priority == ztoc.Prefetch); err != nil {
		// The child may be sending a want: closing with that unread would take the refusal from it.
		ses.SetDeadline(time.Now().Add(time.Second))
		var wg sync.WaitGroup
		wg.Go(func() { io.Copy(io.Discard, io.LimitReader(ses, 2*maxMessage)) })
		ses.Write(frame(header{kind: kindRefused, offset: refusal(err)}, nil))
		wg.Wait()
		return
	}
	defer s.dismiss(ses.peer)
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	p := &parent{s: s, conn: ses, wake: make(chan struct{}, 1), wants: map[uint32]*want{}, asker: Asker{Name: ses.peer, Hello: hello}, priority: hello.Priority}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel() // the child has gone, or talks nonsense
		p.listen(ctx)
	})
	p.send(ctx)
	ses.Close() // ends listen
	wg.Wait()
}

func readHello(r io.Reader) (Hello, error) {
	var b [headerSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Hello{}, err
	}
	h, err := parseHeader(b[:])
	if err != nil || h.kind != kindHello || h.length > maxHello {
		return Hello{}, fmt.Errorf("%w: no hello", ErrProtocol)
	}
	body, err := readPayload(r, h.length)
	if err != nil {
		return Hello{}, err
	}
	return parseHello(body)
}

const maxHello = 1 + MaxPlanID + 7 + MaxGrant
