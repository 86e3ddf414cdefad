package costmodel

import (
	"encoding/csv"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
)

// sequence is n images of layers of these sizes in MB, that share nothing but what is named alike.
func sequence(n int, shared bool, mb ...float64) []Image {
	var all []Image
	for i := range n {
		img := Image{Name: fmt.Sprint("image ", i)}
		for k, s := range mb {
			name := fmt.Sprint("layer ", k)
			if !shared {
				name = fmt.Sprint("layer ", k, " of ", i)
			}
			img.Layers = append(img.Layers, Layer{name, s * 1e6})
		}
		all = append(all, img)
	}
	return all
}

func scenario(t *testing.T, images []Image, hosts int, instance string) Scenario {
	t.Helper()
	p := Defaults(Study(), "ghcr")
	price, err := PriceOf(instance)
	if err != nil {
		t.Fatal(err)
	}
	p[ParamPrice] = price
	return Scenario{Images: images, Hosts: hosts, Slow: Study().Spread.SlowShare, Parameters: p}
}

func give(s Scenario, name string, low, mid, high float64) {
	p := s.Parameters[name]
	p.Range, p.Origin = Range{low, mid, high}, Given
	s.Parameters[name] = p
}

// TestTalk: the talk's figures, which count bytes and a rate of 3 to 5 MB/s alone, and what the measured rate gives.
func TestTalk(t *testing.T) {
	cent := func(name string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 0.005 {
			t.Errorf("%s is %.3f, the talk says %.2f", name, got, want)
		}
	}
	for _, talk := range []struct {
		layers             []float64
		seconds            [2]float64
		dollars            [2]float64
		atMeasured         float64
		best, worst        float64
		secondsOneDecimal  bool
		measuredSecondsMin float64
	}{
		{layers: repeat(16, 12), seconds: [2]float64{345.6, 576.0}, dollars: [2]float64{302.04, 503.40}, atMeasured: 47.94, best: 192e6, worst: 1920e6},
		{layers: []float64{30, 7.3, 3622}, seconds: [2]float64{6586.7, 10977.9}, dollars: [2]float64{5756.52, 9594.20}, atMeasured: 913.73, best: 3659.3e6, worst: 36593e6},
	} {
		// Ten images that are the same layers: the best case; what nothing shared would cost is the worst.
		s := scenario(t, sequence(10, true, talk.layers...), 32, "p5.48xlarge")
		give(s, ParamRate, 3e6, math.Sqrt(15)*1e6, 5e6)
		e, err := Estimate(s)
		if err != nil {
			t.Fatal(err)
		}
		sh := e.Sharing
		cent("the price of all hosts", sh.HourlyPrice, 3146.24)
		if sh.Shared != talk.best || math.Abs(sh.Unshared-talk.worst) > 1 {
			t.Errorf("best %.0f worst %.0f bytes, want %.0f and %.0f", sh.Shared, sh.Unshared, talk.best, talk.worst)
		}
		if math.Abs(sh.SavedGiven.Low-talk.seconds[0]) > 0.05 || math.Abs(sh.SavedGiven.High-talk.seconds[1]) > 0.05 {
			t.Errorf("%.2f to %.2f s, the talk says %v", sh.SavedGiven.Low, sh.SavedGiven.High, talk.seconds)
		}
		cent("low cost", sh.SavedCost.Low, talk.dollars[0])
		cent("high cost", sh.SavedCost.High, talk.dollars[1])
		cent("cost at 31.5 MB/s", sh.StudyCost, talk.atMeasured)

		// The same by two estimates, as somebody would who has both sequences: no ramp, no slow hosts, no growth.
		total := func(shared bool, rate float64) float64 {
			s := scenario(t, sequence(10, shared, talk.layers...), 32, "p5.48xlarge")
			s.Slow = 0
			give(s, ParamRate, rate, rate, rate)
			give(s, ParamGrowth, 0, 0, 0)
			give(s, ParamRamp, 0, 0, 0)
			e, err := Estimate(s)
			if err != nil {
				t.Fatal(err)
			}
			return e.Strategies[0].Cost.Mid
		}
		cent("worst less best at 5 MB/s", total(false, 5e6)-total(true, 5e6), talk.dollars[0])
		cent("worst less best at 3 MB/s", total(false, 3e6)-total(true, 3e6), talk.dollars[1])
		cent("worst less best at 31.5 MB/s", total(false, 31.5e6)-total(true, 31.5e6), talk.atMeasured)
	}
}

func repeat(n int, v float64) []float64 {
	all := make([]float64, n)
	for i := range all {
		all[i] = v
	}
	return all
}

