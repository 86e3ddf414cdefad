package peer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// ClientOptions bound what a client bears. Zero values give the defaults.
type ClientOptions struct {
	// Stall is the longest silence of a host that has something to answer. Parents say every half second that they live. Default 2 s.
	Stall time.Duration
	// MinRate, bytes/s over Window of waiting for a piece under way, is what makes a parent slow. Too low and a trickling
	// parent holds up a stage, too high and a busy link makes good parents look bad. Default 64 KiB/s over 2 s.
	MinRate int64
	Window  time.Duration
	// Demand is the most connections to one host for Read; more readers wait for one. Default 4. They are kept
	// for Keep after their last use, default 30 s, Idle of them over all hosts, default 64.
	Demand int
	Keep   time.Duration
	Idle   int
	// Hosts is the most hosts to which a connection for questions is kept. Default 256.
	Hosts int
}

func (o ClientOptions) withDefaults() ClientOptions {
	if o.Stall <= 0 {
		o.Stall = 2 * time.Second
	}
	if o.MinRate <= 0 {
		o.MinRate = 64 << 10
	}
	if o.Window <= 0 {
		o.Window = 2 * time.Second
	}
	if o.Demand <= 0 {
		o.Demand = 4
	}
	if o.Keep <= 0 {
		o.Keep = 30 * time.Second
	}
	if o.Idle <= 0 {
		o.Idle = 64
	}
	if o.Hosts <= 0 {
		o.Hosts = 256
	}
	return o
}

// A Client asks other hosts. Its methods may be called at the same time. Close must be called.
type Client struct {
	net    Network
	o      ClientOptions
	ask    *asker
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	closed  bool
	streams map[*Stream]struct{}
	readers map[Host]*readers
	idle    int // streams kept in readers

	demand gate // held by Read: this host's own prefetch streams leave the processor and the link to it

	counts clientCounts
}

// readers are the demand connections to one host. Guarded by Client.mu but for places.
type readers struct {
	places chan struct{} // as many as connections may be in use
	users  int           // who holds or waits for a place
	idle   []*Stream
	timers []*time.Timer // that will close idle[i]
}

// ClientStats count what a client saw since it began.
type ClientStats struct {
	Streams   int   // open now
	Bytes     int64 // of blobs, from parents
	Truncated int64 // streams that ended with wants open and not by this end
	Slow      int64 // streams given up because the parent was slow or silent
	Protocol  int64 // streams given up because of nonsense
}

type clientCounts struct{ bytes, truncated, slow, protocol atomic.Int64 }

// NewClient makes a client.
func NewClient(n Network, o ClientOptions) *Client {
	c := &Client{net: n, o: o.withDefaults(), streams: map[*Stream]struct{}{}, readers: map[Host]*readers{}}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.ask = newAsker(n, c.o.Hosts)
	return c
}

// Close ends all streams and questions.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.cancel()
	var open []*Stream
	for s := range c.streams {
		open = append(open, s)
	}
	for _, r := range c.readers {
		for _, t := range r.timers {
			t.Stop()
		}
		r.idle, r.timers = nil, nil
	}
	c.mu.Unlock()
	for _, s := range open {
		s.Close()
	}
	return c.ask.close()
}

// Stats are the counts so far.
func (c *Client) Stats() ClientStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ClientStats{
		Streams: len(c.streams), Bytes: c.counts.bytes.Load(), Truncated: c.counts.truncated.Load(),
		Slow: c.counts.slow.Load(), Protocol: c.counts.protocol.Load(),
	}
}

// Open connects to a parent. The stream ends with ctx at the latest; Close it.
func (c *Client) Open(ctx context.Context, to Host, h Hello) (*Stream, error) {
	hello, err := appendHello(nil, h)
	if err != nil {
		return nil, err
	}
	s, err := c.open(ctx, to)
	if err != nil {
		return nil, err
	}
	s.prefetch = h.Priority == ztoc.Prefetch
	if err := s.write(frame(header{kind: kindHello}, hello)); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (c *Client) open(ctx context.Context, to Host) (*Stream, error) {
	conn, err := c.net.dial(ctx, to, protoRanges)
	if err != nil {
		return nil, err
	}
	s := &Stream{host: to, conn: conn, c: c, ctx: ctx, buf: make([]byte, FrameSize), wants: map[uint32]*asked{}}
	c.mu.Lock()
	closed := c.closed
	if !closed {
		c.streams[s] = struct{}{}
	}
	c.mu.Unlock()
	if closed {
		conn.Close()
		return nil, ErrClosed
	}
	s.bind(ctx)
	return s, nil
}

// bind ties the stream to ctx: reads and writes fail when it ends.
func (s *Stream) bind(ctx context.Context) {
	s.ctx = ctx
	s.unbind = context.AfterFunc(ctx, func() { s.conn.Close() })
}

func (c *Client) forget(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, s)
}

func (c *Client) ended(_ *Stream, err error) {
	switch {
	case errors.Is(err, ErrTruncated):
		c.counts.truncated.Add(1)
	case errors.Is(err, ErrSlow):
		c.counts.slow.Add(1)
	case errors.Is(err, ErrProtocol):
		c.counts.protocol.Add(1)
	}
}

