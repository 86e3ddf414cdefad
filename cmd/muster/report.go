package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/report"
)

type reportFlags struct {
	hosts, html, csv string
	earlier          int
	money            priceFlags
	site             report.Site
}

func (a *app) reportCommand() *cobra.Command {
	f := reportFlags{earlier: 20}
	c := &cobra.Command{
		Use:   "report [JOB...]",
		Short: "tell what starting a job took: each host's phases, what waiting cost, who was slow and why",
		Long: `Asks the agents of all hosts of JOB what they remember: when each host began, resolved, had
the first byte, the tables, the mount, what the program touches first, everything, and when a
program first read; where the bytes came from; how long hosts that were ready waited for others,
and what that cost; which hosts were slow, the likely reason, and whether they were before.
Times of hosts are aligned by asking for their clocks; how far they may be off is printed.

Agents remember a stage when its job has ended, and after a restart. Users see their own jobs,
root sees all. Without JOB: lists the jobs that this host remembers. With several, --csv
writes them to one file, which 'muster estimate fit' and 'evaluate' take.

  muster report 4711 --instance hpc6a.48xlarge --html report.html
  muster report $(muster report -q) --csv events.csv --instance hpc6a.48xlarge`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.report(cmd.Context(), args, &f) },
	}
	c.Flags().StringVar(&f.hosts, "hosts", "", "hosts that may know the job when this one does not")
	c.Flags().StringVar(&f.html, "html", "", "write a page with a timeline of all hosts to this file; it needs no network")
	c.Flags().StringVar(&f.csv, "csv", "", "write the hosts' times to this file, in the columns of the study")
	c.Flags().IntVar(&f.earlier, "earlier", f.earlier, "how many earlier stages hosts are compared in, 0 to 50")
	c.Flags().StringVar(&f.site.Experiment, "experiment", "muster", "with --csv: what these jobs have in common, such as the cluster's name")
	f.money.add(c, "instance type, for its price and for --csv")
	a.jsonFlag(c)
	return c
}

func (a *app) report(ctx context.Context, jobs []string, f *reportFlags) error {
	if len(jobs) == 0 && (f.html != "" || f.csv != "") {
		return badScenario("no job: 'muster report' lists the jobs that this host remembers")
	}
	if f.earlier < 0 || f.earlier > 50 {
		return badScenario("--earlier is %d; accepted are 0 to 50", f.earlier)
	}
	var price float64
	if f.money.given() { // without one, no money is told of
		p, err := f.money.parameter()
		if err != nil {
			return err
		}
		if price = p.Mid; price <= 0 {
			return badScenario("--price is %s; accepted is more than 0 dollars per hour and host", f.money.price)
		}
	}
	hosts, err := expandHosts(f.hosts)
	if err != nil {
		return err
	}
	c, err := a.agentClient()
	if err != nil {
		return err
	}
	defer c.Close()
	if len(jobs) == 0 {
		return a.listReports(ctx, c)
	}
	var all []*report.Report
	for _, job := range jobs {
		stages, answers, err := a.recall(ctx, c, control.RecordsRequest{Job: job, Hosts: hosts, Earlier: f.earlier})
		if err != nil {
			return err
		}
		for _, s := range stages {
			r, err := report.Of(s, answers, price)
			if err != nil {
				return fmt.Errorf("job %s: %w", job, err)
			}
			all = append(all, r)
		}
	}
	if f.html != "" {
		if err := writeFile(f.html, func(w io.Writer) error { return reportPage(w, all) }); err != nil {
			return err
		}
	}
	if f.csv != "" {
		f.site.Instance = cmp.Or(f.money.instance, "unknown")
		var events []costmodel.Event
		for _, r := range all {
			events = append(events, report.Events(r, f.site)...)
		}
		if len(events) == 0 {
			return badScenario("no host of %s got ready: there is nothing to write to %s", strings.Join(jobs, ", "), f.csv)
		}
		if err := writeFile(f.csv, func(w io.Writer) error { return costmodel.WriteEvents(w, events) }); err != nil {
			return err
		}
	}
	return a.result(all, func(w io.Writer) {
		for i, r := range all {
			if i > 0 {
				fmt.Fprintln(w)
			}
			printRecords(w, r, a.quiet)
		}
	})
}

// recall gets what the hosts of a job remember.
func (a *app) recall(ctx context.Context, c *control.Client, q control.RecordsRequest) (stages []control.Record, hosts []control.HostRecords, err error) {
	began, drawn := time.Now(), time.Time{}
	err = c.Records(ctx, q, func(e control.RecordsEvent) {
		stages = append(stages, e.Stages...)
		hosts = append(hosts, e.Hosts...)
		if !a.quiet && isTerminal(a.err) && time.Since(began) > silentFor && time.Since(drawn) > barEvery {
			drawn = time.Now()
			fmt.Fprintf(a.err, "\r\x1b[K%d hosts have answered", len(hosts))
		}
	})
	if !drawn.IsZero() {
		fmt.Fprint(a.err, "\r\x1b[K")
	}
	return stages, hosts, err
}

