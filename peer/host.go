package peer

import (
	"errors"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A Host is another agent as it is dialled: Name must stand in its certificate, Addr is where it listens for data
// ("10.0.0.7:7464", "[fd00::7]:7464").
type Host struct {
	Name string
	Addr string
}

func (h Host) String() string { return h.Name + " (" + h.Addr + ")" }

// Errors that callers decide on. They keep their identity across the network.
var (
	// ErrNotHere says that the host has no such thing now. Somebody else may have it.
	ErrNotHere = errors.New("not here")
	// ErrDenied says that the asker may not have it: its certificate, grant or name does not allow it.
	ErrDenied = errors.New("denied")
	// ErrBusy says that the host is over one of its bounds. It was said at once; try another host, or later.
	ErrBusy = errors.New("busy")
	// ErrSlow says that a host was silent for too long, or moved fewer bytes than the minimum rate.
	ErrSlow = errors.New("too slow")
	// ErrTruncated says that a connection ended before what was asked for was answered.
	ErrTruncated = errors.New("cut short")
	// ErrProtocol says that the other end sent something that it must not.
	ErrProtocol = errors.New("protocol violation")
	// ErrUnknown says that the host does not know such a question: it runs another version.
	ErrUnknown = errors.New("unknown question")
	// ErrClosed says that this end was closed.
	ErrClosed = errors.New("peer: closed")
)

// FrameSize is the most bytes of a blob in one frame. Smaller, and frames cost more than bytes; larger, and demand
// waits longer behind prefetch.
const FrameSize = 128 << 10

// Bounds of the protocol, the same on all hosts.
const (
	MaxName   = 255     // bytes of a host's name
	MaxPlanID = 128     // bytes of a plan's ID
	MaxGrant  = 4 << 10 // bytes of an access grant
	MaxRanges = 1 << 16 // ranges in one Want
	MaxPieces = 1 << 16 // pieces in one Want: 16 GiB
)

// A Hello opens a stream: it says for what the asker asks.
type Hello struct {
	Plan     string // the PlanID, empty when no plan is behind it
	Rank     int    // the asker's rank in the plan's order of hosts
	Priority ztoc.Priority
	Grant    []byte // what proves that the asker may have private blobs; the Source's matter
}

// An Asker is who wants something of a Source.
type Asker struct {
	Name string // from its certificate
	Hello
}

// Times of the protocol.
const (
	// Beat is how often a parent that has nothing to send says that it lives.
	Beat = 500 * time.Millisecond
	// HoldBack is the longest that one frame of prefetch is held back for demand, by the parent before it writes and by the
	// child before it reads. Without a limit a stream of demand would starve the stage: so each prefetch stream still moves 6 MB/s.
	HoldBack = 10 * time.Millisecond
	// decide is how long a Source may think about a demand request before the answer is ErrNotHere.
	decide = 40 * time.Millisecond
	// opening is how long a Source may think about a Want with Prefetch priority (it may have to learn of the plan first).
	opening = 30 * time.Second
)
