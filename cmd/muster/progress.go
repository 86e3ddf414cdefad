package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/muster-hpc/muster/agent/image"
)

// Opening that takes less than this is not worth a word.
const (
	silentFor = 700 * time.Millisecond
	barEvery  = 100 * time.Millisecond
	lineEvery = 10 * time.Second
)

// showOpening tells on the standard error how far the opening of an image is, until the function that
// it returns is called: a bar on a terminal, a line now and then elsewhere, nothing with --quiet.
func (a *app) showOpening(name string, snapshot func() image.Snapshot) (stop func()) {
	if a.quiet {
		return func() {}
	}
	bar := isTerminal(a.err)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		started := time.Now()
		tick := time.NewTicker(barEvery)
		defer tick.Stop()
		var line time.Time // when the last one was written
		drawn := false
		for {
			select {
			case <-end:
				if drawn {
					fmt.Fprint(a.err, "\r\x1b[K")
				}
				return
			case now := <-tick.C:
				if now.Sub(started) < silentFor {
					continue
				}
				s := snapshot()
				if bar {
					fmt.Fprint(a.err, "\r\x1b[K"+fit(openingLine(name, s, now.Sub(started), true), width(a.err)))
					drawn = true
				} else if now.Sub(line) >= lineEvery {
					fmt.Fprintln(a.err, "muster: "+openingLine(name, s, now.Sub(started), false))
					line = now
				}
			}
		}
	}()
	return func() { close(end); <-ended }
}

// openingLine is one line about s.
func openingLine(name string, s image.Snapshot, since time.Duration, bar bool) string {
	switch s.Phase {
	case "pull":
		done := 0.0
		if s.PullTotal > 0 {
			done = float64(s.Pulled) / float64(s.PullTotal)
		}
		text := fmt.Sprintf("%s: first pull, no index: %s of %s", name, megabytes(s.Pulled), megabytes(s.PullTotal))
		if rate := float64(s.Pulled) / since.Seconds(); rate > 0 && s.Pulled < s.PullTotal {
			text += fmt.Sprintf(", %s left", time.Duration(float64(s.PullTotal-s.Pulled)/rate*float64(time.Second)).Round(time.Second))
		}
		if bar {
			return drawBar(done, 24) + " " + text
		}
		return text
	case "resolve":
		return name + ": asking the registry"
	case "index":
		return fmt.Sprintf("%s: looking for an index, %s fetched", name, megabytes(s.Fetched.OriginBytes))
	case "table":
		return name + ": putting the tree together"
	}
	return name + ": opening"
}

// drawBar is done (0 to 1) as n cells.
func drawBar(done float64, n int) string {
	full := max(0, min(n, int(done*float64(n))))
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", n-full) + "]"
}

// fit cuts a line so that it stays one: a wrapped line could not be drawn over.
func fit(s string, columns int) string {
	if r := []rune(s); columns > 1 && len(r) >= columns {
		return string(r[:columns-1])
	}
	return s
}

// megabytes writes bytes for people.
func megabytes(n int64) string {
	switch {
	case n >= 10e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 100e6:
		return fmt.Sprintf("%.0f MB", float64(n)/1e6)
	case n >= 100e3:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.1f kB", float64(n)/1e3)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func width(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
			return n
		}
	}
	return 80
}
