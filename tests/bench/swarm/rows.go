package main

import (
	"fmt"
	"strings"

	"github.com/muster-hpc/muster/tests/bench/report"
)

// rows judges the medians.
func (b *bench) rows() (rows []report.Row) {
	for _, row := range b.order {
		unit, v := "s", b.median(row)
		for suffix, u := range map[string]string{
			"/ image": "images", "/ median": "", "requests": "", "per GB": "CPU s", "busy": "%", "memory": "MB",
		} {
			if strings.HasSuffix(row, suffix) {
				unit = u
			}
		}
		switch {
		case strings.HasSuffix(row, "origin bytes / image") && !strings.Contains(row, "peers") && !strings.Contains(row, "squashfs") && !strings.Contains(row, "fault"):
			rows = append(rows, report.AtMost(row, v, unit, originMost))
		case strings.HasSuffix(row, "slowest / median"):
			rows = append(rows, report.AtMost(row, v, unit, slowest))
		case strings.HasSuffix(row, "passing on, CPU per GB"):
			rows = append(rows, report.AtMost(row, v, unit, cpuMost))
		case strings.HasSuffix(row, "busy"):
			rows = append(rows, report.AtMost(row, v, unit, busyMost))
		default:
			rows = append(rows, report.Figure(row, v, unit))
		}
	}
	for _, n := range b.allSizes() {
		rows = append(rows, b.judge(n)...)
	}
	return append(rows, b.judgeFaults()...)
}

func (b *bench) judge(n int) (rows []report.Row) {
	if complete := key(n, "complete"); b.has(complete) {
		rows = append(rows, report.Figure(key(n, "fluid limit"), b.fluid(n), "s"))
		name, ratio := key(n, "complete / fluid limit"), b.median(complete)/b.fluid(n)
		switch {
		case n == 8:
			rows = append(rows, report.AtMost(name, ratio, "", atEight))
		case n == 16:
			rows = append(rows, report.AtMost(name, ratio, "", atSixteen))
		default:
			rows = append(rows, report.Figure(name, ratio, ""))
		}
		// About one request for 8 MiB; the last run of each layer is shorter, and there are manifest, config and questions for indexes.
		rows = append(rows, report.AtMost(key(n, "requests per 8 MiB"), b.median(key(n, "complete origin requests"))/(float64(b.size)/(8<<20)), "", 1.5))
		for _, other := range []string{"without peers", "tree of whole layers"} {
			if b.has(key(n, other)) {
				rows = append(rows, report.Figure(key(n, other+" / complete"), b.median(key(n, other))/b.median(complete), ""))
			}
		}
	}
	if warm := key(n, "warm"); b.has(warm) {
		rows = append(rows, report.AtMost(key(n, "warm / complete"), b.median(warm)/b.median(key(n, "complete after warm")), "", warmMost))
		if squash := key(n, "squashfs first output"); b.has(squash) {
			name, v := key(n, "first output / squashfs"), b.median(key(n, "first output"))/b.median(squash)
			if n >= 4 {
				rows = append(rows, report.AtMost(name, v, "", 1))
			} else {
				rows = append(rows, report.Figure(name, v, ""))
			}
		}
	}
	return rows
}

func (b *bench) judgeFaults() (rows []report.Row) {
	n := b.faultHosts
	none := key(n, "fault none: others")
	if !b.has(none) {
		return nil
	}
	for _, f := range []string{"slow", "late", "absent"} {
		rows = append(rows,
			report.AtMost(key(n, fmt.Sprintf("fault %s: others / without", f)), b.median(key(n, "fault "+f+": others"))/b.median(none), "", faultMost),
			report.AtMost(key(n, fmt.Sprintf("fault %s: waited for it", f)), b.median(key(n, "fault "+f+": waited")), "s", waitMost))
	}
	return append(rows, report.AtMost(key(n, "fault killed: others - without"), b.median(key(n, "fault killed: others"))-b.median(none), "s", killMost))
}