func (a *app) listReports(ctx context.Context, c *control.Client) error {
	stages, _, err := a.recall(ctx, c, control.RecordsRequest{})
	if err != nil {
		return err
	}
	if stages == nil {
		stages = []control.Record{}
	}
	return a.result(stages, func(w io.Writer) {
		var said []string
		tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
		if !a.quiet {
			fmt.Fprintln(tw, "BEGAN\tJOB\tIMAGE\tHOSTS\tUID\tHERE\tREADY AS ASKED AFTER")
		}
		for _, s := range stages {
			if a.quiet && !slices.Contains(said, s.Job) {
				said = append(said, s.Job)
				fmt.Fprintln(tw, s.Job)
			} else if !a.quiet {
				fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%d\t%s\t%.2f s\n", s.Began.Format(time.DateTime), s.Job, s.Image, len(s.Hosts), s.UID, s.State.Phase, s.State.Took.Seconds())
			}
		}
		_ = tw.Flush()
	})
}

// shownHosts is how many hosts a report prints; of more, only so many that took longest.
const shownHosts = 24

func printRecords(w io.Writer, r *report.Report, quiet bool) {
	fmt.Fprintf(w, "job %s: %s was %s on %d of %d hosts %s after the first began, %s\n", r.Job, r.Image, r.Asked, r.Ready, r.Nodes, lasted(r.Makespan), r.Began.Format(time.DateTime))
	if quiet {
		return
	}
	unknown := ""
	if r.ClockUnknown > 0 {
		unknown = fmt.Sprintf(" (%d hosts were started anew since: their times are as their clocks had them)", r.ClockUnknown)
	}
	fmt.Fprintf(w, "  last host began %s after the first; median host took %s, slowest ÷ median %.2f; clocks aligned within %.1f ms%s\n",
		lasted(r.StartSkew), lasted(r.Median), r.Ratio, 1000*r.ClockBound, unknown)
	share := 0.0
	if r.Size > 0 {
		share = float64(r.Bytes.Origin) / float64(r.Size)
	}
	fmt.Fprintf(w, "  image %s in %d layers, for each host; %.2f times from the origin in %d requests, %s from other hosts, %s were there\n",
		some(r.Size), r.Layers, share, r.Bytes.OriginRequests, some(r.Bytes.Peer), some(r.Bytes.Store))
	fmt.Fprintf(w, "  until all were ready: %.1f node-seconds, of which %.1f ready hosts waited for others", r.NodeSeconds, r.Idle)
	if m := r.Money; m != nil {
		fmt.Fprintf(w, "; $%.4g and $%.4g at $%g per host and hour", m.Total, m.Idle, m.PerHour)
	}
	fmt.Fprintln(w)
	hosts := r.Hosts
	if len(hosts) > shownHosts {
		hosts = r.SlowestHosts(shownHosts)
		fmt.Fprintf(w, "\nThe %d hosts that took longest, of %d (--json and --html have all):\n", shownHosts, len(r.Hosts))
	} else {
		fmt.Fprintln(w)
	}
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "  HOST\tSTART\t%s\tORIGIN\tPEERS\tHAD\tPASSED ON\n", strings.ToUpper(strings.Join(report.Phases, "\t")))
	for _, h := range hosts {
		fmt.Fprintf(tw, "  %s\t%.2f", h.Host, h.Start)
		for _, p := range report.Phases {
			if t, ok := h.Phases[p]; ok {
				fmt.Fprintf(tw, "\t%.2f", t)
			} else {
				fmt.Fprint(tw, "\t-")
			}
		}
		fmt.Fprintf(tw, "\t%s\t%s\t%s\t%s\n", some(h.Bytes.Origin), some(h.Bytes.Peer), some(h.Bytes.Store), some(h.Bytes.Sent))
	}
	_ = tw.Flush()
	fmt.Fprintln(w, "  (seconds after the first host began; - is not reached, or not seen)")
	var lines []string
	for _, h := range r.Hosts {
		if h.Error != "" {
			lines = append(lines, h.Host+": "+h.Error)
		}
	}
	printSome(w, lines)
	lines = nil
	for _, s := range r.Silent {
		lines = append(lines, s.Host+" has told nothing: "+s.Why)
	}
	printSome(w, lines)
	lines = nil
	for _, s := range r.Slow {
		lines = append(lines, fmt.Sprintf("slow: %s, %.2f times the median, %s more: %s: %s%s", s.Host, s.Factor, lasted(s.More), s.Cause, s.Why, before(r, s)))
	}
	printSome(w, lines)
}

// printSome prints as many lines as hosts are shown.
func printSome(w io.Writer, lines []string) {
	for i, l := range lines {
		if i == shownHosts {
			fmt.Fprintf(w, "  and %d more\n", len(lines)-i)
			return
		}
		fmt.Fprintln(w, "  "+l)
	}
}

// before says how a slow host was in earlier stages.
func before(r *report.Report, s report.Slow) string {
	for _, h := range r.Hosts {
		if e := h.Earlier; h.Host == s.Host && e != nil {
			return fmt.Sprintf("; slow in %d of %d earlier stages (median factor %.2f)", e.Slow, e.Stages, e.Factor)
		}
	}
	return ""
}

// some writes bytes for people; nothing is 0.
func some(n int64) string { return carried(float64(n)) }

// lasted writes a time of a stage, which is short.
func lasted(s float64) string {
	if s < 100 {
		return fmt.Sprintf("%.2f s", s)
	}
	return took(s)
}