// Read fills p with what the host has of a blob at off, for a reader who waits. It takes all or nothing: ErrNotHere when any of it
// is absent there, said at once. h.Priority is Demand whatever it says.
func (c *Client) Read(ctx context.Context, to Host, h Hello, d ztoc.Digest, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	h.Priority = ztoc.Demand
	hello, err := appendHello(nil, h)
	if err != nil {
		return err
	}
	prefix := frame(header{kind: kindHello}, hello)
	c.demand.enter()
	defer c.demand.leave()
	for {
		s, used, err := c.reader(ctx, to)
		if err != nil {
			return err
		}
		if err = s.fill(prefix, d, p, off); err == nil || errors.Is(err, errAnswered) {
			c.keep(s)
		} else {
			c.discard(s)
		}
		// A kept connection may have ended since: that says nothing about the host.
		if used && errors.Is(err, ErrTruncated) && ctx.Err() == nil {
			continue
		}
		return err
	}
}

// errAnswered marks the errors after which a connection is as good as before.
var errAnswered = errors.New("answered")

// fill does one Read on the stream.
func (s *Stream) fill(prefix []byte, d ztoc.Digest, p []byte, off int64) error {
	all := ztoc.Range{Start: off, End: off + int64(len(p))}
	id, err := s.want(prefix, d, []ztoc.Range{all})
	if err != nil {
		return err
	}
	var got int64
	for {
		e, err := s.Next()
		if err != nil {
			return err
		}
		switch {
		case e.Kind == Waiting || e.Want != id:
		case e.Kind == Bytes:
			copy(p[e.Range.Start-off:], e.Data)
			got += e.Range.Len()
		case e.Kind == Refused:
			return fmt.Errorf("%w (%w)", e.Err, errAnswered)
		case e.Kind == Done && got < all.Len():
			return fmt.Errorf("%s: %v of %s: %w (%w)", s.host, all, d, ErrNotHere, errAnswered)
		case e.Kind == Done:
			return nil
		}
	}
}

// reader is a connection for Read: one that was kept (used), or a new one. It comes with a place.
func (c *Client) reader(ctx context.Context, to Host) (s *Stream, used bool, err error) {
	c.mu.Lock()
	r := c.readers[to]
	if r == nil {
		r = &readers{places: make(chan struct{}, c.o.Demand)}
		c.readers[to] = r
	}
	r.users++
	c.mu.Unlock()
	select {
	case r.places <- struct{}{}:
	case <-ctx.Done():
		c.drop(to, false)
		return nil, false, context.Cause(ctx)
	}
	c.mu.Lock()
	if n := len(r.idle); n > 0 {
		s = r.idle[n-1]
		r.timers[n-1].Stop()
		r.idle, r.timers = r.idle[:n-1], r.timers[:n-1]
		c.idle--
	}
	c.mu.Unlock()
	if s != nil {
		s.bind(ctx)
		return s, true, nil
	}
	if s, err = c.open(ctx, to); err != nil {
		c.drop(to, true)
	}
	return s, false, err
}

// drop gives a place back and forgets a host of which nothing is kept.
func (c *Client) drop(to Host, place bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.readers[to]
	if place {
		<-r.places
	}
	if r.users--; r.users == 0 && len(r.idle) == 0 {
		delete(c.readers, to)
	}
}

func (c *Client) discard(s *Stream) {
	s.Close()
	c.drop(s.host, true)
}

// keep puts a connection aside for the next Read.
func (c *Client) keep(s *Stream) {
	if !s.unbind() {
		c.discard(s) // its context ended at the last moment and closes it
		return
	}
	c.mu.Lock()
	r := c.readers[s.host]
	if c.closed || c.idle >= c.o.Idle {
		c.mu.Unlock()
		c.discard(s)
		return
	}
	c.idle++
	r.idle = append(r.idle, s)
	r.timers = append(r.timers, time.AfterFunc(c.o.Keep, func() { c.expire(s) }))
	c.mu.Unlock()
	c.drop(s.host, true)
}

func (c *Client) expire(s *Stream) {
	c.mu.Lock()
	found := false
	if r := c.readers[s.host]; r != nil {
		for i := range r.idle {
			if r.idle[i] == s {
				r.idle = append(r.idle[:i], r.idle[i+1:]...)
				r.timers = append(r.timers[:i], r.timers[i+1:]...)
				c.idle--
				found = true
				break
			}
		}
		if r.users == 0 && len(r.idle) == 0 {
			delete(c.readers, s.host)
		}
	}
	c.mu.Unlock()
	if found {
		s.Close()
	}
}

// Blob fetches a whole blob that is small enough to be held in memory (a packed ztoc, a profile), of at most max bytes, and checks its
// digest.
func (c *Client) Blob(ctx context.Context, to Host, h Hello, ref ztoc.BlobRef, max int64) ([]byte, error) {
	if ref.Size < 0 || ref.Size > max {
		return nil, fmt.Errorf("%s: %s has %d bytes, at most %d are taken", to, ref.Digest, ref.Size, max)
	}
	h.Priority = ztoc.Prefetch
	s, err := c.Open(ctx, to, h)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	b := make([]byte, ref.Size)
	if len(b) > 0 {
		if _, err := s.Want(ref.Digest, []ztoc.Range{{Start: 0, End: ref.Size}}); err != nil {
			return nil, err
		}
	}
	for done := len(b) == 0; !done; {
		e, err := s.Next()
		if err != nil {
			return nil, err
		}
		switch e.Kind {
		case Bytes:
			copy(b[e.Range.Start:], e.Data)
		case Missing:
			return nil, fmt.Errorf("%s: %s: %w", to, ref.Digest, ErrNotHere)
		case Refused:
			return nil, e.Err
		case Done:
			done = true
		}
	}
	if ztoc.DigestOf(b) != ref.Digest {
		return nil, fmt.Errorf("%s: %w: %s has other bytes", to, ErrWrong, ref.Digest)
	}
	return b, nil
}

// ErrWrong says that bytes do not have the digest that they should have.
var ErrWrong = errors.New("wrong bytes")
