package costmodel

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// A Similarity says what images of a set have in common.
type Similarity struct {
	Images       []string    `json:"images"` // in the order of Order's indices
	Layers       int         `json:"layers"` // of all images
	Unique       int         `json:"unique_layers"`
	Bytes        float64     `json:"bytes"`
	UniqueBytes  float64     `json:"unique_bytes"`
	UniquePulls  float64     `json:"unique_pulls"`              // unique ÷ all layers
	UniqueShare  float64     `json:"unique_bytes_share"`        // unique ÷ all bytes
	Mean         float64     `json:"mean_jaccard"`              // of layers, with the diagonal
	OffDiagonal  float64     `json:"mean_jaccard_off_diagonal"` // without it
	MeanBytes    float64     `json:"mean_jaccard_bytes"`
	Matrix       [][]float64 `json:"jaccard"`       // by layers
	MatrixBytes  [][]float64 `json:"jaccard_bytes"` // by bytes
	Order        []int       `json:"order"`         // of a clustering: alike images next to each other
	Common       []Layer     `json:"common_base"`   // layers that more than half of the images have
	CommonBytes  float64     `json:"common_base_bytes"`
	LargestShare float64     `json:"largest_common_share"` // of the bytes of all images: how much the common base is
}

// maxImages bounds the matrices.
const maxImages = 4000

// Similar compares images. It needs one image or more, each with layers; errors are [ErrScenario]. A layer that an image has
// twice counts as often in Layers and Bytes, for it is pulled by name once; a Jaccard index is of sets.
func Similar(images []Image) (Similarity, error) {
	if len(images) == 0 || len(images) > maxImages {
		return Similarity{}, fmt.Errorf("%w: %d images; accepted are 1 to %d", ErrScenario, len(images), maxImages)
	}
	var s Similarity
	holders := map[string]int{}
	size := map[string]float64{}
	sets := make([]map[string]float64, len(images))
	for i, img := range images {
		if len(img.Layers) == 0 {
			return s, fmt.Errorf("%w: %s has no layers", ErrScenario, img.Name)
		}
		s.Images = append(s.Images, img.Name)
		sets[i] = distinct([]Image{img})
		for _, l := range img.Layers {
			s.Layers++
			s.Bytes += l.Bytes
		}
		for name, b := range sets[i] {
			holders[name]++
			size[name] = b
		}
	}
	s.Unique, s.UniqueBytes = len(size), sum(size)
	s.UniquePulls = float64(s.Unique) / float64(s.Layers)
	if s.Bytes > 0 {
		s.UniqueShare = s.UniqueBytes / s.Bytes
	}
	n := len(images)
	for i := range n {
		s.Matrix = append(s.Matrix, make([]float64, n))
		s.MatrixBytes = append(s.MatrixBytes, make([]float64, n))
		for j := range i + 1 {
			a, b := jaccard(sets[i], sets[j])
			s.Matrix[i][j], s.Matrix[j][i] = a, a
			s.MatrixBytes[i][j], s.MatrixBytes[j][i] = b, b
		}
	}
	for i := range n {
		for j := range n {
			s.Mean += s.Matrix[i][j] / float64(n*n)
			s.MeanBytes += s.MatrixBytes[i][j] / float64(n*n)
			if i != j {
				s.OffDiagonal += s.Matrix[i][j] / float64(n*(n-1))
			}
		}
	}
	s.Order = cluster(s.Matrix)
	for _, name := range slices.Sorted(maps.Keys(holders)) {
		if 2*holders[name] > n && n > 1 {
			s.Common = append(s.Common, Layer{name, size[name]})
			s.CommonBytes += size[name]
			s.LargestShare += size[name] * float64(holders[name]) / s.Bytes
		}
	}
	slices.SortStableFunc(s.Common, func(a, b Layer) int {
		switch {
		case a.Bytes > b.Bytes:
			return -1
		case a.Bytes < b.Bytes:
			return 1
		}
		return 0
	})
	return s, nil
}

// jaccard is |a∩b| ÷ |a∪b|, by number and by bytes.
func jaccard(a, b map[string]float64) (number, bytes float64) {
	both, bothBytes, all, allBytes := 0, 0.0, len(b), sum(b)
	for _, name := range slices.Sorted(maps.Keys(a)) {
		if _, ok := b[name]; ok {
			both++
			bothBytes += a[name]
		} else {
			all++
			allBytes += a[name]
		}
	}
	number = float64(both) / float64(all)
	if allBytes > 0 {
		bytes = bothBytes / allBytes
	}
	return number, bytes
}

