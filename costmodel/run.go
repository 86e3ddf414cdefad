package costmodel

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strings"
)

// A run is what the model knows of one pull of one image on one cluster. All but the observed part is known before it starts.
type run struct {
	ID         string  `json:"run"`
	Experiment string  `json:"experiment"`
	Strategy   string  `json:"strategy"`
	Image      string  `json:"image"`
	Content    string  `json:"content"`
	Instance   string  `json:"instance"`
	Total      float64 `json:"total"`              // bytes
	New        float64 `json:"new"`                // bytes
	Unpacked   float64 `json:"unpacked,omitempty"` // bytes
	Layers     float64 `json:"layers,omitempty"`
	Nodes      int     `json:"nodes"` // of the cluster
	Hosts      int     `json:"hosts"` // seen

	hosts []string // names, of which the makespan takes the slowest

	// Observed, in a fit only.
	pull  []float64 // seconds, of hosts in their order
	start []float64 // seconds
}

// runsOf gathers events into runs, in the order of their first event.
func runsOf(events []Event) ([]run, error) {
	byID := map[string]int{}
	var runs []run
	for _, e := range events {
		i, ok := byID[e.Run]
		if !ok {
			i = len(runs)
			byID[e.Run] = i
			runs = append(runs, run{
				ID: e.Run, Experiment: e.Experiment, Strategy: e.Strategy, Image: e.Image, Content: e.Content,
				Instance: e.InstanceType, Total: e.TotalBytes, New: e.NewBytes, Unpacked: e.UnpackedBytes, Layers: e.Layers,
				Nodes: e.ClusterNodes,
			})
		}
		r := &runs[i]
		if r.Image != e.Image || r.Strategy != e.Strategy || r.Content != e.Content || r.Experiment != e.Experiment ||
			r.Instance != e.InstanceType || r.Nodes != e.ClusterNodes {
			return nil, badEvents("run %s has events of two images, strategies or clusters: a run is one pull of one image on one cluster", e.Run)
		}
		r.New = min(r.New, e.NewBytes)
		r.Hosts++
		r.hosts = append(r.hosts, e.Node)
		r.pull = append(r.pull, e.Pull)
		r.start = append(r.start, e.Start)
	}
	return runs, nil
}

// cluster is the set of hosts that a run was on, as far as the columns tell.
func (r *run) cluster() string {
	return r.Experiment + "|" + r.Strategy + "|" + r.Instance + "|" + itoa(r.Nodes)
}

func (r *run) host(name string) string { return r.cluster() + "|" + r.Content + "|" + name }

// median is the logarithm of the median host's pull.
func (r *run) median() float64 { return math.Log(median(r.pull)) }

// makespan is from the run's first start to its last end.
func (r *run) makespan() float64 {
	last := 0.0
	for i := range r.pull {
		last = max(last, r.start[i]+r.pull[i])
	}
	return last
}

// ramp is the last start.
func (r *run) ramp() float64 { return slices.Max(r.start) }

// share names the part of the image that is new: an image of which a tenth is missing is another
// piece of work than the whole.
func (r *run) share() string {
	p := r.New / r.Total
	if p > 0.9 {
		return ""
	}
	return "~" + itoa(int(math.Round(p*10)))
}

// family is the image's name without its tag.
func (r *run) family() string {
	if i := strings.LastIndexByte(r.Image, ':'); i > strings.LastIndexByte(r.Image, '/') {
		return r.Image[:i]
	}
	return r.Image
}

// size is the work of a run in octaves: inflated bytes where compressed ones say nothing.
func (r *run) size() float64 {
	if r.Content == ContentZeros && r.Unpacked > 0 {
		return math.Log2(r.Unpacked)
	}
	return math.Log2(max(r.New, 1))
}

func (r *run) octLayers() float64 { return math.Log2(max(r.Layers, 1)) }

// registries are the words in a strategy's name that say where the bytes come from.
var registries = []string{"ghcr", "ar", "gcr", "ecr", "acr", "quay", "dockerhub", "docker", "harbor", "nvcr", "muster"}

// registry is where a strategy's bytes come from: a known word in its name, else the whole name.
func registry(strategy string) string {
	for _, word := range strings.FieldsFunc(strategy, func(c rune) bool { return c == '-' || c == '_' || c == '/' || c == '+' }) {
		if slices.Contains(registries, word) {
			return word
		}
	}
	return strategy
}

// mounting tells whether a strategy may mount images instead of pulling them, by its name. What waits until everything is there pulls.
func mounting(strategy string) bool {
	if strings.HasSuffix(strategy, "-complete") {
		return false
	}
	return strings.Contains(strategy, "stream") || strings.Contains(strategy, "lazy") || strings.Contains(strategy, "muster")
}

// Lazy says which images a strategy that can mount images did mount: others it pulled after all.
type lazy struct {
	Mounted map[string]bool    `json:"mounted"` // by image
	Layers  map[string]float64 `json:"layers"`  // of these images
	Most    bool               `json:"most"`    // what most images were
}

// A mount takes at most mountFactor times what the fastest tenth took, whatever the size.
const mountFactor = 3

// lazyOf finds, for each strategy that can mount, which images it did.
func lazyOf(runs []run) map[string]lazy {
	all := map[string]lazy{}
	group := map[string][]*run{}
	for i := range runs {
		if r := &runs[i]; mounting(r.Strategy) {
			group[r.Strategy+"|"+r.Content] = append(group[r.Strategy+"|"+r.Content], r)
		}
	}
	for key, rs := range group {
		times := map[string][]float64{}
		l := lazy{Mounted: map[string]bool{}, Layers: map[string]float64{}}
		var each []float64
		for _, r := range rs {
			m := math.Exp(r.median())
			times[r.Image] = append(times[r.Image], m)
			each = append(each, m)
			l.Layers[r.Image] = r.Layers
		}
		bound := mountFactor * Quantile(each, 0.1)
		n := 0
		for image, t := range times {
			if l.Mounted[image] = median(t) <= bound; l.Mounted[image] {
				n++
			}
		}
		l.Most = 2*n >= len(times)
		all[key] = l
	}
	return all
}

// mounts tells what becomes of an image: what it was before, else what became of the image with the nearest number of layers.
func (l lazy) mounts(r *run) bool {
	if m, ok := l.Mounted[r.Image]; ok {
		return m
	}
	if r.Layers == 0 {
		return l.Most
	}
	best, answer := math.Inf(1), l.Most
	for _, image := range slices.SortedFunc(maps.Keys(l.Mounted), cmp.Compare[string]) {
		n := l.Layers[image]
		if n == 0 {
			continue
		}
		if d := math.Abs(math.Log(n / r.Layers)); d < best {
			best, answer = d, l.Mounted[image]
		}
	}
	return answer
}
