package costmodel

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// MaxRuns is how many runs of a content a fit takes: the newest, which are the last of the file.
const MaxRuns = 1200

const (
	fitRounds  = 2     // formulas and deviations in turn
	runNoise   = 0.06  // of a run's median, as a logarithm: the same pull again differs by this much
	hostNoise  = 0.03  // of one host around its run's median
	startNoise = 0.5   // of a run's last start
	lastNoise  = 0.08  // of a run's makespan
	startGrain = 0.02  // seconds that starts are told apart by
	hostBound  = 0.4   // one pull says no more about a host than this
	slowFactor = 1.18  // of the median, from where on a host is slow
	realPull   = 200e6 // compressed bytes from where on a rate is a rate
)

// Fit makes a model of events, without those that [Usable] drops. source says where they are from. It needs three runs; errors
// are [ErrEvents].
func Fit(events []Event, source string) (*Model, error) {
	usable := Usable(events)
	runs, err := runsOf(usable)
	if err != nil {
		return nil, err
	}
	if runs = newest(runs); len(runs) < 3 {
		return nil, badEvents("%d runs with pulls that were not cached; a fit needs 3 or more", len(runs))
	}
	m := &Model{Version: modelVersion, Source: source, Events: len(usable), Dropped: len(events) - len(usable)}
	m.Likeness.Pull, m.Likeness.Start, m.Likeness.Last = pullLikeness, startLikeness, lastLikeness
	m.pull, m.start, m.last = map[string]*kriging{}, map[string]*kriging{}, map[string]*kriging{}
	m.Pull, m.Mount, m.Ramp, m.Last = map[string]Formula{}, map[string]Formula{}, map[string][2]float64{}, map[string][2]float64{}
	m.Lazy = lazyOf(runs)
	m.Runs = make([]learned, len(runs))
	for i := range runs {
		m.Runs[i].run = runs[i]
	}
	if err := m.fitPulls(); err != nil {
		return nil, err
	}
	m.fitHosts()
	if err := m.fitMakespans(); err != nil {
		return nil, err
	}
	m.Rate, m.Spread = rates(m, usable), spreads(m)
	for i := range m.Runs { // what was observed is not part of a model
		m.Runs[i].pull, m.Runs[i].start, m.Runs[i].hosts = nil, nil, nil
	}
	m.restore()
	return m, nil
}

// newest drops the oldest runs of a content beyond MaxRuns.
func newest(runs []run) []run {
	left := map[string]int{ContentApp: MaxRuns, ContentZeros: MaxRuns}
	var kept []run
	for _, r := range slices.Backward(runs) {
		if left[r.Content]--; left[r.Content] >= 0 {
			kept = append(kept, r)
		}
	}
	slices.Reverse(kept)
	return kept
}

// fitPulls finds formulas and deviations in turn: formulas of what deviations leave, deviations from the formulas.
func (m *Model) fitPulls() error {
	n := len(m.Runs)
	mounted, y, explained := make([]bool, n), make([]float64, n), make([]float64, n)
	groups := map[string][]int{} // by formula; a mount's key begins with "mount "
	byContent := map[string][]int{}
	for i := range m.Runs {
		r := &m.Runs[i].run
		mounted[i], y[i] = m.mounts(r), r.median()
		key := formulaKey(r, mounted[i])
		if mounted[i] {
			key = "mount " + key
		} else {
			groups[r.Content] = append(groups[r.Content], i)
		}
		groups[key] = append(groups[key], i)
		byContent[r.Content] = append(byContent[r.Content], i)
	}
	for range fitRounds {
		for key, members := range groups {
			rs, left := make([]*run, len(members)), make([]float64, len(members))
			for k, i := range members {
				rs[k], left[k] = &m.Runs[i].run, y[i]-explained[i]
			}
			f := fitFormula(rs, left, mounted[members[0]])
			if mounted[members[0]] {
				m.Mount[key[len("mount "):]] = f
			} else {
				m.Pull[key] = f
			}
		}
		for _, content := range slices.Sorted(maps.Keys(byContent)) {
			members := byContent[content]
			places := make([]place, len(members))
			left, noise := make([]float64, len(members)), make([]float64, len(members))
			for k, i := range members {
				r := &m.Runs[i].run
				places[k] = placeOf(pullLikeness, r, mounted[i])
				left[k] = y[i] - math.Log(m.formula(r, mounted[i]).seconds(r))
				noise[k] = runNoise*runNoise + hostNoise*hostNoise/float64(r.Hosts)
			}
			kr, ex, err := krige(pullLikeness, places, left, noise)
			if err != nil {
				return fmt.Errorf("fit of %s: %w", content, err)
			}
			m.pull[content] = kr
			for k, i := range members {
				explained[i] = ex[k]
				m.Runs[i].PullWeight = kr.weights[k]
			}
		}
	}
	return nil
}

