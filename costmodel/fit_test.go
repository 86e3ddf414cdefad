package costmodel

import (
	"bytes"
	"encoding/json"
	"flag"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write study.json anew")

func studyEvents(t testing.TB) []Event {
	t.Helper()
	f, err := os.Open("testdata/pull_events.csv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	events, err := ReadEvents(f)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// TestStudyModel: the embedded model is what a fit on the study's events gives.
func TestStudyModel(t *testing.T) {
	events := studyEvents(t)
	m, err := Fit(events, "the study (Sochat 2024, 835 runs)")
	if err != nil {
		t.Fatal(err)
	}
	if m.Rate.Mid < 28e6 || m.Rate.Mid > 33e6 {
		t.Errorf("median rate %.1f MB/s, the study says 31.5", m.Rate.Mid/1e6)
	}
	m.Rate = StudyRate
	if *update {
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("study.json", append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Skip("study.json written: run the tests again")
	}
	a, err := Evaluate(m, events)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Evaluate(Study(), events)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []float64{a.All.MdAPE - b.All.MdAPE, a.Apps.P90 - b.Apps.P90, a.Zeros.MdAPE - b.Zeros.MdAPE, a.Makespan.MdAPE - b.Makespan.MdAPE} {
		if math.Abs(d) > 1e-3 {
			t.Fatalf("study.json scores %+v, a fit %+v: go test ./costmodel -run TestStudyModel -update", b, a)
		}
	}
	if want := 7384; a.All.N != want || a.Apps.N+a.Zeros.N != want || a.Makespan.N != 828 {
		t.Errorf("scored %d events and %d runs", a.All.N, a.Makespan.N)
	}
	t.Logf("%+v\n%+v\n%+v %+v\nslow %v ramp %v last %v", m.Pull, m.Mount, m.Rate, m.Spread, m.Slow, m.Ramp, m.Last)
}

// TestBetterThanBaselines: on runs that it has not seen the model is clearly better than the baselines, on every key.
// docs/estimate.md has the table of ten folds.
func TestBetterThanBaselines(t *testing.T) {
	events := studyEvents(t)
	c, err := CrossValidate(events, 4, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s\nmodel    %+v\nbaseline %+v\nlayers   %+v", c.Split, c.Model, c.Baseline, c.Layers)
	for _, k := range []struct {
		name               string
		got, base, layered Score
		mdape, p90         float64 // what the baseline reaches on runs of its own
	}{
		{"all", c.Model.All, c.Baseline.All, c.Layers.All, 0.172, 0.77},
		{"apps", c.Model.Apps, c.Baseline.Apps, c.Layers.Apps, 0.069, 0.45},
		{"zeros", c.Model.Zeros, c.Baseline.Zeros, c.Layers.Zeros, 0.105, 0.40},
		{"makespan", c.Model.Makespan, c.Baseline.Makespan, c.Layers.Makespan, 0.140, 0.48},
	} {
		best := min(k.base.MdAPE, k.layered.MdAPE, k.mdape)
		if k.got.MdAPE > 0.9*best {
			t.Errorf("%s: median error %.3f, baselines %.3f, %.3f, %.3f", k.name, k.got.MdAPE, k.base.MdAPE, k.layered.MdAPE, k.mdape)
		}
		if best := min(k.base.P90, k.layered.P90, k.p90); k.got.P90 > 0.9*best {
			t.Errorf("%s: P90 %.3f, baselines %.3f, %.3f, %.3f", k.name, k.got.P90, k.base.P90, k.layered.P90, k.p90)
		}
	}
	x, err := Extrapolate(events, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s\nmodel    %+v\nbaseline %+v\nlayers   %+v", x.Split, x.Model, x.Baseline, x.Layers)
	for _, k := range []struct {
		name               string
		got, base, layered Score
	}{{"all", x.Model.All, x.Baseline.All, x.Layers.All}, {"apps", x.Model.Apps, x.Baseline.Apps, x.Layers.Apps}, {"zeros", x.Model.Zeros, x.Baseline.Zeros, x.Layers.Zeros}, {"makespan", x.Model.Makespan, x.Baseline.Makespan, x.Layers.Makespan}} {
		if k.got.MdAPE > 0.95*min(k.base.MdAPE, k.layered.MdAPE) {
			t.Errorf("extrapolated %s: median error %.3f, baselines %.3f, %.3f", k.name, k.got.MdAPE, k.base.MdAPE, k.layered.MdAPE)
		}
	}
}

// TestNoPeeking: what is predicted does not depend on what was observed of it.
func TestNoPeeking(t *testing.T) {
	events := studyEvents(t)
	runs, err := runsOf(Usable(events))
	if err != nil {
		t.Fatal(err)
	}
	other := slices.Clone(events)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range other {
		if !other[i].Suspect {
			other[i].Pull, other[i].Start = 1+rng.Float64()*100, rng.Float64()*10
		}
	}
	changed, err := runsOf(Usable(other))
	if err != nil {
		t.Fatal(err)
	}
	m := Study()
	for i := range runs {
		a, b := runs[i].before(), changed[i].before()
		if runs[i].Hosts != changed[i].Hosts { // an event of 0.05 s or less was dropped in one
			continue
		}
		ha, hb := m.hosts(&a, m.predictPull(&a)), m.hosts(&b, m.predictPull(&b))
		if !slices.Equal(ha, hb) || m.predictMakespan(&a, ha) != m.predictMakespan(&b, hb) {
			t.Fatalf("run %s is predicted from what was observed of it", runs[i].ID)
		}
	}
}

// made are events of a made-up site: seconds = 2 + 0.03 s/MB on every host but slow ones.
func made(runs, hosts int) []Event {
	var all []Event
	for r := range runs {
		mb := float64(300 + 100*(r%7))
		for h := range hosts {
			s := 2 + 0.03*mb
			if h == 3 {
				s *= 1.5
			}
			all = append(all, Event{
				Run: "r" + itoa(r), Experiment: "site", Strategy: "harbor", Image: "app:" + itoa(r%7), Content: ContentApp, TotalBytes: mb * 1e6, NewBytes: mb * 1e6,
				ClusterNodes: hosts, InstanceType: "x", Node: "n" + itoa(h), Start: 0.1 * float64(h), Pull: s,
			})
		}
	}
	return all
}

// TestFitFindsTheTruth: a site's own model recovers the formula, the slow host and the ramp it was made with.
func TestFitFindsTheTruth(t *testing.T) {
	m, err := Fit(made(28, 8), "made up")
	if err != nil {
		t.Fatal(err)
	}
	if f := m.Pull["harbor|app"]; math.Abs(f.Fixed-2) > 0.5 || math.Abs(f.PerGB-30) > 1 {
		t.Errorf("formula %+v, made with 2 s and 30 s/GB", f)
	}
	if len(m.Slow) != 1 || !strings.HasSuffix(m.Slow[0], "|n3") {
		t.Errorf("slow hosts %v, want n3", m.Slow)
	}
	s, err := Evaluate(m, made(7, 8))
	if err != nil {
		t.Fatal(err)
	}
	if s.All.MdAPE > 0.02 || s.Makespan.MdAPE > 0.1 {
		t.Errorf("scores %+v of its own data", s)
	}
	// A strategy and a content that it has never seen still get a number.
	odd := made(3, 4)
	for i := range odd {
		odd[i].Strategy, odd[i].Content, odd[i].UnpackedBytes = "other-zeros", ContentZeros, 1e9
	}
	if s, err = Evaluate(m, odd); err != nil || !(s.Zeros.MdAPE < 10) {
		t.Errorf("unseen content: %+v, %v", s, err)
	}
}

func TestModelFile(t *testing.T) {
	m, err := Fit(made(10, 4), "made up")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := WriteModel(&b, m); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	back, err := ReadModel(&b)
	if err != nil {
		t.Fatal(err)
	}
	x, _ := Evaluate(m, made(5, 4))
	y, err := Evaluate(back, made(5, 4))
	if err != nil || x != y {
		t.Errorf("a model that was written and read scores %+v, before %+v (%v)", y, x, err)
	}
	for _, bad := range []string{"", "{}", "[]", strings.Replace(text, `"version": 1`, `"version": 99`, 1), strings.Replace(text, `"fixed_s": `, `"fixed_s": -`, 1), strings.ReplaceAll(text, `"nodes": 4`, `"nodes": 0`), text[:len(text)/2]} {
		if _, err := ReadModel(strings.NewReader(bad)); err == nil {
			t.Errorf("a wrong model is taken: %.60q", bad)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("the error has several lines: %v", err)
		}
	}
}
