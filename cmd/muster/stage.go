package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
)

// agentClient is a client of this host's agent.
func (a *app) agentClient() (*control.Client, error) { return control.Dial(a.cfg.Agent.Socket) }

func (a *app) stageCommand() *cobra.Command {
	var q control.StageRequest
	var hosts, ready string
	c := &cobra.Command{
		Use:   "stage IMAGE --hosts LIST",
		Short: "make an image usable on all hosts of a job, from one pull's worth of registry traffic",
		Long: `Asks this host's agent to stage IMAGE on the hosts of LIST, this one among them, and returns when all are
ready: mounted (the tree answers), warm (what the program touches first is local) or complete (every byte is local
and checked). Interrupting it ends the watching; the stage goes on. 'muster unstage JOB' ends it.

LIST is as schedulers write it: node[01-16],login1. Where names do not resolve: node01=10.0.0.1:7464,…`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if q.Hosts, err = expandHosts(hosts); err != nil {
				return err
			}
			if q.Ready, err = control.ParseReady(ready); err != nil {
				return usage(err)
			}
			q.Image = args[0]
			return a.stage(cmd.Context(), q)
		},
	}
	f := c.Flags()
	f.StringVar(&hosts, "hosts", "", "the job's hosts; default this one")
	f.StringVar(&ready, "ready", "mounted", "mounted, warm or complete")
	f.StringVar(&q.Job, "job", "", "name of the job; default made from user, image and hosts")
	f.StringVar(&q.Platform, "platform", "", "platform of the image, such as linux/arm64; default this machine's")
	f.Int64Var(&q.UID, "uid", -1, "user id to stage for; root only")
	f.Int64Var(&q.GID, "gid", -1, "group id to stage for; root only")
	f.BoolVar(&q.NoMount, "no-mount", false, "only bring the bytes")
	f.DurationVar(&q.Timeout, "timeout", 0, "give up after so long; 0: an hour")
	a.jsonFlag(c)
	return c
}

func (a *app) stage(ctx context.Context, q control.StageRequest) error {
	ref, err := origin.ParseReference(q.Image)
	if err != nil {
		return err
	}
	// The daemon runs no user's helper: what the user may show to the registry, this process finds.
	if q.Secret, err = userSecret(ctx, ref); err != nil {
		return err
	}
	c, err := a.agentClient()
	if err != nil {
		return err
	}
	defer c.Close()
	show := a.showStage(q.Image)
	report, err := c.Stage(ctx, q, show.take)
	show.stop()
	if err != nil {
		return err
	}
	if err := a.result(report, func(w io.Writer) { printReport(w, report, a.quiet) }); err != nil {
		return err
	}
	for _, h := range report.Hosts {
		if h.Phase == control.PhaseFailed {
			return &coded{max(h.Code, 1), fmt.Errorf("%d of %d hosts failed, first %s: %s", report.Failed, len(report.Hosts), h.Host, h.Error)}
		}
	}
	return nil
}

// userSecret is what the calling user shows to the image's registry, as an agent takes it.
func userSecret(ctx context.Context, ref origin.Reference) (map[string]string, error) {
	if ref.Layout != "" {
		return nil, nil
	}
	cred, err := origin.Docker()(ctx, ref.Registry, ref.Repository)
	if err != nil || cred.Username == "" {
		return nil, err
	}
	return map[string]string{ref.Registry: cred.Username + ":" + cred.Password}, nil
}

func printReport(w io.Writer, r *control.Report, quiet bool) {
	fmt.Fprintf(w, "%s is %s on %d of %d hosts after %.2f s (job %s)\n", r.Image, r.Ready, len(r.Hosts)-r.Failed, len(r.Hosts), r.Makespan.Seconds(), r.Job)
	if quiet {
		return
	}
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "  HOST\tTIME\tORIGIN\tPEER\tSTORE\tPASSED ON\tMOUNT")
	for _, h := range r.Hosts {
		where := h.Mount
		if h.Error != "" {
			where = h.Error
		}
		fmt.Fprintf(tw, "  %s\t%.2f s\t%s\t%s\t%s\t%s\t%s\n", h.Host, h.Took.Seconds(), megabytes(h.Bytes.Origin), megabytes(h.Bytes.Peer), megabytes(h.Bytes.Store), megabytes(h.Sent), where)
	}
	_ = tw.Flush()
	share := 0.0
	if r.Size > 0 {
		share = float64(r.Bytes.Origin) / float64(r.Size)
	}
	fmt.Fprintf(w, "  image %s, %.2f times from the origin in %d requests; slowest ÷ median %.2f\n", megabytes(r.Size), share, r.Bytes.OriginRequests, r.Ratio)
	for _, h := range r.Hosts {
		for _, l := range h.Late {
			fmt.Fprintf(w, "  %s passed over %s after %.1f s: %s\n", h.Host, l.Host, l.Waited.Seconds(), l.Why)
		}
	}
}

// A stageShow draws how a stage comes along.
type stageShow struct {
	a      *app
	name   string
	began  time.Time
	drawn  time.Time
	states map[string]control.HostState
}

func (a *app) showStage(name string) *stageShow {
	return &stageShow{a: a, name: name, began: time.Now(), states: map[string]control.HostState{}}
}

func (s *stageShow) take(e control.StageEvent) {
	for _, h := range e.Hosts {
		s.states[h.Host] = h
	}
	bar := isTerminal(s.a.err)
	every := lineEvery
	if bar {
		every = barEvery
	}
	if s.a.quiet || time.Since(s.began) < silentFor || time.Since(s.drawn) < every {
		return
	}
	s.drawn = time.Now()
	if bar {
		fmt.Fprint(s.a.err, "\r\x1b[K"+fit(drawBar(s.done(), 24)+" "+s.line(), width(s.a.err)))
	} else {
		fmt.Fprintln(s.a.err, "muster: "+s.line())
	}
}

