package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/jobhooks"
	"github.com/muster-hpc/muster/jobhooks/slurm"
)

func (a *app) slurmHooks() *cobra.Command {
	c := &cobra.Command{
		Use:   "slurm",
		Short: "what Slurm calls: prolog, epilog and others",
		Long: `The hooks of Slurm. A job names its image with --image=REF (srun, sbatch, salloc, #SBATCH), which the plug-in adds to
them, or without the plug-in with --comment=image=REF.`,
	}
	add := func(use, short string, run func(context.Context) error) {
		c.AddCommand(&cobra.Command{
			Use: use, Short: short, Args: arguments(cobra.NoArgs), RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context()) },
		})
	}
	add("prolog", "Prolog: mounts the job's image on this node, or tells Slurm why not", a.slurmProlog)
	add("epilog", "Epilog: releases what the job had on this node", a.slurmEpilog)
	add("prolog-ctld", "PrologSlurmctld: holds a job whose image is no image, before its nodes wait for it", a.slurmPrologCtld)
	add("step", "for the plug-in: makes a step's root and holds it until standard input ends", a.slurmStep)
	return c
}

// slurmProlog mounts and judges. Only a node that cannot mount anything fails: every other exit than 0 would cost Slurm the node.
func (a *app) slurmProlog(ctx context.Context) error {
	j, err := slurm.Prolog(os.Getenv, parsesAsReference)
	if errors.Is(err, jobhooks.ErrNoImage) {
		return nil
	}
	if errors.Is(err, jobhooks.ErrEnvironment) {
		a.say("%v", err)
		return nil
	}
	var o jobhooks.Outcome
	// Should this process be killed, the epilog knows that there may be something to release.
	note := jobNote{Job: j.Stage(), Image: jobhooks.Printable(j.Image, jobhooks.MaxReference), UID: j.UID}
	if err := a.writeNote(j, note); err != nil {
		a.say("%v", err) // the step finds no mount, and waits or ends
	}
	if err != nil {
		o.Code, o.Text = exitUsage, err.Error()
	} else {
		conf, _ := os.ReadFile(slurmConf()) // a cluster may have it elsewhere: then as configured
		deadline := time.Now().Add(slurm.Deadline(a.cfg.Hooks.Deadline, conf))
		secret := secretOf(ctx, j)
		o = a.stageJob(ctx, j, secret, time.Until(deadline), nil)
	}
	v := jobhooks.Judge(j, o, jobhooks.Policy{Retries: a.cfg.Hooks.Retries, NodeCannot: cannotMount()})
	message := ""
	if o.Code != 0 {
		message = jobhooks.Message(j, o)
	}
	note.Rootfs, note.Error, note.Code = o.Mount, message, o.Code
	if err := a.writeNote(j, note); err != nil {
		a.say("%v", err)
	}
	a.sayOutcome(j, o, v, message)
	if v == jobhooks.Go {
		a.tasks(ctx, j, true)
	}
	return a.tellSlurm(ctx, j, v, message)
}

// sayOutcome is the prolog's last line.
func (a *app) sayOutcome(j jobhooks.Job, o jobhooks.Outcome, v jobhooks.Verdict, message string) {
	switch {
	case v == jobhooks.Go && o.Late:
		a.say("job %s: image %s is mounted after %.2f s, and not yet %s: it goes on coming", j.ID, j.Image, o.Took.Seconds(), j.Ready)
	case v == jobhooks.Go:
		a.say("job %s: image %s is %s after %.2f s", j.ID, j.Image, o.Ready, o.Took.Seconds())
	case v == jobhooks.Wait:
		a.say("job %s: image %s is not mounted after %.2f s: it goes on coming, and the job's first step waits for it", j.ID, j.Image, o.Took.Seconds())
	default:
		a.say("job %s: %s: %s", j.ID, v, message)
	}
}

// tellBound bounds one command to Slurm.
const tellBound = 20 * time.Second

// tellSlurm says a verdict. A job that cannot be queued again, because somebody waits for it (srun, salloc), goes on: its steps end with the
// same message on their standard error.
func (a *app) tellSlurm(ctx context.Context, j jobhooks.Job, v jobhooks.Verdict, message string) error {
	commands, fail := slurm.Tell(j, v, message)
	for _, c := range commands {
		if err := slurmCommand(ctx, c...); err != nil {
			a.say("%v", err)
		}
	}
	if fail != 0 {
		return &coded{fail, errors.New(message)}
	}
	return nil
}

// slurmCommand runs a client of Slurm's. Its hooks come without PATH.
func slurmCommand(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, tellBound)
	defer cancel()
	path, err := exec.LookPath(args[0])
	if err != nil {
		path = "/usr/bin/" + args[0]
	}
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", args[0]+" "+args[1], err, jobhooks.Printable(string(out), 300))
	}
	return nil
}

// slurmConf is where slurm.conf is.
func slurmConf() string {
	if f := os.Getenv("SLURM_CONF"); f != "" {
		return f
	}
	return "/etc/slurm/slurm.conf"
}

// cannotMount says that no image can be mounted on this node: there is no FUSE.
func cannotMount() bool {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return true
	}
	_ = f.Close()
	return false
}

// agentBound bounds a short question to the agent.
const agentBound = 5 * time.Second

// tasks tells the agent that a job's tasks begin here, or have ended.
func (a *app) tasks(ctx context.Context, j jobhooks.Job, running bool) {
	ctx, cancel := context.WithTimeout(ctx, agentBound)
	defer cancel()
	c, err := a.agentClient()
	if err == nil {
		err = c.Tasks(ctx, control.TasksRequest{Job: j.Stage(), Running: running})
		_ = c.Close()
	}
	if err != nil {
		a.say("job %s: %v", j.ID, err)
	}
}

// slurmPrologCtld runs on the controller, which may have no agent and no way out. Slurm waits for it, so it asks nobody.
func (a *app) slurmPrologCtld(ctx context.Context) error {
	j, err := slurm.Prolog(os.Getenv, parsesAsReference)
	if !errors.Is(err, jobhooks.ErrImage) {
		return nil
	}
	message := jobhooks.Message(j, jobhooks.Outcome{Text: err.Error()})
	a.say("job %s: %s", j.ID, message)
	return a.tellSlurm(ctx, j, jobhooks.Hold, message)
}
