package lazyfs

import (
	"context"
	"io"

	"github.com/muster-hpc/muster/lazyfs/tree"
)

// ReadFile reads from off of a regular file's content as a reader of the mount would see it, for whoever wants to
// look into the image from within the process (the guess of what a program touches first). Like io.ReaderAt it
// fills p or returns an error, io.EOF at the end of the file. It waits until Serve runs; what it reads
// counts for nobody's profile.
func (s *Server) ReadFile(ctx context.Context, row tree.Row, p []byte, off int64) (int, error) {
	if err := s.waitServing(ctx); err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) {
		e := s.table.Extent(row, off)
		if e.Len <= 0 {
			return n, io.EOF
		}
		part := p[n:][:min(int64(len(p)-n), e.Len)]
		if e.Layer < 0 {
			clear(part)
		} else if err := s.readLayer(ctx, e.Layer, e.Offset, part); err != nil {
			return n, err
		}
		n, off = n+len(part), off+int64(len(part))
	}
	return n, nil
}
