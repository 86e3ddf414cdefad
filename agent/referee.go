package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// The referee sends parents off. Those that are gone, silent or below peer's minimum rate end their streams by themselves; what is left are
// two kinds:
//
//   - slow: what it sends comes at less than a quarter of the others' pace. Only the time is counted in which a piece was under way, so a
//     parent that waits for its own parents, or for the origin, is not slow.
//   - stuck: it says that it lives and sends nothing, while others send a lot.
//
// Too strict, and hosts that are busy for a moment lose their place, and their pieces may leave the origin twice; too lax, and one slow
// host holds up those behind it.
const (
	lookEvery  = 200 * time.Millisecond
	slowFactor = 4
	slowAfter  = 900 * time.Millisecond // of waiting for pieces under way, of the last 1.3 s or so
	fade       = 0.85                   // what a look leaves of earlier ones
	stuckAfter = 4 * time.Second
	stuckTurns = 16               // pieces that others brought meanwhile
	stuckEver  = 25 * time.Second // and nobody brought anything
)

// paces are what the referee remembers of a feed.
type paces struct {
	bytes, time  float64   // faded: bytes of pieces under way, and seconds waited for them
	lastB, lastT int64     // of Stream.Pace at the last look
	got          int64     // of the feed at the last look
	since        time.Time // when got last grew
	others       int64     // bytes of all other feeds at that time
}

func (p *paces) pace() float64 { return p.bytes / max(p.time, 0.001) }

// referee looks at all feeds until the intake ends.
func (in *intake) referee() error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			in.look(time.Now())
		case <-in.ctx.Done():
			return context.Cause(in.ctx)
		}
	}
}

// look sends off who is slow or stuck.
func (in *intake) look(now time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	all := in.j.fromPeer.Load() + in.j.fromOrigin.Load()
	var running []*feed
	var known []float64 // paces of feeds that sent at least a piece lately
	for _, f := range in.feeds {
		if f.stream == nil {
			continue
		}
		p := &f.paces
		b, t := f.stream.Pace()
		p.bytes = p.bytes*fade + float64(b-p.lastB)
		p.time = p.time*fade + (t - time.Duration(p.lastT)).Seconds()
		p.lastB, p.lastT = b, int64(t)
		if got := f.got.Load(); got > p.got || p.since.IsZero() {
			p.got, p.since, p.others = got, now, all-got
		}
		running = append(running, f)
		if p.bytes >= ztoc.PieceSize/2 {
			known = append(known, p.pace())
		}
	}
	slices.Sort(known)
	for _, f := range running {
		if why := f.paces.verdict(known, now, all); why != "" {
			f.give(fmt.Errorf("%w: %s", peer.ErrSlow, why))
		}
	}
}

// verdict says why a feed is to be sent off, or nothing.
func (p *paces) verdict(known []float64, now time.Time, all int64) string {
	idle := now.Sub(p.since)
	switch meanwhile := all - p.got - p.others; {
	case idle > stuckAfter && meanwhile > stuckTurns*ztoc.PieceSize:
		return fmt.Sprintf("nothing for %.1f s, %d pieces from others meanwhile", idle.Seconds(), meanwhile/ztoc.PieceSize)
	case idle > stuckEver:
		return fmt.Sprintf("nothing for %.0f s", idle.Seconds())
	}
	if len(known) < 2 || p.time < slowAfter.Seconds() {
		return ""
	}
	median := known[len(known)/2]
	if p.pace() >= median/slowFactor {
		return ""
	}
	return fmt.Sprintf("%.2f MB/s when the median of the others was %.2f", p.pace()/1e6, median/1e6)
}
