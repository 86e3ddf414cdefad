package image

import (
	"sync"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/ztoc"
)

// Progress can be watched while Open works. The zero Progress is ready; one belongs to one Open.
type Progress struct {
	mu     sync.Mutex
	phases []Phase
	since  time.Time
	layers map[ztoc.Digest]int64 // bytes of the blob that went through its builder
	total  int64                 // bytes of the layers being pulled
	chain  *fetch.Chain
}

// A Snapshot is how far Open has come.
type Snapshot struct {
	Phase        string      // "resolve", "index", "pull", "table", "ready"
	Pulled       int64       // bytes of layers being fetched whole that are through
	PullTotal    int64       // of all layers being fetched whole
	Fetched      fetch.Stats // by source, everything included
	PhaseAlready time.Duration
}

// Snapshot may be called at any time, from any goroutine.
func (p *Progress) Snapshot() Snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	var s Snapshot
	if n := len(p.phases); n > 0 {
		s.Phase = p.phases[n-1].Name
		s.PhaseAlready = time.Since(p.since)
	}
	for _, n := range p.layers {
		s.Pulled += n
	}
	s.PullTotal = p.total
	if p.chain != nil {
		s.Fetched = p.chain.Stats()
	}
	return s
}

// Phases are the steps taken and how long each took; the last is still under way.
func (p *Progress) Phases() []Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Phase(nil), p.phases...)
}

func (p *Progress) phase(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if n := len(p.phases); n > 0 {
		p.phases[n-1].Took = now.Sub(p.since)
	}
	p.phases = append(p.phases, Phase{Name: name})
	p.since = now
}

func (p *Progress) watch(c *fetch.Chain) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.chain = c
}

// expect announces a layer that will be fetched whole.
func (p *Progress) expect(layer ztoc.Digest, size int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.layers == nil {
		p.layers = map[ztoc.Digest]int64{}
	}
	p.layers[layer] = 0
	p.total += size
}

// layer is the progress function of a layer's builder.
func (p *Progress) layer(layer ztoc.Digest) func(blob, inflated int64) {
	return func(blob, _ int64) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.layers[layer] = blob
	}
}