// cluster orders rows of a similarity matrix so that alike ones are neighbours: the nearest two groups by average similarity
// are joined until one is left, each time with the ends together that are more alike.
func cluster(m [][]float64) []int {
	groups := make([][]int, len(m))
	near := make([][]float64, len(m))
	for i := range m {
		groups[i] = []int{i}
		near[i] = slices.Clone(m[i])
	}
	for len(groups) > 1 {
		a, b, best := 0, 1, math.Inf(-1)
		for i := range groups {
			for j := range i {
				if near[i][j] > best {
					a, b, best = j, i, near[i][j]
				}
			}
		}
		x, y := groups[a], groups[b]
		wx, wy := float64(len(x)), float64(len(y))
		ends := []float64{m[x[len(x)-1]][y[0]], m[x[len(x)-1]][y[len(y)-1]], m[x[0]][y[0]], m[x[0]][y[len(y)-1]]}
		switch slices.Index(ends, slices.Max(ends)) {
		case 1:
			slices.Reverse(y)
		case 2:
			slices.Reverse(x)
		case 3:
			x, y = y, x
		}
		groups[a] = append(slices.Clone(x), y...)
		for i := range groups {
			if i != a && i != b {
				v := (near[a][i]*wx + near[b][i]*wy) / (wx + wy)
				near[a][i], near[i][a] = v, v
			}
		}
		groups = slices.Delete(groups, b, b+1)
		near = slices.Delete(near, b, b+1)
		for i := range near {
			near[i] = slices.Delete(near[i], b, b+1)
		}
	}
	return groups[0]
}

// Savings are what a common base would save on a schedule: images pulled one after another by hosts that keep what they have.
type Savings struct {
	Jobs       int     `json:"jobs"`
	Bytes      float64 `json:"bytes_pulled"`               // per host, as the images are
	Worst      float64 `json:"bytes_if_nothing_is_shared"` // as if no two jobs shared a layer
	WithBase   float64 `json:"bytes_with_common_base"`     // if the layers that most images have were the same in all
	Saved      float64 `json:"saved_bytes"`                // by the base
	SavedShare float64 `json:"saved_share"`                //
	Seconds    Range   `json:"saved_s_per_host"`           // at the study's rates
}

// Save works out what a common base saves on a schedule: indices of images in the order in which jobs need them. The base is the layers that
// more than half of the images have; where there are none it is a layer as large as the smallest of the images' largest ones. An
// image that lacks of the base is taken to have the same content in other layers, from another build of the same system and
// libraries: as many bytes as it lacks, but at most half of what it would pull.
func Save(images []Image, s Similarity, schedule []int) (Savings, error) {
	var v Savings
	base := map[string]float64{}
	for _, l := range s.Common {
		base[l.Name] = l.Bytes
	}
	if len(base) == 0 {
		least := math.Inf(1)
		for _, i := range images {
			largest := 0.0
			for _, l := range i.Layers {
				largest = max(largest, l.Bytes)
			}
			least = min(least, largest)
		}
		base["\x00base"] = least // no layer is called so
	}
	seen, based := map[string]bool{}, map[string]bool{}
	fresh := func(have map[string]bool, layers map[string]float64) float64 {
		sum := 0.0
		for _, name := range slices.Sorted(maps.Keys(layers)) {
			if !have[name] {
				have[name] = true
				sum += layers[name]
			}
		}
		return sum
	}
	for _, k := range schedule {
		if k < 0 || k >= len(images) {
			return v, fmt.Errorf("%w: job needs image %d of %d", ErrScenario, k+1, len(images))
		}
		v.Jobs++
		own := distinct([]Image{images[k]})
		v.Worst += sum(own)
		v.Bytes += fresh(seen, own)
		lacks, rest := maps.Clone(base), maps.Clone(own)
		for name := range base {
			if _, ok := own[name]; ok {
				delete(lacks, name)
				delete(rest, name)
			}
		}
		more := fresh(based, rest)
		v.WithBase += more - min(sum(lacks), more/2) + fresh(based, base)
	}
	// A base that saves nothing is not made.
	v.WithBase = min(v.WithBase, v.Bytes)
	v.Saved = v.Bytes - v.WithBase
	if v.Bytes > 0 {
		v.SavedShare = v.Saved / v.Bytes
	}
	v.Seconds = Range{v.Saved / StudyRate.High, v.Saved / StudyRate.Mid, v.Saved / StudyRate.Low}
	return v, nil
}