// TestEstimate checks what must hold between strategies and numbers, whatever the parameters are.
func TestEstimate(t *testing.T) {
	images := append(sequence(1, true, 30, 900, 200), sequence(2, true, 30, 900, 200, 50)...)
	s := scenario(t, images, 128, "hpc6a.48xlarge")
	e, err := Estimate(s)
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Strategies) != len(Strategies) {
		t.Fatalf("%d strategies", len(e.Strategies))
	}
	by := map[string]Outcome{}
	for _, o := range e.Strategies {
		by[o.Name] = o
		for name, q := range map[string]Quantity{"median": o.Median, "slowest": o.Slowest, "waiting": o.Waiting, "hours": o.NodeHours, "cost": o.Cost, "egress": o.Egress, "egress cost": o.EgressCost} {
			if !(q.Low >= 0 && q.Low <= q.Mid*(1+1e-9) && q.Mid <= q.High*(1+1e-9)) || math.IsInf(q.High, 0) {
				t.Errorf("%s: %s %+v is no interval", o.Name, name, q)
			}
		}
		if o.Median.Mid > o.Slowest.Mid {
			t.Errorf("%s: the median host is slower than the slowest", o.Name)
		}
		if math.Abs(o.Cost.Mid-o.Slowest.Mid*128/3600*2.88) > 1e-6 {
			t.Errorf("%s: cost %v is not waiting times price", o.Name, o.Cost.Mid)
		}
	}
	// Caches are remembered: the second image adds 50 MB, the third nothing.
	for i, want := range []float64{1130e6, 50e6, 0} {
		if got := e.Images[i].NewBytes; math.Abs(got-want) > 1 {
			t.Errorf("image %d brings %.0f new bytes, want %.0f", i, got, want)
		}
	}
	if got, want := by["registry"].Egress.Mid, 128*1180e6; math.Abs(got-want) > 1 {
		t.Errorf("registry gives %.0f bytes, want %.0f", got, want)
	}
	if got, want := by["muster"].Egress.Mid, 1180e6; math.Abs(got-want) > 1 {
		t.Errorf("the registry gives muster %.0f bytes, want %.0f: each once", got, want)
	}
	for _, faster := range [][2]string{{"near", "registry"}, {"ssd", "registry"}, {"zstd", "registry"}, {"muster-again", "muster"}, {"prestaged", "muster-again"}} {
		if by[faster[0]].Median.Mid > by[faster[1]].Median.Mid {
			t.Errorf("%s takes %.1f s, %s %.1f s", faster[0], by[faster[0]].Median.Mid, faster[1], by[faster[1]].Median.Mid)
		}
	}
	origins := map[string]int{}
	for _, p := range e.Parameters {
		origins[p.Origin]++
		if p.Note == "" || p.Unit == "" {
			t.Errorf("parameter %s has no note or unit", p.Name)
		}
	}
	if origins[Fitted] < 4 || origins[Assumed] < 4 {
		t.Errorf("origins %v", origins)
	}
}

func TestGrowthIsOfTheRegistry(t *testing.T) {
	ghcr, known := Study().Growth("ghcr")
	ar, knownAR := Study().Growth("ar")
	if !known || !knownAR || ghcr < 0.2 || ar > 0.1 {
		t.Errorf("growth per 100 nodes: ghcr %.3f, ar %.3f; the study shows it for ghcr only", ghcr, ar)
	}
	if p := Defaults(Study(), "harbor.example.org")[ParamGrowth]; p.Origin != Assumed || p.High < ghcr {
		t.Errorf("growth of an unknown registry is %+v: it must be assumed, and as wide as what is known", p)
	}
	for host, want := range map[string]string{"ghcr.io": "ghcr", "us-docker.pkg.dev": "ar", "123.dkr.ecr.us-east-1.amazonaws.com": "ecr", "x.azurecr.io": "acr", "r.local:5000": "r.local:5000", "index.docker.io": "dockerhub"} {
		if got := Registry(host); got != want {
			t.Errorf("registry of %s is %s, want %s", host, got, want)
		}
	}
}

