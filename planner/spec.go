package planner

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"unicode/utf8"

	"github.com/muster-hpc/muster/ztoc"
)

// Version is that of the rules by which plans are made. Two versions may make different plans of one JobSpec, so the
// version stands in the JobSpec and a plan is only made of one's own.
const Version = 1

// Bounds of a JobSpec. Whatever is beyond is refused, when it is made and when it comes from elsewhere.
const (
	MaxHosts   = 1 << 16   // hosts of a job
	MaxBlobs   = 1 << 12   // blobs of an image, its tables included
	MaxPieces  = 1 << 22   // pieces of a job: 4 TiB of 1 MiB pieces
	MaxName    = 255       // bytes of a name, address, group or job ID
	MaxImage   = 1 << 10   // bytes of an image reference
	MaxAccess  = 4 << 10   // bytes of a grant; peer's bound is the same
	MaxEncoded = 16 << 20  // bytes of an encoded JobSpec: 65,536 hosts with short names fit
	MinPiece   = 64 << 10  // bytes; below, requests cost more than bytes
	MaxPiece   = 64 << 20  // bytes; above, nothing is passed on while it arrives
	MaxTrees   = 256       // trees of a plan
	MaxFanout  = MaxHosts  // children of a host in one tree
	MaxSeeds   = 32        // hosts that fetch from the origin; each is the root of a tree, and so a peer of all
	MaxRun     = 256 << 20 // bytes of one run
)

// What callers decide on.
var (
	// ErrInvalid says that a JobSpec is malformed or beyond a bound.
	ErrInvalid = errors.New("invalid job spec")
	// ErrVersion says that a JobSpec is for another version of the planner: take what its hosts have, wait for none.
	ErrVersion = errors.New("job spec of another planner version")
)

// A JobSpec is everything that a plan depends on, frozen by one host of the job and the same on all.
type JobSpec struct {
	// Planner is the Version whose rules apply.
	Planner uint32
	// Job names the stage: the scheduler's job ID, or one made up.
	Job string
	// Image is the reference that was resolved, for people and for the origin.
	Image string
	// Manifest is what the reference resolved to.
	Manifest ztoc.Digest
	// Blobs are what each host shall have, in the order in which it is wanted. Digests differ.
	Blobs []Blob
	// Hosts are the hosts of the job in the scheduler's order. Names differ. The order of equal hosts decides who
	// does what, nothing else.
	Hosts []Host
	// Params are the numbers that shape the plan. A zero means the planner's own choice.
	Params Params
	// Access is the grant that the origin's verdict led to. The planner does not look at it; it stands here so that one
	// PlanID means one verdict.
	Access []byte
}

// A Blob is something that all hosts of a job shall have.
type Blob struct {
	ztoc.BlobRef
	// Kind says what it is.
	Kind Kind
	// Ztoc is the digest of a layer's table in the packed form; the table is a blob of its own in the list.
	// Empty for a layer means: to be built on the way by Plan.Indexer's host.
	Ztoc ztoc.Digest
}

// A Kind says what a blob is.
type Kind uint8

// The kinds of blob.
const (
	Layer Kind = iota // a layer, or the blob derived from one
	Table             // a ztoc in packed form
	Meta              // manifest, config, profile: small, needed before anything else
	kinds
)

var kindNames = [kinds]string{"layer", "table", "meta"}

