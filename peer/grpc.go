package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Questions travel as gRPC calls of the method /muster.Peer/NAME, whose messages are bytes as question.go makes them. gRPC
// brings many questions at once over one connection, deadlines that the other end sees, and cancelling; its code
// generator would bring nothing more, since the agent's words are opaque here.
const service = "/muster.Peer/"

// raw is gRPC's codec for messages that are bytes already.
type raw struct{}

func (raw) Name() string { return "muster" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// greeted is how gRPC is told that a session has greeted already.
type greeted struct{ name string }

func (greeted) AuthType() string { return "muster" }

// GetCommonAuthInfo says that the connection is private: TLS, or memory.
func (greeted) GetCommonAuthInfo() credentials.CommonAuthInfo {
	return credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
}

type greeting struct{}

func (greeting) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return greeting{}.ServerHandshake(conn)
}

func (greeting) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	s, ok := conn.(*noted)
	if !ok {
		return nil, nil, fmt.Errorf("%w: a connection without a name", ErrProtocol)
	}
	return conn, greeted{s.peer}, nil
}

func (greeting) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "muster"}
}
func (greeting) Clone() credentials.TransportCredentials { return greeting{} }
func (greeting) OverrideServerName(string) error         { return nil }

// noted is a session whose end somebody waits for.
type noted struct {
	*session
	once  sync.Once
	ended chan struct{}
}

func (n *noted) Close() error {
	n.once.Do(func() { close(n.ended) })
	return n.session.Close()
}

// An answerer is a server's half of questions.
type answerer struct {
	grpc   *grpc.Server
	counts *serverCounts
	places chan struct{}
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
	done   chan struct{} // closed when grpc.Serve has returned

	mu       sync.RWMutex
	handlers map[string]handler
}

type handler func(ctx context.Context, from string, question []byte) ([]byte, error)

func newAnswerer(places int, counts *serverCounts) *answerer {
	a := &answerer{
		counts: counts, places: make(chan struct{}, places), conns: make(chan net.Conn),
		closed: make(chan struct{}), done: make(chan struct{}), handlers: map[string]handler{},
	}
	a.grpc = grpc.NewServer(
		grpc.Creds(greeting{}), grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(a.answer),
		grpc.MaxRecvMsgSize(maxQuestion), grpc.MaxSendMsgSize(maxQuestion), grpc.MaxConcurrentStreams(64), grpc.MaxHeaderListSize(16<<10),
		grpc.ReadBufferSize(8<<10), grpc.WriteBufferSize(8<<10),
		grpc.ConnectionTimeout(5*time.Second), grpc.WaitForHandlers(true),
	)
	go func() { // ended by close
		defer close(a.done)
		a.grpc.Serve(sessions{a})
	}()
	return a
}

func (a *answerer) handle(name string, h handler) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.handlers[name] = h
}

// serve answers the questions of one connection until it ends.
func (a *answerer) serve(ctx context.Context, s *session) {
	n := &noted{session: s, ended: make(chan struct{})}
	select {
	case a.conns <- n:
		<-n.ended // by gRPC, which notices when the other end goes, or the server closes the connection
	case <-a.closed:
	case <-ctx.Done():
	}
}

func (a *answerer) close() {
	a.once.Do(func() { close(a.closed) })
	a.grpc.Stop()
	<-a.done
}

// sessions is what gRPC accepts from.
type sessions struct{ a *answerer }

func (l sessions) Accept() (net.Conn, error) {
	select {
	case c := <-l.a.conns:
		return c, nil
	case <-l.a.closed:
		return nil, net.ErrClosed
	}
}
func (l sessions) Close() error   { return nil }
func (l sessions) Addr() net.Addr { return memoryAddr("questions") }

func (a *answerer) answer(_ any, stream grpc.ServerStream) error {
	ctx := stream.Context()
	method, _ := grpc.MethodFromServerStream(stream)
	name, _ := strings.CutPrefix(method, service)
	a.mu.RLock()
	h := a.handlers[name]
	a.mu.RUnlock()
	if h == nil {
		return toStatus(ErrUnknown)
	}
	from, ok := askedBy(ctx)
	if !ok {
		return toStatus(ErrDenied)
	}
	select {
	case a.places <- struct{}{}:
		defer func() { <-a.places }()
	default:
		a.counts.refused.Add(1)
		return toStatus(ErrBusy)
	}
	var question []byte
	if err := stream.RecvMsg(&question); err != nil {
		return err
	}
	answer, err := h(ctx, from, question)
	if err != nil {
		return toStatus(err)
	}
	a.counts.answers.Add(1)
	return stream.SendMsg(&answer)
}

