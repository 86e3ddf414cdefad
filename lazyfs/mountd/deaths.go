package mountd

import (
	"fmt"
	"time"

	"github.com/muster-hpc/muster/lazyfs"
)

// When processes die too often to go on.
//
// A server's death is in vain when no request was answered since the one before. Five of these within thirty seconds are a
// crash loop. A server that is killed from outside again and again while the mount answers in between is in none, whoever does
// that. The mount answers without a parent too: so what counts there is that none could be had for adoptWait. But a hundred
// deaths within thirty seconds are too many in any case: a request that kills its server comes back with each.
const (
	maxDeaths    = 5
	maxAllDeaths = 100
	deathsWithin = 30 * time.Second
)

// The roles in a book.
const (
	roleServer = "server"
	roleParent = "parent"
	inVain     = "server in vain" // those that count against maxDeaths
)

// bury notes a death of role at now and says whether it was one too many. wait is how long to wait before the next try:
// nothing, unless deaths are in vain.
func (b *book) bury(role string, vain bool, now time.Time) (wait time.Duration, err error) {
	note := func(key string) int {
		all := append(b.Deaths[key], now)
		for now.Sub(all[0]) > deathsWithin || all[0].After(now) || len(all) > maxAllDeaths {
			all = all[1:]
		}
		b.Deaths[key] = all
		return len(all)
	}
	n := note(role)
	if vain {
		v := note(inVain)
		if v >= maxDeaths {
			return 0, fmt.Errorf("the mount's %s died %d times within %v without having answered anything", role, v, deathsWithin)
		}
		// 0, 100, 200, 400 ms: what is short now (memory, processes) may be there then.
		if v > 1 {
			wait = 50 * time.Millisecond << (v - 1)
		}
	}
	if n >= maxAllDeaths {
		return 0, fmt.Errorf("the mount's %s died %d times within %v", role, n, deathsWithin)
	}
	return wait, nil
}

// mourn is bury for the book of k.
func (k *kit) mourn(role string) (time.Duration, error) {
	b := k.readBook()
	vain := false
	if role == roleServer {
		answered, err := lazyfs.AnsweredIn(k.slots)
		if err != nil {
			return 0, err
		}
		vain = answered == b.Answered
		b.Answered = answered
	}
	wait, tooMany := b.bury(role, vain, time.Now())
	if err := k.writeBook(b); err != nil {
		return 0, err
	}
	return wait, tooMany
}
