package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// Blobs is where compressed bytes come from: a store, peers, the origin.
type Blobs interface {
	// ReadAt fills p from off of blob or fails. It waits as long as its own rules let it, and at most until
	// ctx ends. The bytes are not proven; the server checks them against the span's digest.
	ReadAt(ctx context.Context, blob ztoc.BlobRef, p []byte, off int64, pri ztoc.Priority) error
	// Reject drops r of blob, which did not match its digest, so that it will be fetched again, from
	// elsewhere. It returns an error when it is time to give up.
	Reject(blob ztoc.BlobRef, r ztoc.Range, cause error) error
}

// Prefetcher is what Blobs may also be: told what compressed bytes will be wanted, in order, further ahead than
// the server inflates. Prefetch returns at once; what it started is dropped when ctx ends.
type Prefetcher interface {
	Prefetch(ctx context.Context, blob ztoc.BlobRef, r []ztoc.Range)
}

// Local is what Blobs may also be: able to say, without waiting, that all of r can be read without the
// network. Such reads never queue behind those that wait for the network.
type Local interface {
	Local(blob ztoc.BlobRef, r ztoc.Range) bool
}

// Ztoc is what the server needs of a layer's *ztoc.Ztoc.
type Ztoc interface {
	NumSpans() int
	Span(i int) ztoc.Span
	SpansOf(out ztoc.Range) (lo, hi int)
	Inflate(dst []byte, i int, blob []byte) error
}

// A Layer is where the bytes of a layer of the table come from.
type Layer struct {
	Ref  ztoc.BlobRef
	Ztoc Ztoc
}

// Config is what a Server serves and with what means. Zero means the default.
type Config struct {
	Table        *tree.Table // must stay mapped as long as Serve runs
	Layers       []Layer     // in the order of Table.Layers()
	Blobs        Blobs
	Presentation tree.Presentation

	// Profile is what programs of this image touched first the last time: its spans are fetched and
	// inflated ahead, in its order.
	Profile Profile
	// Warm holds the inflated bytes of a profile (WriteWarm); what it has is read from there. A file that is
	// not whole or belongs to other layers is refused by New (ErrWarm): try again without it.
	Warm *os.File

	// Memory bounds the inflated bytes kept, default 56 MiB. Below four spans, sequential reads inflate one
	// span at a time; above, it only helps readers who come back to a span that the page cache has lost.
	Memory int64
	// Compressed bounds the compressed bytes in flight between Blobs and inflating, default 24 MiB. It is what
	// limits the number of spans waiting for the network, beside Fetches.
	Compressed int64
	// Fetches bounds how many spans wait for Blobs at the same time, default 64.
	Fetches int
	// Inflaters bounds how many spans are inflated at the same time, default one per processor. GOMAXPROCS
	// should be a little larger, so that requests that need no inflating find a processor.
	Inflaters int
	// Loops is how many threads take requests from the kernel, default 2: they never wait for anything else.
	Loops int
	// Quiet is how long readers must have been quiet, in time during which no read was waiting, until what was
	// read counts as the start-up of a program and the profile is done. Default 2 s.
	Quiet time.Duration
	// Idle is how long there must have been no read until memory is given back. Default 10 s.
	Idle time.Duration

	// Init is the first exchange with the kernel when somebody else had it; zero: Serve has it.
	Init   Init
	Compat Compat
	// Slots is the memory for requests when it is shared with a parent; nil: private.
	Slots *Slots

	// OnProfile gets what was read, once: when readers have been quiet, or when Serve ends before. It is not
	// called when nothing was read. It may take its time.
	OnProfile func(Profile)
	// KeepWarm has the warm file of what is read written, for the next mount, unless there is one in Warm already. It is
	// called on a goroutine of its own at the first read, and calls write with where the file goes; write takes what is
	// read as it is read, and returns when the profile is done: nil, or an error when what came was not worth keeping.
	KeepWarm func(write func(io.Writer) error) error
	// Backing keeps plain copies of large files that are really read, for passthrough; nil: none.
	Backing Backing
	// Modes is memory of ModesSize bytes, zero at first, that all servers of a mount share, aligned to a page: how
	// files were opened the first time. nil: private.
	Modes []byte
	Log   *slog.Logger
}

