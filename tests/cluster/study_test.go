package cluster

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// A study on the hosts of a cluster: staged by their agents, and pulled by each host for itself.
func TestStudy(t *testing.T) {
	c := newCluster(t, 2, 200)
	c.start(lab.StartOptions{})
	h := c.Hosts[0]
	file, out := filepath.Join(t.TempDir(), "study.yaml"), filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(file, []byte("uri: "+lab.OriginAddr+"/study\nsizes: [{total: 1000000}]\nlayers: [{exact: 2}]\niterations: 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"study", file, "-o", out, "--hosts", c.Names(), "--strategies", "muster-mounted,muster-complete,muster-lazy", "--launch", "env HOST={host}", "--json"}
	for range 2 { // the second time there is nothing left to do
		text, errs, code, err := h.Muster(t.Context(), args...)
		if err != nil || code != 0 {
			t.Fatalf("study: %d, %v: %s", code, err, errs)
		}
		var rows []struct {
			Strategy     string
			Hosts, Pulls int
			Median       float64
		}
		if err := json.Unmarshal([]byte(text), &rows); err != nil || len(rows) != 3 {
			t.Fatalf("%s: %v", text, err)
		}
		for _, r := range rows {
			if r.Hosts != 2 || r.Pulls != 4 || r.Median <= 0 {
				t.Errorf("%+v", r)
			}
		}
	}
}
