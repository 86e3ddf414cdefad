package main

import (
	"fmt"
	"html"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/muster-hpc/muster/chart"
	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/report"
)

// reportPage is reports as one HTML file with timelines.
func reportPage(w io.Writer, all []*report.Report) error {
	var body strings.Builder
	if err := reportBody.Execute(&body, all); err != nil {
		return err
	}
	return chart.Page(w, "muster report", template.HTML(body.String())) //nolint:gosec // made by a template
}

var reportBody = template.Must(template.New("report").Funcs(template.FuncMap{
	"seconds": lasted, "bytes": some, "timeline": timeline, "milli": func(s float64) string { return fmt.Sprintf("%.1f", 1000*s) },
	"when": func(t time.Time) string { return t.Format(time.DateTime) }, "two": func(v float64) string { return fmt.Sprintf("%.2f", v) },
	"money": func(v float64) string { return fmt.Sprintf("$%.4g", v) }, "before": before, "phases": func() []string { return report.Phases },
	"at": func(h report.Host, p string) string {
		if t, ok := h.Phases[p]; ok {
			return fmt.Sprintf("%.2f", t)
		}
		return ""
	},
	"shown": func(r *report.Report) []report.Host { return r.SlowestHosts(200) },
}).Parse(`{{range .}}{{$r := .}}<h1>Job {{.Job}}</h1>
<p>{{.Image}} was {{.Asked}} on {{.Ready}} of {{.Nodes}} hosts {{seconds .Makespan}} after the first began, {{when .Began}}.</p>
<p class="note">The last host began {{seconds .StartSkew}} after the first; the median host took {{seconds .Median}}, slowest ÷ median {{two .Ratio}}; clocks aligned within {{milli .ClockBound}} ms{{if .ClockUnknown}}, but for {{.ClockUnknown}} hosts that were started anew since{{end}}.
Until all were ready {{two .NodeSeconds}} node-seconds passed, {{two .Idle}} of them ready hosts waited for others{{with .Money}}: {{money .Total}} and {{money .Idle}} at ${{.PerHour}} per host and hour{{end}}.
{{bytes .Size}} in {{.Layers}} layers for each host: {{bytes .Bytes.Origin}} from the origin in {{.Bytes.OriginRequests}} requests, {{bytes .Bytes.Peer}} from other hosts, {{bytes .Bytes.Store}} were there.</p>
<h2>Timeline</h2>
{{timeline .}}
{{if .Slow}}<h2>Slow hosts</h2>
<div class="wide"><table><tr><th>host</th><th>× median</th><th>more</th><th>cause</th><th>why</th></tr>
{{range .Slow}}<tr><td>{{.Host}}</td><td class="n">{{two .Factor}}</td><td class="n">{{seconds .More}}</td><td>{{.Cause}}</td><td>{{.Why}}{{before $r .}}</td></tr>
{{end}}</table></div>{{end}}
{{if .Silent}}<h2>Hosts that told nothing</h2><table>{{range .Silent}}<tr><td>{{.Host}}</td><td>{{.Why}}</td></tr>
{{end}}</table>{{end}}
<h2>Hosts{{if gt (len .Hosts) 200}}: the 200 that took longest{{end}}</h2>
<div class="wide"><table><tr><th>host</th><th>start</th>{{range phases}}<th>{{.}}</th>{{end}}<th>origin</th><th>peers</th><th>had</th><th>passed on</th><th></th></tr>
{{range shown .}}{{$h := .}}<tr><td>{{.Host}}</td><td class="n">{{two .Start}}</td>{{range phases}}<td class="n">{{at $h .}}</td>{{end}}<td class="n">{{bytes .Bytes.Origin}}</td><td class="n">{{bytes .Bytes.Peer}}</td><td class="n">{{bytes .Bytes.Store}}</td><td class="n">{{bytes .Bytes.Sent}}</td><td>{{.Error}}</td></tr>
{{end}}</table></div>
{{end}}`))

// The parts of a host's time, by what ends each; the last colour goes on until everything is complete.
var timelineParts = []struct{ until, colour, what string }{
	{"resolved", "#c9b458", "resolve"},
	{"first byte", "#d98f4e", "until the first byte"},
	{"mounted", "#4f8fce", "until mounted"},
	{"warm", "#7bb661", "until warm"},
	{"complete", "#b9d7ab", "until complete"},
}

// ownLane is up to how many hosts each has a lane of its own; more are drawn in lanesMost lanes, each the median of its hosts, sorted by
// when they were ready; of these the slowest by their own time and the last ones again below, by name.
const (
	ownLane   = 60
	lanesMost = 200
	lastOnes  = 20
	slowOnes  = 10
)

// A lane is one line of a timeline.
type lane struct {
	label, hint string
	start       float64
	at          map[string]float64
	failed      bool
}

func laneOf(h report.Host) lane {
	var hint strings.Builder
	fmt.Fprintf(&hint, "%s: began at %.2f s", h.Host, h.Start)
	for _, p := range report.Phases {
		if t, ok := h.Phases[p]; ok {
			fmt.Fprintf(&hint, ", %s %.2f", p, t)
		}
	}
	if h.Error != "" {
		hint.WriteString(", " + h.Error)
	}
	return lane{h.Host, hint.String(), h.Start, h.Phases, h.Error != ""}
}

