package hostlist

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestExpand(t *testing.T) {
	for list, want := range map[string]string{
		"":                              "",
		" ":                             "",
		"a":                             "a",
		"a,b, c":                        "a b c",
		"node[1-3]":                     "node1 node2 node3",
		"node[08-11]":                   "node08 node09 node10 node11",
		"node[8-11]":                    "node8 node9 node10 node11",
		"node[001-002,7],login1":        "node001 node002 node7 login1",
		"r[1-2]n[1-2]":                  "r1n1 r1n2 r2n1 r2n2",
		"n[1,3]-ib.cluster.example.org": "n1-ib.cluster.example.org n3-ib.cluster.example.org",
		"[1-2]":                         "1 2",
		"frontier[00001-00003]":         "frontier00001 frontier00002 frontier00003",
	} {
		got, err := Expand(list)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %v, %v; expected %s", list, got, err, want)
		}
	}
}

func TestRefused(t *testing.T) {
	for _, list := range []string{
		",", "a,", "a,,b", "a b", "n[1-3", "n]1[", "n[]", "n[1-]", "n[-1]", "n[3-1]", "n[1,]", "n[a-b]", "n[[1]]", "n[01-100]", "n[1-010]",
		"n[1-3],n2", "n[0-65536]", "n[0-999]m[0-999]", "n[0-99999999999999999999]", "n=1.2.3.4:5", "ü", "a/b", "a\x00", "n[1 - 2]", "n[１]", "..", "-rf",
		strings.Repeat("a", 300), strings.Repeat(",", MaxBytes), strings.Repeat("[0-9]", 300),
	} {
		if got, err := Expand(list); !errors.Is(err, ErrInvalid) {
			t.Errorf("%.40q: %d hosts, %v", list, len(got), err)
		}
	}
}

func TestParse(t *testing.T) {
	got, err := Parse("n1=10.0.0.1:7464,n2=[fd00::2]:7464,n[3-4]")
	want := []Host{{"n1", "10.0.0.1:7464"}, {"n2", "[fd00::2]:7464"}, {"n3", ""}, {"n4", ""}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, list := range []string{"n1=", "=a:1", "n[1-2]=a:1", "n1=a b", "n1=a=b", "n1=a:1,n1=b:1"} {
		if got, err := Parse(list); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
}

func TestFold(t *testing.T) {
	for names, want := range map[string]string{
		"":                          "",
		"a":                         "a",
		"node1":                     "node1",
		"node1 node2 node3 node7":   "node[1-3,7]",
		"n08 n09 n10 n11":           "n[08-11]",
		"n8 n9 n10":                 "n[8-10]",
		"n99 n100 n0100":            "n[99-100,0100]",
		"n2 n1 login n3":            "n[2,1],login,n3",
		"r1n1.x r1n2.x r2n1.x r2n2": "r1n[1-2].x,r2n1.x,r2n2",
		"n12345678901 n12345678902": "n12345678901,n12345678902",
	} {
		if got := Fold(strings.Fields(names)); got != want {
			t.Errorf("%s: %s, expected %s", names, got, want)
		}
	}
	var many []string
	for i := range 10_000 {
		many = append(many, fmt.Sprintf("node%05d", i))
	}
	if got := Fold(many); got != "node[00000-09999]" {
		t.Errorf("%.80s", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"a,b", "node[001-016,20],login1", "r[1-2]n[1-2]", "n1=10.0.0.1:7464", "n[9-10],n011", "[1]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		hosts, err := Parse(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if len(hosts) > MaxHosts {
			t.Fatal(len(hosts))
		}
		var names []string
		for _, h := range hosts {
			names = append(names, h.Name)
		}
		again, err := Expand(Fold(names))
		if err != nil || !slices.Equal(again, names) {
			t.Fatalf("%q folds to %q: %v, %v", names, Fold(names), again, err)
		}
	})
}
