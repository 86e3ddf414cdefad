// Package report prints what a benchmark measured and keeps it: one table for people, and one file
// build/bench/NAME.json for scripts, a list of {"name", "value", "unit", "target", "met"}.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
)

// A Row is one measured figure.
type Row struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`
	Target string  `json:"target"` // in words, "" when the figure is only information
	Met    *bool   `json:"met"`    // nil when there is no target
}

// Figure is a row without a target.
func Figure(name string, value float64, unit string) Row {
	return Row{Name: name, Value: round(value), Unit: unit}
}

// AtMost is a row whose value should not exceed limit.
func AtMost(name string, value float64, unit string, limit float64) Row {
	met := value <= limit
	return Row{name, round(value), unit, fmt.Sprintf("<= %.4g", limit), &met}
}

// AtLeast is a row whose value should reach limit.
func AtLeast(name string, value float64, unit string, limit float64) Row {
	met := value >= limit
	return Row{name, round(value), unit, fmt.Sprintf(">= %.4g", limit), &met}
}

// Median is the middle of v, or the mean of the two middle ones; NaN for none.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// Spread is the largest of v divided by the smallest: how noisy the machine was. 1 for none.
func Spread(v []float64) float64 {
	if len(v) == 0 || slices.Min(v) <= 0 {
		return 1
	}
	return slices.Max(v) / slices.Min(v)
}

// Write prints rows to w and writes them to build/bench/NAME.json beneath the working directory,
// which the Makefile makes the top of the checkout. It returns how many targets were missed.
func Write(w io.Writer, name string, rows []Row) (missed int, err error) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "%s\tvalue\tunit\ttarget\tmet\n", name)
	for _, r := range rows {
		met := ""
		if r.Met != nil {
			met = map[bool]string{true: "yes", false: "NO"}[*r.Met]
			if !*r.Met {
				missed++
			}
		}
		fmt.Fprintf(tw, "%s\t%.4g\t%s\t%s\t%s\n", r.Name, r.Value, r.Unit, r.Target, met)
	}
	if err := tw.Flush(); err != nil {
		return missed, err
	}
	dir := filepath.Join("build", "bench")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return missed, err
	}
	b, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return missed, err
	}
	return missed, os.WriteFile(filepath.Join(dir, name+".json"), append(b, '\n'), 0o644)
}

// Read gives the rows that Write has kept under a name.
func Read(name string) (rows []Row, err error) {
	b, err := os.ReadFile(filepath.Join("build", "bench", name+".json"))
	if err != nil {
		return nil, err
	}
	return rows, json.Unmarshal(b, &rows)
}

// round keeps five significant digits: more would promise a precision that was not measured.
func round(v float64) float64 {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	scale := math.Pow(10, 4-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}
