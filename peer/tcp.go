package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// TCPOptions say how a host uses its data network. The zero value is fine.
type TCPOptions struct {
	// Data is the networks on which ranges and questions may move. Empty: all. A dial to an address outside fails, so that
	// nothing falls back to the management network unless it is listed here.
	Data []netip.Prefix
	// Dial bounds setting up a connection, the handshake included. Too short and a busy host seems dead, too long and
	// a dead one costs its children time. Default 3 s.
	Dial time.Duration
}

// readBatch is how much of what a parent sends is read from the socket at once.
const readBatch = 128 << 10

type tcp struct {
	id *Identity
	o  TCPOptions
}

// NewTCP is the network of real hosts: TCP, TLS 1.3, certificates of the cluster's CA on both sides.
func NewTCP(id *Identity, o TCPOptions) Network {
	if o.Dial <= 0 {
		o.Dial = 3 * time.Second
	}
	return &tcp{id: id, o: o}
}

func (t *tcp) listen(addr string) (net.Listener, error) {
	if err := t.allowed(addr); err != nil {
		return nil, err
	}
	return net.Listen("tcp", addr)
}

// allowed refuses addresses outside the data networks. Names are refused where there is a list: what they mean may
// change between looking and dialling.
func (t *tcp) allowed(addr string) error {
	if len(t.o.Data) == 0 {
		return nil
	}
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return fmt.Errorf("%w: %s is not an address and port, and network.data is limited", ErrDenied, addr)
	}
	for _, p := range t.o.Data {
		if p.Contains(a.Addr().Unmap().WithZone("")) {
			return nil
		}
	}
	return fmt.Errorf("%w: %s is not in network.data %v", ErrDenied, addr, t.o.Data)
}

func (t *tcp) greet(ctx context.Context, conn net.Conn) (*session, error) {
	lively(conn)
	below := &batchConn{Conn: conn}
	return t.shake(ctx, tls.Server(below, t.id.server()), below)
}

func (t *tcp) dial(ctx context.Context, to Host, proto string) (*session, error) {
	if err := t.allowed(to.Addr); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, t.o.Dial)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", to.Addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", to, err)
	}
	lively(conn)
	below := &batchConn{Conn: conn}
	if proto == protoRanges {
		below.in = bufio.NewReaderSize(conn, readBatch)
	}
	s, err := t.shake(ctx, tls.Client(below, t.id.client(to.Name, proto)), below)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", to, err)
	}
	return s, nil
}

// unheard is how long bytes may go without an acknowledgement before a connection is given up. The kernel's own limit is a
// quarter of an hour, for which a host that lost its power would keep its places here.
const unheard = 15 * time.Second

func lively(conn net.Conn) {
	c, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	// Best effort: deadlines hold without it.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unheard.Milliseconds()))
	})
}

func (t *tcp) shake(ctx context.Context, conn *tls.Conn, below *batchConn) (*session, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		conn.NetConn().Close()
		return nil, err
	}
	state := conn.ConnectionState()
	leaf := state.PeerCertificates[0] // the handshake has checked that there is one
	return &session{Conn: conn, below: below, peer: leaf.DNSNames[0], proto: state.NegotiatedProtocol, until: leaf.NotAfter}, nil
}
