package peer

import (
	"context"
	"net"
	"time"
)

// What a connection is for, as ALPN says it.
const (
	protoAsk    = "h2"
	protoRanges = "muster-range/1"
)

// A Network is how hosts reach each other: TCP with mutual TLS (NewTCP), or the memory of one process (Memory).
type Network interface {
	// listen begins to take connections at addr; its Addr is what others dial.
	listen(addr string) (net.Listener, error)
	// greet finds out who has connected and what for. It ends when ctx does.
	greet(ctx context.Context, conn net.Conn) (*session, error)
	// dial reaches a host, and no other one that may answer at its address.
	dial(ctx context.Context, to Host, proto string) (*session, error)
	// sign and signer are Client.Sign and Client.Signer.
	sign(b []byte) ([]byte, error)
	signer(b, signature []byte) (string, error)
}

// A session is a connection of which both ends know who is at the other.
type session struct {
	net.Conn
	peer  string     // the name of the other end
	proto string     // what it is for
	below *batchConn // what lies under TLS; nil in memory
	until time.Time  // when the other end's certificate expires; zero: never
}

// writeFrame writes a frame at once.
func (s *session) writeFrame(b []byte) error {
	if s.below == nil {
		_, err := s.Conn.Write(b)
		return err
	}
	return s.below.whole(func() error {
		_, err := s.Conn.Write(b)
		return err
	})
}
