package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
)

func TestHistory(t *testing.T) {
	h := &history{dir: filepath.Join(t.TempDir(), "history")}
	at := func(id string, second int64, took time.Duration) control.Record {
		return control.Record{ID: id, Job: id, Began: time.Unix(second, 0), State: control.HostState{Took: took}}
	}
	for i := range int64(maxHistory + 20) {
		if err := h.save(at(fmt.Sprint("job/", i%7), 1000+i, time.Duration(i))); err != nil {
			t.Fatal(err)
		}
	}
	all := h.all(func(control.Record) bool { return true })
	if len(all) != maxHistory || all[0].Began.Unix() != 1020 || all[len(all)-1].Began.Unix() != 1000+maxHistory+19 {
		t.Fatalf("%d records, from %v", len(all), all[0].Began)
	}
	if r, err := h.find("job/3"); err != nil || r.ID != "job/3" || r.State.Took < maxHistory {
		t.Errorf("newest of a stage: %+v, %v", r, err)
	}
	if _, err := h.find("other"); err == nil {
		t.Error("found what is not there")
	}
	// A record that is written again takes the place of what was written before.
	if err := h.save(at("job/0", 5000, 1)); err != nil {
		t.Fatal(err)
	}
	if err := h.change("job/0", func(r *control.Record) error { r.State.Took = 2; return nil }); err != nil {
		t.Fatal(err)
	}
	if r, err := h.find("job/0"); err != nil || r.State.Took != 2 || len(h.files()) != maxHistory {
		t.Errorf("%+v, %v, %d files", r, err, len(h.files()))
	}
	// One that is damaged is as good as none.
	if err := os.WriteFile(filepath.Join(h.dir, h.files()[0]), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all := h.all(func(control.Record) bool { return true }); len(all) != maxHistory-1 {
		t.Errorf("%d records beside a damaged one", len(all))
	}
}

func TestAlign(t *testing.T) {
	here := time.Unix(1_000_000, 0)
	// A host whose clock is 5 s ahead now and was 2 s behind when the stage began, an hour ago.
	s := sample{reading{Wall: here.Add(5 * time.Second), Boot: "a", Up: 10 * time.Hour}, here, time.Millisecond}
	r := control.Record{Began: here.Add(-time.Hour - 2*time.Second), Boot: "a", Up: 9 * time.Hour}
	began, bound := s.align(r)
	if !began.Equal(here.Add(-time.Hour)) || bound != time.Millisecond+72*time.Millisecond {
		t.Errorf("%v ± %v", began, bound)
	}
	// It was started anew since: its own clock is all there is.
	r.Boot, r.Began = "b", here.Add(-time.Hour+5*time.Second)
	if began, bound = s.align(r); !began.Equal(here.Add(-time.Hour)) || bound >= 0 {
		t.Errorf("%v ± %v", began, bound)
	}
}
