package main

import (
	"strings"
	"testing"
)

func TestExpandHosts(t *testing.T) {
	for list, want := range map[string]string{
		"":                          "",
		"a":                         "a",
		"a, b,":                     "a b",
		"n[1-3]":                    "n1 n2 n3",
		"n[08-11,20]x,login1":       "n08x n09x n10x n11x n20x login1",
		"r[1-2]n[1-2]":              "r1n1 r1n2 r2n1 r2n2",
		"a=10.0.0.1:7464,b=[::1]:1": "a=10.0.0.1:7464 b=[::1]:1",
	} {
		got, err := expandHosts(list)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
	for _, list := range []string{"n[1", "n]1[", "n[]", "n[3-1]", "n[a]", "n[0-99999999]", "a=", "n[1-9999][1-9999]"} {
		if got, err := expandHosts(list); exitCode(err) != exitUsage {
			t.Errorf("%q: %d hosts, %v", list, len(got), err)
		}
	}
}
