package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/muster-hpc/muster/agent/control"
)

// Jobs come first: from the first task of a job until its last, this host fetches what readers wait for and nothing else, and passes nothing on
// to hosts of other jobs unless Options.ServeOthers allows it. Options.FetchOn switches that off.

// errTasks ends an intake while tasks of a job run here.
var errTasks = errors.New("a job's tasks run on this host")

// Tasks is told by the hooks when a job's tasks begin and end on this host.
func (a *Agent) Tasks(_ context.Context, c control.Caller, q control.TasksRequest) error {
	if !a.mayActForOthers(c) {
		return fmt.Errorf("%w: only root tells of tasks", control.ErrRefused)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if q.Running {
		a.tasks[q.Job] = true
	} else {
		delete(a.tasks, q.Job)
	}
	close(a.tasksChanged)
	a.tasksChanged = make(chan struct{})
	a.log.Info("tasks", "job", q.Job, "running", q.Running, "jobs with tasks here", len(a.tasks))
	return nil
}

// busy says whether tasks run here, and is closed when that may have changed.
func (a *Agent) busy() (bool, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.tasks) > 0 && !a.o.FetchOn, a.tasksChanged
}

// serves reports whether bytes go to hosts of this job while tasks of others run here.
func (a *Agent) serves(j *job) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.tasks) == 0 || a.o.ServeOthers || a.o.FetchOn {
		return true
	}
	return j != nil && a.tasks[j.asked().Job]
}

// takeWhenIdle is take, which pauses while tasks run here. What readers wait for is not in it and goes on.
func (j *job) takeWhenIdle(ctx context.Context) error {
	for {
		busy, changed := j.a.busy()
		for busy {
			select {
			case <-changed:
				busy, changed = j.a.busy()
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		taking, stop := context.WithCancelCause(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-changed:
					if busy, changed = j.a.busy(); busy {
						stop(errTasks)
						return
					}
				case <-taking.Done():
					return
				}
			}
		}()
		err := j.take(taking)
		paused := errors.Is(context.Cause(taking), errTasks)
		stop(nil)
		<-done
		if err == nil || !paused || ctx.Err() != nil {
			return err
		}
		j.a.log.Info("a stage pauses while tasks run here", "job", j.id)
	}
}
