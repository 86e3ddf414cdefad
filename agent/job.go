package agent

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// An order is what a job's hosts are told: the same on all of them.
type order struct {
	Job      string        `json:"job"`
	Image    string        `json:"image"`
	Platform string        `json:"platform,omitempty"`
	Hosts    []peer.Host   `json:"hosts"`
	Ready    control.Ready `json:"ready"`
	UID      uint32        `json:"uid"`
	GID      uint32        `json:"gid"`
	NoMount  bool          `json:"noMount,omitempty"`
	Timeout  time.Duration `json:"timeout"`
	// Secret is what the origin is shown, host → "user:password". It travels between agents under TLS and is never written.
	Secret map[string]string `json:"secret,omitempty"`
}

// id names the stage on every host: one user's job and one image.
func (o order) id() string {
	return o.Job + "/" + store.Key(o.Job + "\x00" + o.Image + "\x00" + o.Platform + "\x00" + itoa(o.UID))[:12]
}

func (o order) names() []string {
	names := make([]string, len(o.Hosts))
	for i, h := range o.Hosts {
		names[i] = h.Name
	}
	return names
}

// A job is an order on this host: under way, or done and kept until it is unstaged.
type job struct {
	a     *Agent
	id    string
	began time.Time

	ctx    context.Context // of everything that works for the job; ended by Unstage and by the end of the agent
	cancel context.CancelCauseFunc
	over   chan struct{} // closed when run has returned

	ordered chan struct{} // closed when the order is known; a plan may be followed before
	offered chan []byte   // a JobSpec that another host handed over

	frozen chan struct{} // closed when spec, plan and what follows are set, or freezing failed
	// Set before frozen is closed, then never changed.
	spec    *planner.JobSpec
	encoded []byte // spec
	plan    *planner.Plan
	me      int // this host in the spec
	chain   *fetch.Chain
	blobs   []*held       // by number in the spec
	failed  error         // freezing failed
	shown   []byte        // the grant, as this host shows it
	voucher string        // who signed it; empty: nobody whom this host believes
	public  bool          // he says that the origin gives the image to anybody
	fresh   []atomic.Bool // by blob: what is here of it was brought by this job; may become false

	started chan struct{}                // closed when start is set
	start   map[ztoc.Digest][]ztoc.Range // what the program touches first; nil: nothing is known

	tables sync.Map // ztoc.Digest of a layer → *tableState

	originGone atomic.Bool // the origin was asked in vain, and has given nothing since
	begunLate  atomic.Bool // others have brought this host's part, or some of it
	gaveUp     atomic.Bool // nothing is promised to others any more
	taking     atomic.Bool // the pieces of the plan are being brought
	accepted   atomic.Bool // its bytes were its own before the agent was started again

	// Bytes and requests by source.
	fromStore, fromPeer, fromOrigin, sent atomic.Int64
	peerRequests, originRequests          atomic.Int64

	// What records tell of: where the time went.
	before               tally        // what the host had done when the job began
	first                atomic.Bool  // bytes have come
	originWait, peerWait atomic.Int64 // nanoseconds of waiting, of all requests together
	paced                atomic.Int64 // bytes that came in peerWait
	clock                reading      // when the job began
	restored             bool         // found by a restarted agent: its record is written already

	asking  sync.Once                   // the directory is asked for holders
	holders map[ztoc.Digest][]peer.Host // set by asking
	quiet   atomic.Int64                // unix nanoseconds until which the origin is left alone, because it has said so to somebody
	notes   sync.WaitGroup              // of notes under way
	closing sync.Once                   // of a prestage: ended when it is complete

	remaking sync.Mutex             // held while made is set
	made     map[ztoc.Digest][]byte // see remade; guarded by remaking
	healing  sync.Mutex             // held while wrong bytes of a layer are replaced

	mu      sync.Mutex
	order   order // see asked
	repo    origin.Repository
	proofs  map[int]*proof // by blob; see proves
	extra   []*held        // blobs held open until the job ends
	state   control.HostState
	version int                   // of state
	changed chan struct{}         // closed and replaced with each version
	worked  *control.Work         // until readiness; nil before
	late    map[int]string        // hosts that are passed over
	from    map[planner.Piece]int // which host brought a piece; originHost for the origin
}

// originHost stands for the origin where hosts are numbers.
const originHost = -1

func (a *Agent) newJob(id string, o order) *job {
	j := &job{
		a: a, order: o, id: id, began: time.Now(), clock: readClock(), ordered: make(chan struct{}), offered: make(chan []byte, 1), started: make(chan struct{}),
		over: make(chan struct{}), frozen: make(chan struct{}), changed: make(chan struct{}),
		late: map[int]string{}, from: map[planner.Piece]int{},
		state: control.HostState{Host: a.o.Name, Phase: control.PhaseWaiting}, before: a.tally(),
	}
	ctx, cancel := context.WithCancelCause(a.ctx)
	j.ctx, j.cancel = ctx, cancel
	return j
}

