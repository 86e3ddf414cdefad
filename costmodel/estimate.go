package costmodel

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
)

// ErrScenario is what is wrong with a scenario: its text is one line that says what is accepted.
var ErrScenario = errors.New("scenario")

// A Layer is a compressed layer. Layers of one name are the same bytes.
type Layer struct {
	Name  string  `json:"name"` // a digest, or any name
	Bytes float64 `json:"bytes"`
}

// An Image is what one job of a sequence needs.
type Image struct {
	Name   string  `json:"name"`
	Layers []Layer `json:"layers"`
}

// Bytes of all distinct layers.
func (i Image) Bytes() float64 { return sum(distinct([]Image{i})) }

// A Scenario is what an estimate is about: hosts that need images one after another and keep what they have pulled.
type Scenario struct {
	Images     []Image
	Hosts      int
	Slow       float64 // share of hosts in the slow class
	Parameters Parameters
}

// A Strategy is a way to bring images to hosts.
type Strategy struct {
	Name  string `json:"name"`
	Label string `json:"label"`
	How   string `json:"how"` // the formula in words
}

// Strategies in the order of an estimate.
var Strategies = []Strategy{
	{"registry", "every host pulls from the registry", "new bytes ÷ rate, longer by growth for each 100 hosts"},
	{"near", "near registry or pull-through mirror", "new bytes ÷ rate, no growth; each layer leaves the origin once"},
	{"ssd", "registry, unpacked on local SSD", "as registry; what is not transfer takes ssd-factor"},
	{"zstd", "registry, layers in zstd", "as registry, with zstd-size bytes; what is not transfer takes zstd-factor"},
	{"lazy", "lazy with an index, from the registry", "lazy-mount, then touched bytes ÷ lazy-rate, longer by growth"},
	{"squashfs", "one squashfs or SIF on a shared file system", "touched bytes ÷ min(link, shared-fs ÷ hosts); the file was made before"},
	{"muster", "muster, first pull", "the swarm's pipeline (origin, links, hops), or one core's inflating of the largest layer; then touched bytes inflated"},
	{"muster-again", "muster, again on the same hosts", "warm-mount, then touched bytes inflated from the host's store"},
	{"prestaged", "pre-staged and unpacked before the job", "nothing but the dispatch ramp; the staging itself was paid before"},
}

// A Quantity is a number with the interval that the parameters' ranges give it.
type Quantity struct {
	Range
	// Main is the parameter whose range moves it most.
	Main string `json:"main_cause,omitempty"`
}

// An Outcome is what a strategy comes to, for all images of the sequence together. A job starts when its last host has the
// image, so all hosts wait as long as the slowest.
type Outcome struct {
	Strategy
	Median      Quantity `json:"median_s"`        // time to start, median host
	Slowest     Quantity `json:"slowest_s"`       // time to start, slowest host
	Waiting     Quantity `json:"waiting_host_s"`  // seconds of all hosts
	NodeHours   Quantity `json:"node_hours"`      //
	Cost        Quantity `json:"cost_usd"`        // of the hosts while they wait
	Egress      Quantity `json:"egress_bytes"`    // that leave the registry
	EgressCost  Quantity `json:"egress_cost_usd"` // and what they cost, NAT included
	PerImage    []Step   `json:"per_image"`
	Preparation string   `json:"preparation,omitempty"` // what must have been done before, not counted
}

// A Step is one image of the sequence.
type Step struct {
	Image    string  `json:"image"`
	Bytes    float64 `json:"bytes"`
	NewBytes float64 `json:"new_bytes"` // of layers that no image before it had
	Layers   int     `json:"layers"`
	NewLayer int     `json:"new_layers"`
	Slowest  float64 `json:"slowest_s"`
}

