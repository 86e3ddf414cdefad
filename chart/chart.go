// Package chart writes pages and charts as HTML and SVG that need nothing else: no script, no network, light and dark.
package chart

import (
	"fmt"
	"html"
	"html/template"
	"io"
	"math"
	"strings"
)

// Page writes a page of HTML: style and charts are in it.
func Page(w io.Writer, title string, body template.HTML) error {
	return pageTemplate.Execute(w, struct {
		Title string
		Body  template.HTML
	}{title, body})
}

// Alone is a chart as a file of its own.
func Alone(svg template.HTML) string {
	return strings.Replace(string(svg), ">", "><style>"+style+"svg { background: var(--paper) }</style>", 1)
}

var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{.Title}}</title>
<style>
` + style + `</style></head><body>
{{.Body}}
</body></html>
`))

// style is that of pages and charts, light or dark as the reader has it.
const style = `:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6; --paper: #fff; --bar: #2f6fb3; --bar2: #8db8e2; --mark: #b3472f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #39424f; --paper: #14181e; --bar: #5a9be0; --bar2: #2b4f78; --mark: #e08a6a } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto; max-width: 74em; padding: 0 1.2em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.1em; margin-top: 2em }
div.wide .note, .note { color: var(--soft) }
table { border-collapse: collapse; font-size: .92em } th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
div.wide { overflow-x: auto }
svg { max-width: 100%; height: auto; font: 13px system-ui, sans-serif } svg text { fill: var(--ink) } svg .soft { fill: var(--soft) } svg .grid { stroke: var(--line) }
svg .bar { fill: var(--bar) } svg polyline { fill: none; stroke-width: 2 } svg .bar2 { fill: var(--bar2) } svg .whisker { stroke: var(--mark); stroke-width: 2 }
`

// A Bar is one line of a bar chart: a value, a further one beyond it, and an interval.
type Bar struct {
	Label      string
	Value      float64
	Further    float64 // 0: none
	Low, High  float64
	Text, Hint string
}

// Bars draws bars on a logarithmic scale from the unit's floor on, as SVG.
func Bars(bars []Bar, floor float64, tick func(float64) string) template.HTML {
	const left, width, row, top, right = 330, 1100, 30, 26, 190
	most := floor * 10
	for _, b := range bars {
		most = max(most, b.High, b.Value, b.Further)
	}
	decades := math.Ceil(math.Log10(most/floor) - 1e-9)
	x := func(v float64) float64 {
		if v <= floor {
			return left
		}
		return left + math.Log10(v/floor)/decades*(width-left-right)
	}
	height := top + row*len(bars) + 8
	var s strings.Builder
	fmt.Fprintf(&s, `<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img" xmlns="http://www.w3.org/2000/svg">`, width, height, width, height)
	for d := 0.0; d <= decades; d++ {
		v := floor * math.Pow(10, d)
		fmt.Fprintf(&s, `<line class="grid" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/><text class="soft" x="%.1f" y="16" text-anchor="middle">%s</text>`,
			x(v), x(v), top-4, height, x(v), html.EscapeString(tick(v)))
	}
	for i, b := range bars {
		y := top + row*i
		fmt.Fprintf(&s, `<g><title>%s</title><text x="%d" y="%d" text-anchor="end">%s</text>`, html.EscapeString(b.Hint), left-10, y+19, html.EscapeString(b.Label))
		if b.Further > b.Value {
			fmt.Fprintf(&s, `<rect class="bar2" x="%d" y="%d" width="%.1f" height="16" rx="2"/>`, left, y+6, x(b.Further)-left)
		}
		fmt.Fprintf(&s, `<rect class="bar" x="%d" y="%d" width="%.1f" height="16" rx="2"/>`, left, y+6, max(x(b.Value)-left, 1))
		end := max(x(b.Value), x(b.Further))
		if b.High > b.Low {
			fmt.Fprintf(&s, `<line class="whisker" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/>`, x(b.Low), x(b.High), y+14, y+14)
			for _, v := range []float64{b.Low, b.High} {
				fmt.Fprintf(&s, `<line class="whisker" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/>`, x(v), x(v), y+9, y+19)
			}
			end = max(end, x(b.High))
		}
		fmt.Fprintf(&s, `<text x="%.1f" y="%d">%s</text></g>`, end+8, y+19, html.EscapeString(b.Text))
	}
	s.WriteString(`</svg>`)
	return template.HTML(s.String()) //nolint:gosec // every text in it is escaped above
}
