package peer

import (
	"context"
	"fmt"
	"net"
	"sync"
)

// Memory is a network inside one process, for tests with many agents: the same protocol over pipes, without
// TLS. Each host of it is a Network of its own.
type Memory struct {
	mu        sync.Mutex
	listeners map[string]*pipeListener // by address
	cut       map[string]bool          // hosts that nobody reaches
	conns     map[*pipeConn]struct{}
	port      int
}

// NewMemory makes a network without hosts.
func NewMemory() *Memory {
	return &Memory{listeners: map[string]*pipeListener{}, cut: map[string]bool{}, conns: map[*pipeConn]struct{}{}}
}

// Host is the network as the host of that name sees it.
func (m *Memory) Host(name string) Network { return memoryHost{m, name} }

// Cut breaks all connections from and to a host, and lets it make no other until Heal.
func (m *Memory) Cut(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cut[name] = true
	for c := range m.conns {
		if c.local == name || c.remote == name {
			go c.Close() // takes m.mu
		}
	}
}

// Heal ends what Cut began.
func (m *Memory) Heal(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.cut, name)
}

type memoryHost struct {
	m    *Memory
	name string
}

func (h memoryHost) listen(addr string) (net.Listener, error) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if addr == "" || h.m.listeners[addr] != nil {
		h.m.port++
		addr = fmt.Sprintf("%s:%d", h.name, h.m.port)
	}
	l := &pipeListener{m: h.m, addr: memoryAddr(addr), host: h.name, conns: make(chan *pipeConn), closed: make(chan struct{})}
	h.m.listeners[addr] = l
	return l, nil
}

func (h memoryHost) greet(_ context.Context, conn net.Conn) (*session, error) {
	c := conn.(*pipeConn)
	return &session{Conn: c, peer: c.remote, proto: c.proto}, nil
}

func (h memoryHost) dial(ctx context.Context, to Host, proto string) (*session, error) {
	h.m.mu.Lock()
	l := h.m.listeners[to.Addr]
	gone := l == nil || h.m.cut[h.name] || h.m.cut[to.Name]
	h.m.mu.Unlock()
	if gone {
		return nil, fmt.Errorf("%s: %w", to, net.ErrClosed)
	}
	if l.host != to.Name {
		return nil, fmt.Errorf("%s: %w: %s answers there", to, ErrDenied, l.host)
	}
	a, b := pipe(h.m, h.name, to.Name, proto)
	select {
	case l.conns <- b:
		return &session{Conn: a, peer: to.Name, proto: proto}, nil
	case <-l.closed:
		a.Close()
		return nil, fmt.Errorf("%s: %w", to, net.ErrClosed)
	case <-ctx.Done():
		a.Close()
		return nil, fmt.Errorf("%s: %w", to, context.Cause(ctx))
	}
}

type memoryAddr string

func (memoryAddr) Network() string  { return "memory" }
func (a memoryAddr) String() string { return string(a) }

type pipeListener struct {
	m      *Memory
	addr   memoryAddr
	host   string
	conns  chan *pipeConn
	once   sync.Once
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.m.mu.Lock()
		delete(l.m.listeners, string(l.addr))
		l.m.mu.Unlock()
	})
	return nil
}

func (l *pipeListener) Addr() net.Addr { return l.addr }

// A pipeConn is one end of a connection in memory: a net.Pipe with a name at each end.
type pipeConn struct {
	net.Conn
	m                    *Memory
	local, remote, proto string
}

func pipe(m *Memory, from, to, proto string) (a, b *pipeConn) {
	x, y := net.Pipe()
	a, b = &pipeConn{x, m, from, to, proto}, &pipeConn{y, m, to, from, proto}
	m.mu.Lock()
	m.conns[a], m.conns[b] = struct{}{}, struct{}{}
	m.mu.Unlock()
	return a, b
}

func (c *pipeConn) Close() error {
	c.m.mu.Lock()
	delete(c.m.conns, c)
	c.m.mu.Unlock()
	return c.Conn.Close()
}
