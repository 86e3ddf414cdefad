package costmodel

import (
	"errors"
	"math"
)

// A likeness is one thing that runs may have in common, and how much of a deviation from the formula it usually carries: Spread is
// the standard deviation of the logarithm (0.2 is about 20 %). With Size or Layers the deviation changes
// with them and only runs alike in them share it.
type likeness struct {
	Of     string  `json:"of"`
	Spread float64 `json:"spread"`
	Size   bool    `json:"by_size,omitempty"`
	Layers bool    `json:"by_layers,omitempty"`
	Growth bool    `json:"by_nodes,omitempty"` // proportional to the doublings of the cluster
}

// What pulls have in common. The spreads were chosen by hand on the study; cross-validation hardly depends on them (docs/estimate.md).
var pullLikeness = []likeness{
	{Of: "image", Spread: 0.2},                                // many small files, one large layer
	{Of: "family", Spread: 0.15},                              // images of one name and several tags
	{Of: "image and strategy", Spread: 0.1},                   // what this registry or disk makes of it
	{Of: "strategy", Spread: 0.3, Layers: true},               //
	{Of: "strategy", Spread: 0.15, Size: true, Layers: true},  // disks that slow down when their cache is full
	{Of: "strategy", Spread: 0.3, Growth: true},               // a registry or a cloud's way to it that slows down with the cluster
	{Of: "cluster", Spread: 0.12},                             // its day
	{Of: "cluster", Spread: 0.12, Size: true, Layers: true},   //
	{Of: "instance", Spread: 0.1, Size: true},                 // cores and disk
	{Of: "experiment", Spread: 0.1, Size: true, Layers: true}, // set-up and season
}

// What the starts of runs have in common.
var startLikeness = []likeness{
	{Of: "cluster", Spread: 0.4},
	{Of: "nodes", Spread: 0.5},
	{Of: "experiment", Spread: 0.3},
	{Of: "strategy", Spread: 0.3},
	{Of: "image", Spread: 0.3},
	{Of: "experiment and image", Spread: 0.2},
}

// What the last hosts of runs have in common, beyond pull and ramp.
var lastLikeness = []likeness{
	{Of: "cluster", Spread: 0.06},
	{Of: "experiment", Spread: 0.05},
	{Of: "image and strategy", Spread: 0.06},
}

const (
	sizeWidth   = 1.0 // octaves of size within which runs are alike
	layersWidth = 1.5 // octaves of layers
	growthFrom  = 32  // nodes from where on growth is counted
	freedom     = 3   // of Student's t: how soon an odd run is disregarded
)

// A place is where a run stands among likenesses: two runs share one when they have the same value there.
type place struct {
	value                []string // one for each likeness
	size, layers, growth float64
}

// placeOf is where r stands among ls; mounts and pulls have nothing in common.
func placeOf(ls []likeness, r *run, mounted bool) place {
	p := place{size: r.size(), layers: r.octLayers(), growth: math.Log2(float64(r.Nodes) / growthFrom), value: make([]string, len(ls))}
	mode := "pull "
	if mounted {
		mode = "mount "
		p.size, p.layers = 0, 0 // neither matters to a mount
	}
	for i, l := range ls {
		switch l.Of {
		case "image":
			p.value[i] = mode + r.Image + r.share()
		case "family":
			p.value[i] = mode + r.family() + r.share()
		case "image and strategy":
			p.value[i] = mode + r.Strategy + "|" + r.Image + r.share()
		case "strategy":
			p.value[i] = mode + r.Strategy
		case "cluster":
			p.value[i] = mode + r.cluster()
		case "instance":
			p.value[i] = mode + r.Instance + "|" + r.Strategy
		case "experiment":
			p.value[i] = mode + r.Experiment + "|" + r.Strategy
		case "nodes":
			p.value[i] = r.Experiment + "|" + itoa(r.Nodes)
		case "experiment and image":
			p.value[i] = r.Experiment + "|" + r.Image
		}
	}
	return p
}

// covariance of the deviations of two runs.
func covariance(ls []likeness, a, b place) float64 {
	sum := 0.0
	var size, layers float64 = -1, -1
	for i, l := range ls {
		if a.value[i] != b.value[i] {
			continue
		}
		v := l.Spread * l.Spread
		if l.Size {
			if size < 0 {
				d := (a.size - b.size) / sizeWidth
				size = math.Exp(-d * d / 2)
			}
			v *= size
		}
		if l.Layers {
			if layers < 0 {
				d := (a.layers - b.layers) / layersWidth
				layers = math.Exp(-d * d / 2)
			}
			v *= layers
		}
		if l.Growth {
			v *= a.growth * b.growth
		}
		sum += v
	}
	return sum
}

// kriging predicts the deviation of a run from those of others.
type kriging struct {
	likeness []likeness
	places   []place
	weights  []float64 // α: a prediction is the sum of α times covariance
}

// krige learns from deviations y with noise variances noise. It also returns what it explains of each.
func krige(ls []likeness, places []place, y, noise []float64) (k *kriging, explained []float64, err error) {
	n := len(places)
	k = &kriging{likeness: ls, places: places}
	cov := make([]float64, n*n)
	for i := range n {
		for j := range i + 1 {
			cov[i*n+j] = covariance(ls, places[i], places[j])
			cov[j*n+i] = cov[i*n+j]
		}
	}
	weight := make([]float64, n) // of each run, Student's t
	for i := range weight {
		weight[i] = 1
	}
	explained = make([]float64, n)
	var chol []float64
	for range 6 {
		chol = append(chol[:0], cov...)
		for i := range n {
			chol[i*n+i] += noise[i] / weight[i]
		}
		if err := cholesky(chol, n); err != nil {
			return nil, nil, err
		}
		k.weights = solve(chol, n, y)
		for i := range n {
			explained[i] = 0
			for j, a := range k.weights {
				explained[i] += a * cov[i*n+j]
			}
			e := y[i] - explained[i]
			weight[i] = (freedom + 1) / (freedom + e*e/noise[i])
		}
	}
	return k, explained, nil
}

// at is the expected deviation at p.
func (k *kriging) at(p place) float64 {
	if k == nil {
		return 0
	}
	sum := 0.0
	for i, a := range k.weights {
		sum += a * covariance(k.likeness, p, k.places[i])
	}
	return sum
}

var errSingular = errors.New("costmodel: the covariance is singular")

// cholesky turns the lower triangle of the n×n matrix a into L with L·Lᵀ = a.
func cholesky(a []float64, n int) error {
	for i := range n {
		ri := a[i*n : i*n+i+1]
		for j := range i + 1 {
			rj := a[j*n : j*n+j+1]
			s := ri[j]
			for k := range j {
				s -= ri[k] * rj[k]
			}
			if j < i {
				ri[j] = s / rj[j]
				continue
			}
			if s <= 0 || math.IsNaN(s) {
				return errSingular
			}
			ri[i] = math.Sqrt(s)
		}
	}
	return nil
}

// forward solves L·x = y in place.
func forward(l []float64, n int, x []float64) {
	for i := range n {
		s := x[i]
		for j, v := range l[i*n : i*n+i] {
			s -= v * x[j]
		}
		x[i] = s / l[i*n+i]
	}
}

// solve is x with L·Lᵀ·x = y.
func solve(l []float64, n int, y []float64) []float64 {
	x := append([]float64(nil), y...)
	forward(l, n, x)
	for i := n - 1; i >= 0; i-- {
		x[i] /= l[i*n+i]
		for j, v := range l[i*n : i*n+i] {
			x[j] -= v * x[i]
		}
	}
	return x
}
