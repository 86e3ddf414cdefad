package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
)

// errUnstaged ends a job's work.
var errUnstaged = errors.New("the job was unstaged")

// Unstage ends a job's orders here and on its other hosts: mounts go, nothing more is fetched, promised or kept open. What is in the store
// stays for the next job.
func (a *Agent) Unstage(ctx context.Context, c control.Caller, q control.UnstageRequest) (control.UnstageReply, error) {
	u := unstageAsk{Job: q.Job, UID: int64(c.UID)}
	if a.mayActForOthers(c) {
		u.UID = -1
	}
	var hosts []peer.Host
	found := false
	for _, j := range a.jobsOf(u) {
		found = true
		for _, h := range j.asked().Hosts {
			if !slices.Contains(hosts, h) {
				hosts = append(hosts, h)
			}
		}
	}
	for _, s := range q.Hosts {
		h, err := a.hostOf(ctx, s)
		if err != nil {
			return control.UnstageReply{}, err
		}
		if !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	if !found && len(q.Hosts) == 0 {
		return control.UnstageReply{}, &control.Error{Text: fmt.Sprintf("job %s: not staged on host %s by this user", q.Job, a.o.Name), Code: 3}
	}
	a.audit("unstage", "job", q.Job, "caller", c.String())
	r := control.UnstageReply{Hosts: []control.UnstagedHost{a.unstageHere(ctx, u)}}
	if q.Here {
		return r, nil
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, h := range hosts {
		if h.Name == a.o.Name {
			continue
		}
		wg.Go(func() {
			got, err := peer.Ask(ctx, a.client, h, unstageQuestion, u)
			if err != nil {
				got.Error = err.Error()
			}
			got.Host = h.Name
			mu.Lock()
			defer mu.Unlock()
			r.Hosts = append(r.Hosts, got)
		})
	}
	wg.Wait()
	return r, nil
}

// jobsOf are the orders of a job that a user, or with -1 anybody, has here.
func (a *Agent) jobsOf(u unstageAsk) (list []*job) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, j := range a.jobs {
		o := j.asked()
		if (o.Job == u.Job || j.id == u.Job) && (u.UID < 0 || int64(o.UID) == u.UID) {
			list = append(list, j)
		}
	}
	return list
}

// unstageHere ends a job's orders on this host and leaves nothing of them.
func (a *Agent) unstageHere(ctx context.Context, u unstageAsk) control.UnstagedHost {
	r := control.UnstagedHost{Host: a.o.Name}
	for _, j := range a.jobsOf(u) {
		busy, err := a.end(ctx, j)
		r.Busy = r.Busy || busy
		if err != nil {
			r.Error = fmt.Sprintf("job %s: %v", j.id, err)
		}
	}
	return r
}

// end ends one job: its work, its mount, its record, its hold on the store.
func (a *Agent) end(ctx context.Context, j *job) (busy bool, err error) {
	j.cancel(errUnstaged)
	select {
	case <-j.over:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if a.o.Mounts != "" {
		// Not bound to the caller: half an unmount is worse than a late one.
		un, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if busy, err = a.unmount(un, a.mountDir(j.id)); err != nil {
			return busy, err
		}
	}
	a.mu.Lock()
	a.forget(j)
	a.mu.Unlock()
	a.forgetRecord(j.id)
	j.record() // what came and was passed on until the end
	j.release()
	return busy, nil
}