func (s *stageShow) stop() {
	if !s.a.quiet && isTerminal(s.a.err) && !s.drawn.IsZero() {
		fmt.Fprint(s.a.err, "\r\x1b[K")
	}
}

// done is the part of all hosts' bytes that is there.
func (s *stageShow) done() float64 {
	var total, present int64
	for _, h := range s.states {
		total += h.Total
		present += h.Present
	}
	if total == 0 {
		return 0
	}
	return float64(present) / float64(total)
}

// line says how many hosts are how far, and which is last.
func (s *stageShow) line() string {
	count := map[string]int{}
	last, least := "", 2.0
	for name, h := range s.states {
		count[h.Phase]++
		if p := float64(h.Present) / float64(max(h.Total, 1)); !h.Done() && p < least {
			last, least = name, p
		}
	}
	var parts []string
	for phase, n := range count {
		parts = append(parts, fmt.Sprintf("%d %s", n, phase))
	}
	slices.Sort(parts)
	text := fmt.Sprintf("%s: %.0f%%, hosts: %s, %.0f s", s.name, 100*s.done(), strings.Join(parts, ", "), time.Since(s.began).Seconds())
	if last != "" {
		text += ", last " + last
	}
	return text
}

func (a *app) unstageCommand() *cobra.Command {
	var hosts string
	var here bool
	c := &cobra.Command{
		Use:   "unstage JOB",
		Short: "end a job's stages: its mounts go, what was fetched stays in the store",
		Args:  arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := expandHosts(hosts)
			if err != nil {
				return err
			}
			c, err := a.agentClient()
			if err != nil {
				return err
			}
			defer c.Close()
			r, err := c.Unstage(cmd.Context(), control.UnstageRequest{Job: args[0], Hosts: list, Here: here})
			if err != nil {
				return err
			}
			err = a.result(r, func(io.Writer) {
				for _, h := range r.Hosts {
					if h.Busy && !a.quiet {
						fmt.Fprintf(a.err, "muster: the mount on %s was still in use and is detached: who is inside is served a little longer\n", h.Host)
					}
				}
			})
			for _, h := range r.Hosts {
				if h.Error != "" {
					return fmt.Errorf("job %s: host %s: %s", args[0], h.Host, h.Error)
				}
			}
			return err
		},
	}
	c.Flags().StringVar(&hosts, "hosts", "", "hosts besides those that the agent knows the job to be on")
	c.Flags().BoolVar(&here, "here", false, "only on this host")
	a.jsonFlag(c)
	return c
}

func (a *app) prestageCommand() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use:   "prestage [IMAGE…]",
		Short: "bring images to this host before a job asks for them, from other hosts first",
		Long: `Brings images, by default those of the setting 'prestage', to this host's store. With --wait it returns when
all are complete, so that a boot script can hold a node back until then.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.agentClient()
			if err != nil {
				return err
			}
			defer c.Close()
			last := map[string]control.PrestageEvent{}
			show := a.showStage("prestage")
			err = c.Prestage(cmd.Context(), control.PrestageRequest{Images: args, Wait: wait}, func(e control.PrestageEvent) {
				last[e.Image] = e
				e.State.Host = e.Image
				show.take(control.StageEvent{Hosts: []control.HostState{e.State}})
			})
			show.stop()
			list := []control.PrestageEvent{}
			for _, e := range last {
				list = append(list, e)
			}
			slices.SortFunc(list, func(x, y control.PrestageEvent) int { return strings.Compare(x.Image, y.Image) })
			if err != nil {
				return err
			}
			return a.result(list, func(w io.Writer) {
				for _, e := range list {
					fmt.Fprintf(w, "%s: %s, %s of %s here\n", e.Image, e.State.Phase, megabytes(e.State.Present), megabytes(e.State.Total))
				}
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "return when all are complete")
	a.jsonFlag(c)
	return c
}

func (a *app) statusCommand() *cobra.Command {
	var job string
	c := &cobra.Command{
		Use:   "status",
		Short: "what this host's agent does: its jobs, peers and store",
		Long:  `Shows the agent's state and the user's own jobs; root sees all.`,
		Args:  arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.agentClient()
			if err != nil {
				return err
			}
			defer c.Close()
			s, err := c.Status(cmd.Context(), control.StatusRequest{Job: job})
			if err != nil {
				return err
			}
			return a.result(s, func(w io.Writer) { printStatus(w, s) })
		},
	}
	c.Flags().StringVar(&job, "job", "", "only this job")
	a.jsonFlag(c)
	return c
}

func printStatus(w io.Writer, s control.Status) {
	state := "up " + s.Up.Round(time.Second).String()
	if s.Draining {
		state = "draining"
	}
	fmt.Fprintf(w, "%s: muster %s, %s; store %s, %s of %s; %d peers; from origin %s, from peers %s, passed on %s\n",
		s.Host, s.Version, state, s.Store.Dir, megabytes(s.Store.Used), megabytes(s.Store.Quota), max(0, len(s.Peers)-1),
		megabytes(s.Bytes.Origin), megabytes(s.Bytes.Peer), megabytes(s.Sent))
	if len(s.Jobs) == 0 {
		return
	}
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "JOB\tIMAGE\tSTATE\tREADY\tHERE\tHOSTS\tUID\tMOUNT")
	for _, j := range s.Jobs {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%.0f%%\t%d\t%d\t%s\n", j.Job, j.Image, j.State.Phase, j.State.Ready,
			100*float64(j.State.Present)/float64(max(j.State.Total, 1)), len(j.Hosts), j.UID, j.State.Mount)
	}
	_ = tw.Flush()
}