// Sharing is what a sequence of images gains when layers are shared, for hosts that pull from the registry at the given rate.
type Sharing struct {
	Images      int      `json:"images"`
	Unshared    float64  `json:"bytes_if_nothing_is_shared"`
	Shared      float64  `json:"bytes_as_given"`
	Best        float64  `json:"bytes_if_all_share_the_largest"` // the largest image's: all that the others have lies in it
	SavedGiven  Quantity `json:"saved_s"`                        // as given against nothing shared
	SavedCost   Quantity `json:"saved_usd"`
	SavedStudy  float64  `json:"saved_s_at_study_rate"` // the same at the median rate that was measured
	StudyCost   float64  `json:"saved_usd_at_study_rate"`
	StudyRate   float64  `json:"study_rate"`       // B/s
	HourlyPrice float64  `json:"usd_per_hour_all"` // of all hosts
}

// An Estimation is the answer to a scenario.
type Estimation struct {
	Hosts      int         `json:"hosts"`
	Images     []Step      `json:"images"`
	Strategies []Outcome   `json:"strategies"`
	Sharing    Sharing     `json:"sharing"`
	Parameters []Parameter `json:"parameters"`
}

func (s *Scenario) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrScenario, fmt.Sprintf(format, args...))
	}
	if s.Hosts < 1 || s.Hosts > 1e7 {
		return bad("%d hosts; accepted are 1 to 10,000,000", s.Hosts)
	}
	if len(s.Images) == 0 {
		return bad("no image")
	}
	if _, ok := s.Parameters[ParamPrice]; !ok {
		return bad("no price: name an instance type (%v) or give dollars per hour and host", slices.Sorted(maps.Keys(Instances)))
	}
	for name, p := range s.Parameters {
		if !(p.Low >= 0) || !(p.Low <= p.Mid) || !(p.Mid <= p.High) || math.IsInf(p.High, 0) {
			return bad("parameter %s is %g to %g with %g between; it must be 0 or more, and in order", name, p.Low, p.High, p.Mid)
		}
	}
	for _, name := range []string{ParamRate, ParamLink, ParamOrigin, ParamSharedFS, ParamLazyRate, ParamInflate} {
		if !(s.Parameters[name].Low > 0) {
			return bad("%s must be more than 0 bytes per second", name)
		}
	}
	for _, i := range s.Images {
		if len(i.Layers) == 0 {
			return bad("%s has no layers: their compressed sizes are needed", i.Name)
		}
		for _, l := range i.Layers {
			if !(l.Bytes > 0) || l.Bytes > maxByteSize {
				return bad("layer %.40s of %s has %g bytes: sizes must be more than 0", l.Name, i.Name, l.Bytes)
			}
		}
	}
	return nil
}

// distinct are the sizes of the layers of images, each once.
func distinct(images []Image) map[string]float64 {
	all := map[string]float64{}
	for _, i := range images {
		for _, l := range i.Layers {
			all[l.Name] = l.Bytes
		}
	}
	return all
}

func sum(m map[string]float64) float64 {
	s := 0.0
	for _, name := range slices.Sorted(maps.Keys(m)) { // in one order: sums of floats depend on it
		s += m[name]
	}
	return s
}

// A piece is what one image of the sequence adds to what a host has.
type piece struct {
	bytes, newBytes, largest float64
	layers, newLayers        int
}

// pieces follow the caches of hosts through the sequence: by layers, of which each is pulled once.
func pieces(images []Image) []piece {
	have := map[string]bool{}
	out := make([]piece, len(images))
	for i, img := range images {
		p := &out[i]
		own := distinct([]Image{img})
		for _, name := range slices.Sorted(maps.Keys(own)) {
			b := own[name]
			p.bytes += b
			p.layers++
			if !have[name] {
				have[name] = true
				p.newBytes += b
				p.newLayers++
				p.largest = max(p.largest, b)
			}
		}
	}
	return out
}

// values are the parameters of one evaluation.
type values map[string]float64

// figures are what one evaluation of a strategy comes to.
type figures struct {
	median, slowest, egress float64
	steps                   []float64
}

// growth is how much longer a pull takes on hosts than on the clusters that the rate was measured on.
func (v values) growth(hosts int) float64 {
	n := func(hosts float64) float64 { return 1 + v[ParamGrowth]*hosts/100 }
	return n(float64(hosts)) / n(min(studyNodes, float64(hosts)))
}

