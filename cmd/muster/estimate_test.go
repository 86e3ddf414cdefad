package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

const studyFolder = "../../costmodel/testdata/"

func studyFile(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(studyFolder + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// inProcess is muster without a process: these commands neither mount nor fork.
func inProcess(t *testing.T, args ...string) (out, errs string, code int) {
	t.Helper()
	read := func(f *os.File) string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		return string(b)
	}
	dir := t.TempDir()
	stdout, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := os.Create(filepath.Join(dir, "err"))
	if err != nil {
		t.Fatal(err)
	}
	a := &app{out: stdout, err: stderr}
	root := a.command()
	root.SetArgs(args)
	err = root.ExecuteContext(t.Context())
	if err != nil {
		a.complain(err)
	}
	return read(stdout), read(stderr), exitCode(err)
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v\n%.500s", err, text)
	}
	return v
}

// TestEstimateTalk: the talk's figures come out of the command with the talk's inputs, beside those of the measured rate.
func TestEstimateTalk(t *testing.T) {
	for _, talk := range []struct {
		image string
		says  []string
	}{
		{"16x12MB", []string{"192 MB per host, 1920 MB if nothing", "345.6 to 576.0 s", "$302.04 to $503.40", "$3,146.24 per hour", "54.9 s and $47.94 at the study's median of 31.5 MB/s"}},
		{"30MB+7.3MB+3622MB", []string{"6586.7 to 10977.9 s", "$5,756.52 to $9,594.20", "$913.73"}},
	} {
		out, errs, code := inProcess(t, "estimate", "--hosts", "32", "--instance", "p5.48xlarge", "--rate", "3..5MB/s", "--times", "10", talk.image)
		if code != 0 {
			t.Fatal(errs)
		}
		for _, s := range talk.says {
			if !strings.Contains(out, s) {
				t.Errorf("%s: the answer does not say %q:\n%s", talk.image, s, out)
			}
		}
	}
}

// TestEstimateImages: images from a layout and from a registry; only manifests and configs are fetched, and layers that
// images share are counted once.
func TestEstimateImages(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	p, ref := c.pushed()
	p.ResetLog()
	page := filepath.Join(t.TempDir(), "page.html")
	out := c.ok("estimate", "--hosts", "64", "--price", "3.6", "--json", "--html", page, ref, c.image, "12MB")
	e := decode[struct {
		Images     []costmodel.Step
		Strategies []costmodel.Outcome
		Parameters []costmodel.Parameter
	}](t, out)
	if len(e.Images) != 3 || e.Images[0].NewBytes <= 0 || e.Images[1].NewBytes != 0 || e.Images[2].NewBytes != 12e6 {
		t.Errorf("images %+v: the second is the first from elsewhere", e.Images)
	}
	if len(e.Strategies) != len(costmodel.Strategies) {
		t.Errorf("%d strategies", len(e.Strategies))
	}
	for _, p := range e.Parameters {
		if p.Name == costmodel.ParamPrice && (p.Origin != costmodel.Given || p.Mid != 3.6) {
			t.Errorf("price %+v", p)
		}
	}
	if got, layer := p.Bytes(registry.Match{}), int64(e.Images[0].Bytes); got > 64<<10 || got >= layer {
		t.Errorf("%d bytes were fetched for an estimate of an image of %d", got, layer)
	}
	checkPage(t, page, "every host pulls from the registry", "muster, first pull", "<svg")

	heat, svg := filepath.Join(t.TempDir(), "heat.html"), filepath.Join(t.TempDir(), "heat.svg")
	out = c.ok("similarity", "--json", "--html", heat, "--svg", svg, "--jobs", "1,2,1", ref, c.image, "a=1MB")
	s := decode[[]similarity](t, out)
	if len(s) != 1 || s[0].Matrix[0][1] != 1 || s[0].Matrix[0][2] != 0 || s[0].Savings.Jobs != 3 {
		t.Errorf("similarity %+v", s)
	}
	checkPage(t, heat, "a=1MB"[:1], "<svg")
	checkPage(t, svg, "<svg", "rotate")
}

// checkPage looks that a page needs nothing from elsewhere.
func checkPage(t *testing.T, file string, wants ...string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, w := range wants {
		if !strings.Contains(text, w) {
			t.Errorf("%s lacks %q", file, w)
		}
	}
	outside := regexp.MustCompile(`(?i)(src|href)\s*=|url\(|@import|<script`)
	if m := outside.FindString(text); m != "" {
		t.Errorf("%s refers to something outside: %q", file, m)
	}
}

// TestSimilarityTable: the study's table, from its layers.
func TestSimilarityTable(t *testing.T) {
	out, errs, code := inProcess(t, "similarity", "--layers", studyFile(t, "app_image_layers.csv"))
	if code != 0 {
		t.Fatal(errs)
	}
	lines := regexp.MustCompile(` +`).ReplaceAllString(out, " ")
	for _, row := range []string{
		"performance-study 10 258 115 44.6 % 23.1 GB 17.8 GB 0.770 0.403 0.336",
		"best-effort 10 120 33 27.5 % 5983 MB 2032 MB 0.340 0.659 0.621",
		"spack 7 56 50 89.3 % 2461 MB 2278 MB 0.926 0.200 0.067",
	} {
		if !strings.Contains(lines, row) {
			t.Errorf("the table lacks %q:\n%s", row, out)
		}
	}
}