func (k Kind) String() string {
	if k < kinds {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// A Host is one machine of the job.
type Host struct {
	Name  string // the scheduler's node name, which stands in its certificate
	Addr  string // "host:port" of its data listener
	Group string // what is close to each other: a rack, a leaf switch. All empty: nothing is known
	Seed  bool   // may reach the origin
	Slow  bool   // is known to be slow: it passes nothing on
}

// Params are the numbers that shape a plan. docs/trees.md says where the planner's own choices come from.
type Params struct {
	// Piece is the grid on which blobs are dealt out, in bytes: a multiple of 64 KiB. Small pieces are passed on earlier and cost
	// more bookkeeping. 0: ztoc.PieceSize, doubled until there are about 32,768 at most.
	Piece int64
	// Trees is how many trees there are at most. More spread the work more evenly and give a host more peers. 0: chosen by N.
	Trees int
	// Fanout is how many children a host has in a tree that it passes pieces on in. 0: DefaultFanout.
	Fanout int
	// Seeds is how many hosts fetch from the origin at most. 0: DefaultSeeds.
	Seeds int
	// Run is about how many adjacent bytes a seed asks of the origin in one request. 0: DefaultRun.
	Run int64
}

// A PlanID is the SHA-256 of a JobSpec's encoding. Hosts with the same PlanID have the same plan.
type PlanID [sha256.Size]byte

func (p PlanID) String() string { return hex.EncodeToString(p[:]) }

// ParsePlanID reads what String wrote.
func ParsePlanID(s string) (PlanID, error) {
	var p PlanID
	if len(s) != 2*len(p) {
		return p, fmt.Errorf("%w: %.80q is no plan ID", ErrInvalid, s)
	}
	if _, err := hex.Decode(p[:], []byte(s)); err != nil || p.String() != s {
		return PlanID{}, fmt.Errorf("%w: %.80q is no plan ID", ErrInvalid, s)
	}
	return p, nil
}

// ID is the identity of the plan that s gives. Specs that Validate refuses have none that anybody accepts.
func (s *JobSpec) ID() PlanID { return sha256.Sum256(s.append(nil)) }

// Validate reports what is wrong with s: ErrInvalid. It does not look at the version, which decides about planning, not about reading.
func (s *JobSpec) Validate() error {
	switch {
	case !text(s.Job, MaxName) || s.Job == "":
		return fmt.Errorf("%w: job ID %.80q", ErrInvalid, s.Job)
	case !text(s.Image, MaxImage):
		return fmt.Errorf("%w: image %.80q", ErrInvalid, s.Image)
	case len(s.Hosts) == 0 || len(s.Hosts) > MaxHosts:
		return fmt.Errorf("%w: %d hosts", ErrInvalid, len(s.Hosts))
	case len(s.Blobs) > MaxBlobs:
		return fmt.Errorf("%w: %d blobs", ErrInvalid, len(s.Blobs))
	case len(s.Access) > MaxAccess:
		return fmt.Errorf("%w: a grant of %d bytes", ErrInvalid, len(s.Access))
	}
	if err := checkDigest(s.Manifest); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	if err := s.Params.validate(); err != nil {
		return err
	}
	if err := s.validateBlobs(); err != nil {
		return err
	}
	names := make(map[string]bool, len(s.Hosts))
	for _, h := range s.Hosts {
		if err := h.validate(); err != nil {
			return err
		}
		if names[h.Name] {
			return fmt.Errorf("%w: host %q twice", ErrInvalid, h.Name)
		}
		names[h.Name] = true
	}
	return nil
}

func (s *JobSpec) validateBlobs() error {
	piece, pieces := s.piece(), int64(0)
	seen := make(map[ztoc.Digest]bool, len(s.Blobs))
	for _, b := range s.Blobs {
		if err := checkDigest(b.Digest); err != nil {
			return err
		}
		if b.Ztoc != "" {
			if err := checkDigest(b.Ztoc); err != nil {
				return err
			}
		}
		if b.Kind >= kinds || b.Size < 0 || (b.Kind != Layer && b.Ztoc != "") {
			return fmt.Errorf("%w: blob %s of %d bytes, %s, ztoc %q", ErrInvalid, b.Digest, b.Size, b.Kind, b.Ztoc)
		}
		if seen[b.Digest] {
			return fmt.Errorf("%w: blob %s twice", ErrInvalid, b.Digest)
		}
		seen[b.Digest] = true
		if b.Size > MaxPieces*piece {
			return fmt.Errorf("%w: blob %s of %d bytes", ErrInvalid, b.Digest, b.Size)
		}
		if pieces += (b.Size + piece - 1) / piece; pieces > MaxPieces {
			return fmt.Errorf("%w: more than %d pieces", ErrInvalid, MaxPieces)
		}
	}
	return nil
}

func (h Host) validate() error {
	if h.Name == "" || !text(h.Name, MaxName) || !text(h.Group, MaxName) || !text(h.Addr, MaxName) {
		return fmt.Errorf("%w: host %.80q at %.80q in group %.80q", ErrInvalid, h.Name, h.Addr, h.Group)
	}
	if _, port, err := net.SplitHostPort(h.Addr); err != nil || port == "" {
		return fmt.Errorf("%w: host %q: address %.80q is not host:port", ErrInvalid, h.Name, h.Addr)
	}
	return nil
}

func (p Params) validate() error {
	switch {
	case p.Piece != 0 && (p.Piece < MinPiece || p.Piece > MaxPiece || p.Piece%MinPiece != 0):
		return fmt.Errorf("%w: pieces of %d bytes", ErrInvalid, p.Piece)
	case p.Trees < 0 || p.Trees > MaxTrees:
		return fmt.Errorf("%w: %d trees", ErrInvalid, p.Trees)
	case p.Fanout < 0 || p.Fanout > MaxFanout:
		return fmt.Errorf("%w: fan-out %d", ErrInvalid, p.Fanout)
	case p.Seeds < 0 || p.Seeds > MaxSeeds:
		return fmt.Errorf("%w: %d seeds", ErrInvalid, p.Seeds)
	case p.Run < 0 || p.Run > MaxRun:
		return fmt.Errorf("%w: runs of %d bytes", ErrInvalid, p.Run)
	}
	return nil
}

// piece is the grid in bytes.
func (s *JobSpec) piece() int64 {
	if s.Params.Piece != 0 {
		return s.Params.Piece
	}
	size := int64(ztoc.PieceSize)
	for size < MaxPiece && s.size()/size > manyPieces {
		size *= 2
	}
	return size
}

// size is the bytes of all blobs. It may be anything where Validate fails.
func (s *JobSpec) size() (n int64) {
	for _, b := range s.Blobs {
		n += b.Size
	}
	return n
}

func checkDigest(d ztoc.Digest) error {
	if _, err := ztoc.ParseDigest(string(d)); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

// text reports whether s is valid UTF-8 without control characters, of n bytes at most: names go to logs and terminals.
func text(s string, n int) bool {
	if len(s) > n || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			return false
		}
	}
	return true
}
