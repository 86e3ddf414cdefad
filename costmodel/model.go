package costmodel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
)

// modelVersion is of the file format: a model of another version is refused.
const modelVersion = 1

// ErrModel is a file that is no model of this version.
var ErrModel = errors.New("model")

// A Model predicts pulls. It is made by [Fit] or [ReadModel].
type Model struct {
	Version int    `json:"version"`
	Source  string `json:"source"` // what it was fitted on, for people
	Events  int    `json:"events"` // that it was fitted on
	Dropped int    `json:"dropped"`

	// Pull are the formulas of runs that pulled, Mount of those that mounted an image without pulling it. Keys are as
	// formulaKey makes them; "app" and "zeros" alone are what is used where a strategy is unknown.
	Pull  map[string]Formula `json:"pull"`
	Mount map[string]Formula `json:"mount"`
	Lazy  map[string]lazy    `json:"lazy,omitempty"` // by strategy|content

	// Hosts are the factors of hosts that are slower or faster than their runs' medians, as logarithms.
	Hosts map[string]float64 `json:"hosts"`
	// Slow are the hosts that are in the slow class: slowFactor or more, in two runs or more.
	Slow []string `json:"slow_hosts"`

	// Ramp is the last start in seconds, fixed and per host seen; Last is how the slowest host's pull and the ramp add
	// up to the makespan.
	Ramp map[string][2]float64 `json:"ramp"`
	Last map[string][2]float64 `json:"last"`

	// Rate is compressed bytes per second and host of real pulls above 200 MB, at the 10th, 50th and 90th percentile of hosts.
	Rate Range `json:"rate"`
	// Spread is how hosts of one run differ.
	Spread Spread `json:"spread"`

	// Likeness and Runs are what deviations from the formulas are predicted from.
	Likeness struct {
		Pull  []likeness `json:"pull"`
		Start []likeness `json:"start"`
		Last  []likeness `json:"last"`
	} `json:"likeness"`
	Runs []learned `json:"runs"`

	pull, start, last map[string]*kriging // by content
}

// A Range is a value with the 10th and 90th percentile of what was seen or believed.
type Range struct {
	Low  float64 `json:"low"`
	Mid  float64 `json:"mid"`
	High float64 `json:"high"`
}

// Spread of hosts around their run's median: most are within Body, a few belong to a slow class. A plain lognormal fits neither.
type Spread struct {
	Body      float64 `json:"body"`       // standard deviation of the logarithm
	SlowShare float64 `json:"slow_share"` // of hosts
	SlowRatio Range   `json:"slow_ratio"` // their time ÷ the median
}

// Slowest is how much longer than the median the slowest of n hosts is expected to take.
func (s Spread) Slowest(n int, ratio float64) float64 {
	if n < 2 {
		return 1
	}
	body := math.Exp(s.Body * math.Sqrt(2*math.Log(float64(n))))
	some := 1 - math.Pow(1-s.SlowShare, float64(n)) // probability of a slow host
	return body + some*max(0, ratio-body)
}

// Growth is how much longer a pull of 1 GB takes for each 100 nodes more, as a fraction, where the registry has been seen to slow
// down; ok tells whether the model knows the registry at clusters of different sizes.
func (m *Model) Growth(registry string) (growth float64, ok bool) {
	f, ok := m.Pull[registry+"|"+ContentApp]
	if !ok || f.Fixed+f.PerGB == 0 {
		return 0, false
	}
	return f.PerGBNode / (f.Fixed + f.PerGB), true
}

// A learned run has, for each of the three things predicted, its kriging weight.
type learned struct {
	run
	PullWeight  float64 `json:"pull_weight"`
	StartWeight float64 `json:"start_weight"`
	LastWeight  float64 `json:"last_weight"`
}

// WriteModel writes m as JSON.
func WriteModel(w io.Writer, m *Model) error {
	e := json.NewEncoder(w)
	e.SetIndent("", " ")
	return e.Encode(m)
}

// maxModel bounds what is read of a model.
const maxModel = 64 << 20

// ReadModel reads what [WriteModel] wrote. Errors are [ErrModel].
func ReadModel(r io.Reader) (*Model, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxModel+1))
	if err != nil {
		return nil, err
	}
	m := new(Model)
	switch err := json.Unmarshal(b, m); {
	case len(b) > maxModel:
		return nil, fmt.Errorf("%w: larger than %d MiB", ErrModel, maxModel>>20)
	case err != nil:
		return nil, fmt.Errorf("%w: not a model of 'muster estimate fit': %v", ErrModel, err)
	case m.Version != modelVersion:
		return nil, fmt.Errorf("%w: version %d, this program reads version %d: fit it again", ErrModel, m.Version, modelVersion)
	}
	for _, f := range []Formula{m.Pull[ContentApp], m.Pull[ContentZeros]} {
		if !(f.Fixed >= 0) || !(f.PerGB >= 0) || !(f.PerGBNode >= 0) || !(f.PerLayer >= 0) || !(f.PerUnpackedGB >= 0) {
			return nil, fmt.Errorf("%w: a term is negative", ErrModel)
		}
	}
	for _, l := range m.Runs {
		if !(l.Total > 0) || !(l.New >= 0) || l.Nodes < 1 {
			return nil, fmt.Errorf("%w: run %.40q has no size or no nodes", ErrModel, l.ID)
		}
	}
	if len(m.Pull)+len(m.Mount) == 0 || len(m.Runs) == 0 {
		return nil, fmt.Errorf("%w: it holds no formula or no run", ErrModel)
	}
	m.restore()
	return m, nil
}