// An asker is a client's half of questions: one connection to each of a bounded number of hosts.
type asker struct {
	net   Network
	limit int

	mu     sync.Mutex
	closed bool
	hosts  map[Host]*line
}

// A line is the connection to one host. Guarded by asker.mu but for failed.
type line struct {
	conn   *grpc.ClientConn
	users  int
	used   time.Time
	failed atomic.Pointer[error] // why the last dial failed; nil when it did not
}

func newAsker(n Network, limit int) *asker {
	return &asker{net: n, limit: limit, hosts: map[Host]*line{}}
}

func (a *asker) close() error {
	a.mu.Lock()
	a.closed = true
	hosts := a.hosts
	a.hosts = nil
	a.mu.Unlock()
	var errs []error
	for _, l := range hosts {
		errs = append(errs, l.conn.Close())
	}
	return errors.Join(errs...)
}

func (a *asker) ask(ctx context.Context, to Host, name string, question []byte, maxAnswer int) ([]byte, error) {
	l, err := a.line(to)
	if err != nil {
		return nil, err
	}
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		l.users--
		l.used = time.Now()
	}()
	var answer []byte
	err = l.conn.Invoke(ctx, service+name, &question, &answer, grpc.MaxCallRecvMsgSize(maxAnswer))
	if err != nil {
		return nil, fromStatus(err, l.failed.Load())
	}
	return answer, nil
}

func (a *asker) line(to Host) (*line, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, ErrClosed
	}
	if l := a.hosts[to]; l != nil {
		l.users++
		return l, nil
	}
	if len(a.hosts) >= a.limit {
		a.makeRoom()
	}
	l := &line{users: 1}
	conn, err := grpc.NewClient("passthrough:///muster",
		grpc.WithTransportCredentials(greeting{}), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{}), grpc.MaxCallSendMsgSize(maxQuestion)),
		grpc.WithReadBufferSize(8<<10), grpc.WithWriteBufferSize(8<<10),
		grpc.WithIdleTimeout(time.Minute),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			s, err := a.net.dial(ctx, to, protoAsk)
			if err != nil {
				l.failed.Store(&err)
				return nil, err
			}
			l.failed.Store(nil)
			return &noted{session: s, ended: make(chan struct{})}, nil
		}),
	)
	if err != nil {
		return nil, err
	}
	l.conn = conn
	a.hosts[to] = l
	return l, nil
}

// makeRoom closes the connection that has been idle for longest. When all are in use the limit is passed: whoever asks
// has a bound of its own.
func (a *asker) makeRoom() {
	var oldest Host
	var found *line
	for h, l := range a.hosts {
		if l.users == 0 && (found == nil || l.used.Before(found.used)) {
			oldest, found = h, l
		}
	}
	if found != nil {
		delete(a.hosts, oldest)
		found.conn.Close()
	}
}

// toStatus and fromStatus translate between this package's errors and gRPC's codes.
func toStatus(err error) error {
	code := codes.Unknown
	for c, known := range statuses {
		if errors.Is(err, known) {
			code = c
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	text := err.Error()
	return status.Error(code, text[:min(len(text), 1<<10)])
}

func fromStatus(err error, dial *error) error {
	s, _ := status.FromError(err)
	known := statuses[s.Code()]
	switch {
	case s.Code() == codes.Unavailable && dial != nil:
		return *dial
	case s.Code() == codes.Unavailable:
		known = ErrTruncated
	case s.Code() == codes.DeadlineExceeded:
		known = context.DeadlineExceeded
	case s.Code() == codes.Canceled:
		known = context.Canceled
	case s.Code() == codes.ResourceExhausted: // gRPC's word for a message over a limit
		known = ErrProtocol
	}
	if known == nil {
		return errors.New(s.Message())
	}
	if s.Message() == known.Error() {
		return known
	}
	return fmt.Errorf("%w: %s", known, s.Message())
}

var statuses = map[codes.Code]error{
	codes.NotFound:         ErrNotHere,
	codes.PermissionDenied: ErrDenied,
	codes.Aborted:          ErrBusy,
	codes.InvalidArgument:  ErrProtocol,
	codes.Unimplemented:    ErrUnknown,
}

// askedBy is the name of whoever is at the other end of a call.
func askedBy(ctx context.Context) (string, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", false
	}
	g, ok := p.AuthInfo.(greeted)
	return g.name, ok && g.name != ""
}
