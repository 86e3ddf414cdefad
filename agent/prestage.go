package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/peer"
)

// prestageJob names the orders that only bring bytes.
const prestageJob = "prestage"

// Prestage brings images to this host before a job asks for them.
func (a *Agent) Prestage(ctx context.Context, c control.Caller, q control.PrestageRequest, tell func(control.PrestageEvent) error) error {
	if !a.mayActForOthers(c) {
		return fmt.Errorf("%w: only root brings images without a job", control.ErrRefused)
	}
	images := q.Images
	if len(images) == 0 {
		images = a.o.Prestage
	}
	for _, i := range images {
		if _, err := origin.ParseReference(i); err != nil {
			return err
		}
	}
	if !q.Wait {
		for _, i := range images {
			j, err := a.prestageOne(i)
			if err != nil {
				return err
			}
			s, _, _ := j.status()
			if err := tell(control.PrestageEvent{Image: i, State: s}); err != nil {
				return err
			}
		}
		return nil
	}
	return a.prestage(ctx, images, tell)
}

// prestageOne begins to bring one image. Its work goes on without anybody watching; then the order ends and the bytes stay.
func (a *Agent) prestageOne(image string) (*job, error) {
	ref, err := origin.ParseReference(image)
	if err != nil {
		return nil, err
	}
	j, err := a.begin(order{
		Job: prestageJob, Image: ref.String(), Hosts: []peer.Host{{Name: a.o.Name, Addr: a.addr}}, Ready: control.Complete, NoMount: true,
	})
	if err != nil {
		return nil, err
	}
	j.closing.Do(func() {
		a.jobsWG.Add(1)
		go func() {
			defer a.jobsWG.Done()
			select {
			case <-j.over:
				if s, _, _ := j.status(); s.Phase == control.PhaseDone {
					_, _ = a.end(context.Background(), j)
				}
			case <-a.ctx.Done():
			}
		}()
	})
	return j, nil
}

// prestage brings images and tells how it goes, until all are here or have failed.
func (a *Agent) prestage(ctx context.Context, images []string, tell func(control.PrestageEvent) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var wg sync.WaitGroup
	var errs []error
	for _, i := range images {
		j, err := a.prestageOne(i)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		wg.Go(func() {
			for {
				s, _, changed := j.status()
				mu.Lock()
				if tell != nil {
					if err := tell(control.PrestageEvent{Image: i, State: s}); err != nil {
						cancel(err)
					}
				}
				if s.Phase == control.PhaseFailed {
					errs = append(errs, &control.Error{Text: s.Error, Code: s.Code})
				}
				mu.Unlock()
				if s.Done() {
					return
				}
				select {
				case <-changed:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		errs = append(errs, context.Cause(ctx))
	}
	err := errors.Join(errs...)
	if err != nil {
		a.log.Error("images were not prestaged", "cause", err)
	}
	return err
}
