package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/jobhooks"
	"github.com/muster-hpc/muster/jobhooks/slurm"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// epilogBound is how long releasing may take: a mount whose last user does not let go is detached long before.
const epilogBound = 40 * time.Second

// slurmEpilog releases, and never fails: that would cost the node its place for something that the next epilog, or the agent, puts right.
func (a *app) slurmEpilog(ctx context.Context) error {
	j, err := slurm.Prolog(os.Getenv, func(string) error { return nil })
	if errors.Is(err, jobhooks.ErrEnvironment) {
		a.say("%v", err)
		return nil
	}
	a.releaseJob(ctx, j)
	return nil
}

// releaseJob ends everything that a job had on this node. Without an agent the mount is taken away all the same; the next agent finds that
// it is gone.
func (a *app) releaseJob(ctx context.Context, j jobhooks.Job) {
	ctx, cancel := context.WithTimeout(ctx, epilogBound)
	defer cancel()
	n, err := readNote(a.notePath(j.Stage()))
	if err != nil {
		a.say("job %s: %v", j.ID, err)
	}
	c, err := a.agentClient()
	if err == nil {
		defer c.Close()
		short, stop := context.WithTimeout(ctx, agentBound)
		err = c.Tasks(short, control.TasksRequest{Job: j.Stage()})
		stop()
	}
	if err == nil {
		_, err = c.Unstage(ctx, control.UnstageRequest{Job: j.Stage(), Here: true})
		var said *control.Error
		if errors.As(err, &said) && said.Code == exitNoImage { // nothing was staged
			err = nil
		}
	}
	if err != nil {
		a.say("job %s: %v", j.ID, err)
		if _, mounted := lazyfs.Mounted(n.Rootfs); n.Rootfs != "" && mounted == nil {
			if _, err := mountd.Unmount(ctx, n.Rootfs); err != nil {
				a.say("job %s: %v", j.ID, err)
				return // the note stays for who comes after
			}
			agent.RemoveMountDir(n.Rootfs)
		}
	}
	a.removeNote(j.Stage())
}