// fitHosts finds the hosts that are slower or faster than their runs, run after run. Whether they are so again is a matter of
// the strategy: on persistent disks nearly always, elsewhere hardly. So each strategy's hosts are believed as far as its data show it:
// a host's factor is its mean, shrunk by the ratio of what varies within hosts to what varies between them.
func (m *Model) fitHosts() {
	m.Hosts, m.Slow = map[string]float64{}, []string{}
	type seen struct {
		sum, squares, n float64
		slow            int
		kind            string // strategy and content
	}
	hosts := map[string]*seen{}
	for i := range m.Runs {
		r := &m.Runs[i].run
		if r.Hosts < 3 {
			continue // the median of two says nothing of either
		}
		mid := r.median()
		for k, name := range r.hosts {
			h := hosts[r.host(name)]
			if h == nil {
				h = &seen{kind: r.Strategy + "|" + r.Content}
				hosts[r.host(name)] = h
			}
			d := math.Log(r.pull[k]) - mid
			if d > math.Log(slowFactor) {
				h.slow++
			}
			d = max(-hostBound, min(hostBound, d))
			h.sum, h.squares, h.n = h.sum+d, h.squares+d*d, h.n+1
		}
	}
	type shared struct{ between, all, n, pairs float64 }
	kinds := map[string]*shared{}
	names := slices.Sorted(maps.Keys(hosts)) // sums of floats depend on the order
	for _, name := range names {
		h := hosts[name]
		v := kinds[h.kind]
		if v == nil {
			v = new(shared)
			kinds[h.kind] = v
		}
		v.all, v.n = v.all+h.squares, v.n+h.n
		v.between, v.pairs = v.between+(h.sum*h.sum-h.squares), v.pairs+h.n*(h.n-1)
	}
	for _, name := range names {
		h := hosts[name]
		v := kinds[h.kind]
		if h.slow >= 2 && float64(h.slow) > h.n/2 {
			m.Slow = append(m.Slow, name)
		}
		if v.pairs == 0 || v.between <= 0 {
			continue // no host was seen twice, or none is like itself
		}
		between := v.between / v.pairs
		within := max(v.all/v.n-between, between/20)
		if f := h.sum / (h.n + within/between); math.Abs(f) > 0.003 {
			m.Hosts[name] = math.Round(f*1e4) / 1e4
		}
	}
}

// fitMakespans finds the dispatch ramp, and how it and the slowest pull add up.
func (m *Model) fitMakespans() error {
	for _, content := range []string{ContentApp, ContentZeros} {
		var members []*learned
		for i := range m.Runs {
			if m.Runs[i].Content == content {
				members = append(members, &m.Runs[i])
			}
		}
		if len(members) == 0 {
			continue
		}
		n := len(members)
		x, y, noise := make([][]float64, n), make([]float64, n), make([]float64, n)
		places := make([]place, n)
		for i, l := range members {
			x[i], y[i], noise[i] = []float64{1, float64(l.Hosts)}, math.Log(l.ramp()+startGrain), startNoise*startNoise
			places[i] = placeOf(startLikeness, &l.run, m.mounts(&l.run))
		}
		b := fitPositive(x, y)
		m.Ramp[content] = [2]float64{b[0], b[1]}
		for i := range y {
			y[i] -= math.Log(max(b[0]+b[1]*x[i][1], 1e-9))
		}
		kr, _, err := krige(startLikeness, places, y, noise)
		if err != nil {
			return fmt.Errorf("fit of starts: %w", err)
		}
		m.start[content] = kr
		for i, l := range members {
			l.StartWeight = kr.weights[i]
		}
		places = make([]place, n) // the others belong to the kriging of starts
		// The slowest host as it would be predicted by one who knew the run's median: errors of that are not the last host's.
		for i, l := range members {
			slowest := slices.Max(m.hosts(&l.run, l.median()))
			x[i] = []float64{slowest, m.predictRamp(&l.run)}
			y[i], noise[i] = math.Log(l.makespan()), lastNoise*lastNoise
			places[i] = placeOf(lastLikeness, &l.run, m.mounts(&l.run))
		}
		b = fitPositive(x, y)
		m.Last[content] = [2]float64{b[0], b[1]}
		for i := range y {
			y[i] -= math.Log(max(b[0]*x[i][0]+b[1]*x[i][1], 1e-9))
		}
		if kr, _, err = krige(lastLikeness, places, y, noise); err != nil {
			return fmt.Errorf("fit of makespans: %w", err)
		}
		m.last[content] = kr
		for i, l := range members {
			l.LastWeight = kr.weights[i]
		}
	}
	return nil
}

// rates are the bytes per second and host of real pulls: bytes as the event has them.
func rates(m *Model, events []Event) Range {
	var all []float64
	for _, e := range events {
		r := run{Strategy: e.Strategy, Content: e.Content, Image: e.Image, Layers: e.Layers}
		if e.Content == ContentApp && e.NewBytes >= realPull && !m.mounts(&r) {
			all = append(all, e.NewBytes/e.Pull)
		}
	}
	if len(all) == 0 {
		return Range{}
	}
	return Range{Low: Quantile(all, 0.1), Mid: median(all), High: Quantile(all, 0.9)}
}

// spreads are how hosts of real pulls differ from their run's median. Mounts and zeros say nothing about that; where there
// is nothing else they are taken.
func spreads(m *Model) Spread {
	var real, any []float64
	for i := range m.Runs {
		r := &m.Runs[i].run
		if r.Hosts < 4 {
			continue
		}
		for _, s := range r.pull {
			d := math.Log(s) - r.median()
			any = append(any, d)
			if r.Content == ContentApp && !m.mounts(r) {
				real = append(real, d)
			}
		}
	}
	if len(real) == 0 {
		real = any
	}
	if len(real) == 0 {
		return Spread{}
	}
	const quartiles = 1.349 // distance of a normal distribution's, in standard deviations
	s := Spread{Body: (Quantile(real, 0.75) - Quantile(real, 0.25)) / quartiles}
	var slow []float64
	for _, d := range real {
		if d > math.Log(slowFactor) {
			slow = append(slow, math.Exp(d))
		}
	}
	if len(slow) > 0 {
		s.SlowShare = float64(len(slow)) / float64(len(real))
		s.SlowRatio = Range{Quantile(slow, 0.1), median(slow), Quantile(slow, 0.9)}
	} else {
		s.SlowRatio = Range{1, 1, 1}
	}
	return s
}
