package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/jobhooks/hostlist"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// manyHosts is how many hosts a table for people shows.
const manyHosts = 32

// planFlags are those of muster plan.
type planFlags struct {
	hosts, seeds, slow string
	platform           string
	link, originLink   float64
	params             planner.Params
}

// A planned is what muster plan prints: the plan of a stage, and how long it should take.
type planned struct {
	Image    string      `json:"image"`
	Manifest ztoc.Digest `json:"manifest"`
	Bytes    int64       `json:"bytes"` // that each host shall have: layers, tables and what else a mount needs
	Blobs    int         `json:"blobs"`
	Pieces   int         `json:"pieces"`
	Piece    int64       `json:"piece_size"`
	Fanout   int         `json:"fanout"`
	Hops     int         `json:"hops"` // from a seed to the last host
	// FromOrigin is false when none of the hosts may reach the registry: the roots need somebody who has the image.
	FromOrigin bool          `json:"from_origin"`
	Requests   int           `json:"requests"` // to the registry, all hosts together
	Uneven     float64       `json:"sent_max_over_mean"`
	Peers      int           `json:"peers"` // of the host that has most
	Hosts      []plannedHost `json:"hosts"`
	Trees      []plannedTree `json:"trees"`
	Link       float64       `json:"link_mbit"`
	OriginLink float64       `json:"origin_link_mbit"`
	Fluid      float64       `json:"fluid_limit_seconds"`
	Time       float64       `json:"seconds"`         // until the last host has everything
	Apart      float64       `json:"without_seconds"` // were each host to pull for itself
}

type plannedHost struct {
	Name     string        `json:"name"`
	Seed     bool          `json:"seed"`
	Slow     bool          `json:"slow,omitempty"`
	Fetches  int64         `json:"from_origin"` // bytes
	Requests int           `json:"requests"`
	Sends    int64         `json:"sends"` // bytes, to other hosts
	Peers    int           `json:"peers"`
	Indexes  []ztoc.Digest `json:"indexes,omitempty"` // layers whose tables it builds
}

type plannedTree struct {
	Bytes   int64 `json:"bytes"`
	Parents []int `json:"parents"` // for each host the number of the one it is served by, -1: the root
}

