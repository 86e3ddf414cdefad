package fetchtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// An Origin is a fetch.Origin in memory with a log, and with limits and faults that a test may set before its first
// request.
type Origin struct {
	// Latency passes before a body begins.
	Latency time.Duration
	// Rate is bytes a second of each body; 0 is without limit.
	Rate int
	// Fault may replace a request's answer: an error, or a body that it makes of the right one. N counts
	// requests from 1.
	Fault func(n int, d ztoc.Digest, r ztoc.Range, body []byte) ([]byte, error)
	// Gate, if not nil, is received from before each Read of a body goes on.
	Gate chan struct{}

	mu    sync.Mutex
	blobs map[ztoc.Digest][]byte
	log   []Request
	open  int
	most  int
	sent  int64
}

// A Request is one request of the log.
type Request struct {
	Digest ztoc.Digest
	Range  ztoc.Range
}

func (r Request) String() string { return r.Range.String() }

// NewOrigin makes an origin that has these blobs.
func NewOrigin(blobs ...[]byte) *Origin {
	o := &Origin{blobs: map[ztoc.Digest][]byte{}}
	for _, b := range blobs {
		o.blobs[ztoc.DigestOf(b)] = b
	}
	return o
}

// Content is n bytes that look random and are the same for the same seed.
func Content(seed uint64, n int) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b) //nolint:errcheck // never fails
	return b
}

// Ref is the reference of a blob.
func Ref(b []byte) ztoc.BlobRef { return ztoc.BlobRef{Digest: ztoc.DigestOf(b), Size: int64(len(b))} }

// Blob is fetch.Origin's.
func (o *Origin) Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	o.mu.Lock()
	o.log = append(o.log, Request{d, r})
	n := len(o.log)
	o.open++
	o.most = max(o.most, o.open)
	data, ok := o.blobs[d]
	o.mu.Unlock()
	b := &body{o: o, ctx: ctx, closed: make(chan struct{})}
	if err := b.sleep(o.Latency); err != nil {
		b.Close()
		return nil, err
	}
	if !ok || r.Start < 0 || r.End > int64(len(data)) || r.Empty() {
		b.Close()
		return nil, fmt.Errorf("origin: no %v of %s", r, d)
	}
	part := data[r.Start:r.End]
	if o.Fault != nil {
		var err error
		if part, err = o.Fault(n, d, r, bytes.Clone(part)); err != nil {
			b.Close()
			return nil, err
		}
	}
	b.rest = part
	return b, nil
}

// Requests is the log so far.
func (o *Origin) Requests() []Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.log)
}

// Sent is the bytes of all bodies so far.
func (o *Origin) Sent() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sent
}

// Most is the most requests that were in progress at one time; Open is those in progress now.
func (o *Origin) Most() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.most
}

// Open is the number of requests in progress.
func (o *Origin) Open() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.open
}

type body struct {
	o      *Origin
	ctx    context.Context
	rest   []byte
	sent   int
	began  time.Time // of the first Read, when there is a rate
	once   sync.Once
	closed chan struct{}
}

func (b *body) sleep(d time.Duration) error {
	if d <= 0 {
		return b.ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return b.ctx.Err()
	case <-b.ctx.Done():
		return b.ctx.Err()
	case <-b.closed:
		return io.ErrClosedPipe
	}
}

func (b *body) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	if len(b.rest) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), len(b.rest), 16<<10)
	if b.o.Gate != nil {
		select {
		case <-b.o.Gate:
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		case <-b.closed:
			return 0, io.ErrClosedPipe
		}
	}
	if b.o.Rate > 0 {
		n = min(n, max(1, b.o.Rate/20))
		if b.began.IsZero() {
			b.began = time.Now()
		}
		b.sent += n
		due := b.began.Add(time.Duration(b.sent) * time.Second / time.Duration(b.o.Rate))
		if err := b.sleep(time.Until(due)); err != nil {
			return 0, err
		}
	}
	copy(p, b.rest[:n])
	b.rest = b.rest[n:]
	b.o.mu.Lock()
	b.o.sent += int64(n)
	b.o.mu.Unlock()
	return n, nil
}

func (b *body) Close() error {
	b.once.Do(func() {
		close(b.closed)
		b.o.mu.Lock()
		b.o.open--
		b.o.mu.Unlock()
	})
	return nil
}