// TestFitAndEvaluate: a model is fitted on some runs and scored on others, as a site does after its first jobs.
func TestFitAndEvaluate(t *testing.T) {
	f, err := os.Open(studyFile(t, "pull_events.csv"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	events, err := costmodel.ReadEvents(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var learn, predict []costmodel.Event
	for _, e := range events {
		if strings.HasSuffix(e.Run, "3") {
			predict = append(predict, e)
		} else {
			learn = append(learn, e)
		}
	}
	write := func(name string, events []costmodel.Event) string {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := costmodel.WriteEvents(f, events); err != nil {
			t.Fatal(err)
		}
		return path
	}
	model := filepath.Join(dir, "model.json")
	if _, errs, code := inProcess(t, "estimate", "fit", write("learn.csv", learn), "-o", model); code != 0 {
		t.Fatal(errs)
	}
	out, errs, code := inProcess(t, "estimate", "evaluate", "--model", model, write("predict.csv", predict), "--json")
	if code != 0 {
		t.Fatal(errs)
	}
	scores := decode[map[string]any](t, out)
	for key, most := range map[string]float64{"all": 0.1, "apps": 0.12, "zeros": 0.1, "makespan": 0.12} {
		s, ok := scores[key].(map[string]any)
		if !ok || len(s) != 3 {
			t.Fatalf("%s is %v", key, scores[key])
		}
		n, mdape, p90 := s["n"].(float64), s["mdape"].(float64), s["p90"].(float64)
		if n == 0 || math.IsNaN(mdape) || mdape > most || p90 < mdape {
			t.Errorf("%s: %v", key, s)
		}
	}
	if out, errs, code := inProcess(t, "estimate", "--model", model, "--hosts", "8", "--price", "1", "1GB"); code != 0 || !strings.Contains(out, "fitted on learn.csv") {
		t.Errorf("estimate with that model: %s%s", out, errs)
	}
	small := write("small.csv", learn[:600])
	for _, args := range [][]string{{"--folds", "3"}, {"--up-to", "64"}} {
		out, errs, code := inProcess(t, append([]string{"estimate", "evaluate", "--json", small}, args...)...)
		if code != 0 {
			t.Fatal(errs)
		}
		if c := decode[costmodel.Comparison](t, out); c.Model.All.N == 0 || c.Baseline.All.N != c.Model.All.N {
			t.Errorf("%v: %+v", args, c)
		}
	}
}

// TestEstimateRefuses: bad input is one line that says what is wrong and what is accepted, and exit code 2.
func TestEstimateRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	head := "run_id,experiment,strategy,image,content,total_bytes,new_bytes,cluster_nodes,instance_type,node,start_s,pull_s\n"
	good := head + "r1,e,s,i,app,500000000,500000000,4,x,1,0,20\nr2,e,s,i,app,500000000,500000000,4,x,1,0,21\nr3,e,s,i,app,500000000,500000000,4,x,1,0,21\n"
	model := filepath.Join(dir, "model.json")
	if _, errs, code := inProcess(t, "estimate", "fit", file("good.csv", good), "-o", model); code != 0 {
		t.Fatal(errs)
	}
	layout := layoutWithoutSizes(t)
	ask := []string{"estimate", "--hosts", "4", "--price", "1"}
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"no hosts":          {[]string{"estimate", "--price", "1", "12MB"}, "--hosts"},
		"zero hosts":        {[]string{"estimate", "--hosts", "0", "--price", "1", "12MB"}, "1 or more"},
		"no price":          {[]string{"estimate", "--hosts", "4", "12MB"}, "p5.48xlarge"},
		"unknown instance":  {[]string{"estimate", "--hosts", "4", "--instance", "p6.huge", "12MB"}, "p5.48xlarge"},
		"two prices":        {[]string{"estimate", "--hosts", "4", "--instance", "V100", "--price", "1", "12MB"}, "one is enough"},
		"price in words":    {[]string{"estimate", "--hosts", "4", "--price", "cheap", "12MB"}, "$/h"},
		"negative price":    {[]string{"estimate", "--hosts", "4", "--price", "-1", "12MB"}, "$/h"},
		"rate without unit": {append(ask, "--rate", "31.5", "12MB"), "MB/s"},
		"rate reversed":     {append(ask, "--rate", "5..3MB/s", "12MB"), "LOW..HIGH"},
		"rate of zero":      {append(ask, "--rate", "0MB/s", "12MB"), "more than 0"},
		"rate NaN":          {append(ask, "--rate", "NaNMB/s", "12MB"), "MB/s"},
		"size of zero":      {append(ask, "0MB"), "12MB"},
		"many layers":       {append(ask, "99999x1MB"), "10000"},
		"label of many":     {append(ask, "3x1MB@base"), "one layer"},
		"times":             {append(ask, "--times", "0", "1MB"), "1 to 10000"},
		"no sizes":          {append(ask, layout), "size"},
		"no model":          {append(ask, "--model", filepath.Join(dir, "none"), "1MB"), "estimate fit"},
		"model of events":   {append(ask, "--model", file("events.csv", good), "1MB"), "not a model"},
		"no page":           {append(ask, "--html", filepath.Join(dir, "no/such/page"), "1MB"), "no/such/page"},
		"fit to nowhere":    {[]string{"estimate", "fit", file("a.csv", good)}, "-o MODEL"},
		"fit of nothing":    {[]string{"estimate", "fit", filepath.Join(dir, "none.csv"), "-o", model}, "none.csv"},
		"missing column":    {[]string{"estimate", "fit", file("b.csv", strings.ReplaceAll(good, "pull_s", "pull_ms")), "-o", model + "2"}, "pull_s missing"},
		"milliseconds":      {[]string{"estimate", "evaluate", file("c.csv", strings.NewReplacer(",20\n", ",20000\n", ",21\n", ",21000\n").Replace(good))}, "seconds"},
		"megabytes":         {[]string{"estimate", "evaluate", "--model", model, file("d.csv", strings.ReplaceAll(good, "500000000", "500"))}, "bytes"},
		"too few":           {[]string{"estimate", "fit", file("e.csv", head+"r1,e,s,i,app,500000000,500000000,4,x,1,0,20\n"), "-o", model + "2"}, "3 or more"},
		"all cached":        {[]string{"estimate", "evaluate", "--model", model, file("f.csv", head+"r1,e,s,i,app,500000000,500000000,4,x,1,0,0.01\n")}, "cached"},
		"folds":             {[]string{"estimate", "evaluate", "--folds", "1", file("g.csv", good)}, "2 to 100"},
		"both splits":       {[]string{"estimate", "evaluate", "--model", model, "--folds", "3", file("h.csv", good)}, "--folds"},
		"nothing to say":    {[]string{"similarity"}, "--layers"},
		"no such set":       {[]string{"similarity", "--layers", studyFile(t, "app_image_layers.csv"), "--set", "x"}, "spack"},
		"layers of nothing": {[]string{"similarity", "--layers", file("i.csv", "image,digest\n")}, "bytes missing"},
		"layers of no size": {[]string{"similarity", "--layers", file("j.csv", "image,digest,bytes\na,b,0\n")}, "line 2"},
		"no such job":       {[]string{"similarity", "--jobs", "1,3", "1MB", "2MB"}, "1 to 2"},
	} {
		t.Run(name, func(t *testing.T) { oneLineError(t, c.says, c.args...) })
	}
	if _, err := os.Stat(model + "2"); err == nil {
		t.Error("a fit that failed left a model")
	}
}

// layoutWithoutSizes is an OCI layout whose manifest gives a layer the size 0.
func layoutWithoutSizes(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	layer := images.Layer(images.File("a", strings.Repeat("text ", 1000)))
	if err := images.WriteImage(dir, images.Image{Layers: []images.Blob{layer}}); err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	size := regexp.MustCompile(fmt.Sprintf(`"size": ?%d\b`, layer.Size))
	for _, path := range blobs {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !size.Match(b) {
			continue
		}
		changed := images.NewBlob("", size.ReplaceAll(b, []byte(`"size": 0`)))
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(changed.Digest, "sha256:")), changed.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		index := filepath.Join(dir, "index.json")
		text, err := os.ReadFile(index)
		if err != nil {
			t.Fatal(err)
		}
		fixed := strings.NewReplacer(filepath.Base(path), strings.TrimPrefix(changed.Digest, "sha256:"), fmt.Sprintf(`"size":%d`, len(b)), fmt.Sprintf(`"size":%d`, len(changed.Bytes()))).Replace(string(text))
		if err := os.WriteFile(index, []byte(fixed), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "oci:" + dir
}

func TestParseRange(t *testing.T) {
	for text, want := range map[string]costmodel.Range{
		"31.5MB/s":         {Low: 31.5e6, Mid: 31.5e6, High: 31.5e6},
		"2..8 MB/s":        {Low: 2e6, Mid: 4e6, High: 8e6},
		"22..31.5..46MB/s": {Low: 22e6, Mid: 31.5e6, High: 46e6},
		"10Gbit/s":         {Low: 1.25e9, Mid: 1.25e9, High: 1.25e9},
	} {
		got, err := parseRange(text, "B/s")
		if err != nil || math.Abs(got.Mid/want.Mid-1) > 1e-9 || got.Low != want.Low || got.High != want.High {
			t.Errorf("%s is %+v, %v; want %+v", text, got, err, want)
		}
	}
	if got, err := parseRange("13%", "share"); err != nil || math.Abs(got.Mid-0.13) > 1e-12 {
		t.Errorf("13%% is %+v, %v", got, err)
	}
}
