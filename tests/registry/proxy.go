package registry

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Upstream forwards to the server at addr ("127.0.0.1:port"), for a [Proxy] in front of it.
func Upstream(addr string) http.Handler {
	to := &url.URL{Scheme: "http", Host: addr}
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host // so that the registry's Location headers lead back through the proxy
		},
		Transport:  &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64, ReadBufferSize: 64 << 10},
		BufferPool: copyBuffers{},
		ErrorLog:   log.New(discard{}, "", 0),
	}
}

type copyBuffers struct{}

type copyBuffer [256 << 10]byte

var buffers = sync.Pool{New: func() any { return new(copyBuffer) }}

func (copyBuffers) Get() []byte  { return buffers.Get().(*copyBuffer)[:] }
func (copyBuffers) Put(b []byte) { buffers.Put((*copyBuffer)(b)) }

// A Proxy listens in front of a registry, slows it down, breaks it on purpose, and keeps a log. All
// methods may be called at any time, also while requests are under way.
type Proxy struct {
	Addr string // "127.0.0.1:port"

	upstream http.Handler
	up       listener
	all      bucket // of all connections
	perConn  atomic.Int64
	latency  atomic.Int64

	mu      sync.Mutex
	faults  []*fault
	log     []*entry
	active  int // entries of log not yet finished
	tokens  *Tokens
	storage *SignedStorage
	serial  int
}

// StartProxy listens on a free loopback port in front of upstream ([NewHandler], [Server.Handler] or
// [Upstream]).
func StartProxy(upstream http.Handler) (*Proxy, error) {
	return StartProxyAt("", upstream)
}

// StartProxyAt listens at addr ("127.0.0.1:port").
func StartProxyAt(addr string, upstream http.Handler) (*Proxy, error) {
	p := &Proxy{upstream: upstream}
	p.up.handler = http.HandlerFunc(p.serve)
	if err := p.up.start(addr); err != nil {
		return nil, err
	}
	p.Addr = p.up.addr
	return p, nil
}

// Close stops the proxy, its token server and its storage.
func (p *Proxy) Close() error {
	p.mu.Lock()
	tokens, storage := p.tokens, p.storage
	p.mu.Unlock()
	if tokens != nil {
		tokens.srv.stop()
	}
	if storage != nil {
		storage.srv.stop()
	}
	return p.up.stop()
}

// Down closes the listener and all connections, as when a network goes away; Up listens again at the
// same address.
func (p *Proxy) Down() error { return p.up.stop() }

// Up ends Down.
func (p *Proxy) Up() error { return p.up.start(p.Addr) }

// Conns is how many connections are open, PeakConns the most there were since the last ResetLog.
func (p *Proxy) Conns() int { return int(p.up.conns.Load()) }

// PeakConns is the most connections that were open at once since the last ResetLog.
func (p *Proxy) PeakConns() int { return int(p.up.peak.Load()) }

// SetRate limits what all connections together receive, in bytes per second of body; 0 is no limit.
func (p *Proxy) SetRate(bytesPerSecond int64) { p.all.set(bytesPerSecond) }

// SetConnRate limits each response's body; 0 is no limit.
func (p *Proxy) SetConnRate(bytesPerSecond int64) { p.perConn.Store(bytesPerSecond) }

// SetLatency delays each answer.
func (p *Proxy) SetLatency(d time.Duration) { p.latency.Store(int64(d)) }

// entry is a Record being made: out has the rest while the request is under way.
type entry struct {
	Record
	out *writer // nil once finished
}

// A Record is one request that has arrived.
type Record struct {
	Serial   int // in order of arrival, from 1
	Time     time.Time
	Kind     Kind
	Method   string
	Path     string
	Query    string
	Repo     string
	Ref      string // digest or tag
	Range    string // the Range header
	Status   int    // 0: none was sent
	Bytes    int64  // of body sent
	Duration time.Duration
	Auth     string // the Authorization header
	Agent    string
	Fault    string // what was done to it on purpose
	Done     bool   // answered in full, or cut; else Status, Bytes and Duration are as of now
}

// Match selects requests: every field that is set must agree.
type Match struct {
	Kind   Kind
	Method string
	Repo   string
	Ref    string               // digest or tag
	Path   string               // a part of the path
	Status int                  // of Log, Count and Bytes only
	Where  func(r *Record) bool // anything else; of a request under way only what is known then is set
}