// A Server serves one mounted image. It keeps nothing about inodes: node IDs are rows of the table.
type Server struct {
	table  *tree.Table
	look   tree.Presentation
	layers []Layer
	blobs  Blobs
	ahead  Prefetcher // blobs, or nil
	local  Local      // blobs, or nil
	log    *slog.Logger
	cfg    Config

	conn    conn
	slots   *Slots
	ctx     context.Context // of Serve; ends the fetches
	serving chan struct{}   // closed when ctx and conn are set
	stats   counters

	inflated   *pool
	compressed *pool
	warm       *warm    // nil without
	capture    *capture // nil without
	pass       *pass    // nil unless passthrough was agreed on
	grow       *grow    // nil unless backing files are made
	recorder   recorder
	logged     causes
	working    sync.WaitGroup // workers; added to under mu while not closed

	mu sync.Mutex // for everything in cache
	cache
}

// New checks that the parts of c belong together.
func New(c Config) (*Server, error) {
	if c.Table == nil || c.Blobs == nil {
		return nil, errors.New("lazyfs: no table or no blobs")
	}
	refs := c.Table.Layers()
	if len(refs) != len(c.Layers) {
		return nil, fmt.Errorf("lazyfs: table has %d layers, %d given", len(refs), len(c.Layers))
	}
	for i, l := range c.Layers {
		if l.Ztoc == nil || (refs[i].Blob.Digest != "" && refs[i].Blob != l.Ref) {
			return nil, fmt.Errorf("lazyfs: layer %d is %s in the table, %s given", i, refs[i].Blob.Digest, l.Ref.Digest)
		}
	}
	c.setDefaults()
	s := &Server{
		table: c.Table, look: c.Presentation, layers: c.Layers, blobs: c.Blobs, log: c.Log, cfg: c, slots: c.Slots, serving: make(chan struct{}),
		inflated: newPool(4 << 20), compressed: newPool(4 << 20),
	}
	s.ahead, _ = c.Blobs.(Prefetcher)
	s.local, _ = c.Blobs.(Local)
	s.recorder.init(c.Layers)
	s.cache.init(c)
	if c.Warm != nil {
		w, err := openWarm(c.Warm, c.Layers)
		if err != nil {
			return nil, err
		}
		s.warm = w
	} else if c.KeepWarm != nil {
		s.capture = &capture{keep: c.KeepWarm, layers: c.Layers}
	}
	return s, nil
}

