package chart

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
)

// wellFormed fails the test unless s is XML.
func wellFormed(t *testing.T, s string) {
	t.Helper()
	for d := xml.NewDecoder(strings.NewReader(s)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("%v\n%s", err, s)
		}
	}
}

func TestLines(t *testing.T) {
	for _, a := range []Axes{{X: "x <1>", Y: "y"}, {LogX: true, LogY: true, MarkX: []float64{1, 100}}} {
		for _, s := range [][]Series{
			nil,
			{{Name: "one & only", Points: [][2]float64{{3, 5}}}},
			{{Name: "a", Points: [][2]float64{{1, 1}, {10, 1e6}}, Dashed: true}, {Name: "b", Points: [][2]float64{{0, 0}, {4, 2}}, Dots: true}},
		} {
			svg := Alone(Lines(a, s))
			wellFormed(t, svg)
			if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
				t.Errorf("%+v: %s", s, svg)
			}
		}
	}
}

func TestBars(t *testing.T) {
	svg := string(Bars([]Bar{{Label: "<a>", Value: 3, Further: 10, Low: 2, High: 20, Text: "3", Hint: "&"}, {Label: "b"}}, 1, func(float64) string { return "x" }))
	wellFormed(t, svg)
}

func TestStep(t *testing.T) {
	for v, want := range map[float64]float64{0.9: 1, 1: 1, 1.1: 2, 3: 5, 7: 10, 0.02: 0.02, 450: 500} {
		if got := Step(v); math.Abs(got/want-1) > 1e-9 {
			t.Errorf("%g: %g, want %g", v, got, want)
		}
	}
}
