package agent_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// A host whose disk has rotted passes wrong bytes on. Everybody ends with right ones, and little leaves the origin again.
func TestLyingHost(t *testing.T) {
	w := newWorld(t, 10<<20, 4<<20)
	nodes := w.swarm(4, nil)
	if _, err := nodes[1].client.Stage(t.Context(), control.StageRequest{Image: w.image, Hosts: []string{"n1=n1:1"}, Ready: control.Complete, UID: -1, NoMount: true}, nil); err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(nodes[1].store.Dir(), "blobs", "*"))
	if err != nil || len(blobs) == 0 {
		t.Fatal("no blobs", err)
	}
	rotten := 0
	for _, b := range blobs {
		f, err := os.OpenFile(b, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if st, _ := f.Stat(); st.Size() > 2<<20 {
			if _, err := f.WriteAt(bytes.Repeat([]byte("rot"), 100), 1<<20+12345); err != nil {
				t.Fatal(err)
			}
			rotten++
		}
		f.Close()
	}
	if rotten == 0 {
		t.Fatal("nothing has rotted")
	}
	nodes[1].stop() // it would not look so soon again
	nodes[1] = w.start("n1", nil)
	w.proxy.ResetLog()
	r := w.stage(nodes[0], 4, func(q *control.StageRequest) { q.Job = "second" })
	if r.Failed > 0 {
		t.Errorf("%d hosts failed", r.Failed)
	}
	for _, n := range nodes {
		w.verify(n)
	}
	w.originBytes(1.5)
}

