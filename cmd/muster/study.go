package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/viper"

	"github.com/muster-hpc/muster/costmodel"
)

// A studyPlan is a parameter file: container-crafter's keys, and how often each image is pulled.
type studyPlan struct {
	URI   string `mapstructure:"uri"` // where the images go: a repository; their tags say what they are
	Sizes []struct {
		Total float64 `mapstructure:"total"` // compressed bytes
	} `mapstructure:"sizes"`
	Layers []struct {
		Exact int `mapstructure:"exact"`
		Min   int `mapstructure:"min"`
		Max   int `mapstructure:"max"`
	} `mapstructure:"layers"`
	Iterations int `mapstructure:"iterations"`

	combinations []studyImage
}

// Bounds of a study.
const (
	maxStudyLayers = 127 // what overlay file systems of container engines take
	maxStudyBytes  = 1 << 40
	maxStudyImages = 10_000
	minLayerBytes  = 1 << 10
)

func badStudy(file, format string, args ...any) error {
	return badScenario("%s: %s", file, fmt.Sprintf(format, args...))
}

// readStudy reads a parameter file.
func readStudy(file string) (p studyPlan, err error) {
	v := viper.New()
	v.SetConfigFile(file)
	v.SetConfigType("yaml")
	p.Iterations = 3
	if err := v.ReadInConfig(); err != nil {
		return p, badStudy(file, "%s: a parameter file is YAML with uri, sizes, layers and iterations", oneLine(err))
	}
	if err := v.UnmarshalExact(&p); err != nil {
		return p, badStudy(file, "%s: accepted are uri, sizes (total), layers (exact, or min and max) and iterations", oneLine(err))
	}
	if p.URI == "" {
		return p, badStudy(file, "no uri: the repository that the images are pushed to, such as registry.example.org/study")
	}
	if p.Iterations < 1 || p.Iterations > 1000 {
		return p, badStudy(file, "iterations is %d; accepted are 1 to 1000", p.Iterations)
	}
	if len(p.Sizes) == 0 || len(p.Layers) == 0 {
		return p, badStudy(file, "sizes and layers are lists, such as sizes: [{total: 53702097}] and layers: [{exact: 9}]; one is missing")
	}
	var counts []int
	for _, l := range p.Layers {
		from, to := l.Exact, l.Exact
		if l.Exact == 0 {
			from, to = l.Min, l.Max
		}
		if from < 1 || to < from || to > maxStudyLayers {
			return p, badStudy(file, "layers from %d to %d; accepted are 1 to %d", from, to, maxStudyLayers)
		}
		for n := from; n <= to; n++ {
			counts = append(counts, n)
		}
	}
	for _, s := range p.Sizes {
		for _, n := range counts {
			if s.Total < float64(n*minLayerBytes) || s.Total > maxStudyBytes {
				return p, badStudy(file, "total of %.0f bytes in %d layers; accepted are %d bytes per layer to 1 TiB in all", s.Total, n, minLayerBytes)
			}
			p.combinations = append(p.combinations, studyImage{Bytes: int64(s.Total), Layers: n, ref: fmt.Sprintf("%s:%d-bytes-%d-layers", p.URI, int64(s.Total), n)})
		}
	}
	if len(p.combinations) > maxStudyImages {
		return p, badStudy(file, "%d images; accepted are %d", len(p.combinations), maxStudyImages)
	}
	return p, nil
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

type studyFlags struct {
	hosts, launch, out, instance, experiment string
	strategies                               []string
}

func (a *app) studyCommand() *cobra.Command {
	var f studyFlags
	c := &cobra.Command{
		Use:   "study PARAMETERS.yaml -o DIR",
		Short: "measure pulls: make images of given sizes, push them, pull them by each strategy, draw the results",
		Long: `Makes images as a parameter file says, of content that compresses like real files (not of
zeros), pushes them, pulls each by every strategy that the hosts offer, and writes DIR/events.csv
in the study's columns, which 'muster estimate fit' takes, and DIR/study.html with charts. What
DIR has is not measured again: an interrupted study goes on where it was.

  uri: registry.example.org/study      # container-crafter's files are understood
  sizes: [{total: 53702097}, {total: 132399102}]      # compressed bytes
  layers: [{exact: 9}, {exact: 125}]                  # or min and max
  iterations: 3

Strategies: ` + strings.Join(strategyNames(), ", ") + `. Those whose
program is not there are left out, and said to be. muster-mounted and muster-complete stage
through this host's agent on all --hosts. The others run on each host by --launch, whose
{host} is the host's name ('ssh {host}', 'srun -N1 -w {host}'), on all at once; without it on this
host alone. Each pull begins without
any of the image: in an empty directory, and for stages with an image of the same kind that no
host has.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return a.study(cmd.Context(), args[0], &f) },
	}
	c.Flags().StringVarP(&f.out, "output", "o", "", "directory of results")
	c.Flags().StringVar(&f.hosts, "hosts", "", "the job's hosts; default this one")
	c.Flags().StringVar(&f.launch, "launch", "", "command that runs another one on a host, such as 'ssh {host}'")
	c.Flags().StringSliceVar(&f.strategies, "strategies", nil, "only these")
	c.Flags().StringVar(&f.instance, "instance", "unknown", "type of the hosts, for the events")
	c.Flags().StringVar(&f.experiment, "experiment", "study", "what the events have in common, such as the cluster's name")
	a.jsonFlag(c)
	c.AddCommand(a.studyPullCommand())
	return c
}

// A studyRun is one image, pulled once by all hosts in one way.
type studyRun struct {
	image     *studyImage
	strategy  string
	iteration int
}

func (r studyRun) id(hosts int, experiment string) string {
	tag := r.image.ref[strings.LastIndexByte(r.image.ref, ':')+1:]
	return fmt.Sprintf("%s/%s/%s/%d-hosts/%d", experiment, r.strategy, tag, hosts, r.iteration)
}

func (a *app) study(ctx context.Context, file string, f *studyFlags) error {
	if f.out == "" {
		return badScenario("no place for results: give -o DIR")
	}
	p, err := readStudy(file)
	if err != nil {
		return err
	}
	hosts, err := a.studyHosts(f)
	if err != nil {
		return err
	}
	ways, left, err := a.studyWays(ctx, f, hosts)
	if err != nil {
		return err
	}
	for _, l := range left {
		fmt.Fprintln(a.err, "muster: "+l)
	}
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return badScenario("%v", err)
	}
	s := &studying{a: a, f: f, hosts: hosts, file: filepath.Join(f.out, "events.csv")}
	if s.events, err = readEvents(s.file); err != nil {
		if _, missing := os.Stat(s.file); !errors.Is(missing, fs.ErrNotExist) {
			return err // of another study, or damaged: nothing is written over
		}
		s.events = nil
	}
	var runs []studyRun
	for i := range p.combinations {
		for _, w := range ways {
			for n := range p.Iterations {
				runs = append(runs, studyRun{&p.combinations[i], w, n})
			}
		}
	}
	if err := s.run(ctx, runs); err != nil {
		return err
	}
	page := filepath.Join(f.out, "study.html")
	if err := writeFile(page, func(w io.Writer) error { return studyPage(w, s.events, s.a.studySimilarity(p.combinations)) }); err != nil {
		return err
	}
	sum := summariseStudy(s.events)
	return a.result(sum, func(w io.Writer) {
		tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "STRATEGY\tBYTES\tLAYERS\tHOSTS\tPULLS\tMEDIAN\tSLOWEST")
		for _, r := range sum {
			fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%d\t%s\t%s\n", r.Strategy, megabytes(int64(r.Bytes)), r.Layers, r.Hosts, r.Pulls, lasted(r.Median), lasted(r.Slowest))
		}
		_ = tw.Flush()
		fmt.Fprintf(w, "\n%s: %d events; charts: %s\n", s.file, len(s.events), page)
	})
}

// studyHosts are the hosts that pull; the first one is this.
func (a *app) studyHosts(f *studyFlags) ([]string, error) {
	hosts, err := expandHosts(f.hosts)
	if err != nil {
		return nil, err
	}
	if f.launch != "" && !strings.Contains(f.launch, "{host}") {
		return nil, badScenario("--launch %q does not say {host}", f.launch)
	}
	if len(hosts) == 0 {
		name, err := os.Hostname()
		if err != nil {
			return nil, err
		}
		hosts = []string{name}
	}
	return hosts, nil
}

// studying is a study under way.
type studying struct {
	a      *app
	f      *studyFlags
	hosts  []string
	file   string
	events []costmodel.Event
}

// run does what is not done yet, and keeps each result as soon as it is there. An image is made and pushed when it is first needed.
func (s *studying) run(ctx context.Context, runs []studyRun) error {
	done := map[string]bool{}
	for _, e := range s.events {
		done[e.Run] = true
	}
	began, drawn := time.Now(), time.Time{}
	bar := !s.a.quiet && isTerminal(s.a.err)
	for i, r := range runs {
		hosts := len(s.hosts)
		if !staged(r.strategy) && s.f.launch == "" {
			hosts = 1
		}
		id := r.id(hosts, s.f.experiment)
		text := fmt.Sprintf("%d of %d pulls, %s %s, %.0f s", i, len(runs), r.strategy, r.image.ref, time.Since(began).Seconds())
		switch {
		case bar:
			fmt.Fprint(s.a.err, "\r\x1b[K"+fit(drawBar(float64(i)/float64(len(runs)), 24)+" "+text, width(s.a.err)))
		case !s.a.quiet && time.Since(drawn) > lineEvery:
			drawn = time.Now()
			fmt.Fprintln(s.a.err, "muster: "+text)
		}
		if done[id] {
			continue
		}
		name := r.image.ref
		if staged(r.strategy) {
			r.image = r.image.fresh(fmt.Sprintf("%s-%d-%d", r.strategy, r.iteration, time.Now().Unix()))
		}
		if err := s.a.makeImage(ctx, r.image); err != nil {
			return fmt.Errorf("image %s: %w", r.image.ref, err)
		}
		pulls, err := s.pull(ctx, r)
		if err != nil {
			return fmt.Errorf("%s of %s: %w", r.strategy, r.image.ref, err)
		}
		first := slices.MinFunc(pulls, func(a, b studyPulled) int { return a.Began.Compare(b.Began) }).Began
		for _, p := range pulls {
			s.events = append(s.events, costmodel.Event{
				Run: id, Experiment: s.f.experiment, Strategy: r.strategy, Image: name, Content: costmodel.ContentApp, TotalBytes: float64(r.image.size), NewBytes: float64(r.image.size),
				UnpackedBytes: float64(r.image.unpacked), Layers: float64(r.image.Layers), ClusterNodes: hosts, InstanceType: s.f.instance, Node: p.Host, Start: p.Began.Sub(first).Seconds(), Pull: p.Seconds,
			})
		}
		if err := s.keep(); err != nil {
			return err
		}
	}
	if bar {
		fmt.Fprint(s.a.err, "\r\x1b[K")
	}
	return nil
}

// keep writes all events, in place of those before.
func (s *studying) keep() error {
	if err := writeFile(s.file+".new", func(w io.Writer) error { return costmodel.WriteEvents(w, s.events) }); err != nil {
		return err
	}
	return os.Rename(s.file+".new", s.file)
}

// A studyRow sums up the pulls of images of one size by one strategy.
type studyRow struct {
	Strategy string  `json:"strategy"`
	Bytes    float64 `json:"bytes"`
	Layers   int     `json:"layers"`
	Hosts    int     `json:"hosts"`
	Pulls    int     `json:"pulls"` // events
	Median   float64 `json:"median"`
	Slowest  float64 `json:"slowest"`
}

func summariseStudy(events []costmodel.Event) []studyRow {
	type key struct {
		strategy, image string
		hosts           int
	}
	at := map[key]int{}
	rows := []studyRow{}
	times := map[int][]float64{}
	for _, e := range events {
		k := key{e.Strategy, e.Image, e.ClusterNodes}
		i, ok := at[k]
		if !ok {
			i = len(rows)
			at[k] = i
			rows = append(rows, studyRow{Strategy: e.Strategy, Bytes: e.TotalBytes, Layers: int(e.Layers), Hosts: e.ClusterNodes})
		}
		rows[i].Pulls++
		rows[i].Slowest = max(rows[i].Slowest, e.Pull)
		times[i] = append(times[i], e.Pull)
	}
	for i := range rows {
		rows[i].Median = costmodel.Quantile(times[i], 0.5)
	}
	return rows
}
