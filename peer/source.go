package peer

import (
	"context"

	"github.com/muster-hpc/muster/ztoc"
)

// A Source is what a Server answers ranges from. The agent implements it; Shelf is one in memory.
// Its methods may be called at the same time.
type Source interface {
	// Open is called for each Want. It checks that the asker may have the blob (ErrDenied) and that this host knows
	// of it (ErrNotHere). For demand it must answer from what it knows, within 40 ms; otherwise it may take its
	// time, as ctx allows, to learn of the asker's plan.
	Open(ctx context.Context, from Asker, d ztoc.Digest) (Blob, error)
}

// A Blob is what a Source has of one blob, and will have. Its methods may be called at the same time.
type Blob interface {
	// Have reports whether ReadAt would give every byte of r now.
	Have(r ztoc.Range) bool
	// Promised reports whether the asker that opened the blob may wait for r: this host expects it, and stands
	// before the asker in the plan's order for that piece. It is not asked for demand.
	Promised(r ztoc.Range) bool
	// ReadAt fills p from off, or fails when any of it is absent.
	ReadAt(p []byte, off int64) error
	// Watch has f called for each range that arrives, and for each that was promised and will not come, from now on
	// until stop is called. Nothing may be lost between: whoever calls Watch and then Have sees a range in one of them. f
	// does not block and may be called with locks held; it may still be called once while stop runs.
	Watch(f func(r ztoc.Range)) (stop func())
	// Close is called once, after the last use.
	Close() error
}

// NotHere is a Source that has nothing, for a host that serves no one.
type NotHere struct{}

// Open gives ErrNotHere.
func (NotHere) Open(context.Context, Asker, ztoc.Digest) (Blob, error) { return nil, ErrNotHere }
