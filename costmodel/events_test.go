package costmodel

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
)

const header = "run_id,experiment,strategy,image,content,total_bytes,new_bytes,unpacked_bytes,layers,cluster_nodes,nodes_observed,instance_type,node,iteration,start_s,pull_s,wait_s,pods_on_node,suspect_cached,clock\n"

func TestReadEvents(t *testing.T) {
	events := studyEvents(t)
	if len(events) != 7457 {
		t.Fatalf("%d events", len(events))
	}
	if n := len(Usable(events)); n != 7384 {
		t.Errorf("%d usable events: 73 are suspect", n)
	}
	var b bytes.Buffer
	if err := WriteEvents(&b, events); err != nil {
		t.Fatal(err)
	}
	back, err := ReadEvents(&b)
	if err != nil {
		t.Fatal(err)
	}
	for i := range events {
		if events[i] != back[i] {
			t.Fatalf("event %d was %+v, is %+v", i, events[i], back[i])
		}
	}
}

func TestBadEvents(t *testing.T) {
	line := "r1,e,s,i:t,app,500000000,500000000,,4,16,16,x,1,0,0.0,20.5,0,1,0,ns\n"
	replaced := func(old, new string) string { return header + strings.Replace(line, old, new, 1) }
	if _, err := ReadEvents(strings.NewReader(header + line)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ text, says string }{
		"empty":             {"", "must name the columns"},
		"header only":       {header, "no line of data"},
		"missing column":    {strings.Replace(header, "pull_s", "pull_ms", 1) + line, "column pull_s missing"},
		"twice":             {strings.Replace(header, "wait_s", "pull_s", 1) + line, "twice"},
		"no number":         {replaced("20.5", "fast"), "pull_s"},
		"NaN":               {replaced("20.5", "NaN"), "pull_s"},
		"infinite":          {replaced("20.5", "Inf"), "pull_s"},
		"negative":          {replaced("20.5", "-3"), "pull_s"},
		"milliseconds":      {replaced("20.5", "20500"), "seconds"},
		"more than a day":   {replaced("20.5", "20500000"), "seconds"},
		"megabytes":         {header + "r1,e,s,i:t,app,500,500,,4,16,16,x,1,0,0.0,20.5,0,1,0,ns\n", "bytes"},
		"more new than all": {replaced("500000000,500000000", "500000000,600000000"), "new_bytes"},
		"content":           {replaced("app", "game"), "app or zeros"},
		"zero hosts":        {replaced(",16,16,", ",0,16,"), "cluster_nodes"},
		"no run":            {replaced("r1", ""), "run_id"},
		"suspect":           {replaced(",1,0,ns", ",1,perhaps,ns"), "suspect_cached"},
		"short line":        {header + "r1,e\n", "line 2"},
		"no CSV":            {header + "\"r1,e\n", "line"},
	} {
		_, err := ReadEvents(strings.NewReader(c.text))
		if !errors.Is(err, ErrEvents) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; it should be one line that says %q", name, err, c.says)
		}
	}
	two := header + line + strings.Replace(line, "i:t", "other:t", 1)
	events, err := ReadEvents(strings.NewReader(two))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Fit(events, ""); !errors.Is(err, ErrEvents) {
		t.Errorf("a run of two images: %v", err)
	}
	if _, err := Fit(events[:1], ""); !errors.Is(err, ErrEvents) {
		t.Errorf("one run: %v", err)
	}
}

// FuzzReadEvents: whatever is read is within bounds, can be written and read again, and fitting and scoring it never
// panics nor gives what is no number.
func FuzzReadEvents(f *testing.F) {
	b, err := os.ReadFile("testdata/pull_events.csv")
	if err != nil {
		f.Fatal(err)
	}
	lines := strings.SplitAfter(string(b), "\n")
	f.Add([]byte(strings.Join(lines[:20], "")))
	f.Add([]byte(lines[0] + strings.Join(lines[4000:4040], "")))
	f.Add([]byte(lines[0] + "r1,e,muster-lazy,i,zeros,20000000,0,5,,1,,x,1,,0,0.06,,,,\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		events, err := ReadEvents(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrEvents) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		var out bytes.Buffer
		if err := WriteEvents(&out, events); err != nil {
			t.Fatal(err)
		}
		back, err := ReadEvents(&out)
		if err != nil || len(back) != len(events) {
			t.Fatalf("written and read again: %d events, %v", len(back), err)
		}
		m, err := Fit(events, "fuzz")
		if err != nil {
			return
		}
		out.Reset()
		if err := WriteModel(&out, m); err != nil {
			t.Fatal(err)
		}
		if m, err = ReadModel(&out); err != nil {
			t.Fatalf("a fitted model cannot be read: %v", err)
		}
		s, err := Evaluate(m, events)
		if err != nil || !(s.All.MdAPE >= 0) || !(s.Makespan.P90 >= 0) {
			t.Fatalf("%+v, %v", s, err)
		}
	})
}
