package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
)

// What agents ask each other beside peer's own questions.
var (
	// stageQuestion begins an order at another host.
	stageQuestion = peer.Question[order, struct{}]{Name: "Stage", MaxAsk: 4 << 20}
	// stateQuestion asks for the state of an order; it is answered when there is a newer one than Version, or after a while.
	stateQuestion = peer.Question[stateAsk, stateAnswer]{Name: "State", MaxAnswer: 1 << 20, Timeout: 10 * time.Second}
	// unstageQuestion ends a job's orders at another host.
	unstageQuestion = peer.Question[unstageAsk, control.UnstagedHost]{Name: "Unstage", Timeout: 30 * time.Second}
)

type stateAsk struct {
	ID      string        `json:"id"`
	Version int           `json:"version"` // that the asker has; -1: none
	Every   time.Duration `json:"every"`   // how often it wants to hear of progress
}

type stateAnswer struct {
	State   control.HostState `json:"state"`
	Version int               `json:"version"`
	Digest  string            `json:"digest,omitempty"`
	Plan    string            `json:"plan,omitempty"`
}

type unstageAsk struct {
	Job string `json:"job"`
	UID int64  `json:"uid"` // whose; -1: anybody's
}

// stateEvery is how often progress is told while nothing else happens.
const stateEvery = 300 * time.Millisecond

// handle answers other agents.
func (a *Agent) handle() {
	peer.Handle(a.server, specQuestion, a.answerSpec)
	peer.Handle(a.server, peer.Begin, a.answerBegin)
	peer.Handle(a.server, tableQuestion, a.answerTable)
	peer.Handle(a.server, bringQuestion, a.answerBring)
	peer.Handle(a.server, peer.Tell, a.told)
	peer.Handle(a.server, peer.Holders, a.holders.Find)
	peer.Handle(a.server, peer.Announce, a.holders.Announce)
	peer.Handle(a.server, stageQuestion, func(_ context.Context, from string, o order) (struct{}, error) {
		if !o.has(from) {
			return struct{}{}, fmt.Errorf("%w: %s is no host of the job", peer.ErrDenied, from)
		}
		_, err := a.begin(o)
		return struct{}{}, err
	})
	peer.Handle(a.server, stateQuestion, func(ctx context.Context, _ string, q stateAsk) (stateAnswer, error) {
		return a.stateOf(ctx, q)
	})
	peer.Handle(a.server, clockQuestion, func(context.Context, string, struct{}) (reading, error) { return readClock(), nil })
	peer.Handle(a.server, recordQuestion, func(_ context.Context, _ string, q recordAsk) (recordAnswer, error) {
		return a.recordsHere(q), nil
	})
	peer.Handle(a.server, unstageQuestion, func(ctx context.Context, _ string, q unstageAsk) (control.UnstagedHost, error) {
		return a.unstageHere(ctx, q), nil
	})
}

func (o order) has(host string) bool {
	for _, h := range o.Hosts {
		if h.Name == host {
			return true
		}
	}
	return false
}

// answerSpec gives the JobSpec of an order: the asker takes this host for the resolver. The order is begun here too.
func (a *Agent) answerSpec(ctx context.Context, from string, b []byte) ([]byte, error) {
	var o order
	if err := json.Unmarshal(b, &o); err != nil {
		return nil, fmt.Errorf("%w: %w", peer.ErrProtocol, err)
	}
	if !o.has(from) || !o.has(a.o.Name) {
		return nil, fmt.Errorf("%w: not a job of %s and %s", peer.ErrDenied, from, a.o.Name)
	}
	j, err := a.begin(o)
	if err != nil {
		return nil, err
	}
	if err := j.thaw(ctx); err != nil {
		if b := a.final(err); b != nil && ctx.Err() == nil {
			return b, nil
		}
		return nil, err
	}
	return j.encoded, nil
}

// answerBegin takes a JobSpec from a host that follows it already, so that nobody waits for this host's own prolog.
func (a *Agent) answerBegin(_ context.Context, from string, b []byte) (struct{}, error) {
	spec, err := planner.DecodeJobSpec(b)
	if err != nil {
		return struct{}{}, fmt.Errorf("%w: %w", peer.ErrProtocol, err)
	}
	o := order{Image: spec.Image}
	for _, h := range spec.Hosts {
		o.Hosts = append(o.Hosts, peer.Host{Name: h.Name, Addr: h.Addr})
	}
	if !o.has(from) || !o.has(a.o.Name) {
		return struct{}{}, fmt.Errorf("%w: not a job of %s and %s", peer.ErrDenied, from, a.o.Name)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	j := a.jobs[spec.Job]
	if j == nil {
		if a.draining || a.ctx.Err() != nil {
			return struct{}{}, peer.ErrNotHere
		}
		j = a.newJob(spec.Job, o)
		j.offered <- b
		a.start(j)
		return struct{}{}, nil
	}
	select {
	case j.offered <- b:
	default:
	}
	return struct{}{}, nil
}

// stateOf is the state of an order, when it is newer than what the asker has.
func (a *Agent) stateOf(ctx context.Context, q stateAsk) (stateAnswer, error) {
	a.mu.Lock()
	j := a.jobs[q.ID]
	a.mu.Unlock()
	if j == nil {
		return stateAnswer{}, peer.ErrNotHere
	}
	tick := time.NewTimer(min(max(q.Every, stateEvery), 5*time.Second))
	defer tick.Stop()
	for {
		s, version, changed := j.status()
		if version > q.Version && s.Done() {
			return j.answer(s, version), nil
		}
		select {
		case <-changed:
		case <-tick.C:
			return j.answer(s, version), nil
		case <-ctx.Done():
			return stateAnswer{}, context.Cause(ctx)
		}
	}
}

func (j *job) answer(s control.HostState, version int) stateAnswer {
	r := stateAnswer{State: s, Version: version}
	select {
	case <-j.frozen:
		if j.spec != nil {
			r.Digest, r.Plan = string(j.spec.Manifest), j.spec.ID().String()
		}
	default:
	}
	return r
}
