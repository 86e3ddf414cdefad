package costmodel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
)

// A Score is how far predictions are from what was observed. Errors are |predicted − observed| ÷ observed.
type Score struct {
	N     int     `json:"n"`     // events, or runs for the makespan
	MdAPE float64 `json:"mdape"` // median error
	P90   float64 `json:"p90"`   // 90th percentile of errors
}

// Scores are those of all events, of applications, of zeros, and of runs' makespans.
type Scores struct {
	All      Score `json:"all"`
	Apps     Score `json:"apps"`
	Zeros    Score `json:"zeros"`
	Makespan Score `json:"makespan"`
}

// errorsOf gathers errors for Scores.
type errorsOf struct{ all, apps, zeros, makespan []float64 }

func (e *errorsOf) add(r *run, hosts []float64, makespan float64) {
	for i, p := range hosts {
		d := math.Abs(p-r.pull[i]) / r.pull[i]
		e.all = append(e.all, d)
		if r.Content == ContentApp {
			e.apps = append(e.apps, d)
		} else {
			e.zeros = append(e.zeros, d)
		}
	}
	if o := r.makespan(); o > 0 {
		e.makespan = append(e.makespan, math.Abs(makespan-o)/o)
	}
}

func (e *errorsOf) scores() Scores {
	of := func(x []float64) Score {
		if len(x) == 0 {
			return Score{}
		}
		round := func(v float64) float64 { return math.Round(v*1e5) / 1e5 }
		return Score{len(x), round(median(x)), round(Quantile(x, 0.9))}
	}
	return Scores{of(e.all), of(e.apps), of(e.zeros), of(e.makespan)}
}

// Evaluate scores m on events, without those that [Usable] drops. Of an event that is predicted nothing is used that is
// known only afterwards: neither pull_s nor start_s of any event of these runs.
func Evaluate(m *Model, events []Event) (Scores, error) {
	var e errorsOf
	if err := m.evaluate(events, &e); err != nil {
		return Scores{}, err
	}
	return e.scores(), nil
}

func (m *Model) evaluate(events []Event, e *errorsOf) error {
	runs, err := runsOf(Usable(events))
	if err != nil {
		return err
	}
	for i := range runs {
		before := runs[i].before()
		hosts := m.hosts(&before, m.predictPull(&before))
		e.add(&runs[i], hosts, m.predictMakespan(&before, hosts))
	}
	return nil
}

// before is the run without what was observed of it.
func (r *run) before() run {
	b := *r
	b.pull, b.start = nil, nil
	return b
}

// A predictor scores itself on events after it has learned from others.
type predictor func(learn, predict []Event, e *errorsOf) error

func ours(learn, predict []Event, e *errorsOf) error {
	m, err := Fit(learn, "")
	if err != nil {
		return err
	}
	return m.evaluate(predict, e)
}

// A Comparison is one way of splitting events, with the scores of the model and of two baselines that see the same.
type Comparison struct {
	Split    string `json:"split"`
	Model    Scores `json:"model"`
	Baseline Scores `json:"baseline"`        // a + b·new_bytes per strategy and content
	Layers   Scores `json:"baseline_layers"` // the same and c·layers
}

// CrossValidate splits events by run into folds, predicts each from a model of the others, and scores all. The split is the
// same each time for a seed.
func CrossValidate(events []Event, folds int, seed uint64) (Comparison, error) {
	if folds < 2 || folds > 100 {
		return Comparison{}, badEvents("%d folds; a cross-validation needs 2 to 100", folds)
	}
	var ids []string
	seen := map[string]bool{}
	for _, e := range events {
		if !seen[e.Run] {
			seen[e.Run] = true
			ids = append(ids, e.Run)
		}
	}
	slices.Sort(ids)
	rng := rand.New(rand.NewPCG(seed, 6))
	fold := map[string]int{}
	for i, k := range rng.Perm(len(ids)) {
		fold[ids[k]] = i % folds
	}
	return compare(fmt.Sprintf("%d folds by run, seed %d", folds, seed), folds, events, func(e *Event) int { return fold[e.Run] })
}

