package costmodel

import (
	"math"
	"strconv"
)

func itoa(n int) string { return strconv.Itoa(n) }

// A Formula is the time of the median host in seconds, as a sum of terms that are zero or more:
//
//	Fixed + PerLayer·layers + PerGB·new + PerGBNode·new·cluster nodes/100 + PerUnpackedGB·unpacked
//
// with new compressed and unpacked inflated bytes in 10⁹.
type Formula struct {
	Fixed         float64 `json:"fixed_s"`
	PerLayer      float64 `json:"s_per_layer"`
	PerGB         float64 `json:"s_per_gb"`
	PerGBNode     float64 `json:"s_per_gb_and_100_nodes"` // growth with the cluster, of this registry
	PerUnpackedGB float64 `json:"s_per_unpacked_gb"`
	Runs          int     `json:"runs"` // that it was fitted on
}

func terms(r *run) [5]float64 {
	gb := r.New / 1e9
	return [5]float64{1, r.Layers, gb, gb * float64(r.Nodes) / 100, r.Unpacked / 1e9}
}

func (f Formula) seconds(r *run) float64 {
	x := terms(r)
	return max(f.Fixed*x[0]+f.PerLayer*x[1]+f.PerGB*x[2]+f.PerGBNode*x[3]+f.PerUnpackedGB*x[4], 0.01)
}

// fitFormula finds the formula of runs whose logarithmic times are y. A term is there only where the data can tell it:
// layers and inflated bytes where they are known of all runs, growth where clusters differ in size by four or more.
func fitFormula(runs []*run, y []float64, mounted bool) Formula {
	low, high := math.MaxInt, 0
	layers, unpacked, zeros := true, true, true
	for _, r := range runs {
		low, high = min(low, r.Nodes), max(high, r.Nodes)
		layers, unpacked = layers && r.Layers > 0, unpacked && r.Unpacked > 0
		zeros = zeros && r.Content == ContentZeros
	}
	active := []int{0}
	if !mounted && len(runs) >= 3 {
		if zeros && unpacked {
			active = append(active, 4) // compressed bytes are a fixed part of these
			if layers {
				active = append(active, 1)
			}
		} else {
			active = append(active, 2)
			if high >= 4*low && len(runs) >= 8 {
				active = append(active, 3)
			}
		}
	}
	x := make([][]float64, len(runs))
	for i, r := range runs {
		all := terms(r)
		for _, j := range active {
			x[i] = append(x[i], all[j])
		}
	}
	b := fitPositive(x, y)
	var full [5]float64
	for k, j := range active {
		full[j] = b[k]
	}
	return Formula{full[0], full[1], full[2], full[3], full[4], len(runs)}
}

// fitPositive minimises the sum of |log(x·b) − y| over b ≥ 0. Each step multiplies every coefficient by how much
// too small or too large the sums are that it takes part in, so none becomes negative; near zero error the absolute value is
// rounded off, which makes the steps vanish at the optimum.
func fitPositive(x [][]float64, y []float64) []float64 {
	const (
		steps = 400
		round = 0.03 // relative error below which errors count by their square
	)
	p := len(x[0])
	b := make([]float64, p)
	level := math.Exp(median(y))
	for j := range b {
		var seen []float64
		for i := range x {
			if x[i][j] > 0 {
				seen = append(seen, x[i][j])
			}
		}
		if len(seen) > 0 {
			b[j] = level / median(seen) / float64(p)
		}
	}
	pull, weight := make([]float64, p), make([]float64, p)
	for range steps {
		clear(pull)
		clear(weight)
		for i := range x {
			sum := 0.0
			for j, v := range x[i] {
				sum += v * b[j]
			}
			sum = max(sum, 1e-9)
			e := y[i] - math.Log(sum)
			w := 1 / max(math.Abs(e), round)
			for j, v := range x[i] {
				pull[j] += w * e * v / sum
				weight[j] += w * v / sum
			}
		}
		for j := range b {
			if weight[j] > 0 {
				b[j] *= math.Exp(max(-0.5, min(0.5, pull[j]/weight[j]*float64(p))))
			}
		}
	}
	return b
}
