package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// faults stages on -faults hosts with one of them, the middle one, in trouble, and looks at how the others fare.
func (b *bench) faults(ctx context.Context) error {
	n := b.faultHosts
	if n < 3 {
		return fmt.Errorf("-faults %d: at least 3 hosts", n)
	}
	if err := b.open(ctx, n); err != nil {
		return err
	}
	bad := b.lab.Hosts[n/2]
	var good []*lab.Host
	for _, h := range b.lab.Hosts {
		if h != bad {
			good = append(good, h)
		}
	}
	for round := range b.rounds {
		say("faults, round %d of %d", round+1, b.rounds)
		for _, f := range []struct {
			name string
			code int
			bad  func() (end func() error, err error) // after all agents but a late one have started, at the stage's begin
			late bool                                 // its agent does not run yet
		}{
			{"none", 0, func() (func() error, error) { return nil, nil }, false},
			{"slow", 0, func() (func() error, error) {
				// Its own bytes take longer than anybody wants to watch: the others are done by then.
				return b.after(time.Duration(4*b.fluid(n)*float64(time.Second)), func() error { return bad.Rate(b.rate) }), bad.Slow(10)
			}, false},
			{"late", 0, func() (func() error, error) {
				return b.after(20*time.Second, func() error { return bad.Start(ctx, lab.StartOptions{}) }), nil
			}, true},
			{"absent", 5, func() (func() error, error) { return nil, nil }, true},
			{"killed", 5, func() (func() error, error) {
				return b.after(time.Duration(b.fluid(n)/2*float64(time.Second)), func() error { bad.Kill(); return nil }), nil
			}, false},
			{"origin gone", 0, func() (func() error, error) {
				return b.onceGone(ctx, func() error {
					if err := b.lab.OriginCut(); err != nil {
						return err
					}
					return bad.Start(ctx, lab.StartOptions{})
				}), nil
			}, true},
		} {
			if b.which != "" && !slices.Contains(strings.Split(b.which, ","), f.name) {
				continue
			}
			if err := b.fault(ctx, n, f.name, bad, good, f.late, f.bad); err != nil {
				return fmt.Errorf("fault %s: %w", f.name, err)
			}
		}
	}
	return nil
}

// fault does one stage of the faults.
func (b *bench) fault(ctx context.Context, n int, name string, bad *lab.Host, good []*lab.Host, late bool, begin func() (func() error, error)) error {
	defer b.lab.OriginHeal() //nolint:errcheck // the next stage would show it
	hosts := b.lab.Hosts
	if late {
		hosts = good
	}
	if err := b.fresh(ctx, lab.StartOptions{}, hosts...); err != nil {
		return err
	}
	end, err := begin()
	if err != nil {
		return err
	}
	r, _, _, err := b.lab.Hosts[0].Stage(ctx, b.lab.Ref(imageName), "--hosts", b.lab.Names(), "--ready", "complete")
	if end != nil {
		if e := end(); e != nil {
			return e
		}
	}
	if err != nil {
		return err
	}
	others, waited := 0.0, 0.0
	for _, h := range r.Hosts {
		if h.Host == bad.Name {
			if (name == "absent" || name == "killed") != (h.Phase == control.PhaseFailed) {
				return fmt.Errorf("host %s: %+v", h.Host, h)
			}
			continue
		}
		if h.Phase != control.PhaseDone {
			return fmt.Errorf("host %s: %+v", h.Host, h)
		}
		others = max(others, h.Took.Seconds())
		wait := 0.0
		for _, l := range h.Late {
			if l.Host == bad.Name {
				wait += l.Waited.Seconds()
			}
		}
		waited = max(waited, wait)
	}
	what := "fault " + name
	b.add(key(n, what+": others"), others)
	if name != "none" && name != "origin gone" {
		b.add(key(n, what+": waited"), waited)
	}
	b.origin(n, what, b.size)
	return nil
}

// after does f a while after now, and gives how to wait for it.
func (b *bench) after(d time.Duration, f func() error) func() error {
	done := make(chan error, 1)
	go func() { time.Sleep(d); done <- f() }()
	return func() error { return <-done }
}

// taken is how many bytes of layers the agents that run have from the origin.
func (b *bench) taken(ctx context.Context) (n int64) {
	for _, h := range b.lab.Hosts {
		if h.Running() {
			if s, err := h.Agent().Status(ctx, control.StatusRequest{}); err == nil {
				n += s.Bytes.Origin
			}
		}
	}
	return n
}

// onceGone does f as soon as one copy of the layers has left the origin, and is here: what is still on the link is lost when that is cut.
func (b *bench) onceGone(ctx context.Context, f func() error) func() error {
	done := make(chan error, 1)
	go func() {
		for b.taken(ctx) < b.size {
			select {
			case <-ctx.Done():
				done <- ctx.Err()
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
		done <- f()
	}()
	return func() error { return <-done }
}
