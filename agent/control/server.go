package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// An Agent is what answers. Its methods are called at the same time; contexts end with the client.
type Agent interface {
	Stage(ctx context.Context, c Caller, q StageRequest, tell func(StageEvent) error) error
	Unstage(ctx context.Context, c Caller, q UnstageRequest) (UnstageReply, error)
	Status(ctx context.Context, c Caller, q StatusRequest) (Status, error)
	Prestage(ctx context.Context, c Caller, q PrestageRequest, tell func(PrestageEvent) error) error
	// Tasks is told when a job's tasks begin and end on this host.
	Tasks(ctx context.Context, c Caller, q TasksRequest) error
	// Read gives bytes of q.Range in order, some in each call of send, which keeps none of them.
	Read(ctx context.Context, c Caller, q ReadRequest, send func([]byte) error) error
	Records(ctx context.Context, c Caller, q RecordsRequest, tell func(RecordsEvent) error) error
	FirstRead(ctx context.Context, c Caller, q FirstReadRequest) error
}

// A Server answers on a socket.
type Server struct {
	Agent Agent
	// ExitCode is the exit code for an error; nil: 1 for all.
	ExitCode func(error) int

	grpc *grpc.Server
}

// Listen makes the socket. One that a dead agent left is replaced; of a living one it says so.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("socket %s: another agent answers there", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// Everybody may ask; who it is, the kernel says, and what he may do, the agent.
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// Serve answers on l until Stop.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(l) }

// New readies a server for Serve.
func New(a Agent, exitCode func(error) int) *Server {
	s := &Server{Agent: a, ExitCode: exitCode}
	s.grpc = grpc.NewServer(
		grpc.Creds(peerCredentials{}), grpc.ForceServerCodecV2(codec{}), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	s.grpc.RegisterService(&description, s)
	return s
}

// Stop ends all calls and waits for them.
func (s *Server) Stop() { s.grpc.Stop() }

var description = grpc.ServiceDesc{
	ServiceName: service,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		{MethodName: "Unstage", Handler: unary(func(s *Server, ctx context.Context, c Caller, q UnstageRequest) (UnstageReply, error) {
			return s.Agent.Unstage(ctx, c, q)
		})},
		{MethodName: "Status", Handler: unary(func(s *Server, ctx context.Context, c Caller, q StatusRequest) (Status, error) {
			return s.Agent.Status(ctx, c, q)
		})},
		{MethodName: "Tasks", Handler: unary(func(s *Server, ctx context.Context, c Caller, q TasksRequest) (struct{}, error) {
			return struct{}{}, s.Agent.Tasks(ctx, c, q)
		})},
		{MethodName: "FirstRead", Handler: unary(func(s *Server, ctx context.Context, c Caller, q FirstReadRequest) (struct{}, error) {
			return struct{}{}, s.Agent.FirstRead(ctx, c, q)
		})},
	},
	Streams: []grpc.StreamDesc{
		{StreamName: "Stage", ServerStreams: true, Handler: streaming(func(s *Server, ctx context.Context, c Caller, q StageRequest, send func(StageEvent) error) error {
			return s.Agent.Stage(ctx, c, q, send)
		})},
		{StreamName: "Prestage", ServerStreams: true, Handler: streaming(func(s *Server, ctx context.Context, c Caller, q PrestageRequest, send func(PrestageEvent) error) error {
			return s.Agent.Prestage(ctx, c, q, send)
		})},
		{StreamName: "Records", ServerStreams: true, Handler: streaming(func(s *Server, ctx context.Context, c Caller, q RecordsRequest, send func(RecordsEvent) error) error {
			return s.Agent.Records(ctx, c, q, send)
		})},
		{StreamName: "Read", ServerStreams: true, Handler: streaming(func(s *Server, ctx context.Context, c Caller, q ReadRequest, send func(chunk) error) error {
			return s.Agent.Read(ctx, c, q, func(b []byte) error { return send(chunk{b}) })
		})},
	},
}
