package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("something"), 1},
		{usagef("wrong"), 2},
		{errors.New(`unknown command "x" for "muster"`), 2},
		{fmt.Errorf("pulling: %w", context.DeadlineExceeded), 5},
		{unsupported("no FUSE"), 9},
		{fmt.Errorf("run: %w", unsupported("no FUSE")), 9},
		{finished(0), 0},
		{finished(42), 42},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: code %d, want %d", c.err, got, c.want)
		}
	}
}

// The README repeats the table, since it is what people read before they have the program.
func TestReadmeHasTheExitCodes(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range exitCodes {
		if row := fmt.Sprintf("| %d | %s |", e.code, e.meaning); !strings.Contains(string(b), row) {
			t.Errorf("README.md lacks the row %s", row)
		}
	}
}