// muster's own defaults, as planner has them.
const (
	swarmSeeds  = 16
	swarmFanout = 4
	swarmPiece  = 256 << 10
)

// start is the time from an image's first start until the median host has it, without the ramp, and what leaves the registry.
func (v values) start(strategy string, p piece, hosts int) (seconds, egress float64) {
	n := float64(hosts)
	pull := p.newBytes / v[ParamRate] * v.growth(hosts)
	transfer := min(pull, p.newBytes/v[ParamLink])
	touched := p.bytes * v[ParamTouched]
	switch strategy {
	case "registry":
		return pull, n * p.newBytes
	case "near":
		return p.newBytes / v[ParamRate], p.newBytes
	case "ssd":
		return transfer + (pull-transfer)*v[ParamSSD], n * p.newBytes
	case "zstd":
		return (transfer + (pull-transfer)*v[ParamZstdFactor]) * v[ParamZstdSize], n * p.newBytes * v[ParamZstdSize]
	case "lazy":
		// What an image before it has touched of a shared layer is taken to be there.
		fresh := p.newBytes * v[ParamTouched]
		return v[ParamLazyMount] + fresh/v[ParamLazyRate]*v.growth(hosts), n * fresh
	case "squashfs":
		// One file for each image: nothing is shared between them.
		return touched * v[ParamSquashSize] / min(v[ParamLink], v[ParamSharedFS]/n), 0
	case "muster":
		swarm := Swarm{
			Bytes: p.newBytes, Hosts: hosts, Seeds: swarmSeeds, Fanout: swarmFanout, Piece: swarmPiece,
			Origin: min(v[ParamOrigin], n*v[ParamLink]), Up: v[ParamLink], Down: v[ParamLink], Hop: v[ParamHop],
		}
		return v[ParamWarm] + max(swarm.Pipeline(), p.largest/v[ParamInflate]) + touched/v[ParamInflate], p.newBytes
	case "muster-again":
		return v[ParamWarm] + touched/v[ParamInflate], 0
	default: // prestaged
		return 0, 0
	}
}

// evaluate is one strategy with one value for each parameter.
func (s *Scenario) evaluate(strategy string, ps []piece, v values) figures {
	var f figures
	spread := Spread{SlowShare: s.Slow}
	slow := spread.Slowest(s.Hosts, max(1, v[ParamSlow]))
	ramp := v[ParamRamp] * float64(s.Hosts)
	for _, p := range ps {
		t, egress := v.start(strategy, p, s.Hosts)
		f.median += t + ramp/2
		f.slowest += t*slow + ramp
		f.egress += egress
		f.steps = append(f.steps, t*slow+ramp)
	}
	return f
}

// Estimate works out all strategies. Errors are [ErrScenario].
func Estimate(s Scenario) (Estimation, error) {
	if err := s.check(); err != nil {
		return Estimation{}, err
	}
	ps := pieces(s.Images)
	e := Estimation{Hosts: s.Hosts}
	for i, p := range ps {
		e.Images = append(e.Images, Step{Image: s.Images[i].Name, Bytes: p.bytes, NewBytes: p.newBytes, Layers: p.layers, NewLayer: p.newLayers})
	}
	names := slices.Sorted(maps.Keys(s.Parameters))
	for _, name := range names {
		e.Parameters = append(e.Parameters, s.Parameters[name])
	}
	for _, strategy := range Strategies {
		e.Strategies = append(e.Strategies, s.outcome(strategy, ps, e.Images))
	}
	e.Sharing = s.sharing(ps)
	return e, nil
}

func (s *Scenario) middle() values {
	v := values{}
	for name, p := range s.Parameters {
		v[name] = p.Mid
	}
	return v
}

