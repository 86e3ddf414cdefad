package jobhooks_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/jobhooks"
)

func TestJudge(t *testing.T) {
	first := jobhooks.Job{Hosts: []string{"n1", "n2"}, Here: "n1"}
	second := jobhooks.Job{Hosts: []string{"n1", "n2"}, Here: "n2"}
	tired := jobhooks.Job{Hosts: []string{"n1"}, Here: "n1", Restarts: 3}
	for _, x := range []struct {
		name string
		job  jobhooks.Job
		o    jobhooks.Outcome
		cant bool
		want jobhooks.Verdict
	}{
		{"mounted", second, jobhooks.Outcome{Mount: "/m"}, false, jobhooks.Go},
		{"mounted, and not yet warm", second, jobhooks.Outcome{Mount: "/m", Late: true}, false, jobhooks.Go},
		{"still on its way", second, jobhooks.Outcome{Late: true}, false, jobhooks.Wait},
		{"no such image", first, jobhooks.Outcome{Code: 3}, false, jobhooks.Hold},
		{"no such image, another node", second, jobhooks.Outcome{Code: 3}, false, jobhooks.Leave},
		{"not authorised", first, jobhooks.Outcome{Code: 4}, false, jobhooks.Hold},
		{"not a name", first, jobhooks.Outcome{Code: 2}, false, jobhooks.Hold},
		{"an image of an unknown kind", first, jobhooks.Outcome{Code: 9}, false, jobhooks.Hold},
		{"no FUSE here", second, jobhooks.Outcome{Code: 9}, true, jobhooks.Broken},
		{"the registry does not answer", second, jobhooks.Outcome{Code: 5}, false, jobhooks.Retry},
		{"it has not answered three times", tired, jobhooks.Outcome{Code: 5}, false, jobhooks.Hold},
		{"no agent", second, jobhooks.Outcome{Code: 8}, false, jobhooks.Retry},
		{"the store is full", second, jobhooks.Outcome{Code: 7}, false, jobhooks.Retry},
		{"wrong bytes", second, jobhooks.Outcome{Code: 6}, false, jobhooks.Retry},
		{"anything else", second, jobhooks.Outcome{Code: 1}, false, jobhooks.Retry},
	} {
		if got := jobhooks.Judge(x.job, x.o, jobhooks.Policy{Retries: 3, NodeCannot: x.cant}); got != x.want {
			t.Errorf("%s: %s, want %s", x.name, got, x.want)
		}
	}
}

func TestMessage(t *testing.T) {
	j := jobhooks.Job{Image: "reg/app:1", Here: "n1"}
	got := jobhooks.Message(j, jobhooks.Outcome{Text: "registry reg: 403 Forbidden: \x1b[31mno\nentry\x00 für\u202e you", Code: 5})
	if want := "muster: image reg/app:1: registry reg: 403 Forbidden: ?[31mno entry? f?r? you (node n1); try again later; when it stays, ask whether the node reaches the registry"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	long := jobhooks.Message(j, jobhooks.Outcome{Text: strings.Repeat("x", 5000)})
	if len(long) > 600 {
		t.Errorf("%d bytes", len(long))
	}
}

func FuzzCheckImage(f *testing.F) {
	for _, s := range []string{"debian:12", "ghcr.io/a/b@sha256:00", "a b", "oci:/x", "a\x00", "-v", "$(x)"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		err := jobhooks.CheckImage(s, func(string) error { return nil })
		if err != nil && !errors.Is(err, jobhooks.ErrImage) {
			t.Errorf("%q: %v", s, err)
		}
		if err == nil && (len(s) > jobhooks.MaxReference || strings.ContainsAny(s, " \t\r\n\x00$`\"'\\;&|<>(){}*?[]!#~%=,") || s == "") {
			t.Errorf("%q is accepted", s)
		}
	})
}