func (c *Config) setDefaults() {
	or := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	or(&c.Fetches, 64)
	or(&c.Inflaters, runtime.NumCPU())
	or(&c.Loops, 2)
	if c.Memory <= 0 {
		c.Memory = 56 << 20
	}
	if c.Compressed <= 0 {
		c.Compressed = 24 << 20
	}
	if c.Quiet <= 0 {
		c.Quiet = 2 * time.Second
	}
	if c.Idle <= 0 {
		c.Idle = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Serve answers the requests that come over dev until the file system is unmounted, which is its ordinary
// end (nil), or until ctx ends. In the latter case what had not been answered stays in the slots; the threads
// that wait for requests end with the mount or the process. Serve is called once. It does not close dev.
func (s *Server) Serve(ctx context.Context, dev *os.File) error {
	if len(s.cfg.Init.Reply) == 0 {
		in, err := Negotiate(dev, s.cfg.Compat, HasBacking(s.cfg))
		if err != nil {
			return err
		}
		s.cfg.Init = in
	}
	lim, err := s.cfg.Init.limits()
	if err != nil {
		return err
	}
	if lim.request > minReadBuffer {
		return fmt.Errorf("the kernel was promised room for requests of %d bytes, there is room for %d", lim.request, minReadBuffer)
	}
	if s.slots == nil {
		if s.slots, err = newPrivateSlots(); err != nil {
			return err
		}
	}
	s.conn = conn{int(dev.Fd()), dev}
	if err := s.initBacking(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.ctx = ctx
	close(s.serving)
	s.log.Debug("serving", "init", s.cfg.Init.String(), "inodes", s.table.Len(), "layers", len(s.layers))

	w := newScratch()
	for _, sl := range s.slots.left() {
		if !s.dispatch(w, sl) {
			s.slots.put(sl)
		}
	}
	s.watchParked()
	s.startReplay()
	defer s.deliverProfile()
	kept := make(chan struct{})
	go func() { defer close(kept); s.keepHouse(ctx) }()
	grown := make(chan struct{})
	go func() { defer close(grown); s.makeBacking(ctx) }()

	ends := make(chan error, s.cfg.Loops)
	for range s.cfg.Loops {
		go func() { ends <- s.loop() }()
	}
	ended := false // all loops
	defer func() {
		cancel()
		<-kept
		<-grown
		s.drain()
		if ended {
			s.slots.unmap()
		}
	}()
	for range s.cfg.Loops {
		select {
		case err := <-ends:
			if !errors.Is(err, errUnmounted) {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	ended = true
	return nil
}

// counters are the Stats while they are counted.
type counters struct {
	requests, reads, readBytes, hits, misses, interrupted  atomic.Int64
	inflated, inflatedBytes, fetchedBytes, inflateTime     atomic.Int64
	aheadInflated, aheadUsed, rejected, failed, warmPieces atomic.Int64
	warmBad, passed, backed                                atomic.Int64
}

// Stats is what a Server did since New.
type Stats struct {
	Requests      int64         `json:"requests"`       // other than reads
	Reads         int64         `json:"reads"`          // answered or waiting
	ReadBytes     int64         `json:"read_bytes"`     // asked for by them
	Hits          int64         `json:"hits"`           // reads answered from inflated bytes
	Misses        int64         `json:"misses"`         // reads that had to wait
	Interrupted   int64         `json:"interrupted"`    // waiting reads given up because the reader was killed
	Failed        int64         `json:"failed"`         // reads answered with EIO
	Inflated      int64         `json:"inflated"`       // spans
	InflatedBytes int64         `json:"inflated_bytes"` // out of them
	FetchedBytes  int64         `json:"fetched_bytes"`  // compressed, from Blobs
	InflateTime   time.Duration `json:"inflate_time"`   // processor time of hashing and inflating
	AheadInflated int64         `json:"ahead_inflated"` // spans inflated before anybody asked
	AheadUsed     int64         `json:"ahead_used"`     // of these, read later
	Rejected      int64         `json:"rejected"`       // spans whose bytes did not match their digest
	WarmPieces    int64         `json:"warm_pieces"`    // pieces read from the warm file
	WarmBad       int64         `json:"warm_bad"`       // of these, rotten, so that spans were used instead
	Passed        int64         `json:"passed"`         // opens of files that the kernel reads by itself
	Backed        int64         `json:"backed"`         // files of which a plain copy was made
	Waiting       int           `json:"waiting"`        // reads parked now
	Memory        int64         `json:"memory"`         // bytes of buffers held now
}

// Stats may be called at any time.
func (s *Server) Stats() Stats {
	c := &s.stats
	s.mu.Lock()
	waiting := len(s.parked)
	s.mu.Unlock()
	return Stats{
		Requests: c.requests.Load(), Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(), Hits: c.hits.Load(),
		Misses: c.misses.Load(), Interrupted: c.interrupted.Load(), Failed: c.failed.Load(), Inflated: c.inflated.Load(),
		InflatedBytes: c.inflatedBytes.Load(), FetchedBytes: c.fetchedBytes.Load(),
		InflateTime:   time.Duration(c.inflateTime.Load()),
		AheadInflated: c.aheadInflated.Load(), AheadUsed: c.aheadUsed.Load(), Rejected: c.rejected.Load(),
		WarmPieces: c.warmPieces.Load(), WarmBad: c.warmBad.Load(), Passed: c.passed.Load(), Backed: c.backed.Load(),
		Waiting: waiting, Memory: s.inflated.bytes() + s.compressed.bytes(),
	}
}
