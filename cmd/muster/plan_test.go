package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/jobhooks/hostlist"
	"github.com/muster-hpc/muster/tests/images"
)

// TestPlan: what is printed adds up: each byte is fetched once and sent to each other host once; nothing of it is fetched here.
func TestPlan(t *testing.T) {
	c := newCLI(t, 0, images.RunConfig{})
	for _, test := range []struct {
		args  []string
		hosts int
		seeds string // who fetches, of all that may; empty: not looked at
		fails int
	}{
		{args: []string{"--hosts", "node[1-8]"}, hosts: 8},
		{args: []string{"--hosts", "node[1-8]", "--seeds", "node[2,5]", "--slow", "node7"}, hosts: 8, seeds: "node[2,5]"},
		{args: []string{"--hosts", "one"}, hosts: 1, seeds: "one"},
		{args: []string{"--hosts", "n[0001-1000]", "--link", "10000", "--origin-link", "1000"}, hosts: 1000},
		{args: []string{"--hosts", "a,b", "--fanout", "1", "--trees", "3"}, hosts: 2},
		{args: []string{"--hosts", "a[1-"}, fails: exitUsage},
		{args: []string{"--hosts", ""}, fails: exitUsage},
		{args: nil, fails: exitUsage},
		{args: []string{"--hosts", "a,b", "--seeds", "c"}, fails: exitUsage},
		{args: []string{"--hosts", "a", "--link", "0"}, fails: exitUsage},
		{args: []string{"--hosts", "a", "--trees", "-1"}, fails: exitUsage},
	} {
		out, errs, code := c.run(append([]string{"plan", "--json", c.image}, test.args...)...)
		if code != test.fails {
			t.Errorf("plan %q: code %d, expected %d\n%s", test.args, code, test.fails, errs)
		}
		if test.fails != 0 {
			continue
		}
		var p planned
		if err := json.Unmarshal([]byte(out), &p); err != nil {
			t.Fatal(err)
		}
		var fetched, sent, along int64
		var seeds []string
		for _, h := range p.Hosts {
			fetched, sent = fetched+h.Fetches, sent+h.Sends
			if h.Slow && h.Sends > 0 {
				t.Errorf("plan %q: %s is slow and sends %d bytes", test.args, h.Name, h.Sends)
			}
			if h.Seed {
				seeds = append(seeds, h.Name)
			}
		}
		for _, tree := range p.Trees {
			along += tree.Bytes
			if len(tree.Parents) != test.hosts || len(slices.DeleteFunc(slices.Clone(tree.Parents), func(q int) bool { return q >= 0 })) != 1 {
				t.Errorf("plan %q: a tree has parents %v", test.args, tree.Parents)
			}
		}
		if len(p.Hosts) != test.hosts || fetched != p.Bytes || along != p.Bytes || sent != int64(test.hosts-1)*p.Bytes || p.Peers > 64 {
			t.Errorf("plan %q: %d hosts, %d bytes of which %d fetched, %d along trees, %d sent", test.args, len(p.Hosts), p.Bytes, fetched, along, sent)
		}
		if p.Fluid <= 0 || p.Time < p.Fluid || p.Apart < p.Fluid {
			t.Errorf("plan %q: %g s at best, %g s by the plan, %g s without", test.args, p.Fluid, p.Time, p.Apart)
		}
		if test.seeds != "" && hostlist.Fold(seeds) != test.seeds {
			t.Errorf("plan %q: seeds are %v", test.args, seeds)
		}
	}
	for _, want := range []string{"to 40 hosts: node[1-40]", "node32", "and 8 more", "by this plan"} {
		if out := c.ok("plan", c.image, "--hosts", "node[1-40]"); !strings.Contains(out, want) {
			t.Errorf("nothing of %q in\n%s", want, out)
		}
	}
	if out, _, code := c.run("plan", "oci:/no/such/place", "--hosts", "a"); code != exitNoImage {
		t.Errorf("an image that is not there: code %d\n%s", code, out)
	}
	var kept int
	entries, err := os.ReadDir(c.store())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() == "blobs" {
			inside, _ := os.ReadDir(fmt.Sprint(c.store(), "/blobs"))
			kept += len(inside)
		}
	}
	if kept > 0 {
		t.Errorf("%d blobs were kept by planning", kept)
	}
}