// Extrapolate fits on clusters of up to nodes hosts and scores on larger ones.
func Extrapolate(events []Event, nodes int) (Comparison, error) {
	split := func(e *Event) int {
		if e.ClusterNodes > nodes {
			return 0
		}
		return -1 // learned from, never predicted
	}
	return compare(fmt.Sprintf("fit on up to %d nodes, predict more", nodes), 1, events, split)
}

func compare(name string, folds int, events []Event, fold func(*Event) int) (Comparison, error) {
	c := Comparison{Split: name}
	for _, p := range []struct {
		predictor
		to *Scores
	}{{ours, &c.Model}, {baseline(false), &c.Baseline}, {baseline(true), &c.Layers}} {
		var e errorsOf
		for k := range folds {
			var learn, predict []Event
			for i := range events {
				if fold(&events[i]) == k {
					predict = append(predict, events[i])
				} else {
					learn = append(learn, events[i])
				}
			}
			if len(predict) == 0 {
				continue
			}
			if err := p.predictor(learn, predict, &e); err != nil {
				return c, err
			}
		}
		*p.to = e.scores()
	}
	if c.Model.All.N == 0 {
		return c, badEvents("no run to predict with this split")
	}
	return c, nil
}

// baseline is a + b·new_bytes, and with layers + c·layers, per strategy and content, by least absolute relative error.
func baseline(layers bool) predictor {
	row := func(e *Event) []float64 {
		x := []float64{1, e.NewBytes / 1e9}
		if layers {
			x = append(x, e.Layers)
		}
		return x
	}
	return func(learn, predict []Event, out *errorsOf) error {
		x, y := map[string][][]float64{}, map[string][]float64{}
		for _, e := range Usable(learn) {
			for _, key := range []string{e.Strategy + "|" + e.Content, e.Content} {
				x[key], y[key] = append(x[key], row(&e)), append(y[key], e.Pull)
			}
		}
		fitted := map[string][]float64{}
		for key := range x {
			fitted[key] = leastRelative(x[key], y[key])
		}
		predict = Usable(predict)
		runs, err := runsOf(predict)
		if err != nil {
			return err
		}
		hosts := map[string][]float64{}
		for _, e := range predict {
			b, ok := fitted[e.Strategy+"|"+e.Content]
			if !ok {
				b = fitted[e.Content]
			}
			sum := 0.0
			for j, v := range row(&e) {
				if j < len(b) {
					sum += b[j] * v
				}
			}
			hosts[e.Run] = append(hosts[e.Run], sum)
		}
		for i := range runs {
			h := hosts[runs[i].ID]
			out.add(&runs[i], h, slices.Max(h))
		}
		return nil
	}
}

// leastRelative minimises the sum of |x·b − y| ÷ y by reweighted least squares.
func leastRelative(x [][]float64, y []float64) []float64 {
	const round = 1e-4
	p := len(x[0])
	b := make([]float64, p)
	for step := range 60 {
		a, rhs := make([]float64, p*p), make([]float64, p)
		for i := range x {
			w := 1.0
			if step > 0 {
				sum := 0.0
				for j, v := range x[i] {
					sum += v * b[j]
				}
				w = 1 / max(math.Abs(sum-y[i])/y[i], round)
			}
			for j, v := range x[i] {
				rhs[j] += w * v / y[i]
				for k := range j + 1 {
					a[j*p+k] += w * v * x[i][k] / (y[i] * y[i])
				}
			}
		}
		for j := range p {
			a[j*p+j] = a[j*p+j]*(1+1e-9) + 1e-12
		}
		if cholesky(a, p) != nil {
			break
		}
		b = solve(a, p, rhs)
	}
	return b
}