func (a *app) planCommand() *cobra.Command {
	var f planFlags
	c := &cobra.Command{
		Use:   "plan IMAGE --hosts LIST",
		Short: "print how a stage would move an image to the hosts of a job, and how long it should take",
		Long: `Resolves IMAGE and prints the plan that all agents of a job would follow: who fetches what from the registry,
who sends how much to others, and predicted times. Nothing is fetched but manifest, config and index; no agent is
asked.

The fluid limit is the least time that any scheme needs on such links. LIST is as schedulers write it:
node[01-16],login1.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.plan(cmd.Context(), args[0], f)
			if err != nil {
				return err
			}
			return a.result(p, p.print)
		},
	}
	fl := c.Flags()
	fl.StringVar(&f.hosts, "hosts", "", "the job's hosts")
	fl.StringVar(&f.seeds, "seeds", "", "those of them that may reach the registry; default as cluster.seeds says, all if it says nothing")
	fl.StringVar(&f.slow, "slow", "", "those of them that are to pass nothing on")
	fl.StringVar(&f.platform, "platform", "", "platform of the image, such as linux/arm64; default this machine's")
	fl.Float64Var(&f.link, "link", 1000, "speed of each host's link in Mbit/s, in each direction, for the prediction")
	fl.Float64Var(&f.originLink, "origin-link", 0, "speed of the registry's link in Mbit/s; 0: as --link")
	fl.IntVar(&f.params.Trees, "trees", 0, "trees, about; 0: chosen by the number of hosts")
	fl.IntVar(&f.params.Fanout, "fanout", 0, fmt.Sprintf("children of a host in a tree; 0: %d", planner.DefaultFanout))
	_ = c.MarkFlagRequired("hosts")
	a.jsonFlag(c)
	return c
}

func (a *app) plan(ctx context.Context, ref string, f planFlags) (*planned, error) {
	if !(f.link > 0) || !(f.originLink >= 0) {
		return nil, usagef("--link and --origin-link are speeds in Mbit/s")
	}
	hosts, err := a.plannedHosts(f)
	if err != nil {
		return nil, err
	}
	repo, err := a.repository(ref)
	if err != nil {
		return nil, err
	}
	st, err := a.openStore()
	if err != nil {
		return nil, err
	}
	defer st.Close()
	found, err := image.Survey(ctx, image.Options{Repo: repo, Store: st, Platform: f.platform, NoIndex: !a.cfg.Index.Use, Log: slog.Default()})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	spec := &planner.JobSpec{
		Planner: planner.Version, Job: "plan", Image: found.Image.Ref.WithDigest(found.Image.Digest).String(),
		Manifest: found.Image.Digest, Hosts: hosts, Params: f.params,
	}
	if spec.Blobs, _, err = agent.Blobs(found); err != nil {
		return nil, err
	}
	p, err := planner.New(spec)
	if errors.Is(err, planner.ErrInvalid) {
		err = usage(err)
	}
	if err != nil {
		return nil, err
	}
	return describePlan(ref, p, f), nil
}

// plannedHosts are the hosts of the list, with what the flags say of them.
func (a *app) plannedHosts(f planFlags) ([]planner.Host, error) {
	names, err := hostlist.Expand(f.hosts)
	if err != nil {
		return nil, usage(fmt.Errorf("--hosts: %w", err))
	}
	if len(names) == 0 {
		return nil, usagef("--hosts: no host")
	}
	hosts := make([]planner.Host, len(names))
	number := map[string]int{}
	for i, name := range names {
		number[name] = i
		hosts[i] = planner.Host{
			Name: name, Addr: net.JoinHostPort(name, strconv.Itoa(a.cfg.Network.Port)),
			Seed: f.seeds == "" && (len(a.cfg.Cluster.Seeds) == 0 || matches(a.cfg.Cluster.Seeds, name)),
		}
	}
	for _, mark := range []struct {
		flag, list string
		set        func(*planner.Host)
	}{
		{"--seeds", f.seeds, func(h *planner.Host) { h.Seed = true }},
		{"--slow", f.slow, func(h *planner.Host) { h.Slow = true }},
	} {
		list, err := hostlist.Expand(mark.list)
		if err != nil {
			return nil, usage(fmt.Errorf("%s: %w", mark.flag, err))
		}
		for _, name := range list {
			i, ok := number[name]
			if !ok {
				return nil, usagef("%s: %s is not among the hosts", mark.flag, name)
			}
			mark.set(&hosts[i])
		}
	}
	return hosts, nil
}

func describePlan(ref string, p *planner.Plan, f planFlags) *planned {
	spec := p.Spec()
	n := len(spec.Hosts)
	d := &planned{
		Image: ref, Manifest: spec.Manifest, Blobs: len(spec.Blobs), Pieces: p.Pieces(), Piece: p.PieceSize(), Fanout: f.params.Fanout,
		FromOrigin: p.FromOrigin(), Link: f.link, OriginLink: f.originLink, Hosts: make([]plannedHost, n), Trees: []plannedTree{},
	}
	if d.Fanout == 0 {
		d.Fanout = planner.DefaultFanout
	}
	if d.OriginLink == 0 {
		d.OriginLink = d.Link
	}
	for i, h := range spec.Hosts {
		d.Hosts[i] = plannedHost{Name: h.Name, Slow: h.Slow}
		for _, r := range p.Runs(i) {
			d.Hosts[i].Fetches += r.Range.Len()
			d.Hosts[i].Requests++
			d.Requests++
		}
	}
	for _, h := range p.Seeds() {
		d.Hosts[h].Seed = true
	}
	for i, b := range spec.Blobs {
		d.Bytes += b.Size
		if h := p.Indexer(i); h >= 0 {
			d.Hosts[h].Indexes = append(d.Hosts[h].Indexes, b.Digest)
		}
	}
	d.follow(p)
	swarm := costmodel.Swarm{
		Bytes: float64(d.Bytes), Hosts: n, Seeds: len(p.Seeds()), Fanout: d.Fanout, Piece: float64(d.Piece),
		Origin: d.OriginLink * 1e6 / 8, Up: d.Link * 1e6 / 8, Down: d.Link * 1e6 / 8, Hop: 0.001,
	}
	for _, h := range spec.Hosts {
		if h.Slow {
			swarm.Leaves++
		}
	}
	d.Fluid, d.Time = swarm.Fluid(), swarm.Pipeline()
	d.Apart = max(float64(n)*swarm.Bytes/swarm.Origin, swarm.Bytes/swarm.Down)
	return d
}

// follow adds up what the trees make each host do.
func (d *planned) follow(p *planner.Plan) {
	n := len(d.Hosts)
	peers := make([]map[int]bool, n)
	for h := range peers {
		peers[h] = map[int]bool{}
	}
	for k := range p.Trees() {
		if p.Bytes(k) == 0 {
			continue
		}
		t := plannedTree{Bytes: p.Bytes(k), Parents: make([]int, n)}
		for h := range n {
			q := p.Parent(k, h)
			t.Parents[h] = q
			if q < 0 {
				continue
			}
			d.Hosts[q].Sends += t.Bytes
			peers[q][h], peers[h][q] = true, true
			d.Hops = max(d.Hops, p.Depth(k, h))
		}
		d.Trees = append(d.Trees, t)
	}
	var most, sum int64
	for h := range d.Hosts {
		d.Hosts[h].Peers = len(peers[h])
		d.Peers = max(d.Peers, len(peers[h]))
		most, sum = max(most, d.Hosts[h].Sends), sum+d.Hosts[h].Sends
	}
	d.Uneven = 1
	if sum > 0 {
		d.Uneven = float64(most) * float64(n) / float64(sum)
	}
}

func (d *planned) print(w io.Writer) {
	names, seeds := make([]string, len(d.Hosts)), []string{}
	for i, h := range d.Hosts {
		if names[i] = h.Name; h.Seed {
			seeds = append(seeds, h.Name)
		}
	}
	fmt.Fprintf(w, "%s: %s in %d pieces of %s, to %d hosts: %s\n", d.Image, megabytes(d.Bytes), d.Pieces, Size(d.Piece), len(names), shortList(names))
	if d.FromOrigin {
		fmt.Fprintf(w, "%d fetch from the registry, in %d requests: %s\n", len(seeds), d.Requests, shortList(seeds))
	} else {
		fmt.Fprintf(w, "none of them may reach the registry; %s need a host that has the image\n", shortList(seeds))
	}
	fmt.Fprintf(w, "%d trees, fan-out %d, at most %d hops; at most %d peers; bytes sent max ÷ mean %.2f\n\n",
		len(d.Trees), d.Fanout, d.Hops, d.Peers, d.Uneven)
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "HOST\tFROM REGISTRY\tREQUESTS\tSENDS\tPEERS\tBUILDS TABLES OF")
	for i, h := range d.Hosts {
		if i == manyHosts {
			break
		}
		fetches := "-"
		if h.Seed {
			fetches = megabytes(h.Fetches)
		}
		note := ""
		if h.Slow {
			note = "passes nothing on"
		}
		for k, x := range h.Indexes {
			if k > 0 || note != "" {
				note += ", "
			}
			note += short(x)
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%s\t%d\t%s\n", h.Name, fetches, h.Requests, megabytes(h.Sends), h.Peers, note)
	}
	_ = tw.Flush()
	if more := len(d.Hosts) - manyHosts; more > 0 {
		fmt.Fprintf(w, "and %d more; --json has all\n", more)
	}
	fmt.Fprintf(w, "\nWith %g Mbit/s per host and %g Mbit/s at the registry, until the last host has everything:\n", d.Link, d.OriginLink)
	tw = tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "  at best, by any scheme\t%s\n", seconds(d.Fluid))
	fmt.Fprintf(tw, "  by this plan\t%s\n", seconds(d.Time))
	fmt.Fprintf(tw, "  each host for itself\t%s\n", seconds(d.Apart))
	_ = tw.Flush()
}

// shortList is a host list that fits on a line.
func shortList(names []string) string {
	s := hostlist.Fold(names)
	if len(s) > 100 {
		s = s[:97] + "…"
	}
	return s
}
