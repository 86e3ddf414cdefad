package chart

import (
	"fmt"
	"html"
	"html/template"
	"math"
	"slices"
	"strings"
)

// A Series is one line of a chart, or points without a line.
type Series struct {
	Name   string
	Points [][2]float64
	Dashed bool // what is no measurement
	Dots   bool // points alone
}

// Axes say how a chart of lines is drawn.
type Axes struct {
	X, Y       string               // labels
	LogX, LogY bool                 // powers of the values' own range
	TickX      func(float64) string // nil: three digits
	TickY      func(float64) string // nil: three digits
	MarkX      []float64            // where ticks of x are; nil: chosen
	Hint       func(Series) string  // what a line says when pointed at; nil: its name
}

// colours tell lines apart, also for those who see red and green alike (Okabe and Ito).
var colours = []string{"#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8d00", "#7f7f7f", "#5b3a8e", "#a6761d"}

// Lines draws series over common axes, with a legend, as SVG.
func Lines(a Axes, all []Series) template.HTML {
	const left, width, right, top, height, bottom = 80, 1100, 400, 14, 420, 50
	tickX, tickY := orDigits(a.TickX), orDigits(a.TickY)
	loX, hiX := span(all, 0, a.LogX)
	loY, hiY := span(all, 1, a.LogY)
	x := scale(loX, hiX, left, width-right, a.LogX)
	y := scale(loY, hiY, height-bottom, top, a.LogY)
	var s strings.Builder
	fmt.Fprintf(&s, `<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img" xmlns="http://www.w3.org/2000/svg">`, width, height, width, height)
	marks := a.MarkX
	if marks == nil {
		marks = ticks(loX, hiX, a.LogX)
	}
	for _, v := range marks {
		fmt.Fprintf(&s, `<line class="grid" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/><text class="soft" x="%.1f" y="%d" text-anchor="middle">%s</text>`,
			x(v), x(v), top, height-bottom, x(v), height-bottom+18, html.EscapeString(tickX(v)))
	}
	for _, v := range ticks(loY, hiY, a.LogY) {
		fmt.Fprintf(&s, `<line class="grid" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/><text class="soft" x="%d" y="%.1f" text-anchor="end">%s</text>`,
			left, width-right, y(v), y(v), left-8, y(v)+4, html.EscapeString(tickY(v)))
	}
	fmt.Fprintf(&s, `<text x="%d" y="%d" text-anchor="middle">%s</text><text transform="translate(16 %d) rotate(-90)" text-anchor="middle">%s</text>`,
		(left+width-right)/2, height-8, html.EscapeString(a.X), (top+height-bottom)/2, html.EscapeString(a.Y))
	for i, line := range all {
		colour, hint, dash := colours[i%len(colours)], line.Name, ""
		if a.Hint != nil {
			hint = a.Hint(line)
		}
		if line.Dashed {
			dash = ` stroke-dasharray="6 4"`
		}
		fmt.Fprintf(&s, `<g><title>%s</title>`, html.EscapeString(hint))
		if !line.Dots {
			var at []string
			for _, p := range line.Points {
				at = append(at, fmt.Sprintf("%.1f,%.1f", x(p[0]), y(p[1])))
			}
			fmt.Fprintf(&s, `<polyline points="%s" stroke="%s"%s/>`, strings.Join(at, " "), colour, dash)
		}
		if !line.Dashed {
			for _, p := range line.Points {
				fmt.Fprintf(&s, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`, x(p[0]), y(p[1]), colour)
			}
		}
		ly := top + 12 + 20*i
		fmt.Fprintf(&s, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="%s" stroke-width="3"%s/><text x="%d" y="%d">%s</text></g>`,
			width-right+16, width-right+40, ly, ly, colour, dash, width-right+48, ly+4, html.EscapeString(line.Name))
	}
	s.WriteString(`</svg>`)
	return template.HTML(s.String()) //nolint:gosec // every text in it is escaped above
}

func orDigits(f func(float64) string) func(float64) string {
	if f == nil {
		return func(v float64) string {
			if math.Abs(v) >= 100 {
				return fmt.Sprintf("%.0f", v)
			}
			return fmt.Sprintf("%.3g", v)
		}
	}
	return f
}

// span is the range of one coordinate, with room. A linear one begins at 0.
func span(all []Series, axis int, log bool) (lo, hi float64) {
	lo, hi = math.Inf(1), math.Inf(-1)
	for _, s := range all {
		for _, p := range s.Points {
			if v := p[axis]; !log || v > 0 {
				lo, hi = min(lo, v), max(hi, v)
			}
		}
	}
	switch {
	case lo > hi:
		return 1, 10
	case log:
		return lo / 1.15, hi * 1.15
	}
	return min(lo, 0), max(hi*1.05, 1e-9)
}

func scale(lo, hi, from, to float64, log bool) func(float64) float64 {
	if log {
		return func(v float64) float64 {
			return from + math.Log(max(v, lo)/lo)/math.Log(hi/lo)*(to-from)
		}
	}
	return func(v float64) float64 { return from + (v-lo)/(hi-lo)*(to-from) }
}

// ticks are round numbers of a range.
func ticks(lo, hi float64, log bool) (list []float64) {
	if !log {
		step := Step((hi - lo) / 6)
		for v := math.Ceil(lo/step) * step; v <= hi; v += step {
			list = append(list, v)
		}
		return list
	}
	for _, factors := range [][]float64{{1}, {1, 3}, {1, 2, 5}, {1, 1.5, 2, 3, 5, 7}} {
		list = list[:0]
		for d := math.Floor(math.Log10(lo)); d <= math.Ceil(math.Log10(hi)); d++ {
			for _, f := range factors {
				if v := f * math.Pow(10, d); v >= lo && v <= hi {
					list = append(list, v)
				}
			}
		}
		if len(list) >= 4 {
			break
		}
	}
	slices.Sort(list)
	return list
}

// Step is 1, 2 or 5 times a power of ten, at least v.
func Step(v float64) float64 {
	p := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 5} {
		if f*p >= v {
			return f * p
		}
	}
	return 10 * p
}
