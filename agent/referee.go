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
// three kinds:
//
//   - slow: what it sends comes at less than an eighth of the others' pace for a second or so, or at less than a quarter for some seconds. Only the
//     time is counted in which a piece was under way, so a parent that waits for its own parents, or for the origin, is not slow.
//   - behind: it has brought less than a fifth of what it was asked for, in proportion to the others, when some seconds have gone. So is a parent
//     whose own link is slow: what it has it sends on at once, and it has little.
//   - stuck: it says that it lives and sends nothing, while others send a lot.
//
// Too strict, and hosts that are busy for a moment lose their place, and their pieces may leave the origin twice; too lax, and one slow
// host holds up those behind it. A referee that does not get to look in time sits on a busy host itself: what it has measured then says more about
// that host than about the parents, and is forgotten.
const (
	lookEvery    = 200 * time.Millisecond
	lookLate     = 2 * lookEvery // between two looks, from which on this host is busy itself
	behindAfter  = 4 * time.Second
	behindFactor = 5
	behindMedian = 16 * ztoc.PieceSize // that the others have brought at least
	stuckAfter   = 4 * time.Second
	stuckTurns   = 16               // pieces that others brought meanwhile
	stuckEver    = 25 * time.Second // and nobody brought anything
)

// A window is bytes of pieces under way, and the seconds waited for them, of the last looks: those before fade.
type window struct{ bytes, time float64 }

func (w *window) pace() float64 { return w.bytes / max(w.time, 0.001) }

// windows are what a parent is judged by: how much slower than the others, over which time. fade is what a look leaves of earlier ones, so that
// a window is lookEvery/(1-fade) long; after is how much waiting it takes.
var windows = [...]struct {
	fade   float64
	factor float64
	after  float64 // s
}{
	{0.85, 8, 0.9}, // 1.3 s
	{0.95, 4, 3},   // 4 s
}

// paces are what the referee remembers of a feed.
type paces struct {
	bytes  int64         // of pieces under way, since the stream began; set before each look
	waited time.Duration // for them; set before each look
	got    int64         // bytes of the feed; set before each look
	wanted int64         // bytes that it was asked for; set before each look
	began  time.Time     // set by the first look

	windows [len(windows)]window
	lastB   int64 // bytes, waited and got at the last look
	lastT   time.Duration
	lastGot int64
	since   time.Time // when got last grew
	others  int64     // bytes of all other feeds at that time
}

// A referee judges the feeds of an intake. Used by one goroutine.
type referee struct {
	last time.Time
	late time.Time // when a look last came late
}

// referee looks at all feeds until the intake ends.
func (in *intake) referee() error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var r referee
	for {
		select {
		case <-tick.C:
			in.look(&r, time.Now())
		case <-in.ctx.Done():
			return context.Cause(in.ctx)
		}
	}
}

// look sends off who is slow or stuck.
func (in *intake) look(r *referee, now time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	var running []*feed
	var all []*paces
	for _, f := range in.feeds {
		if f.stream != nil {
			f.paces.bytes, f.paces.waited = f.stream.Pace()
			f.paces.got, f.paces.wanted = f.got.Load(), f.wanted.Load()
			running, all = append(running, f), append(all, &f.paces)
		}
	}
	for i, why := range r.judge(now, in.j.fromPeer.Load()+in.j.fromOrigin.Load(), all) {
		if why != "" {
			running[i].give(fmt.Errorf("%w: %s", peer.ErrSlow, why))
		}
	}
}

// judge says of each feed why it is to be sent off, or nothing. all is the bytes that have come from anywhere.
func (r *referee) judge(now time.Time, all int64, feeds []*paces) []string {
	late := !r.last.IsZero() && now.Sub(r.last) > lookLate
	r.last = now
	if late {
		r.late = now
	}
	var known [len(windows)][]float64 // paces of feeds that sent at least half a piece lately
	for _, p := range feeds {
		for i := range p.windows {
			w := &p.windows[i]
			if late {
				*w = window{}
				continue
			}
			w.bytes = w.bytes*windows[i].fade + float64(p.bytes-p.lastB)
			w.time = w.time*windows[i].fade + (p.waited - p.lastT).Seconds()
			if w.bytes >= ztoc.PieceSize/2 {
				known[i] = append(known[i], w.pace())
			}
		}
		p.lastB, p.lastT = p.bytes, p.waited
		if p.began.IsZero() {
			p.began = now
		}
		if p.got > p.lastGot || p.since.IsZero() {
			p.lastGot, p.since, p.others = p.got, now, all-p.got
		}
	}
	why := make([]string, len(feeds))
	part, median := medianPart(feeds)
	for k, p := range feeds {
		why[k] = p.stuck(now, all)
		if why[k] == "" && len(feeds) > 2 && median >= behindMedian && now.Sub(p.began) > behindAfter && now.Sub(r.late) > behindAfter &&
			p.part() < part/behindFactor {
			why[k] = fmt.Sprintf("%.0f %% of what it was asked for, when the median of the others was %.0f %%", 100*p.part(), 100*part)
		}
		for i := range p.windows {
			if w := &p.windows[i]; why[k] == "" && len(known[i]) > 1 && w.time >= windows[i].after {
				slices.Sort(known[i])
				if median := known[i][len(known[i])/2]; w.pace() < median/windows[i].factor {
					why[k] = fmt.Sprintf("%.2f MB/s when the median of the others was %.2f", w.pace()/1e6, median/1e6)
				}
			}
		}
	}
	return why
}

// part is how much of what it was asked for a feed has brought.
func (p *paces) part() float64 { return float64(p.got) / float64(max(p.wanted, 1)) }

// medianPart is the median of all feeds' parts, and of their bytes.
func medianPart(feeds []*paces) (part float64, bytes int64) {
	if len(feeds) == 0 {
		return 0, 0
	}
	var parts []float64
	var all []int64
	for _, p := range feeds {
		parts, all = append(parts, p.part()), append(all, p.got)
	}
	slices.Sort(parts)
	slices.Sort(all)
	return parts[len(parts)/2], all[len(all)/2]
}

// stuck says why a feed that brings nothing is to be sent off, or nothing.
func (p *paces) stuck(now time.Time, all int64) string {
	idle := now.Sub(p.since)
	switch meanwhile := all - p.got - p.others; {
	case idle > stuckAfter && meanwhile > stuckTurns*ztoc.PieceSize:
		return fmt.Sprintf("nothing for %.1f s, %d pieces from others meanwhile", idle.Seconds(), meanwhile/ztoc.PieceSize)
	case idle > stuckEver:
		return fmt.Sprintf("nothing for %.0f s", idle.Seconds())
	}
	return ""
}