func TestBadScenarios(t *testing.T) {
	good := func() Scenario { return scenario(t, sequence(1, true, 100), 4, "p5.48xlarge") }
	for name, spoil := range map[string]func(*Scenario){
		"no hosts":      func(s *Scenario) { s.Hosts = 0 },
		"no price":      func(s *Scenario) { delete(s.Parameters, ParamPrice) },
		"no image":      func(s *Scenario) { s.Images = nil },
		"no layers":     func(s *Scenario) { s.Images[0].Layers = nil },
		"no size":       func(s *Scenario) { s.Images[0].Layers[0].Bytes = 0 },
		"NaN size":      func(s *Scenario) { s.Images[0].Layers[0].Bytes = math.NaN() },
		"no rate":       func(s *Scenario) { give(*s, ParamRate, 0, 0, 0) },
		"NaN rate":      func(s *Scenario) { give(*s, ParamRate, math.NaN(), 1, 2) },
		"negative ramp": func(s *Scenario) { give(*s, ParamRamp, -1, 0, 0) },
		"wrong order":   func(s *Scenario) { give(*s, ParamLink, 5, 4, 3) },
	} {
		s := good()
		spoil(&s)
		if _, err := Estimate(s); !errors.Is(err, ErrScenario) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := PriceOf("p6.colossal"); !errors.Is(err, ErrScenario) || !strings.Contains(err.Error(), "p5.48xlarge") {
		t.Errorf("an unknown instance type: %v", err)
	}
}

func studyImages(t *testing.T) map[string][]Image {
	t.Helper()
	f, err := os.Open("testdata/app_image_layers.csv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	sets := map[string][]Image{}
	for _, r := range rows[1:] {
		size, err := strconv.ParseFloat(r[4], 64)
		if err != nil {
			t.Fatal(err)
		}
		set := sets[r[0]]
		if n := len(set); n == 0 || set[n-1].Name != r[1] {
			set = append(set, Image{Name: r[1]})
		}
		i := &set[len(set)-1]
		i.Layers = append(i.Layers, Layer{r[3], size})
		sets[r[0]] = set
	}
	return sets
}

// TestSimilarityTable is the study's table.
func TestSimilarityTable(t *testing.T) {
	sets := studyImages(t)
	for _, row := range []struct {
		set                               string
		layers, unique                    int
		mean, off, uniqueBytes, uniqueOne float64
	}{
		{"performance-study", 258, 115, 0.403, 0.336, 0.770, 44.6},
		{"best-effort", 120, 33, 0.659, 0.621, 0.340, 27.5},
		{"spack", 56, 50, 0.200, 0.067, 0.926, 89.3},
	} {
		s, err := Similar(sets[row.set])
		if err != nil {
			t.Fatal(err)
		}
		if s.Layers != row.layers || s.Unique != row.unique {
			t.Errorf("%s: %d layers, %d unique; want %d, %d", row.set, s.Layers, s.Unique, row.layers, row.unique)
		}
		for name, v := range map[string][2]float64{"mean": {s.Mean, row.mean}, "off-diagonal": {s.OffDiagonal, row.off}, "unique bytes": {s.UniqueShare, row.uniqueBytes}, "unique pulls": {s.UniquePulls, row.uniqueOne / 100}} {
			if math.Abs(v[0]-v[1]) > 0.00051 {
				t.Errorf("%s: %s %.4f, the study says %.3f", row.set, name, v[0], v[1])
			}
		}
		seen := map[int]bool{}
		for _, i := range s.Order {
			seen[i] = true
		}
		if len(seen) != len(sets[row.set]) || len(s.Order) != len(seen) {
			t.Errorf("%s: the clustering's order %v is no order of the images", row.set, s.Order)
		}
	}
}

func TestSave(t *testing.T) {
	images := sequence(3, false, 100, 50)
	s, err := Similar(images)
	if err != nil {
		t.Fatal(err)
	}
	v, err := Save(images, s, []int{0, 1, 2, 0})
	if err != nil {
		t.Fatal(err)
	}
	// 150 MB each, the fourth job again; with a base: 75 MB (half of an image) of each of three is one of 100 MB.
	if v.Worst != 600e6 || v.Bytes != 450e6 || v.WithBase != 325e6 || v.Saved != 125e6 {
		t.Errorf("%+v", v)
	}
	// Images that have the base already gain nothing by it.
	if alike := sequence(3, true, 100, 50); true {
		s, err := Similar(alike)
		if err != nil {
			t.Fatal(err)
		}
		if v, err := Save(alike, s, []int{0, 1, 2}); err != nil || v.Bytes != 150e6 || v.Saved != 0 || v.Worst != 450e6 {
			t.Errorf("images that are the same: %+v, %v", v, err)
		}
	}
	if _, err := Save(images, s, []int{3}); !errors.Is(err, ErrScenario) {
		t.Errorf("a job of no image: %v", err)
	}
	if _, err := Similar(nil); !errors.Is(err, ErrScenario) {
		t.Errorf("no image: %v", err)
	}
}

// TestCluster: three pairs of alike images, given apart, come out next to each other.
func TestCluster(t *testing.T) {
	m := make([][]float64, 6)
	for i := range m {
		m[i] = make([]float64, 6)
		for j := range m[i] {
			switch {
			case i == j:
				m[i][j] = 1
			case i%3 == j%3:
				m[i][j] = 0.8
			default:
				m[i][j] = 0.1
			}
		}
	}
	o := cluster(m)
	for i := 0; i < 6; i += 2 {
		if o[i]%3 != o[i+1]%3 {
			t.Fatalf("order %v separates pairs", o)
		}
	}
}
