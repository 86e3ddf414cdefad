package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/report"
)

// madeReport is a report of n hosts, some of them slow, one failed.
func madeReport(t *testing.T, n int) *report.Report {
	t.Helper()
	stage := control.Record{ID: "job<&>/1", Job: "job<&>", Image: "registry/app:1", Asked: control.Complete, Layers: 3}
	var all []control.HostRecords
	for i := range n {
		name := fmt.Sprintf("node%04d", i)
		stage.Hosts = append(stage.Hosts, name)
		took := 10 + float64(i%17)/20
		if i%97 == 3 {
			took *= 1.5
		}
		at := func(name string, share float64) control.Phase {
			d := time.Duration(share * took * 1e9)
			return control.Phase{Name: name, Start: d, End: d}
		}
		s := control.HostState{Host: name, Phase: control.PhaseDone, Total: 1e8, Took: time.Duration(took * 1e9), Phases: []control.Phase{
			at(control.PointResolved, 0.02), at(control.PointFirstByte, 0.05), at(control.PointIndexed, 0.2), at("ready mounted", 0.3), at("ready warm", 0.5),
			at("ready complete", 1), at(control.PointFirstExec, 0.45),
		}, Bytes: control.Sources{Peer: 1e8}}
		if i == n-1 && n > 2 {
			s.Phase, s.Error = control.PhaseFailed, "no <space>"
		}
		all = append(all, control.HostRecords{Host: name, Records: []control.Record{{ID: stage.ID, Began: time.Unix(1e9, int64(i)*4e6), State: s}}})
	}
	r, err := report.Of(stage, all, 2.88)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// The page is well-formed, names who was slow, and does not grow with the hosts beyond a bound.
func TestReportPage(t *testing.T) {
	for _, n := range []int{1, 4, 61, 4000} {
		var b bytes.Buffer
		if err := reportPage(&b, []*report.Report{madeReport(t, n)}); err != nil {
			t.Fatal(err)
		}
		if keep := os.Getenv("MUSTER_PAGES"); keep != "" {
			if err := os.WriteFile(fmt.Sprintf("%s/report-%d.html", keep, n), b.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		svg := b.String()
		svg = svg[strings.Index(svg, "<svg") : strings.Index(svg, "</svg>")+6]
		for d := xml.NewDecoder(strings.NewReader(svg)); ; {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%d hosts: %v", n, err)
			}
		}
		if b.Len() > 300_000 || strings.Contains(b.String(), "job<&>") || strings.Contains(b.String(), "<space>") {
			t.Errorf("%d hosts: page of %d bytes", n, b.Len())
		}
		for _, s := range madeReport(t, n).Slow[:min(slowOnes, len(madeReport(t, n).Slow))] {
			if !strings.Contains(svg, s.Host) {
				t.Errorf("%d hosts: %s, which was slow, is not named", n, s.Host)
			}
		}
	}
}

// Wrong flags are told of in one line, before any agent is asked.
func TestReportErrors(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for want, args := range map[string][]string{
		"instance type": {"job", "--instance", "abacus"},
		"one is enough": {"job", "--instance", "hpc6a.48xlarge", "--price", "1"},
		"--price":       {"job", "--price", "cheap"},
		"more than 0":   {"job", "--price", "0"},
		"0 to 50":       {"job", "--earlier", "51"},
		"no job":        {"--csv", "x"},
	} {
		oneLineError(t, want, append([]string{"report", "--agent-socket", none}, args...)...)
	}
	if _, errs, code := inProcess(t, "report", "job", "--agent-socket", none); code != exitNoAgent {
		t.Errorf("without an agent: code %d, %s", code, errs)
	}
}

func TestReportText(t *testing.T) {
	for _, n := range []int{1, 4, 4000} {
		var b bytes.Buffer
		printRecords(&b, madeReport(t, n), false)
		lines := strings.Count(b.String(), "\n")
		if n == 4000 && (lines > 120 || !strings.Contains(b.String(), "The 24 hosts that took longest, of 4000")) || !strings.Contains(b.String(), "node-seconds") {
			t.Errorf("%d hosts: %d lines\n%s", n, lines, b.String())
		}
		t.Logf("%s", b.String())
	}
}