// medianLane is many hosts in one lane.
func medianLane(hosts []report.Host, first int) lane {
	l := lane{hint: fmt.Sprintf("hosts %d to %d in the order in which they were ready: %s ... %s", first+1, first+len(hosts), hosts[0].Host, hosts[len(hosts)-1].Host), at: map[string]float64{}}
	of := func(f func(report.Host) (float64, bool)) (float64, bool) {
		var v []float64
		for _, h := range hosts {
			if t, ok := f(h); ok {
				v = append(v, t)
			}
		}
		if 2*len(v) < len(hosts) || len(v) == 0 {
			return 0, false
		}
		return costmodel.Quantile(v, 0.5), true
	}
	l.start, _ = of(func(h report.Host) (float64, bool) { return h.Start, true })
	for _, p := range report.Phases {
		if t, ok := of(func(h report.Host) (float64, bool) { t, ok := h.Phases[p]; return t, ok }); ok {
			l.at[p] = t
		}
	}
	return l
}

// lanes are the lanes of a report: the first many are small where there are too many hosts for labels.
func lanes(r *report.Report) (small, named []lane) {
	hosts := r.SlowestHosts(len(r.Hosts))
	slices.Reverse(hosts) // first ready first
	if len(hosts) <= ownLane {
		for _, h := range hosts {
			named = append(named, laneOf(h))
		}
		return nil, named
	}
	n := min(lanesMost, len(hosts))
	for i := range n {
		from, to := i*len(hosts)/n, (i+1)*len(hosts)/n
		small = append(small, medianLane(hosts[from:to], from))
	}
	slow := map[string]bool{}
	for _, s := range r.Slow[:min(slowOnes, len(r.Slow))] {
		slow[s.Host] = true
	}
	for i, h := range hosts {
		if slow[h.Host] || i >= len(hosts)-lastOnes {
			named = append(named, laneOf(h))
		}
	}
	return small, named
}

// timeline draws what hosts did when, as SVG. Its size does not grow with the hosts beyond a bound.
func timeline(r *report.Report) template.HTML {
	const left, width, right, smallRow, row = 170, 1100, 60, 3, 18
	small, named := lanes(r)
	end := r.Makespan
	for _, l := range slices.Concat(small, named) {
		for _, t := range l.at {
			end = max(end, t)
		}
	}
	end = max(end, 1e-3)
	x := func(t float64) float64 { return left + t/end*(width-left-right) }
	var s strings.Builder
	top := 48
	height := top + smallRow*len(small) + row*len(named) + 12
	if len(small) > 0 {
		height += 40
	}
	fmt.Fprintf(&s, `<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img" xmlns="http://www.w3.org/2000/svg">`, width, height, width, height)
	at := left
	for _, p := range timelineParts {
		fmt.Fprintf(&s, `<rect x="%d" y="4" width="12" height="12" fill="%s"/><text x="%d" y="15">%s</text>`, at, p.colour, at+17, html.EscapeString(p.what))
		at += 40 + 8*len(p.what)
	}
	fmt.Fprintf(&s, `<circle cx="%d" cy="10" r="4" class="bar"/><text x="%d" y="15">first exec</text>`, at+6, at+17)
	step := chart.Step(end / 8)
	for t := 0.0; t <= end*1.0001; t += step {
		fmt.Fprintf(&s, `<line class="grid" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/><text class="soft" x="%.1f" y="%d" text-anchor="middle">%.4g s</text>`, x(t), x(t), top-6, height-8, x(t), top-10, t)
	}
	draw := func(l lane, y, h int) {
		fmt.Fprintf(&s, `<g><title>%s</title>`, html.EscapeString(l.hint))
		from := l.start
		for _, p := range timelineParts {
			t, ok := l.at[p.until]
			if !ok || t <= from {
				continue
			}
			fmt.Fprintf(&s, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`, x(from), y, max(x(t)-x(from), 0.5), h, p.colour)
			from = t
		}
		if l.failed {
			fmt.Fprintf(&s, `<rect x="%.1f" y="%d" width="6" height="%d" fill="#b3472f"/>`, x(from), y, h)
		}
		if t, ok := l.at["first exec"]; ok && l.label != "" {
			fmt.Fprintf(&s, `<circle class="bar" cx="%.1f" cy="%.1f" r="4"/>`, x(t), float64(y)+float64(h)/2)
		}
		if l.label != "" {
			fmt.Fprintf(&s, `<text x="%d" y="%d" text-anchor="end">%s</text>`, left-8, y+h-1, html.EscapeString(fit(l.label, 23)))
		}
		s.WriteString(`</g>`)
	}
	y := top
	if len(small) > 0 {
		fmt.Fprintf(&s, `<text class="soft" x="%d" y="%d" text-anchor="end">%d hosts, the</text><text class="soft" x="%d" y="%d" text-anchor="end">first ready on top</text>`, left-8, y+12, len(r.Hosts), left-8, y+28)
		for _, l := range small {
			draw(l, y, smallRow)
			y += smallRow
		}
		y += 32
		fmt.Fprintf(&s, `<text class="soft" x="%d" y="%d">the slowest and the last, by name</text>`, left, y-8)
	}
	for _, l := range named {
		draw(l, y, row-5)
		y += row
	}
	fmt.Fprintf(&s, `<line class="whisker" x1="%.1f" x2="%.1f" y1="%d" y2="%d"><title>all ready as asked: %.2f s</title></line></svg>`, x(r.Makespan), x(r.Makespan), top-6, height-8, r.Makespan)
	return template.HTML(s.String()) //nolint:gosec // every text in it is escaped above
}