// restore makes the krigings from the learned runs.
func (m *Model) restore() {
	m.pull, m.start, m.last = map[string]*kriging{}, map[string]*kriging{}, map[string]*kriging{}
	of := func(to map[string]*kriging, ls []likeness, content string, p place, weight float64) {
		if to[content] == nil {
			to[content] = &kriging{likeness: ls}
		}
		k := to[content]
		k.places, k.weights = append(k.places, p), append(k.weights, weight)
	}
	for i := range m.Runs {
		l := &m.Runs[i]
		mounted := m.mounts(&l.run)
		of(m.pull, m.Likeness.Pull, l.Content, placeOf(m.Likeness.Pull, &l.run, mounted), l.PullWeight)
		of(m.start, m.Likeness.Start, l.Content, placeOf(m.Likeness.Start, &l.run, mounted), l.StartWeight)
		of(m.last, m.Likeness.Last, l.Content, placeOf(m.Likeness.Last, &l.run, mounted), l.LastWeight)
	}
}

func (m *Model) mounts(r *run) bool {
	l, ok := m.Lazy[r.Strategy+"|"+r.Content]
	return ok && l.mounts(r)
}

// formulaKey is what runs share a formula: real images by registry (what they cost besides is the strategy's deviation),
// zeros and mounts by strategy, which for them is a disk or a file system.
func formulaKey(r *run, mounted bool) string {
	if r.Content == ContentApp && !mounted {
		return registry(r.Strategy) + "|" + r.Content
	}
	return r.Strategy + "|" + r.Content
}

func (m *Model) formula(r *run, mounted bool) Formula {
	from := m.Pull
	if mounted {
		from = m.Mount
	}
	if f, ok := from[formulaKey(r, mounted)]; ok {
		return f
	}
	if f, ok := m.Pull[r.Content]; ok {
		return f
	}
	for _, any := range []map[string]Formula{m.Pull, m.Mount} {
		for _, key := range slices.Sorted(maps.Keys(any)) { // "app" comes first
			return any[key]
		}
	}
	return Formula{}
}

// predictPull is the median host's pull, as a logarithm of seconds.
func (m *Model) predictPull(r *run) float64 {
	mounted := m.mounts(r)
	return math.Log(m.formula(r, mounted).seconds(r)) + m.pull[r.Content].at(placeOf(m.Likeness.Pull, r, mounted))
}

// hosts are the predicted pulls of the run's hosts in seconds, in their order.
func (m *Model) hosts(r *run, pull float64) []float64 {
	all := make([]float64, len(r.hosts))
	for i, h := range r.hosts {
		all[i] = math.Exp(pull + m.Hosts[r.host(h)])
	}
	return all
}

// predictRamp is the last start in seconds.
func (m *Model) predictRamp(r *run) float64 {
	base, ok := m.Ramp[r.Content]
	if !ok {
		return 0
	}
	d := m.start[r.Content].at(placeOf(m.Likeness.Start, r, m.mounts(r)))
	return max(0, (base[0]+base[1]*float64(r.Hosts))*math.Exp(d)-startGrain)
}

// predictMakespan is seconds from the first start to the last host's end.
func (m *Model) predictMakespan(r *run, hosts []float64) float64 {
	l, ok := m.Last[r.Content]
	if !ok {
		l = [2]float64{1, 0.5}
	}
	base := l[0]*slices.Max(hosts) + l[1]*m.predictRamp(r)
	return base * math.Exp(m.last[r.Content].at(placeOf(m.Likeness.Last, r, m.mounts(r))))
}

// A Summary is what people want to know of a model.
type Summary struct {
	Source   string         `json:"source"`
	Events   int            `json:"events"`
	Dropped  int            `json:"dropped"`
	Runs     int            `json:"runs"`
	Formulas []NamedFormula `json:"formulas"`
	Rate     Range          `json:"rate"` // B/s
	Spread   Spread         `json:"spread"`
	Slow     []string       `json:"slow_hosts"`
}

// A NamedFormula is a formula and what it is of.
type NamedFormula struct {
	Name string `json:"name"`
	Formula
}

// Summary of m.
func (m *Model) Summary() Summary {
	s := Summary{Source: m.Source, Events: m.Events, Dropped: m.Dropped, Runs: len(m.Runs), Rate: m.Rate, Spread: m.Spread, Slow: m.Slow}
	for _, key := range slices.Sorted(maps.Keys(m.Pull)) {
		if key != ContentApp && key != ContentZeros { // fallbacks
			s.Formulas = append(s.Formulas, NamedFormula{"pull " + key, m.Pull[key]})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(m.Mount)) {
		s.Formulas = append(s.Formulas, NamedFormula{"mount " + key, m.Mount[key]})
	}
	return s
}