func (m Match) is(r *Record) bool {
	return (m.Kind == "" || m.Kind == r.Kind) && (m.Method == "" || m.Method == r.Method) &&
		(m.Repo == "" || m.Repo == r.Repo) && (m.Ref == "" || m.Ref == r.Ref) && strings.Contains(r.Path, m.Path) &&
		(m.Status == 0 || m.Status == r.Status) && (m.Where == nil || m.Where(r))
}

// Log is the requests that match, in order of arrival. A client may have its last byte before the server
// has noted it, so requests under way are given a moment to finish.
func (p *Proxy) Log(m Match) []Record {
	const moment = 100 * time.Millisecond
	for begun := time.Now(); time.Since(begun) < moment; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		busy := p.active > 0
		p.mu.Unlock()
		if !busy {
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []Record
	for _, e := range p.log {
		r := e.Record
		if e.out != nil {
			r.Status, r.Bytes, r.Duration = int(e.out.status.Load()), e.out.n.Load(), time.Since(r.Time)
		}
		if m.is(&r) {
			out = append(out, r)
		}
	}
	return out
}

// Count is how many requests match.
func (p *Proxy) Count(m Match) int { return len(p.Log(m)) }

// Bytes is the sum of bodies sent for what matches.
func (p *Proxy) Bytes(m Match) int64 {
	var n int64
	for _, r := range p.Log(m) {
		n += r.Bytes
	}
	return n
}

// ResetLog forgets the log and PeakConns.
func (p *Proxy) ResetLog() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = nil
	p.up.peak.Store(p.up.conns.Load())
}

// serve is what happens to every request to the registry's own address.
func (p *Proxy) serve(w http.ResponseWriter, r *http.Request) {
	q := parsePath(r.URL.Path)
	p.handle(w, r, q, func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		tokens, storage := p.tokens, p.storage
		p.mu.Unlock()
		if tokens != nil && !tokens.admit(w, r, q) {
			return
		}
		if storage != nil && q.kind == Blob && r.Method == http.MethodGet {
			http.Redirect(w, r, storage.sign(r.URL.Path), http.StatusTemporaryRedirect)
			return
		}
		p.upstream.ServeHTTP(w, r)
	})
}

// handle logs a request, delays it, does to it what faults want, and passes it to next.
func (p *Proxy) handle(w http.ResponseWriter, r *http.Request, q question, next http.HandlerFunc) {
	rec := Record{
		Time: time.Now(), Kind: q.kind, Method: r.Method, Path: r.URL.Path, Query: r.URL.RawQuery, Repo: q.repo, Ref: q.ref,
		Range: r.Header.Get("Range"), Auth: r.Header.Get("Authorization"), Agent: r.UserAgent(),
	}
	out := &writer{ResponseWriter: w, p: p, r: r}
	p.mu.Lock()
	p.serial++
	rec.Serial = p.serial
	for _, f := range p.faults {
		if f.m.is(&rec) && f.take() {
			out.act = f.do
			break
		}
	}
	act := out.act
	rec.Fault = act.name
	e := &entry{rec, out}
	p.log = append(p.log, e)
	p.active++
	p.mu.Unlock()
	out.conn.set(p.perConn.Load())
	if act.rate > 0 {
		out.conn.set(act.rate)
	}
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.active--
		e.Status, e.Bytes, e.Duration, e.Done = int(out.status.Load()), out.n.Load(), time.Since(rec.Time), true
		e.out = nil
	}()
	if d := time.Duration(p.latency.Load()) + act.delay; d > 0 && !pause(r.Context(), d) {
		panic(http.ErrAbortHandler)
	}
	if act.before != nil && act.before(out, r) {
		return
	}
	next(out, r)
}

// pause reports whether d has passed before the client went away.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A bucket paces bytes: each taker is told how long to wait for its own.
type bucket struct {
	mu   sync.Mutex
	rate int64
	next time.Time // when what was given out so far has been paid for
}

// burst is how much time may be saved up while nobody asks.
const burst = 50 * time.Millisecond

func (b *bucket) set(rate int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rate, b.next = rate, time.Time{}
}

func (b *bucket) limit() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rate
}

func (b *bucket) take(n int64) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate <= 0 {
		return 0
	}
	now := time.Now()
	if low := now.Add(-burst); b.next.Before(low) {
		b.next = low
	}
	b.next = b.next.Add(time.Duration(float64(n) / float64(b.rate) * float64(time.Second)))
	return b.next.Sub(now)
}

