package main

import (
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/tests/images"
)

// A study makes its images, pulls them by what there is, and goes on where it was.
func TestStudy(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	p := c.registry()
	file, out := filepath.Join(c.dir, "study.yaml"), filepath.Join(c.dir, "out")
	// As container-crafter has it, with sizes that are no whole numbers.
	if err := os.WriteFile(file, []byte("uri: "+p.Addr+"/study\nsizes:\n  - total: 300000.5\n  - total: 900000\nlayers:\n  - exact: 2\n  - exact: 5\niterations: 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"study", file, "-o", out, "--strategies", "muster-lazy", "--instance", "here", "--json"}
	var rows []studyRow
	if err := json.Unmarshal([]byte(c.ok(args...)), &rows); err != nil || len(rows) != 4 {
		t.Fatalf("%+v, %v", rows, err)
	}
	for _, r := range rows {
		if r.Pulls != 2 || r.Hosts != 1 || r.Median <= 0 || r.Slowest < r.Median {
			t.Errorf("%+v", r)
		}
		if want := 300_000.0; r.Bytes < want*0.9 || r.Bytes > 900_000*1.3 {
			t.Errorf("an image of %.0f bytes", r.Bytes)
		}
	}
	events, err := readEvents(filepath.Join(out, "events.csv"))
	if err != nil || len(events) != 8 {
		t.Fatalf("%d events, %v", len(events), err)
	}
	if e := events[0]; e.Layers != 2 || e.UnpackedBytes < 1.5*e.TotalBytes || e.UnpackedBytes > 5*e.TotalBytes || e.InstanceType != "here" || e.ClusterNodes != 1 {
		t.Errorf("%+v", e)
	}
	page, err := os.ReadFile(filepath.Join(out, "study.html"))
	if err != nil || strings.Count(string(page), "<svg") != 3 { // by size, by layers, what they share
		t.Errorf("%d charts, %v", strings.Count(string(page), "<svg"), err)
	}

	// The second half is lost: only that is measured again.
	half := events[:4]
	s := studying{file: filepath.Join(out, "events.csv"), events: half}
	if err := s.keep(); err != nil {
		t.Fatal(err)
	}
	c.ok(args...)
	again, err := readEvents(filepath.Join(out, "events.csv"))
	if err != nil || len(again) != 8 || again[3].Pull != events[3].Pull || again[6].Pull == events[6].Pull {
		t.Errorf("%d events, %v", len(again), err)
	}
	c.ok("estimate", "fit", filepath.Join(out, "events.csv"), "-o", filepath.Join(c.dir, "model"))
}

// Content compresses as programs do, is the same each time, and has the size that was asked for.
func TestStudyLayer(t *testing.T) {
	img := &studyImage{Bytes: 2_000_000, Layers: 1}
	var ref string
	for range 2 {
		f, err := os.Create(filepath.Join(t.TempDir(), "layer"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		l, err := writeStudyLayer(f, studySeed(img, 0), img.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if ref != "" && ref != string(l.ref.Digest) {
			t.Error("another layer of the same parameters")
		}
		ref = string(l.ref.Digest)
		if got := float64(l.unpacked) / float64(l.ref.Size); got < 1.7 || got > 4 || l.ref.Size < img.Bytes || l.ref.Size > img.Bytes*5/4 {
			t.Errorf("%d bytes, which inflate to %.2f times as many", l.ref.Size, got)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, z); err != nil || n != l.unpacked {
			t.Errorf("inflates to %d bytes, %v", n, err)
		}
	}
	other := *img
	other.only = "x"
	if studySeed(img, 0) == studySeed(&other, 0) || studySeed(img, 0) == studySeed(img, 1) {
		t.Error("layers that should differ are the same")
	}
}

// Wrong parameter files and flags are told of in one line.
func TestStudyErrors(t *testing.T) {
	dir := t.TempDir()
	good := "uri: 127.0.0.1:1/x\nsizes: [{total: 100000}]\nlayers: [{exact: 2}]\n"
	for text, want := range map[string]string{
		"":       "no uri",
		"uri: [": "YAML",
		strings.ReplaceAll(good, "sizes", "size"):          "size",
		"uri: a/b\nlayers: [{exact: 2}]":                   "sizes and layers",
		strings.ReplaceAll(good, "exact: 2", "exact: 0"):   "layers from 0",
		strings.ReplaceAll(good, "exact: 2", "exact: 500"): "accepted are 1 to 127",
		strings.ReplaceAll(good, "100000", "100"):          "accepted are 1024 bytes per layer",
		strings.ReplaceAll(good, "100000", "many"):         "accepted are uri",
		good + "iterations: 0\n":                           "iterations is 0",
	} {
		file := filepath.Join(dir, "study.yaml")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		oneLineError(t, want, "study", file, "-o", filepath.Join(dir, "out"))
	}
	file := filepath.Join(dir, "study.yaml")
	if err := os.WriteFile(file, []byte(good), 0o644); err != nil {
		t.Fatal(err)
	}
	oneLineError(t, "-o DIR", "study", file)
	oneLineError(t, "no strategy", "study", file, "-o", dir, "--strategies", "magic")
	oneLineError(t, "{host}", "study", file, "-o", dir, "--launch", "ssh")
	oneLineError(t, "no such file", "study", filepath.Join(dir, "none.yaml"), "-o", dir)
}

// oneLineError expects exit code 2 and one line that says want.
func oneLineError(t *testing.T, want string, args ...string) {
	t.Helper()
	out, errs, code := inProcess(t, args...)
	if code != exitUsage || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 || out != "" {
		t.Errorf("muster %s: code %d, %q %q; want code 2 and one line that says %q", strings.Join(args, " "), code, out, errs, want)
	}
}
