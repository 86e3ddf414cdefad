package main

import (
	"cmp"
	"fmt"
	"html/template"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/muster-hpc/muster/chart"
	"github.com/muster-hpc/muster/costmodel"
)

// studyPage is the results of a study as one HTML file: pull time by size, layers, hosts and strategy, and what the images share.
func studyPage(w io.Writer, events []costmodel.Event, images *costmodel.Similarity) error {
	data := struct {
		Rows    []studyRow
		Charts  []studyChart
		Heat    template.HTML
		Events  int
		Similar *costmodel.Similarity
	}{Rows: summariseStudy(events), Events: len(events), Similar: images}
	data.Charts = studyCharts(events)
	if images != nil {
		data.Heat = template.HTML(heatMap(*images, true)) //nolint:gosec // heatMap escapes
	}
	var body strings.Builder
	if err := studyBody.Execute(&body, data); err != nil {
		return err
	}
	return chart.Page(w, "muster study", template.HTML(body.String())) //nolint:gosec // made by a template
}

var studyBody = template.Must(template.New("study").Funcs(template.FuncMap{
	"lasted": lasted, "bytes": func(v float64) string { return megabytes(int64(v)) },
}).Parse(`<h1>Pulls</h1>
<p class="note">{{.Events}} pulls. Points are medians over hosts and iterations.</p>
{{range .Charts}}<h2>{{.Title}}</h2>
{{.SVG}}
{{end}}{{with .Similar}}<h2>What the images share</h2>
<p class="note">Jaccard index of the layers of each two images.</p>
{{$.Heat}}{{end}}
<h2>The numbers</h2>
<div class="wide"><table><tr><th>strategy</th><th>bytes</th><th>layers</th><th>hosts</th><th>pulls</th><th>median</th><th>slowest</th></tr>
{{range .Rows}}<tr><td>{{.Strategy}}</td><td class="n">{{bytes .Bytes}}</td><td class="n">{{.Layers}}</td><td class="n">{{.Hosts}}</td><td class="n">{{.Pulls}}</td><td class="n">{{lasted .Median}}</td><td class="n">{{lasted .Slowest}}</td></tr>
{{end}}</table></div>`))

// A studyChart is one picture of a study.
type studyChart struct {
	Title string
	SVG   template.HTML
}

// studyCharts are pull times against what differs between the pulls; what does not differ has no chart.
func studyCharts(events []costmodel.Event) (all []studyChart) {
	inMB := func(v float64) string { return megabytes(int64(v)) }
	for _, c := range []struct {
		title, x, per string
		value, other  func(costmodel.Event) float64
		tick          func(float64) string
	}{
		{"Pull time by size", "compressed bytes", "layers", func(e costmodel.Event) float64 { return e.TotalBytes }, func(e costmodel.Event) float64 { return e.Layers }, inMB},
		{"Pull time by layers", "layers", "bytes", func(e costmodel.Event) float64 { return e.Layers }, func(e costmodel.Event) float64 { return sizeClass(e.TotalBytes) }, nil},
		{"Pull time by hosts", "hosts", "bytes", func(e costmodel.Event) float64 { return float64(e.ClusterNodes) }, func(e costmodel.Event) float64 { return sizeClass(e.TotalBytes) }, nil},
	} {
		type key struct {
			strategy string
			other    float64
		}
		points, values := map[key]map[float64][]float64{}, map[float64]bool{}
		for _, e := range events {
			k := key{e.Strategy, c.other(e)}
			if points[k] == nil {
				points[k] = map[float64][]float64{}
			}
			points[k][c.value(e)] = append(points[k][c.value(e)], e.Pull)
			values[c.value(e)] = true
		}
		if len(values) < 2 {
			continue
		}
		var series []chart.Series
		for _, k := range slices.SortedFunc(maps.Keys(points), func(a, b key) int { return cmp.Or(cmp.Compare(a.strategy, b.strategy), cmp.Compare(a.other, b.other)) }) {
			name := fmt.Sprintf("%s, %g layers", k.strategy, k.other)
			if c.per == "bytes" {
				name = fmt.Sprintf("%s, %s", k.strategy, inMB(k.other))
			}
			s := chart.Series{Name: name}
			for _, x := range slices.Sorted(maps.Keys(points[k])) {
				s.Points = append(s.Points, [2]float64{x, costmodel.Quantile(points[k][x], 0.5)})
			}
			series = append(series, s)
		}
		all = append(all, studyChart{c.title, chart.Lines(chart.Axes{X: c.x, Y: "seconds", LogX: true, LogY: true, TickX: c.tick}, series)})
	}
	return all
}

// sizeClass is bytes to two digits: images of one size differ by a little with their layers.
func sizeClass(bytes float64) float64 {
	p := 1.0
	for bytes/p >= 100 {
		p *= 10
	}
	return float64(int(bytes/p+0.5)) * p
}

// studySimilarity is what the study's images share, as far as they were made in this call; nil when there are less than two.
func (a *app) studySimilarity(images []studyImage) *costmodel.Similarity {
	var made []costmodel.Image
	for _, img := range images {
		if img.digests == nil {
			continue
		}
		m := costmodel.Image{Name: img.ref}
		for i, d := range img.digests {
			m.Layers = append(m.Layers, costmodel.Layer{Name: string(d), Bytes: float64(img.sizes[i])})
		}
		made = append(made, m)
	}
	if len(made) < 2 {
		return nil
	}
	s, err := costmodel.Similar(made)
	if err != nil {
		return nil
	}
	return &s
}