// writer paces, counts and breaks a response's body.
type writer struct {
	http.ResponseWriter
	p      *Proxy
	r      *http.Request
	act    Action
	conn   bucket // of this response
	status atomic.Int32
	n      atomic.Int64
}

func (w *writer) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		w.status.Store(int32(status))
	}
	if w.act.header != nil {
		w.act.header(w.Header(), status)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *writer) Flush() { http.NewResponseController(w.ResponseWriter).Flush() }

// chunk is how much is sent at once: small enough for an even flow, large enough to be cheap.
func (w *writer) chunk() int64 {
	rate := w.p.all.limit()
	if c := w.conn.limit(); c > 0 && (rate <= 0 || c < rate) {
		rate = c
	}
	if rate <= 0 {
		return 1 << 20
	}
	return min(max(rate/100, 512), 256<<10)
}

// pace waits for n bytes' turn.
func (w *writer) pace(n int64) {
	if d := max(w.p.all.take(n), w.conn.take(n)); d > 0 && !pause(w.r.Context(), d) {
		panic(http.ErrAbortHandler)
	}
}

// breaking does what the fault wants before byte w.n, and says how many bytes may go before the next
// such place.
func (w *writer) breaking(n int64) int64 {
	a := &w.act
	sent := w.n.Load()
	if a.during == nil || sent > a.at {
		return n
	}
	if sent < a.at {
		return min(n, a.at-sent)
	}
	w.Flush()
	a.during(w)
	return n
}

func (w *writer) Write(b []byte) (int, error) {
	if w.status.Load() == 0 {
		w.WriteHeader(http.StatusOK)
	}
	done := 0
	for done < len(b) {
		n := w.breaking(min(w.chunk(), int64(len(b)-done)))
		w.pace(n)
		part := b[done : done+int(n)]
		if i := w.act.flip - w.n.Load(); w.act.flips && 0 <= i && i < n {
			part = slices.Clone(part)
			part[i] ^= 0x20
		}
		k, err := w.ResponseWriter.Write(part)
		w.n.Add(int64(k))
		done += k
		if err != nil {
			return done, err
		}
		if w.conn.limit() > 0 {
			w.Flush()
		}
	}
	return done, nil
}

// ReadFrom lets the kernel copy files to sockets, paced as well; with a fault it is a plain copy.
func (w *writer) ReadFrom(src io.Reader) (int64, error) {
	from, ok := w.ResponseWriter.(io.ReaderFrom)
	if !ok || w.act.name != "" || w.conn.limit() > 0 {
		b := buffers.Get().(*copyBuffer)
		defer buffers.Put(b)
		return io.CopyBuffer(struct{ io.Writer }{w}, src, b[:])
	}
	if w.status.Load() == 0 {
		w.WriteHeader(http.StatusOK)
	}
	// One LimitedReader around the file, not two: more than one the kernel's copy is not used for.
	left := int64(1) << 62
	outer, limited := src.(*io.LimitedReader)
	if limited {
		src, left = outer.R, outer.N
	}
	var total int64
	for left > 0 {
		n := min(w.chunk(), left)
		w.pace(n)
		k, err := from.ReadFrom(&io.LimitedReader{R: src, N: n})
		w.n.Add(k)
		total += k
		left -= k
		if limited {
			outer.N = left
		}
		if err != nil || k < n {
			return total, err
		}
	}
	return total, nil
}

// A listener is a server that can go away and come back at the same address.
type listener struct {
	handler http.Handler
	addr    string
	conns   atomic.Int64
	peak    atomic.Int64

	mu  sync.Mutex
	srv *http.Server
}

func (l *listener) start(addr string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.srv != nil {
		return nil
	}
	ln, err := listen(addr)
	if err != nil {
		return err
	}
	l.addr = ln.Addr().String()
	l.srv = newHTTP(l.handler)
	l.srv.ConnState = func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			n := l.conns.Add(1)
			for {
				p := l.peak.Load()
				if n <= p || l.peak.CompareAndSwap(p, n) {
					break
				}
			}
		case http.StateClosed, http.StateHijacked:
			l.conns.Add(-1)
		}
	}
	go l.srv.Serve(ln) // ends with stop
	return nil
}

func (l *listener) stop() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.srv == nil {
		return nil
	}
	err := l.srv.Close()
	l.srv = nil
	return err
}
