package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const service = "muster.control.v1.Agent"

// maxMessage bounds one message, bytes: a report of 16,384 hosts fits.
const maxMessage = 32 << 20

// A chunk is bytes of a blob: the one message that is not JSON.
type chunk struct{ b []byte }

// codec writes messages as JSON and chunks as they are.
type codec struct{}

func (codec) Name() string { return "muster" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	if c, ok := v.(*chunk); ok {
		// A copy: SendMsg returns while the message is still queued, and the sender fills its buffer again.
		return mem.BufferSlice{mem.Copy(c.b, mem.DefaultBufferPool())}, nil
	}
	b, err := json.Marshal(v)
	return mem.BufferSlice{mem.SliceBuffer(b)}, err
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	b := data.Materialize()
	if c, ok := v.(*chunk); ok {
		c.b = b
		return nil
	}
	return json.Unmarshal(b, v)
}

// A Caller is the process at the other end of the socket, as the kernel says.
type Caller struct {
	UID, GID uint32
	PID      int32
}

// Root reports whether the caller may do everything.
func (c Caller) Root() bool { return c.UID == 0 }

func (c Caller) String() string { return fmt.Sprintf("uid %d, pid %d", c.UID, c.PID) }

// AuthType makes a Caller gRPC's AuthInfo.
func (Caller) AuthType() string { return "peercred" }

// peerCredentials are transport credentials that only look who it is.
type peerCredentials struct{}

func (peerCredentials) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, Caller{}, nil
}

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("control: not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, nil, err
	}
	if cerr != nil {
		return nil, nil, fmt.Errorf("control: SO_PEERCRED: %w", cerr)
	}
	return c, Caller{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }
func (peerCredentials) OverrideServerName(string) error           { return nil }

// callerOf is who calls.
func callerOf(ctx context.Context) (Caller, error) {
	p, ok := peer.FromContext(ctx)
	if ok {
		if c, ok := p.AuthInfo.(Caller); ok {
			return c, nil
		}
	}
	return Caller{}, status.Error(codes.Unauthenticated, "who calls is not known")
}

// An Error is a failure with the exit code that a command ends with.
type Error struct {
	Text string `json:"text"`
	Code int    `json:"code"`
}

func (e *Error) Error() string { return e.Text }

// Errors that callers decide on.
var (
	// ErrNoAgent says that nobody answers on the socket.
	ErrNoAgent = errors.New("no agent answers")
	// ErrRefused says that the caller may not do that.
	ErrRefused = errors.New("not allowed")
)

// userCodes is where exit codes are in gRPC's space of codes.
const userCodes = 1000

// toStatus makes an error one that keeps its exit code on the wire.
func (s *Server) toStatus(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrRefused):
		return status.Error(codes.PermissionDenied, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	code := 1
	var e *Error
	switch {
	case errors.As(err, &e):
		code = e.Code
	case s.ExitCode != nil:
		code = s.ExitCode(err)
	}
	return status.Error(codes.Code(userCodes+code), err.Error())
}

// fromStatus is the other way round.
func fromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	switch c := st.Code(); {
	case c >= userCodes:
		return &Error{Text: st.Message(), Code: int(c - userCodes)}
	case c == codes.PermissionDenied:
		return fmt.Errorf("%w: %s", ErrRefused, st.Message())
	case c == codes.Unavailable:
		return fmt.Errorf("%w: %s", ErrNoAgent, st.Message())
	case c == codes.Canceled:
		return context.Canceled
	case c == codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	return errors.New(st.Message())
}

// unary makes a gRPC method of a function.
func unary[Q, A any](f func(s *Server, ctx context.Context, c Caller, q Q) (A, error)) func(any, context.Context, func(any) error, grpc.UnaryServerInterceptor) (any, error) {
	return func(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		s := srv.(*Server)
		c, err := callerOf(ctx)
		if err != nil {
			return nil, err
		}
		var q Q
		if err := dec(&q); err != nil {
			return nil, err
		}
		a, err := f(s, ctx, c, q)
		if err != nil {
			return nil, s.toStatus(err)
		}
		return &a, nil
	}
}

// streaming makes a gRPC method of a function that answers with many messages.
func streaming[Q, A any](f func(s *Server, ctx context.Context, c Caller, q Q, send func(A) error) error) func(any, grpc.ServerStream) error {
	return func(srv any, g grpc.ServerStream) error {
		s := srv.(*Server)
		c, err := callerOf(g.Context())
		if err != nil {
			return err
		}
		var q Q
		if err := g.RecvMsg(&q); err != nil {
			return err
		}
		return s.toStatus(f(s, g.Context(), c, q, func(a A) error { return g.SendMsg(&a) }))
	}
}
