package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/muster-hpc/muster/costmodel"
)

func printEstimate(w io.Writer, e *estimation) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintf(w, "%d hosts, %d pulls one after another\n\n", e.Hosts, len(e.Images))
	fmt.Fprintln(tw, "IMAGE\tSIZE\tLAYERS\tNEW TO THE HOSTS\tIN LAYERS")
	for i, s := range e.Images {
		if i == 12 && len(e.Images) > 14 {
			fmt.Fprintf(tw, "and %d more\n", len(e.Images)-i)
			break
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%s\t%d\n", s.Image, carried(s.Bytes), s.Layers, carried(s.NewBytes), s.NewLayer)
	}
	_ = tw.Flush()
	fmt.Fprintln(w)
	fmt.Fprintln(tw, "STRATEGY\tMEDIAN HOST\tSLOWEST HOST\tINTERVAL\tMOST BY\tNODE-HOURS\tCOST\tINTERVAL\tFROM REGISTRY\tCOST")
	for _, o := range e.Strategies {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s to %s\t%s\t%s\t%s\t%s to %s\t%s\t%s\n", o.Label, took(o.Median.Mid), took(o.Slowest.Mid), took(o.Slowest.Low), took(o.Slowest.High),
			o.Slowest.Main, figure(o.NodeHours.Mid), dollars(o.Cost.Mid), dollars(o.Cost.Low), dollars(o.Cost.High), carried(o.Egress.Mid), dollars(o.EgressCost.Mid))
	}
	_ = tw.Flush()
	fmt.Fprintln(w, "\nA job starts when its last host does: all hosts wait for the slowest. Done before, and not counted:")
	for _, o := range e.Strategies {
		if o.Preparation != "" {
			fmt.Fprintf(w, "  %s: %s\n", o.Label, o.Preparation)
		}
	}
	printSharing(w, e.Sharing)
	fmt.Fprintln(w)
	fmt.Fprintln(tw, "PARAMETER\tLOW\tMIDDLE\tHIGH\tUNIT\tORIGIN\tWHAT AND WHERE FROM")
	for _, p := range e.Parameters {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, amount(p.Low, p.Unit), amount(p.Mid, p.Unit), amount(p.High, p.Unit), shownUnit(p.Unit), p.Origin, p.Note)
	}
	_ = tw.Flush()
}

func printSharing(w io.Writer, s costmodel.Sharing) {
	if s.Images < 2 {
		return
	}
	fmt.Fprintf(w, "\nSharing of layers between the %d pulls: %s per host, %s if nothing were shared, %s at best.\n",
		s.Images, megabytes(int64(s.Shared)), megabytes(int64(s.Unshared)), megabytes(int64(s.Best)))
	fmt.Fprintf(w, "It saves %.1f to %.1f s and %s to %s at the rate given (all hosts: %s per hour); %.1f s and %s at the study's median of %.1f MB/s.\n",
		s.SavedGiven.Low, s.SavedGiven.High, cents(s.SavedCost.Low), cents(s.SavedCost.High), cents(s.HourlyPrice), s.SavedStudy, cents(s.StudyCost), s.StudyRate/1e6)
}

// carried writes bytes for people; nothing is 0.
func carried(bytes float64) string {
	if bytes < 1 {
		return "0"
	}
	return megabytes(int64(bytes))
}

// took writes seconds for people.
func took(s float64) string {
	switch {
	case s >= 100*3600:
		return fmt.Sprintf("%.0f h", s/3600)
	case s >= 120:
		return time.Duration(s * float64(time.Second)).Round(time.Second).String()
	case s >= 10:
		return fmt.Sprintf("%.0f s", s)
	}
	return fmt.Sprintf("%.1f s", s)
}

// figure writes a number with three digits that count.
func figure(v float64) string {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return fmt.Sprint(v)
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	return thousands(fmt.Sprintf("%.*f", min(digits, 4), v))
}

// cents writes dollars to the cent.
func cents(v float64) string { return "$" + thousands(fmt.Sprintf("%.2f", v)) }

func dollars(v float64) string {
	if v >= 1000 {
		return "$" + thousands(fmt.Sprintf("%.0f", v))
	}
	return cents(v)
}

// thousands puts commas into a decimal number.
func thousands(s string) string {
	whole, rest, has := strings.Cut(s, ".")
	for i := len(whole) - 3; i > 0 && whole[i-1] != '-'; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if has {
		whole += "." + rest
	}
	return whole
}

// amount writes a parameter's value in the unit that shownUnit names.
func amount(v float64, unit string) string {
	if unit == "B/s" {
		v /= 1e6
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}

func shownUnit(unit string) string {
	if unit == "B/s" {
		return "MB/s"
	}
	return unit
}
