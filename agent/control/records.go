package control

import (
	"context"
	"strings"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A Record is what a host remembers of one stage. It outlives the job and the agent.
type Record struct {
	ID     string      `json:"id"` // of the stage: one job, image and user; the same on all hosts
	Job    string      `json:"job"`
	Image  string      `json:"image"`
	Digest ztoc.Digest `json:"digest,omitempty"`
	Plan   string      `json:"plan,omitempty"`
	UID    int64       `json:"uid"`
	Asked  Ready       `json:"asked"`
	Layers int         `json:"layers"`
	// Hosts are all of the job, "name=address:port". Set in Stages only: what each host says leaves them out.
	Hosts []string `json:"hosts,omitempty"`

	// Began is when the host began. In a HostRecords it is by the clock of the agent that was asked, right within Bound; Bound is
	// negative where the host was started anew since, and Began is what its clock said then.
	Began time.Time     `json:"began"`
	Bound time.Duration `json:"bound,omitempty"`
	// Boot and Up say the same by a clock that nobody sets: which boot of the host, and how long after it.
	Boot string        `json:"boot,omitempty"`
	Up   time.Duration `json:"up,omitempty"`

	State HostState `json:"state"`
	Work  Work      `json:"work"`
}

// Work is what a host's time went into until it was as ready as asked: sums, since much happens at once.
type Work struct {
	Write   time.Duration `json:"write"`   // writing into the store, the whole host
	Written int64         `json:"written"` // bytes
	Origin  time.Duration `json:"origin"`  // waiting for the origin
	Peer    time.Duration `json:"peer"`    // pieces were on their way from other hosts
	Paced   int64         `json:"paced"`   // bytes of these pieces
	// Busy and IOWait are shares of the host's processors that worked, or had nothing to do because of disks.
	Busy   float64 `json:"busy"`
	IOWait float64 `json:"ioWait"`
}

// Names of points in HostState.Phases; the others are parts of the work.
const (
	PointResolved  = "resolved"
	PointFirstByte = "first byte"
	PointIndexed   = "indexed" // all tables are here
	PointFirstExec = "first exec"
	// PointReady is followed by a Ready.
	PointReady = "ready "
)

// At is when a point was reached, after the host began.
func (h HostState) At(point string) (t time.Duration, ok bool) {
	for _, p := range h.Phases {
		if p.Name == point {
			return p.End, true
		}
	}
	return 0, false
}

// A RecordsRequest asks for what a job's hosts remember. Callers get their own jobs, root and admins all.
type RecordsRequest struct {
	// Job is a job's name or a stage's ID. Empty: only which stages this host remembers.
	Job string `json:"job,omitempty"`
	// Hosts are asked which hosts the job had when this one does not know. "name" or "name=address:port".
	Hosts []string `json:"hosts,omitempty"`
	// Earlier is how many stages before this one each host tells of.
	Earlier int `json:"earlier,omitempty"`
}

// A RecordsEvent is one message of the answer: first Stages alone, oldest first, then hosts as they answer.
type RecordsEvent struct {
	Stages []Record      `json:"stages,omitempty"`
	Hosts  []HostRecords `json:"hosts,omitempty"`
}

// HostRecords is what one host remembers of a job.
type HostRecords struct {
	Host    string    `json:"host"`
	Error   string    `json:"error,omitempty"` // it could not be asked
	Records []Record  `json:"records,omitempty"`
	Earlier []Earlier `json:"earlier,omitempty"` // newest first
}

// An Earlier is a stage that a host had before.
type Earlier struct {
	ID    string        `json:"id"`
	Job   string        `json:"job"`
	Took  time.Duration `json:"took"`
	Asked Ready         `json:"asked"`
	New   int64         `json:"new"` // bytes that had to be brought
}

// A FirstReadRequest tells that a program reads in a job's mount, for the first time.
type FirstReadRequest struct {
	Job string        `json:"job"` // the stage's ID
	Ago time.Duration `json:"ago"`
}

// Records asks what the hosts of a job remember, and gives the answers as they come.
func (c *Client) Records(ctx context.Context, q RecordsRequest, each func(RecordsEvent)) error {
	return listen(ctx, c, "Records", q, func(e RecordsEvent) error { each(e); return nil })
}

// FirstRead tells that a program has begun to read in a mount.
func (c *Client) FirstRead(ctx context.Context, q FirstReadRequest) error {
	_, err := ask[struct{}](ctx, c, "FirstRead", q)
	return err
}

// HostName is the name in "name=address:port" or "name".
func HostName(s string) string {
	name, _, _ := strings.Cut(s, "=")
	return name
}
