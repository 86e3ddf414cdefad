package main

import (
	"fmt"
	"html"
	"html/template"
	"io"
	"math"
	"strings"

	"github.com/muster-hpc/muster/chart"
	"github.com/muster-hpc/muster/costmodel"
)

// similarityPage is similarities as one HTML file with heat maps.
func similarityPage(w io.Writer, all []similarity) error {
	var body strings.Builder
	if err := similarityBody.Execute(&body, all); err != nil {
		return err
	}
	return chart.Page(w, "muster similarity", template.HTML(body.String())) //nolint:gosec // made by a template
}

var similarityBody = template.Must(template.New("similarity").Funcs(template.FuncMap{
	"bytes": func(v float64) string { return megabytes(int64(v)) }, "took": took,
	"percent": func(v float64) string { return fmt.Sprintf("%.1f %%", 100*v) },
	"three":   func(v float64) string { return fmt.Sprintf("%.3f", v) },
	"map":     func(s similarity) template.HTML { return template.HTML(heatMap(s.Similarity, true)) }, //nolint:gosec // heatMap escapes
	"rate":    func() string { return fmt.Sprintf("%.1f MB/s", costmodel.StudyRate.Mid/1e6) },
}).Parse(`<h1>What images share</h1>
<div class="wide"><table><tr><th>set</th><th>images</th><th>layers</th><th>unique</th><th>unique pulls</th><th>bytes</th><th>unique bytes</th><th>share</th><th>mean Jaccard</th><th>off-diagonal</th><th>by bytes</th></tr>
{{range .}}<tr><td>{{or .Set "these"}}</td><td class="n">{{len .Images}}</td><td class="n">{{.Layers}}</td><td class="n">{{.Unique}}</td><td class="n">{{percent .UniquePulls}}</td><td class="n">{{bytes .Bytes}}</td><td class="n">{{bytes .UniqueBytes}}</td><td class="n">{{three .UniqueShare}}</td><td class="n">{{three .Mean}}</td><td class="n">{{three .OffDiagonal}}</td><td class="n">{{three .MeanBytes}}</td></tr>
{{end}}</table></div>
{{range .}}<h2>{{or .Set "Heat map"}}</h2>
<p class="note">Jaccard index of the layers of each two images: 1 is the same layers, 0 none in common. Alike images are next to each other.</p>
{{map .}}
{{with .Savings}}<p>{{.Jobs}} jobs pull {{bytes .Bytes}} per host; {{bytes .Worst}} if no two shared a layer; with a common base {{bytes .WithBase}}, which saves {{bytes .Saved}} ({{percent .SavedShare}}), {{took .Seconds.Mid}} per host at {{rate}}.</p>{{end}}
{{end}}`))

// similaritySVG is a heat map as a file of its own.
func similaritySVG(w io.Writer, s similarity) error {
	_, err := io.WriteString(w, `<?xml version="1.0" encoding="UTF-8"?>`+"\n"+heatMap(s.Similarity, false)+"\n")
	return err
}

// heatMap draws the matrix in the clustering's order. Within a page the text takes the page's colours.
func heatMap(s costmodel.Similarity, inPage bool) string {
	const longest = 46
	n := len(s.Order)
	cell := max(4, min(26, 900/max(n, 1)))
	named := cell >= 10
	left, top := 10, 10
	if named {
		widest := 0
		for _, name := range s.Images {
			widest = max(widest, min(len(name), longest))
		}
		left, top = 20+widest*7, 20+widest*5
	}
	right := 80
	if named {
		right = max(80, top) // the last slanted name
	}
	width, height := left+n*cell+right, top+n*cell+10
	name := func(i int) string {
		v := s.Images[i]
		if len(v) > longest {
			v = "…" + v[len(v)-longest+1:]
		}
		return html.EscapeString(strings.ToValidUTF8(v, "?"))
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img" xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="%d">`, width, height, width, height, max(9, min(13, cell-2)))
	if !inPage {
		fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`, width, height)
	}
	for row, i := range s.Order {
		y := top + row*cell
		if named {
			fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%s</text>`, left-6, float64(y)+float64(cell)*0.7, name(i))
			fmt.Fprintf(&b, `<text transform="translate(%.1f %d) rotate(-45)">%s</text>`, float64(left)+(float64(row)+0.7)*float64(cell), top-6, name(i))
		}
		for col, j := range s.Order {
			v := s.Matrix[i][j]
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"><title>%s / %s: %.3f by layers, %.3f by bytes</title></rect>`,
				left+col*cell, y, cell, cell, heat(v), name(i), name(j), v, s.MatrixBytes[i][j])
		}
	}
	// The scale.
	x := left + n*cell + 16
	for k := range 10 {
		v := 1 - float64(k)/9
		y := top + k*12
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="14" height="12" fill="%s"/>`, x, y, heat(v))
		if k%3 == 0 {
			fmt.Fprintf(&b, `<text x="%d" y="%d" font-size="11">%.1f</text>`, x+20, y+10, v)
		}
	}
	b.WriteString(`</svg>`)
	return b.String()
}

// heat is the colour of a similarity: from near white over green to dark blue, even in lightness.
func heat(v float64) string {
	stops := [][3]float64{{247, 250, 240}, {168, 221, 181}, {67, 162, 202}, {8, 64, 129}}
	at := max(0, min(1, v)) * float64(len(stops)-1)
	i := min(int(at), len(stops)-2)
	f := at - float64(i)
	c := [3]int{}
	for k := range c {
		c[k] = int(math.Round(stops[i][k]*(1-f) + stops[i+1][k]*f))
	}
	return fmt.Sprintf("#%02x%02x%02x", c[0], c[1], c[2])
}
