package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/costmodel"
)

func readEvents(file string) ([]costmodel.Event, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, badScenario("%v: events are a CSV file in the columns of the study", err)
	}
	defer func() { _ = f.Close() }()
	events, err := costmodel.ReadEvents(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return events, nil
}

func (a *app) estimateFitCommand() *cobra.Command {
	var out, source string
	c := &cobra.Command{
		Use:   "fit EVENTS.csv -o MODEL",
		Short: "make a model of one's own pulls",
		Long: `Fits a model on measured pulls: a CSV file in the columns of the study, as 'muster report'
exports them. 'muster estimate --model MODEL' then estimates with it.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			if out == "" {
				return badScenario("no file for the model: give -o MODEL")
			}
			events, err := readEvents(args[0])
			if err != nil {
				return err
			}
			if source == "" {
				source = filepath.Base(args[0])
			}
			m, err := costmodel.Fit(events, source)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if err := writeFile(out, func(w io.Writer) error { return costmodel.WriteModel(w, m) }); err != nil {
				return err
			}
			return a.result(m.Summary(), func(w io.Writer) { printFit(w, m.Summary(), out) })
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "", "file of the model")
	c.Flags().StringVar(&source, "name", "", "what the model calls these pulls; default the file's name")
	a.jsonFlag(c)
	return c
}

func printFit(w io.Writer, s costmodel.Summary, out string) {
	fmt.Fprintf(w, "%s: fitted on %d events of %d runs (%s), %d events dropped as cached\n\n", out, s.Events, s.Runs, s.Source, s.Dropped)
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "FORMULA\tRUNS\tFIXED s\ts/LAYER\ts/GB\ts/GB PER 100 NODES\ts/GB INFLATED")
	for _, f := range s.Formulas {
		fmt.Fprintf(tw, "%s\t%d\t%.2f\t%.3f\t%.1f\t%.1f\t%.2f\n", f.Name, f.Runs, f.Fixed, f.PerLayer, f.PerGB, f.PerGBNode, f.PerUnpackedGB)
	}
	_ = tw.Flush()
	if s.Rate.Mid > 0 {
		fmt.Fprintf(w, "\nreal pulls above 200 MB: %.1f MB/s per host (%.1f to %.1f)\n", s.Rate.Mid/1e6, s.Rate.Low/1e6, s.Rate.High/1e6)
	}
	fmt.Fprintf(w, "slow hosts, in most of their runs above 1.18 times the median: %d\n", len(s.Slow))
	for _, h := range s.Slow {
		fmt.Fprintf(w, "  %s\n", h)
	}
}

// An evaluation is scores with how they came about.
type evaluation struct {
	costmodel.Scores
	Dropped int    `json:"dropped"` // events
	Model   string `json:"model"`
	Uses    string `json:"uses"`
}

const evaluateUses = "run_id, experiment, strategy, image, content, sizes, layers, cluster_nodes, instance_type, node; never pull_s or start_s of the events predicted"

func (a *app) estimateEvaluateCommand() *cobra.Command {
	var model string
	var folds, upTo int
	var seed uint64
	c := &cobra.Command{
		Use:   "evaluate EVENTS.csv",
		Short: "score a model on pulls",
		Long: `With --model scores that model on the events, which should not be those it was fitted on.
Without it cross-validates: the events are split by run, each part is predicted by a model of
the others, beside two baselines (a + b*new_bytes per strategy and content; the same with
c*layers). --up-to fits on clusters of up to so many nodes and predicts the larger ones.

Errors are |predicted - observed| / observed: mdape is their median, p90 their 90th
percentile. Events that were cached (suspect_cached, or pull_s of 0.05 or less) are dropped.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if model != "" && (cmd.Flags().Changed("folds") || upTo != 0) {
				return badScenario("--model scores a model that is there; --folds and --up-to fit their own")
			}
			events, err := readEvents(args[0])
			if err != nil {
				return err
			}
			dropped := len(events) - len(costmodel.Usable(events))
			if model != "" {
				m, err := openModel(model)
				if err != nil {
					return err
				}
				s, err := costmodel.Evaluate(m, events)
				if err != nil {
					return fmt.Errorf("%s: %w", args[0], err)
				}
				if s.All.N == 0 {
					return badScenario("%s: all %d events were cached: nothing to score", args[0], dropped)
				}
				v := evaluation{s, dropped, m.Source, evaluateUses}
				return a.result(v, func(w io.Writer) { printScores(w, "model of "+m.Source, s) })
			}
			var v costmodel.Comparison
			if upTo != 0 {
				v, err = costmodel.Extrapolate(events, upTo)
			} else {
				v, err = costmodel.CrossValidate(events, folds, seed)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return a.result(v, func(w io.Writer) {
				fmt.Fprintf(w, "%s; %d events dropped as cached\n\n", v.Split, dropped)
				printScores(w, "model", v.Model)
				printScores(w, "a + b*new_bytes", v.Baseline)
				printScores(w, "a + b*new_bytes + c*layers", v.Layers)
			})
		},
	}
	c.Flags().StringVar(&model, "model", "", "file of 'muster estimate fit'")
	c.Flags().IntVar(&folds, "folds", 10, "parts of a cross-validation")
	c.Flags().Uint64Var(&seed, "seed", 1, "of the split of a cross-validation")
	c.Flags().IntVar(&upTo, "up-to", 0, "fit on clusters of up to this many nodes, predict larger ones")
	a.jsonFlag(c)
	return c
}

func printScores(w io.Writer, name string, s costmodel.Scores) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%s\n", name)
	fmt.Fprintln(tw, "\tn\tmedian error\tP90\t")
	for _, row := range []struct {
		name string
		s    costmodel.Score
	}{{"all", s.All}, {"apps", s.Apps}, {"zeros", s.Zeros}, {"makespan", s.Makespan}} {
		fmt.Fprintf(tw, "%s\t%d\t%.1f %%\t%.1f %%\t\n", row.name, row.s.N, 100*row.s.MdAPE, 100*row.s.P90)
	}
	_ = tw.Flush()
	fmt.Fprintln(w)
}
