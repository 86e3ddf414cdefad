package peer

import (
	"context"
	"sync"
	"time"
)

// A gate lets prefetch wait for demand.
type gate struct {
	mu   sync.Mutex
	n    int           // answers to demand in progress
	open chan struct{} // closed when n is 0 again; nil while it is
}

func (g *gate) enter() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n++; g.n == 1 {
		g.open = make(chan struct{})
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n--; g.n == 0 {
		close(g.open)
		g.open = nil
	}
}

// wait returns when no demand is in progress, or after HoldBack.
func (g *gate) wait(ctx context.Context) {
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	if open == nil {
		return
	}
	t := time.NewTimer(HoldBack)
	defer t.Stop()
	select {
	case <-open:
	case <-t.C:
	case <-ctx.Done():
	}
}
