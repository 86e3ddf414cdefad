package origin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"hash"
	"io"

	"github.com/muster-hpc/muster/ztoc"
)

// bytesBody is a request body over b.
func bytesBody(b []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) }

// hasher is a SHA-256 that ends as a Digest.
type hasher struct{ hash.Hash }

func newHash() hasher { return hasher{sha256.New()} }

func (h hasher) digest() ztoc.Digest { return ztoc.DigestFromSum([sha256.Size]byte(h.Sum(nil))) }

// ctxReader ends with its context: a copy to or from a slow file system must be stoppable.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *ctxReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}
