package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// remembered is what this host will remember of the job, as things are.
func (j *job) remembered() control.Record {
	s, version, _ := j.status()
	told, o := j.answer(s, version), j.asked()
	r := control.Record{
		ID: j.id, Job: o.Job, Image: o.Image, UID: int64(o.UID), Asked: o.Ready, Plan: told.Plan,
		Began: j.began.Round(0), Boot: j.clock.Boot, Up: j.clock.Up, State: s, Work: j.work(),
	}
	r.Digest = ztoc.Digest(told.Digest)
	for _, h := range o.Hosts {
		r.Hosts = append(r.Hosts, h.Name+"="+h.Addr)
	}
	select {
	case <-j.frozen:
		if j.spec != nil {
			r.Layers = len(j.layers())
		}
	default:
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.worked != nil {
		r.Work = *j.worked
	}
	return r
}

// measured fixes what the time until readiness went into.
func (j *job) measured() {
	w := j.work()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.worked = &w
}

// record writes down what is to be remembered.
func (j *job) record() {
	if j.restored {
		return
	}
	if err := j.a.history.save(j.remembered()); err != nil {
		j.a.log.Warn("a stage will not be in reports", "job", j.id, "cause", err)
	}
}

// recordQuestion asks a host for what it remembers of some stages.
var recordQuestion = peer.Question[recordAsk, recordAnswer]{Name: "Records", MaxAnswer: 16 << 20, Timeout: 10 * time.Second}

type recordAsk struct {
	// IDs are the stages; or Job and UID say which (a UID of -1: anybody's), and the newest record of each comes with the job's hosts.
	IDs []string `json:"ids,omitempty"`
	Job string   `json:"job,omitempty"`
	UID int64    `json:"uid"`
	// Earlier is how many stages of UID before the first of IDs are told of.
	Earlier int `json:"earlier,omitempty"`
}

type recordAnswer struct {
	Records []control.Record  `json:"records"`
	Earlier []control.Earlier `json:"earlier,omitempty"`
}

// maxEarlier bounds how many earlier stages a host tells of.
const maxEarlier = 50

// recordsHere is what this host remembers: the newest record of each stage, of stages under way what there is.
func (a *Agent) recordsHere(q recordAsk) (r recordAnswer) {
	mine := func(c control.Record) bool { return q.UID < 0 || c.UID == q.UID }
	wanted := func(c control.Record) bool {
		if len(q.IDs) > 0 {
			return slices.Contains(q.IDs, c.ID)
		}
		return mine(c) && (q.Job == "" || c.Job == q.Job || c.ID == q.Job)
	}
	newest := map[string]control.Record{}
	add := func(c control.Record) {
		if old, ok := newest[c.ID]; wanted(c) && (!ok || old.Began.Before(c.Began)) {
			newest[c.ID] = c
		}
	}
	before := a.history.all(func(c control.Record) bool {
		add(c)
		return q.Earlier > 0 && mine(c) && c.State.Phase == control.PhaseDone
	})
	a.mu.Lock()
	var jobs []*job
	for _, j := range a.jobs {
		jobs = append(jobs, j)
	}
	a.mu.Unlock()
	for _, j := range jobs {
		if !j.restored {
			add(j.remembered())
		}
	}
	var first time.Time
	for _, c := range newest {
		if first.IsZero() || c.Began.Before(first) {
			first = c.Began
		}
		if len(q.IDs) > 0 {
			c.Hosts = nil // who asks by ID knows them
		}
		r.Records = append(r.Records, c)
	}
	slices.SortFunc(r.Records, func(x, y control.Record) int { return cmp.Or(x.Began.Compare(y.Began), cmp.Compare(x.ID, y.ID)) })
	for _, c := range slices.Backward(before) {
		if len(r.Earlier) < min(q.Earlier, maxEarlier) && c.Began.Before(first) {
			r.Earlier = append(r.Earlier, control.Earlier{ID: c.ID, Job: c.Job, Took: c.State.Took, Asked: c.Asked, New: c.State.Bytes.Peer + c.State.Bytes.Origin})
		}
	}
	return r
}

// recallAtOnce is how many hosts are asked at the same time: more, and they would wait for each other, and clocks be read worse.
const recallAtOnce = 64

// recallWait bounds what one host may take.
const recallWait = 15 * time.Second

// Records tells what the hosts of a job remember of it, times by this host's clock.
func (a *Agent) Records(ctx context.Context, c control.Caller, q control.RecordsRequest, tell func(control.RecordsEvent) error) error {
	ask := recordAsk{Job: q.Job, UID: int64(c.UID)}
	if a.mayActForOthers(c) {
		ask.UID = -1
	}
	stages := a.recordsHere(ask).Records
	for _, s := range q.Hosts { // they may know more
		h, err := a.hostOf(ctx, s)
		if err != nil {
			return err
		}
		if len(stages) > 0 || h.Name == a.o.Name {
			break
		}
		r, err := peer.Ask(ctx, a.client, h, recordQuestion, ask)
		if err != nil {
			a.log.Info("a host does not say what it remembers", "host", h.Name, "cause", err)
		}
		stages = r.Records
	}
	if q.Job != "" && len(stages) == 0 {
		return &control.Error{Text: fmt.Sprintf("job %s: host %s remembers no stage of it by this user; --hosts names hosts that may", q.Job, a.o.Name), Code: 3}
	}
	if err := tell(control.RecordsEvent{Stages: stages}); err != nil || q.Job == "" {
		return err
	}
	var hosts []peer.Host
	known := map[string]bool{}
	for _, s := range stages {
		ask.IDs = append(ask.IDs, s.ID)
		for _, name := range s.Hosts {
			h, err := a.hostOf(ctx, name)
			if err != nil {
				return err
			}
			if !known[h.Name] {
				known[h.Name] = true
				hosts = append(hosts, h)
			}
		}
	}
	ask.Earlier = q.Earlier
	var mu sync.Mutex // one message at a time
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(recallAtOnce)
	for _, h := range hosts {
		g.Go(func() error {
			r := a.recall(ctx, h, ask)
			mu.Lock()
			defer mu.Unlock()
			return tell(control.RecordsEvent{Hosts: []control.HostRecords{r}})
		})
	}
	return g.Wait()
}

// recall asks one host, and says when its stages began by this host's clock.
func (a *Agent) recall(ctx context.Context, h peer.Host, ask recordAsk) control.HostRecords {
	ctx, cancel := context.WithTimeout(ctx, recallWait)
	defer cancel()
	out := control.HostRecords{Host: h.Name}
	var r recordAnswer
	var s sample
	var err error
	if h.Name == a.o.Name {
		now := readClock()
		r, s = a.recordsHere(ask), sample{reading: now, at: now.Wall}
	} else if r, err = peer.Ask(ctx, a.client, h, recordQuestion, ask); err == nil {
		s, err = a.sampleClock(ctx, h)
	}
	if err != nil {
		out.Error = err.Error()
		return out
	}
	for _, c := range r.Records {
		c.Began, c.Bound = s.align(c)
		c.State.Host = h.Name
		out.Records = append(out.Records, c)
	}
	out.Earlier = r.Earlier
	return out
}

// FirstRead notes when a program began to read in a job's mount.
func (a *Agent) FirstRead(_ context.Context, c control.Caller, q control.FirstReadRequest) error {
	at := readClock().Up - max(q.Ago, 0)
	add := func(s *control.HostState, up time.Duration) {
		if _, known := s.At(control.PointFirstExec); !known && at > up {
			s.Phases = append(s.Phases, control.Phase{Name: control.PointFirstExec, Start: at - up, End: at - up})
		}
	}
	a.mu.Lock()
	j := a.jobs[q.Job]
	a.mu.Unlock()
	if j != nil && !j.restored && (c.Root() || c.UID == j.asked().UID) {
		j.change(func(s *control.HostState) { add(s, j.clock.Up) })
		if s, _, _ := j.status(); s.Done() {
			j.record()
		}
		return nil
	}
	return a.history.change(q.Job, func(r *control.Record) error {
		if !c.Root() && int64(c.UID) != r.UID {
			return fmt.Errorf("%w: stage %s is another user's", control.ErrRefused, q.Job)
		}
		if r.Boot == bootID() {
			add(&r.State, r.Up)
		}
		return nil
	})
}