// adopt gives the job the order that it was begun without, or has it be done later when the new order asks for more.
func (j *job) adopt(o order) {
	j.mu.Lock()
	defer j.mu.Unlock()
	select {
	case <-j.ordered:
		if readyLevel[o.Ready] > readyLevel[j.order.Ready] { // asked for again, and for more
			j.order.Ready = o.Ready
			if j.state.Phase == control.PhaseDone && readyLevel[j.state.Ready] < readyLevel[o.Ready] {
				j.state.Phase = "fetch"
				j.version++
				close(j.changed)
				j.changed = make(chan struct{})
			}
		}
	default:
		j.order, j.repo = o, nil
		close(j.ordered)
	}
}

// asked is the order; before it is known, what the plan tells of it.
func (j *job) asked() order {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.order
}

// repository is where the job's layers come from, with the user's credentials.
func (j *job) repository() (origin.Repository, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var err error
	if j.repo == nil {
		j.repo, err = j.a.o.Repository(j.spec.Image, j.order.Secret)
	}
	return j.repo, err
}

// release lets go of everything that the job holds open. It has ended.
func (j *job) release() {
	<-j.over
	j.notes.Wait()
	if j.chain != nil {
		_ = j.chain.Close()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, h := range append(j.blobs, j.extra...) {
		h.close()
	}
	j.extra = nil
}

// change changes the state and wakes who watches it.
func (j *job) change(f func(*control.HostState)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	f(&j.state)
	j.version++
	close(j.changed)
	j.changed = make(chan struct{})
}

// phase begins a part of the work; it ends the one before.
func (j *job) phase(name string) {
	j.change(func(s *control.HostState) {
		now := time.Since(j.began)
		s.Phase = name
		if n := len(s.Phases); n > 0 && s.Phases[n-1].End == 0 {
			s.Phases[n-1].End = now
		}
		if name != control.PhaseDone && name != control.PhaseFailed {
			s.Phases = append(s.Phases, control.Phase{Name: name, Start: now})
		}
	})
}

// mark records something that happens beside the phases.
func (j *job) mark(name string, from time.Time) {
	j.change(func(s *control.HostState) {
		s.Phases = append(s.Phases, control.Phase{Name: name, Start: from.Sub(j.began), End: time.Since(j.began)})
	})
}

// point records that something was reached.
func (j *job) point(name string) {
	j.change(func(s *control.HostState) {
		now := time.Since(j.began)
		s.Phases = append(s.Phases, control.Phase{Name: name, Start: now, End: now})
	})
}

// The places that bytes come from, as metrics name them.
const (
	fromPeer   = "peer"
	fromOrigin = "origin"
)

// got counts bytes that came.
func (j *job) got(from string, n int64) {
	if from == fromPeer {
		j.fromPeer.Add(n)
	} else {
		j.fromOrigin.Add(n)
	}
	j.a.metrics.received.WithLabelValues(from).Add(float64(n))
	if !j.first.Load() && j.first.CompareAndSwap(false, true) {
		j.point(control.PointFirstByte)
	}
}

// status is the state with the numbers of this moment.
func (j *job) status() (control.HostState, int, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := j.state
	s.Phases = append([]control.Phase(nil), s.Phases...)
	s.Late = append([]control.LatePeer(nil), s.Late...)
	s.Bytes = control.Sources{
		Store: j.fromStore.Load(), Peer: j.fromPeer.Load(), Origin: j.fromOrigin.Load(),
		PeerRequests: j.peerRequests.Load(), OriginRequests: j.originRequests.Load(),
	}
	s.Sent = j.sent.Load()
	if !s.Done() {
		s.Took = time.Since(j.began)
		s.Present = min(s.Total, s.Bytes.Store+s.Bytes.Peer+s.Bytes.Origin)
	}
	return s, j.version, j.changed
}

// thaw waits until the job's plan is known.
func (j *job) thaw(ctx context.Context) error {
	select {
	case <-j.frozen:
		return j.failed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// layers are the numbers of the blobs that are layers.
func (j *job) layers() (list []int) {
	for i, b := range j.spec.Blobs {
		if b.Kind == planner.Layer {
			list = append(list, i)
		}
	}
	return list
}

// size is the bytes of all layers.
func (j *job) size() (n int64) {
	for _, i := range j.layers() {
		n += j.spec.Blobs[i].Size
	}
	return n
}

// number is the place of a blob in the spec, or -1.
func (j *job) number(d ztoc.Digest) int {
	for i, b := range j.spec.Blobs {
		if b.Digest == d {
			return i
		}
	}
	return -1
}

// passOver notes that a host is not waited for any more, and says whether that is new.
func (j *job) passOver(host int, why string, waited time.Duration) bool {
	j.mu.Lock()
	_, known := j.late[host]
	j.late[host] = why
	j.mu.Unlock()
	if known {
		return false
	}
	name := j.spec.Hosts[host].Name
	j.a.log.Warn("a host is passed over for the rest of the job", "job", j.id, "host", name, "why", why, "waited", waited)
	j.a.metrics.passedOver.Inc()
	j.change(func(s *control.HostState) {
		s.Late = append(s.Late, control.LatePeer{Host: name, Why: why, Waited: waited})
	})
	return true
}

func (j *job) isLate(host int) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	_, late := j.late[host]
	return late
}

// brought notes who brought a range of a blob.
func (j *job) brought(blob int, r ztoc.Range, host int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for x := j.plan.PieceAt(blob, r.Start); x <= j.plan.PieceAt(blob, r.End-1); x++ {
		j.from[x] = host
	}
}
