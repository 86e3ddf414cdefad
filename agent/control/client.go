package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// A Client asks the agent. Its methods may be called at the same time; it connects when first used, and again when the
// agent was restarted.
type Client struct {
	socket string
	conn   *grpc.ClientConn
}

// Dial makes a client of the agent that listens on socket; empty: DefaultSocket. Nothing is asked yet.
func Dial(socket string) (*Client, error) {
	if socket == "" {
		socket = DefaultSocket
	}
	conn, err := grpc.NewClient("passthrough:///muster",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}),
		grpc.WithTransportCredentials(peerCredentials{}),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		// An agent that is restarted is back soon, and readers wait for it.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
	)
	if err != nil {
		return nil, err
	}
	return &Client{socket: socket, conn: conn}, nil
}

// Close ends the connection and all calls.
func (c *Client) Close() error { return c.conn.Close() }

// told names the socket in an error about nobody answering there.
func (c *Client) told(err error) error {
	err = fromStatus(err)
	if errors.Is(err, ErrNoAgent) {
		return fmt.Errorf("socket %s: %w", c.socket, err)
	}
	return err
}

func ask[A, Q any](ctx context.Context, c *Client, method string, q Q) (a A, err error) {
	return a, c.told(c.conn.Invoke(ctx, "/"+service+"/"+method, &q, &a))
}

// listen calls a streaming method and gives what comes to each.
func listen[A, Q any](ctx context.Context, c *Client, method string, q Q, each func(A) error, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.conn.NewStream(ctx, &grpc.StreamDesc{StreamName: method, ServerStreams: true}, "/"+service+"/"+method, opts...)
	if err != nil {
		return c.told(err)
	}
	if err := s.SendMsg(&q); err != nil && !errors.Is(err, io.EOF) { // of EOF RecvMsg tells the reason
		return c.told(err)
	}
	if err := s.CloseSend(); err != nil {
		return c.told(err)
	}
	for {
		var a A
		if err := s.RecvMsg(&a); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return c.told(err)
		}
		if err := each(a); err != nil {
			return err
		}
	}
}

// Stage stages an image and tells how it goes, in the calling goroutine. The report is nil when the stage could not
// begin.
func (c *Client) Stage(ctx context.Context, q StageRequest, each func(StageEvent)) (report *Report, err error) {
	err = listen(ctx, c, "Stage", q, func(e StageEvent) error {
		if e.Report != nil {
			report = e.Report
		}
		if each != nil {
			each(e)
		}
		return nil
	})
	return report, err
}

// Unstage ends a job.
func (c *Client) Unstage(ctx context.Context, q UnstageRequest) (UnstageReply, error) {
	return ask[UnstageReply](ctx, c, "Unstage", q)
}

// Status asks what the agent does.
func (c *Client) Status(ctx context.Context, q StatusRequest) (Status, error) {
	return ask[Status](ctx, c, "Status", q)
}

// Tasks tells that a job's tasks begin or have ended on this host.
func (c *Client) Tasks(ctx context.Context, q TasksRequest) error {
	_, err := ask[struct{}](ctx, c, "Tasks", q)
	return err
}

// Prestage asks for images on this host.
func (c *Client) Prestage(ctx context.Context, q PrestageRequest, each func(PrestageEvent)) error {
	return listen(ctx, c, "Prestage", q, func(e PrestageEvent) error { each(e); return nil })
}

// Read asks for bytes of a blob; it fails with io.ErrUnexpectedEOF where fewer came. While no agent answers it waits for one
// until ctx ends.
func (c *Client) Read(ctx context.Context, q ReadRequest) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.conn.NewStream(ctx, &grpc.StreamDesc{StreamName: "Read", ServerStreams: true}, "/"+service+"/Read", grpc.WaitForReady(true))
	if err == nil {
		err = s.SendMsg(&q)
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = s.CloseSend()
	}
	if err != nil {
		cancel()
		return nil, c.told(err)
	}
	return &body{c: c, s: s, cancel: cancel, left: q.Range.Len()}, nil
}

// Reject reports wrong bytes; see ReadRequest.Wrong.
func (c *Client) Reject(ctx context.Context, q ReadRequest) error {
	return listen(ctx, c, "Read", q, func(chunk) error { return nil })
}

// A body is the bytes of a Read as they come.
type body struct {
	c      *Client
	s      grpc.ClientStream
	cancel context.CancelFunc
	got    []byte
	left   int64
}

func (b *body) Read(p []byte) (int, error) {
	for len(b.got) == 0 {
		if b.left <= 0 {
			return 0, io.EOF
		}
		var m chunk
		if err := b.s.RecvMsg(&m); errors.Is(err, io.EOF) {
			return 0, io.ErrUnexpectedEOF
		} else if err != nil {
			return 0, b.c.told(err)
		}
		b.got = m.b
	}
	n := copy(p, b.got)
	b.got = b.got[n:]
	b.left -= int64(n)
	return n, nil
}

func (b *body) Close() error {
	b.cancel()
	return nil
}
