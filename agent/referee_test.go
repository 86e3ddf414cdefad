package agent

import (
	"testing"
	"time"
)

// TestReferee plays feeds of given paces, in MB/s, and looks at who is sent off, and when.
func TestReferee(t *testing.T) {
	steady := func(rates ...float64) func(time.Duration) []float64 {
		return func(time.Duration) []float64 { return rates }
	}
	// moment has the first of six feeds at a sixth of the others' pace for a while.
	moment := func(d time.Duration) func(time.Duration) []float64 {
		return func(at time.Duration) []float64 {
			if at > 2*time.Second && at < 2*time.Second+d {
				return []float64{1, 6, 6, 6, 6, 6}
			}
			return []float64{6, 6, 6, 6, 6, 6}
		}
	}
	for _, c := range []struct {
		name        string
		rates       func(at time.Duration) []float64
		look        time.Duration // between looks
		after, most time.Duration // the first feed is sent off between these; 0: never
	}{
		{"all alike", steady(6, 5, 7, 6, 6), lookEvery, 0, 0},
		{"half", steady(3, 6, 6, 6, 6), lookEvery, 0, 0},
		{"a tenth", steady(0.6, 6, 6, 6, 6), lookEvery, 0, 2 * time.Second},
		{"a sixth", steady(1, 6, 6, 6, 6), lookEvery, 2 * time.Second, 8 * time.Second},
		{"a sixth, for a moment", moment(1500 * time.Millisecond), lookEvery, 0, 0},
		{"a sixth, for long", moment(time.Minute), lookEvery, 4 * time.Second, 12 * time.Second},
		{"a tenth, seen from a busy host", steady(0.6, 6, 6, 6, 6), 3 * lookEvery, 0, 0},
		{"brings little", steady(-0.3, 3, 3, 3, 3), lookEvery, 4 * time.Second, 6 * time.Second},
		{"brings half", steady(-1.5, 3, 3, 3, 3), lookEvery, 0, 0},
		{"alone", steady(0.1), lookEvery, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r referee
			feeds := make([]*paces, len(c.rates(0)))
			for i := range feeds {
				feeds[i] = &paces{}
			}
			begin := time.Now()
			for at := c.look; at < 20*time.Second; at += c.look {
				var all int64
				for i, rate := range c.rates(at) {
					if rate < 0 { // brings little, and what it brings at full pace
						feeds[i].bytes += int64(-rate * 1e6 * c.look.Seconds())
						feeds[i].got, feeds[i].wanted = feeds[i].bytes, 40e6
						feeds[i].waited += time.Duration(-rate / 6 * float64(c.look))
						continue
					}
					feeds[i].wanted = 40e6
					feeds[i].bytes += int64(rate * 1e6 * c.look.Seconds())
					feeds[i].got, feeds[i].waited = feeds[i].bytes, feeds[i].waited+c.look
					all += feeds[i].got
				}
				for i, why := range r.judge(begin.Add(at), all, feeds) {
					if why == "" {
						continue
					}
					if i != 0 || c.most == 0 || at < c.after || at > c.most {
						t.Fatalf("feed %d after %v: %s", i, at, why)
					}
					return
				}
			}
			if c.most > 0 {
				t.Error("the slow one stays")
			}
		})
	}
}
