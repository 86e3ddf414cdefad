package mountd

import (
	"encoding/json"
	"testing"
	"time"
)

func TestDeaths(t *testing.T) {
	type death struct {
		after time.Duration // the one before
		vain  bool
	}
	many := func(n int, d death) (all []death) {
		for range n {
			all = append(all, d)
		}
		return all
	}
	for _, x := range []struct {
		name   string
		deaths []death
		at     int // the death that is one too many, 0: none
	}{
		{"killed while it works", many(99, death{300 * time.Millisecond, false}), 0},
		{"too often all the same", many(200, death{100 * time.Millisecond, false}), 100},
		{"a crash loop", many(10, death{100 * time.Millisecond, true}), 5},
		{"a slow one", many(10, death{7 * time.Second, true}), 5},
		{"too slow to be one", many(100, death{8 * time.Second, true}), 0},
		{"work in between does not excuse", []death{{0, true}, {1, true}, {1, false}, {1, true}, {1, true}, {1, true}}, 6},
		{"the clock was set back", []death{{0, true}, {1, true}, {1, true}, {1, true}, {-time.Hour, true}, {1, true}}, 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			b := book{Deaths: map[string][]time.Time{}}
			now := time.Unix(1e9, 0)
			at := 0
			var slept time.Duration
			for i, d := range x.deaths {
				now = now.Add(d.after)
				wait, err := b.bury(roleServer, d.vain, now)
				slept += wait
				if err != nil {
					at = i + 1
					break
				}
			}
			if at != x.at {
				t.Errorf("given up at death %d, not %d", at, x.at)
			}
			if at == 5 && slept != 700*time.Millisecond {
				t.Errorf("waited %v before giving up", slept)
			}
			if j, err := json.Marshal(b); err != nil || len(j) > bookSize {
				t.Errorf("a book of %d bytes, %v", len(j), err)
			}
		})
	}
}