// quantity evaluates f at the middle of all parameters and, one after another, at each one's ends. The ends of the interval add
// up the logarithms of what each parameter does as if they were independent: the root of the sum of squares.
func (s *Scenario) quantity(f func(values) float64) Quantity {
	v := s.middle()
	mid := f(v)
	q := Quantity{Range: exactly(mid)}
	if mid <= 0 {
		q.High = mid
		for _, name := range slices.Sorted(maps.Keys(s.Parameters)) {
			v[name] = s.Parameters[name].High
			q.High = max(q.High, f(v))
			v[name] = s.Parameters[name].Mid
		}
		return q
	}
	var up, down, most float64
	for _, name := range slices.Sorted(maps.Keys(s.Parameters)) {
		p := s.Parameters[name]
		if p.Low == p.High {
			continue
		}
		high, low := 0.0, 0.0
		for _, end := range []float64{p.Low, p.High} {
			v[name] = end
			d := math.Log(max(f(v), 1e-9) / mid)
			high, low = max(high, d), min(low, d)
		}
		v[name] = p.Mid
		up, down = up+high*high, down+low*low
		if high-low > most+1e-9 {
			most, q.Main = high-low, name
		}
	}
	q.Low, q.High = mid*math.Exp(-math.Sqrt(down)), mid*math.Exp(math.Sqrt(up))
	return q
}

func (s *Scenario) outcome(strategy Strategy, ps []piece, images []Step) Outcome {
	o := Outcome{Strategy: strategy, PerImage: slices.Clone(images)}
	for i, t := range s.evaluate(strategy.Name, ps, s.middle()).steps {
		o.PerImage[i].Slowest = t
	}
	n := float64(s.Hosts)
	of := func(f func(figures, values) float64) Quantity {
		return s.quantity(func(v values) float64 { return f(s.evaluate(strategy.Name, ps, v), v) })
	}
	o.Median = of(func(f figures, _ values) float64 { return f.median })
	o.Slowest = of(func(f figures, _ values) float64 { return f.slowest })
	o.Waiting = of(func(f figures, _ values) float64 { return f.slowest * n })
	o.NodeHours = of(func(f figures, _ values) float64 { return f.slowest * n / 3600 })
	o.Cost = of(func(f figures, v values) float64 { return f.slowest * n / 3600 * v[ParamPrice] })
	o.Egress = of(func(f figures, _ values) float64 { return f.egress })
	o.EgressCost = of(func(f figures, v values) float64 {
		return f.egress/1e9*v[ParamEgress] + f.egress/(1<<30)*v[ParamNAT]
	})
	switch strategy.Name {
	case "squashfs":
		o.Preparation = "one pull and conversion of each image"
	case "zstd":
		o.Preparation = "each image pushed again in zstd"
	case "lazy":
		o.Preparation = "an index pushed beside each image"
	case "prestaged":
		o.Preparation = "as the staging: see muster, first pull"
	case "muster-again":
		o.Preparation = "one earlier job on these hosts"
	}
	return o
}

// StudyRate is compressed bytes per second and host of real pulls above 200 MB at the 10th, 50th and 90th percentile of the whole
// study (1,180 runs; the part that is in this repository says 22, 30 and 47 MB/s).
var StudyRate = Range{22e6, 31.5e6, 46e6}

// sharing compares the sequence with one that shares nothing. As the talk has it, only bytes and the given rate count: no
// ramp, no slow hosts, no growth.
func (s *Scenario) sharing(ps []piece) Sharing {
	sh := Sharing{Images: len(ps), StudyRate: StudyRate.Mid, HourlyPrice: s.Parameters[ParamPrice].Mid * float64(s.Hosts)}
	for _, p := range ps {
		sh.Unshared += p.bytes
		sh.Shared += p.newBytes
		sh.Best = max(sh.Best, p.bytes)
	}
	more := sh.Unshared - sh.Shared
	rate := s.Parameters[ParamRate]
	sh.SavedGiven = Quantity{Range: Range{more / rate.High, more / rate.Mid, more / rate.Low}}
	hours := func(seconds float64) float64 { return seconds / 3600 * sh.HourlyPrice }
	sh.SavedCost = Quantity{Range: Range{hours(sh.SavedGiven.Low), hours(sh.SavedGiven.Mid), hours(sh.SavedGiven.High)}}
	sh.SavedStudy = more / StudyRate.Mid
	sh.StudyCost = hours(sh.SavedStudy)
	return sh
}