// A host that dies in the middle costs the others little.
func TestHostDiesInTheMiddle(t *testing.T) {
	w := newWorld(t, 12<<20, 4<<20)
	w.proxy.SetRate(6 << 20)
	nodes := w.swarm(4, nil)
	done := make(chan *control.Report, 1)
	go func() {
		r, err := nodes[0].client.Stage(t.Context(), control.StageRequest{Image: w.image, Hosts: hosts(4), Ready: control.Complete, UID: -1, NoMount: true}, nil)
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	time.Sleep(500 * time.Millisecond)
	w.net.Cut("n2")
	for _, n := range []*node{nodes[0], nodes[1], nodes[3]} {
		for {
			s, err := n.client.Status(t.Context(), control.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if len(s.Jobs) == 1 && s.Jobs[0].State.Done() {
				if s.Jobs[0].State.Phase != control.PhaseDone {
					t.Errorf("%s: %+v", n.name, s.Jobs[0].State)
				}
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		w.verify(n)
	}
	w.net.Heal("n2")
	r := <-done
	var origin int64 // n2 goes on alone, and from the origin
	for _, n := range []*node{nodes[0], nodes[1], nodes[3]} {
		s, err := n.client.Status(t.Context(), control.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		origin += s.Bytes.Origin
	}
	if times := float64(origin) / float64(w.size); times > 1.2 {
		t.Errorf("the others took the image %.2f times from the origin", times)
	}
	if r != nil && r.Failed > 1 {
		t.Errorf("%d hosts failed", r.Failed)
	}
}

// The host that has resolved the image goes as soon as another one follows its plan: what only it has made is made again.
func TestResolverIsGone(t *testing.T) {
	w := newWorld(t, 4<<20, 2<<20)
	w.index() // so that it makes tables' blobs too
	nodes := w.swarm(3, nil)
	id := agent.OrderID("gone", w.image)
	resolver := planner.Resolver(id, []string{"n0", "n1", "n2"})[0]
	var asked *node
	var others []*node
	for _, n := range nodes {
		if n.name != resolver {
			asked, others = n, append(others, n)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for t.Context().Err() == nil {
			if s, err := asked.client.Status(t.Context(), control.StatusRequest{}); err == nil && len(s.Jobs) == 1 && s.Jobs[0].Plan != "" {
				w.net.Cut(resolver)
				return
			}
		}
	}()
	r := w.stage(asked, 3, func(q *control.StageRequest) { q.Job = "gone" })
	<-done
	for _, h := range r.Hosts {
		if h.Host != resolver && h.Phase != control.PhaseDone {
			t.Errorf("%+v", h)
		}
	}
	for _, n := range others {
		w.verify(n)
	}
}

// The host that should build a layer's table gets no bytes, because tasks run there. The others do not wait for it.
func TestIndexerIsLate(t *testing.T) {
	w := newWorld(t, 8<<20, 2<<20)
	nodes := w.swarm(4, nil)
	bad := planner.Rendezvous("indexer\x00"+agent.OrderID("late", w.image), []string{"n0", "n1", "n2", "n3"}, 1)[0]
	var good []*node
	tasks := func(bool) {}
	for _, n := range nodes {
		if n.name != bad {
			good = append(good, n)
			continue
		}
		tasks = func(running bool) {
			if err := n.client.Tasks(t.Context(), control.TasksRequest{Job: "other", Running: running}); err != nil {
				t.Fatal(err)
			}
		}
	}
	tasks(true)
	done := make(chan *control.Report, 1)
	go func() {
		r, err := good[0].client.Stage(t.Context(), control.StageRequest{Image: w.image, Job: "late", Hosts: hosts(4), Ready: control.Complete, UID: -1, NoMount: true}, nil)
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	for _, n := range good {
		for {
			s, err := n.client.Status(t.Context(), control.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if len(s.Jobs) == 1 && s.Jobs[0].State.Done() {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		w.verify(n)
	}
	tasks(false)
	if r := <-done; r == nil || r.Failed > 0 {
		t.Errorf("%+v", r)
	}
}

// A mount says that bytes are wrong. Nobody is blamed who has right ones: neither when the mount errs, nor when this host's disk does.
func TestBlame(t *testing.T) {
	w := newWorld(t, 6<<20)
	nodes := w.swarm(2, func(_ int, o *agent.Options) { o.Seed = func(h string) bool { return h == "n0" } })
	w.stage(nodes[0], 2, nil)
	rot := func(n *node, off int64) {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(n.store.Dir(), "blobs", w.layers[0].Digest.Hex()+"*"))
		if err != nil || len(names) != 1 {
			t.Fatal(names, err)
		}
		f, err := os.OpenFile(names[0], os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("rot"), off); err != nil {
			t.Fatal(err)
		}
	}
	complain := func(off int64) (late []control.LatePeer) {
		t.Helper()
		job := func() control.JobStatus {
			s, err := nodes[1].client.Status(t.Context(), control.StatusRequest{})
			if err != nil || len(s.Jobs) != 1 {
				t.Fatal(s.Jobs, err)
			}
			return s.Jobs[0]
		}
		id := agent.OrderID(job().Job, w.image)
		q := control.ReadRequest{Job: id, Image: w.image, Blob: w.layers[0], Range: ztoc.Range{Start: off, End: off + 4096}, Wrong: "a test says so"}
		if err := nodes[1].client.Reject(t.Context(), q); err != nil {
			t.Fatal(err)
		}
		q.Wrong = ""
		b, err := nodes[1].client.Read(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if _, err := io.Copy(io.Discard, b); err != nil {
			t.Fatal(err)
		}
		return job().State.Late
	}
	if late := complain(1 << 20); len(late) > 0 {
		t.Errorf("right bytes: %v", late)
	}
	rot(nodes[1], 1<<20)
	if late := complain(1 << 20); len(late) > 0 {
		t.Errorf("this disk: %v", late)
	}
	w.verify(nodes[1])
	rot(nodes[0], 2<<20)
	rot(nodes[1], 2<<20)
	if late := complain(2 << 20); len(late) != 1 || late[0].Host != "n0" {
		t.Errorf("the other's disk: %v", late)
	}
}

// A host that is gone for good is given up as soon as the others are done.
func TestHostIsGone(t *testing.T) {
	w := newWorld(t, 8<<20, 4<<20)
	w.proxy.SetRate(6 << 20)
	nodes := w.swarm(4, nil)
	cut := make(chan struct{})
	go func() {
		defer close(cut)
		for t.Context().Err() == nil {
			s, err := nodes[2].client.Status(t.Context(), control.StatusRequest{})
			if err == nil && len(s.Jobs) == 1 && s.Jobs[0].State.Bytes.Peer+s.Jobs[0].State.Bytes.Origin > 0 {
				w.net.Cut("n2")
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	r := w.stage(nodes[0], 4, nil)
	<-cut
	if r.Failed != 1 || !strings.Contains(r.Hosts[2].Error, "no answer for") || strings.Contains(r.Hosts[2].Error, "15s") {
		t.Errorf("%+v", r.Hosts)
	}
	for _, n := range []*node{nodes[0], nodes[1], nodes[3]} {
		w.verify(n)
	}
}

// Two of four hosts have a way to the registry, and that is enough.
func TestFewSeeds(t *testing.T) {
	w := newWorld(t, 6<<20, 2<<20)
	seed := func(h string) bool { return h == "n1" || h == "n3" }
	nodes := w.swarm(4, func(_ int, o *agent.Options) { o.Seed = seed })
	r := w.stage(nodes[0], 4, nil)
	if r.Failed > 0 {
		t.Errorf("%d hosts failed", r.Failed)
	}
	for i, h := range r.Hosts {
		if i%2 == 0 && h.Bytes.Origin > 0 {
			t.Errorf("%s has asked the origin", h.Host)
		}
	}
	w.originBytes(1.03)
}

// With the origin gone after one copy has left it, other hosts take that copy.
func TestOriginGone(t *testing.T) {
	w := newWorld(t, 6<<20, 2<<20)
	nodes := w.swarm(3, nil)
	// All have heard of the image, so that any can resolve it; only n0 keeps its bytes.
	w.stage(nodes[0], 3, nil)
	for _, n := range nodes {
		if _, err := n.client.Unstage(t.Context(), control.UnstageRequest{Job: w.job(n), Here: true}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes[1:] {
		w.forgetBytes(n)
	}
	if err := w.proxy.Down(); err != nil {
		t.Fatal(err)
	}
	r := w.stage(nodes[0], 3, func(q *control.StageRequest) { q.Job = "offline" })
	if r.Failed > 0 {
		t.Errorf("%d hosts failed", r.Failed)
	}
	if r.Bytes.Peer < 2*w.size {
		t.Errorf("%d bytes from peers, two images have %d", r.Bytes.Peer, 2*w.size)
	}
}

// job is the name of the only job on a node.
func (w *world) job(n *node) string {
	w.t.Helper()
	s, err := n.client.Status(w.t.Context(), control.StatusRequest{})
	if err != nil || len(s.Jobs) != 1 {
		w.t.Fatal(s.Jobs, err)
	}
	return s.Jobs[0].Job
}

// forgetBytes drops the layers that a node has; what it knows about them stays.
func (w *world) forgetBytes(n *node) {
	w.t.Helper()
	names, err := filepath.Glob(filepath.Join(n.store.Dir(), "blobs", "*"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, name := range names {
		if err := os.Remove(name); err != nil {
			w.t.Fatal(err)
		}
	}
}

// While a job's tasks run, bytes stand still, but for those that somebody reads; afterwards they go on.
func TestJobsComeFirst(t *testing.T) {
	w := newWorld(t, 6<<20, 2<<20)
	nodes := w.swarm(2, func(_ int, o *agent.Options) { o.ServeOthers = true })
	tasks := func(n *node, running bool) {
		t.Helper()
		if err := n.client.Tasks(t.Context(), control.TasksRequest{Job: "other", Running: running}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		tasks(n, true)
	}
	done := make(chan *control.Report, 1)
	go func() {
		r, err := nodes[0].client.Stage(t.Context(), control.StageRequest{Image: w.image, Hosts: hosts(2), Ready: control.Complete, UID: -1, NoMount: true}, nil)
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	time.Sleep(500 * time.Millisecond)
	for _, n := range nodes {
		if s, err := n.client.Status(t.Context(), control.StatusRequest{}); err != nil || s.Bytes.Origin+s.Bytes.Peer > 0 {
			t.Errorf("%s: %+v, %v", n.name, s.Bytes, err)
		}
	}
	for _, n := range nodes {
		tasks(n, false)
	}
	if r := <-done; r == nil || r.Failed > 0 {
		t.Errorf("%+v", r)
	}
	w.originBytes(1.03)
}
