package agent_test

import (
	"path/filepath"
	"testing"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/tests/registry"
)

// index pushes an index beside the image, as `muster index push` does: without the small layers, and with a start-up profile of the first bytes
// of each layer.
func (w *world) index() {
	w.t.Helper()
	st, err := store.Open(filepath.Join(w.dir, "index-store"), store.Options{Quota: 1 << 30})
	if err != nil {
		w.t.Fatal(err)
	}
	defer st.Close()
	ref, err := origin.ParseReference(w.image)
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := origin.New(origin.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	repo, err := c.Repository(ref)
	if err != nil {
		w.t.Fatal(err)
	}
	open := func() *image.Image {
		im, err := image.Open(w.t.Context(), image.Options{Repo: repo, Store: st})
		if err != nil {
			w.t.Fatal(err)
		}
		return im
	}
	im := open()
	var p lazyfs.Profile
	for i := range w.layers {
		p.Ranges = append(p.Ranges, lazyfs.ProfileRange{Layer: i, Start: 0, End: 100_000})
	}
	if err := image.KeepProfile(st, im.Resolved, p.Encode()); err != nil {
		w.t.Fatal(err)
	}
	im.Close()
	im = open()
	defer im.Close()
	x, err := im.MakeIndex(w.t.Context(), image.IndexOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	if x.Profile == 0 {
		w.t.Fatal("no profile in the index")
	}
	if err := x.Push(w.t.Context(), repo); err != nil {
		w.t.Fatal(err)
	}
}

// An index leaves small layers out. The image is warm before it is complete all the same: nobody builds a table, and what the program touches
// first is known.
func TestWarmWithSmallLayers(t *testing.T) {
	w := newWorld(t, 1<<20, 24<<20, 300, 6<<20)
	w.index()
	nodes := w.swarm(4, nil)
	w.proxy.ResetLog()
	r := w.stage(nodes[1], 4, nil)
	if r.Failed > 0 {
		t.Fatal("not staged")
	}
	for _, h := range r.Hosts {
		at := map[string]control.Phase{}
		for _, p := range h.Phases {
			at[p.Name] = p
		}
		if _, built := at["index"]; built {
			t.Errorf("%s has built a table", h.Host)
		}
		warm, ok := at["ready warm"]
		if !ok || warm.Start >= at["ready complete"].Start {
			t.Errorf("%s was not warm before it was complete: %+v", h.Host, h.Phases)
		}
	}
	// The small layers, which one host has pulled to build their tables, are passed on like the others.
	if got := w.proxy.Bytes(registry.Match{Kind: registry.Blob, Where: func(r *registry.Record) bool { return r.Range != "" }}); float64(got) > 1.03*float64(w.size) {
		t.Errorf("%d bytes of layers left the origin, they have %d", got, w.size)
	}
	for _, n := range nodes {
		w.verify(n)
	}
}
