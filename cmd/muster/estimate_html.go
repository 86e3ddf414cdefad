package main

import (
	"fmt"
	"html/template"
	"io"
	"strings"

	"github.com/muster-hpc/muster/chart"
	"github.com/muster-hpc/muster/costmodel"
)

// estimatePage is an estimate as one HTML file with charts.
func estimatePage(w io.Writer, e *estimation) error {
	var body strings.Builder
	if err := estimateBody.Execute(&body, e); err != nil {
		return err
	}
	return chart.Page(w, "muster estimate", template.HTML(body.String())) //nolint:gosec // made by a template
}

var estimateBody = template.Must(template.New("estimate").Funcs(template.FuncMap{
	"took": took, "dollars": dollars, "cents": cents, "figure": figure, "bytes": carried,
	"amount": amount, "unit": shownUnit, "mega": func(v float64) string { return fmt.Sprintf("%.1f", v/1e6) },
	"seconds": func(v float64) string { return fmt.Sprintf("%.1f", v) },
	"times": func(all []costmodel.Outcome) template.HTML {
		var bars []chart.Bar
		for _, o := range all {
			bars = append(bars, chart.Bar{
				Label: o.Label, Value: o.Median.Mid, Further: o.Slowest.Mid, Low: o.Slowest.Low, High: o.Slowest.High,
				Text: took(o.Slowest.Mid), Hint: o.Label + ": " + o.How,
			})
		}
		return chart.Bars(bars, 0.1, took)
	},
	"costs": func(all []costmodel.Outcome) template.HTML {
		var bars []chart.Bar
		for _, o := range all {
			bars = append(bars, chart.Bar{Label: o.Label, Value: o.Cost.Mid, Low: o.Cost.Low, High: o.Cost.High, Text: dollars(o.Cost.Mid), Hint: fmt.Sprintf("%s: %s node-hours", o.Label, figure(o.NodeHours.Mid))})
		}
		return chart.Bars(bars, 0.01, dollars)
	},
	"egress": func(all []costmodel.Outcome) template.HTML {
		var bars []chart.Bar
		for _, o := range all {
			bars = append(bars, chart.Bar{Label: o.Label, Value: o.Egress.Mid, Low: o.Egress.Low, High: o.Egress.High, Text: carried(o.Egress.Mid), Hint: dollars(o.EgressCost.Mid)})
		}
		return chart.Bars(bars, 1e6, carried)
	},
}).Parse(`<h1>What it costs to start</h1>
<p class="note">{{.Hosts}} hosts, {{len .Images}} pulls one after another; hosts keep the layers they have. Fitted parameters: {{.Model}}.</p>
<h2>Time to start</h2>
<p class="note">Dark: median host. Light: slowest host, with the interval that the ranges of the parameters give it. Logarithmic scale.</p>
{{times .Strategies}}
<h2>Cost of the hosts while they wait</h2>
<p class="note">A job starts when its last host does, so all hosts wait for the slowest.</p>
{{costs .Strategies}}
<h2>Bytes that leave the registry</h2>
{{egress .Strategies}}
<h2>The numbers</h2>
<div class="wide"><table><tr><th>strategy</th><th>median host</th><th>slowest host</th><th>interval</th><th>moved most by</th><th>node-hours</th><th>cost</th><th>interval</th><th>from the registry</th><th>its cost</th></tr>
{{range .Strategies}}<tr><td>{{.Label}}{{with .Preparation}}<br><span class="note">before: {{.}}</span>{{end}}</td><td class="n">{{took .Median.Mid}}</td><td class="n">{{took .Slowest.Mid}}</td><td class="n">{{took .Slowest.Low}} to {{took .Slowest.High}}</td><td>{{.Slowest.Main}}</td><td class="n">{{figure .NodeHours.Mid}}</td><td class="n">{{dollars .Cost.Mid}}</td><td class="n">{{dollars .Cost.Low}} to {{dollars .Cost.High}}</td><td class="n">{{bytes .Egress.Mid}}</td><td class="n">{{dollars .EgressCost.Mid}}</td></tr>
{{end}}</table></div>
{{with .Sharing}}{{if gt .Images 1}}<h2>Sharing of layers</h2>
<p>{{bytes .Shared}} per host, {{bytes .Unshared}} if nothing were shared, {{bytes .Best}} at best. Sharing saves {{seconds .SavedGiven.Low}} to {{seconds .SavedGiven.High}} s and {{cents .SavedCost.Low}} to {{cents .SavedCost.High}} at the rate given
(all hosts: {{cents .HourlyPrice}} per hour), {{seconds .SavedStudy}} s and {{cents .StudyCost}} at the study's median of {{mega .StudyRate}} MB/s.</p>{{end}}{{end}}
<h2>Images</h2>
<div class="wide"><table><tr><th>image</th><th>size</th><th>layers</th><th>new to the hosts</th><th>in layers</th></tr>
{{range .Images}}<tr><td>{{.Image}}</td><td class="n">{{bytes .Bytes}}</td><td class="n">{{.Layers}}</td><td class="n">{{bytes .NewBytes}}</td><td class="n">{{.NewLayer}}</td></tr>
{{end}}</table></div>
<h2>What the numbers rest on</h2>
<div class="wide"><table><tr><th>parameter</th><th>low</th><th>middle</th><th>high</th><th>unit</th><th>origin</th><th></th></tr>
{{range .Parameters}}<tr><td>{{.Name}}</td><td class="n">{{amount .Low .Unit}}</td><td class="n">{{amount .Mid .Unit}}</td><td class="n">{{amount .High .Unit}}</td><td>{{unit .Unit}}</td><td>{{.Origin}}</td><td class="note">{{.Note}}</td></tr>
{{end}}</table></div>
<h2>How each strategy is counted</h2>
<table>{{range .Strategies}}<tr><td>{{.Label}}</td><td class="note">{{.How}}</td></tr>
{{end}}</table>`))
