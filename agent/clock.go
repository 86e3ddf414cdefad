package agent

import (
	"context"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/peer"
)

// Clocks of hosts differ, and may be set between a job and its report. So a stage notes when it began by a clock that nobody sets too: time
// since boot. A report asks each host for both its clocks and measures the way there and back; what it says is right within half of the
// shortest way, and what two clocks may drift apart since.

// drift is how much a clock may be off per second although it is disciplined: 20 ppm.
const drift = 20e-6

// clockTries is how often a host's clock is asked for: the shortest way counts.
const clockTries = 4

// A reading is what a host's clocks say at one moment.
type reading struct {
	Wall time.Time     `json:"wall"`
	Boot string        `json:"boot"` // which boot of the host
	Up   time.Duration `json:"up"`   // since then
}

func readClock() reading {
	r := reading{Wall: time.Now(), Boot: bootID()}
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) == nil {
		r.Up = time.Duration(ts.Nano())
	}
	return r
}

var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})

// clockQuestion asks for a host's clocks.
var clockQuestion = peer.Question[struct{}, reading]{Name: "Clock"}

// A sample is another host's reading, and when it was taken by this host's clock, give or take.
type sample struct {
	reading
	at    time.Time
	bound time.Duration
}

// sampleClock asks for another host's clocks a few times; the shortest way counts.
func (a *Agent) sampleClock(ctx context.Context, h peer.Host) (best sample, err error) {
	for range clockTries {
		sent := time.Now()
		r, err := peer.Ask(ctx, a.client, h, clockQuestion, struct{}{})
		if err != nil {
			return best, err
		}
		way := time.Since(sent)
		if best.at.IsZero() || way/2 < best.bound {
			best = sample{r, sent.Add(way / 2), way / 2}
		}
	}
	return best, nil
}

// align is when a record's stage began by the clock of the host that took the sample. The bound is negative where nobody knows.
func (s sample) align(r control.Record) (began time.Time, bound time.Duration) {
	if r.Boot == "" || r.Boot != s.Boot {
		return s.at.Add(r.Began.Sub(s.Wall)), -1
	}
	age := s.Up - r.Up
	return s.at.Add(-age), s.bound + time.Duration(drift*float64(age))
}
