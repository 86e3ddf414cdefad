package lazyfs

import (
	"github.com/muster-hpc/muster/ztoc"
)

// A unitID names what is verified and inflated as a whole: a span of a layer, or a piece of the warm file.
// Layer (or warmSource) in the upper half, index in the lower.
type unitID uint64

const (
	warmSource        = 1<<32 - 1
	zeroUnit   unitID = 1<<64 - 1 // not a unit: a hole
)

func unitOf(source, index int) unitID { return unitID(uint64(source)<<32 | uint64(uint32(index))) }

func (u unitID) source() int { return int(u >> 32) }
func (u unitID) index() int  { return int(uint32(u)) }

type unitState uint8

const (
	queued  unitState = iota // in the queue named by unit.queue
	loading                  // a worker has it
	ready                    // inflated, in the LRU list
)

// A unit is a span or piece that is at hand or on its way. All fields are guarded by Server.mu, except that
// buf is read without it by whoever holds a reference.
type unit struct {
	id       unitID
	size     int64 // inflated bytes
	packed   int64 // compressed bytes, 0 for the warm file's
	state    unitState
	queue    *queue // while queued
	lane     *lane  // while loading: whose limits it counts against
	demand   bool   // somebody waits for it
	fetching bool   // Blobs has been asked
	poked    bool   // with the priority of demand, from the start or later
	ahead    *int64 // budget it counts against until somebody reads it; nil: read, or asked for
	spared   bool   // was not evicted once, because it had not been read
	refs     int    // users of buf
	read     int64  // bytes of it that readers got, some perhaps twice
	buf      []byte

	first, last *miss // reads that wait for it, first come first
	prev, next  *unit // LRU list
}

// A queue is first in, first out, apart from pushFront. A unit that moved to another queue is skipped.
type queue struct{ front, back []*unit }

func (q *queue) push(u *unit)      { q.back = append(q.back, u); u.queue = q }
func (q *queue) pushFront(u *unit) { q.front = append(q.front, u); u.queue = q }

func (q *queue) peek() *unit {
	for {
		var u *unit
		switch {
		case len(q.front) > 0:
			u = q.front[len(q.front)-1]
		case len(q.back) > 0:
			u = q.back[0]
		default:
			q.back = nil
			return nil
		}
		if u.state == queued && u.queue == q {
			return u
		}
		q.drop()
	}
}

func (q *queue) drop() {
	if n := len(q.front); n > 0 {
		q.front = q.front[:n-1]
		return
	}
	q.back[0] = nil
	q.back = q.back[1:]
}

// A lane is a class of loads with limits of its own, so that one class never holds up another.
type lane struct {
	q        queue
	workers  int   // now
	limit    int   // most workers
	bytes    int64 // compressed, in their hands
	maxBytes int64 // of these; a single load may exceed it
	pri      ztoc.Priority
}

func (l *lane) take() *unit {
	if l.workers >= l.limit {
		return nil
	}
	u := l.q.peek()
	if u == nil || (l.workers > 0 && l.bytes+u.packed > l.maxBytes) {
		return nil
	}
	l.q.drop()
	l.workers++
	l.bytes += u.packed
	u.state, u.queue, u.lane = loading, nil, l
	return u
}

// cache is what a Server has at hand and what it is about to have. Everything is guarded by Server.mu,
// which is never held while waiting for anything.
type cache struct {
	units  map[unitID]*unit
	lru    unit  // head of the ring; next is the most recently used
	bytes  int64 // of buffers of ready units and of those being inflated
	limit  int64
	parked map[uint64]*miss // by the request's unique
	held   int64            // bytes of units kept by reads that wait for more (see Server.resume)

	near lane // demanded and local
	far  lane // demanded, maybe from the network
	idle lane // ahead of demand

	cpu     int     // inflaters that may start
	cpuWait []*unit // loads that wait for one, with their wake-up
	wake    map[*unit]chan struct{}

	touched []bitmap // by layer: spans that somebody has read
	streams [16]stream
	clock   uint64 // orders the streams' use
	replay  replay
	closed  bool

	// Bytes of units loaded or being loaded ahead and not read yet, by the reason.
	aheadOfStreams, aheadOfReplay, aheadOfMisses int64
	guessed, guessedRight                        int // of the last neighbours loaded, see neighbour
}

func (c *cache) init(cfg Config) {
	c.units = map[unitID]*unit{}
	c.lru.next, c.lru.prev = &c.lru, &c.lru
	c.limit = cfg.Memory
	c.parked = map[uint64]*miss{}
	c.near = lane{limit: 2 * cfg.Inflaters, maxBytes: cfg.Compressed / 3, pri: ztoc.Demand}
	c.far = lane{limit: cfg.Fetches, maxBytes: cfg.Compressed / 3, pri: ztoc.Demand}
	c.idle = lane{limit: max(4*cfg.Inflaters, 8), maxBytes: cfg.Compressed / 3, pri: ztoc.Prefetch}
	c.cpu = cfg.Inflaters
	c.wake = map[*unit]chan struct{}{}
	c.touched = make([]bitmap, len(cfg.Layers))
}

func (c *cache) touch(u *unit) {
	u.prev.next, u.next.prev = u.next, u.prev
	c.link(u)
}

// sink makes u the least recently used.
func (c *cache) sink(u *unit) {
	u.prev.next, u.next.prev = u.next, u.prev
	u.prev, u.next = c.lru.prev, &c.lru
	u.prev.next, c.lru.prev = u, u
}

func (c *cache) link(u *unit) {
	u.next, u.prev = c.lru.next, &c.lru
	u.next.prev, c.lru.next = u, u
}

// makeRoom drops units that nobody uses, least recently used first, until need more bytes fit, and returns
// their buffers. What was loaded ahead and not read yet is passed over once: its reader is on the way, or has given up, and
// then it must not hold its budget for ever. What is in use stays, even beyond the limit: it is bounded by what is being
// answered.
func (c *cache) makeRoom(need int64) (free [][]byte) {
	for u := c.lru.prev; u != &c.lru && c.bytes+need > c.limit; {
		prev := u.prev
		switch {
		case u.refs > 0:
		case u.ahead != nil && !u.spared && c.limit > 0:
			u.spared = true
			c.touch(u)
			if prev == &c.lru { // all others have been looked at, so this one is next
				prev = u
			}
		default:
			free = append(free, c.evict(u))
		}
		u = prev
	}
	return free
}

func (c *cache) evict(u *unit) []byte {
	u.prev.next, u.next.prev = u.next, u.prev
	delete(c.units, u.id)
	c.bytes -= int64(cap(u.buf))
	c.settle(u)
	buf := u.buf
	u.buf = nil
	return buf
}

// used is settle because somebody reads u.
func (c *cache) used(u *unit) bool {
	if u.ahead == &c.aheadOfMisses {
		c.guessedRight++
	}
	return c.settle(u)
}

// settle ends u's counting as work done ahead.
func (c *cache) settle(u *unit) (was bool) {
	if u.ahead == nil {
		return false
	}
	*u.ahead -= u.size
	u.ahead = nil
	return true
}

// A bitmap grows as it is set.
type bitmap []uint64

func (b *bitmap) set(i int) {
	for len(*b) <= i/64 {
		*b = append(*b, 0)
	}
	(*b)[i/64] |= 1 << (i % 64)
}

func (b bitmap) has(i int) bool { return i/64 < len(b) && b[i/64]>>(i%64)&1 != 0 }
