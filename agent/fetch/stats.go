package fetch

import (
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// Stats are a chain's counts since it was made.
type Stats struct {
	StoreBytes     int64 // read from the store
	StoreReads     int64 // reads that got something from the store
	OriginBytes    int64 // received from the origin
	OriginRequests int64 // requests to the origin
	Joined         int64 // reads that needed no flight of their own
	UnstoredBytes  int64 // received and not kept by the store
	Yielded        int64 // times a flight waited for another process
	Rejected       int64 // calls of Reject
	Running        int   // requests at this moment
	Queued         int   // flights waiting to become requests
	Waiting        int   // readers waiting
	Buffered       int64 // bytes of flights' buffers
}

// Stats counts.
func (c *Chain) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.StoreBytes, s.StoreReads = c.storeBytes.Load(), c.storeReads.Load()
	for cl := range classes {
		s.Running += c.running[cl]
	}
	c.blobs.Range(func(_, v any) bool {
		b := v.(*blob)
		s.Waiting += len(b.waiters)
		for _, f := range b.flights {
			s.Buffered += int64(cap(f.buf))
			if f.state == queued {
				s.Queued++
			}
		}
		return true
	})
	return s
}

// EventKind tells events apart.
type EventKind uint8

// The kinds of events.
const (
	Started EventKind = iota // a request goes to the origin for Range
	Arrived                  // Range has arrived: some 256 KiB, or the rest of a request
	Ended                    // the request brought Range, which may be less than was asked for
)

// An Event is something that happened to a request to the origin.
type Event struct {
	Kind  EventKind
	At    time.Time
	Blob  ztoc.BlobRef
	Range ztoc.Range
	Class string        // "demand", "stream" or "prefetch"
	Took  time.Duration // of Ended
	Err   error         // of Ended; context.Canceled when nobody wanted it any more
}

func (c *Chain) event(e Event) {
	if c.o.OnEvent != nil {
		c.o.OnEvent(e)
	}
}
