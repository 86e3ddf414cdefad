package control

import (
	"fmt"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// DefaultSocket is where an agent listens and commands look for it.
const DefaultSocket = "/run/muster/agent.sock"

// Ready is how much of an image a stage waits for.
type Ready string

// The kinds of readiness, each including those before it.
const (
	Mounted  Ready = "mounted"  // the tree answers
	Warm     Ready = "warm"     // what the program will touch first is local
	Complete Ready = "complete" // every byte of every layer is local, and each layer's digest was checked
)

// ParseReady reads a Ready; empty is Mounted.
func ParseReady(s string) (Ready, error) {
	switch r := Ready(s); r {
	case "":
		return Mounted, nil
	case Mounted, Warm, Complete:
		return r, nil
	}
	return "", fmt.Errorf("%q: readiness is mounted, warm or complete", s)
}

// A StageRequest asks for an image on the hosts of a job.
type StageRequest struct {
	// Job names the stage: asking twice with one name joins. Empty: made from user, image and hosts.
	Job      string   `json:"job,omitempty"`
	Image    string   `json:"image"`
	Platform string   `json:"platform,omitempty"` // empty: this machine's
	Hosts    []string `json:"hosts"`              // "name", or "name=address:port" where names do not resolve
	Ready    Ready    `json:"ready"`
	// UID and GID are for whom it is, -1 for the caller. Another one than the caller's only root may give.
	UID int64 `json:"uid"`
	GID int64 `json:"gid"`
	// Here asks for this host alone, as a prolog does that runs on each of the job's hosts: the plan is for all of Hosts, but the others
	// begin when they are asked themselves, and are not reported.
	Here bool `json:"here,omitempty"`
	// NoMount leaves the image unmounted: its bytes are all that is wanted.
	NoMount bool          `json:"noMount,omitempty"`
	Timeout time.Duration `json:"timeout,omitempty"` // 0: the agent's own bound
	// Secret is what the origin is shown for this user: host → "user:password". Never stored, never logged.
	Secret map[string]string `json:"secret,omitempty"`
}

// A HostState is how far one host has come.
type HostState struct {
	Host    string        `json:"host"`
	Phase   string        `json:"phase"` // waiting, resolve, fetch, index, mount, check, done, failed
	Ready   Ready         `json:"ready,omitempty"`
	Total   int64         `json:"total"`   // bytes of the image's layers, compressed
	Present int64         `json:"present"` // of them in the host's store
	Bytes   Sources       `json:"bytes"`   // by source, so far
	Took    time.Duration `json:"took"`    // since the host began; fixed when done
	Mount   string        `json:"mount,omitempty"`
	Error   string        `json:"error,omitempty"`
	Code    int           `json:"code,omitempty"` // exit code of Error
	Phases  []Phase       `json:"phases,omitempty"`
	Late    []LatePeer    `json:"late,omitempty"`
	// Sent is what the host passed on to others, bytes.
	Sent int64 `json:"sent"`
}

// Done reports whether the host will not change any more.
func (h HostState) Done() bool { return h.Phase == PhaseDone || h.Phase == PhaseFailed }

// The phases that callers decide on.
const (
	PhaseWaiting = "waiting"
	PhaseDone    = "done"
	PhaseFailed  = "failed"
)

// A Phase is one part of a host's work, from Start to End after the host began.
type Phase struct {
	Name  string        `json:"name"`
	Start time.Duration `json:"start"`
	End   time.Duration `json:"end"`
}

// A LatePeer is a host that was passed over, and why.
type LatePeer struct {
	Host   string        `json:"host"`
	Why    string        `json:"why"`
	Waited time.Duration `json:"waited"`
}

// Sources counts bytes, and the requests they took, by where they came from.
type Sources struct {
	Store  int64 `json:"store"` // had been there before
	Peer   int64 `json:"peer"`
	Origin int64 `json:"origin"`

	PeerRequests   int64 `json:"peerRequests"`
	OriginRequests int64 `json:"originRequests"`
}

// Add is the sum.
func (s Sources) Add(t Sources) Sources {
	s.Store += t.Store
	s.Peer += t.Peer
	s.Origin += t.Origin
	s.PeerRequests += t.PeerRequests
	s.OriginRequests += t.OriginRequests
	return s
}

// A StageEvent is one message of a stage: the states that changed, and at the end the Report.
type StageEvent struct {
	Hosts  []HostState `json:"hosts,omitempty"`
	Report *Report     `json:"report,omitempty"`
}

// A Report is a stage when it is over.
type Report struct {
	Job      string        `json:"job"`
	Image    string        `json:"image"`
	Digest   ztoc.Digest   `json:"digest,omitempty"`
	Plan     string        `json:"plan,omitempty"`
	Ready    Ready         `json:"ready"`
	Makespan time.Duration `json:"makespan"` // from the request to the last host ready
	Median   time.Duration `json:"median"`   // of the hosts' times
	Slowest  time.Duration `json:"slowest"`
	Ratio    float64       `json:"slowestOverMedian"`
	Size     int64         `json:"size"` // of the layers, compressed
	Bytes    Sources       `json:"bytes"`
	Hosts    []HostState   `json:"hosts"`
	Failed   int           `json:"failed"`
}

// An UnstageRequest ends a job on this host, or on Hosts.
type UnstageRequest struct {
	Job   string   `json:"job"`
	Hosts []string `json:"hosts,omitempty"` // empty: those the job was staged on
	Here  bool     `json:"here,omitempty"`  // only on this host
}

// An UnstageReply says what was taken away.
type UnstageReply struct {
	Hosts []UnstagedHost `json:"hosts"`
}

// An UnstagedHost is what Unstage did on one host.
type UnstagedHost struct {
	Host  string `json:"host"`
	Busy  bool   `json:"busy,omitempty"` // something inside was still in use: detached, ends with its last user
	Error string `json:"error,omitempty"`
}

// A StatusRequest asks what the agent does. Callers see their own jobs, root sees all.
type StatusRequest struct {
	Job string `json:"job,omitempty"` // only this one
}

// A Status is an agent as a user may see it.
type Status struct {
	Host     string        `json:"host"`
	Version  string        `json:"version"`
	Up       time.Duration `json:"up"`
	Draining bool          `json:"draining"`
	Store    StoreStatus   `json:"store"`
	Bytes    Sources       `json:"bytes"`
	Sent     int64         `json:"sent"`
	Peers    []Peer        `json:"peers"`
	Jobs     []JobStatus   `json:"jobs"`
}

// A StoreStatus is the store in numbers, bytes.
type StoreStatus struct {
	Dir   string `json:"dir"`
	Used  int64  `json:"used"`
	Quota int64  `json:"quota"`
}

// A Peer is another agent as this one knows it.
type Peer struct {
	Host    string `json:"host"`
	Address string `json:"address"`
	State   string `json:"state"`
}

// A JobStatus is a job on this host.
type JobStatus struct {
	Job    string      `json:"job"`
	Image  string      `json:"image"`
	UID    int64       `json:"uid"`
	Digest ztoc.Digest `json:"digest,omitempty"`
	Plan   string      `json:"plan,omitempty"`
	Hosts  []string    `json:"hosts"`
	Began  time.Time   `json:"began"`
	State  HostState   `json:"state"`
}

// A PrestageRequest asks for images on this host, from peers first.
type PrestageRequest struct {
	Images []string `json:"images"` // empty: those of the configuration
	Wait   bool     `json:"wait"`   // stream until all are complete
}

// A PrestageEvent is the state of one image.
type PrestageEvent struct {
	Image string    `json:"image"`
	State HostState `json:"state"`
}

// A ReadRequest asks for bytes of a blob on behalf of a mount.
type ReadRequest struct {
	Job   string       `json:"job"`
	Image string       `json:"image"` // name@digest
	Blob  ztoc.BlobRef `json:"blob"`
	Range ztoc.Range   `json:"range"`
	// Ahead says that nobody waits for the bytes yet: what the stage brings anyway is not fetched before its turn.
	Ahead bool `json:"ahead,omitempty"`
	// Wrong reports that Range of Blob did not match its digest, with the cause: drop it and fetch elsewhere from now on.
	Wrong string `json:"wrong,omitempty"`
}

// A TasksRequest tells that a job's tasks begin, or have ended, on this host.
type TasksRequest struct {
	Job     string `json:"job"`
	Running bool   `json:"running"`
}
