package agent_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// layer is a tar archive of about n bytes, half of which compress.
func layer(t testing.TB, seed uint64, n int) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; buf.Len() < n; i++ {
		b := make([]byte, 10_000+r.IntN(60_000))
		for k := range b[:len(b)/2] {
			b[k] = byte(r.Uint32())
		}
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%d/f%d", seed, i), Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A world is a registry with an image and a network.
type world struct {
	t      testing.TB
	proxy  *registry.Proxy
	image  string
	size   int64 // of the layers
	layers []ztoc.BlobRef
	net    *peer.Memory
	dir    string
}

func newWorld(t testing.TB, layers ...int) *world {
	t.Helper()
	w := &world{t: t, net: peer.NewMemory(), dir: t.TempDir()}
	s, err := registry.Start(filepath.Join(w.dir, "registry"), registry.Options{Referrers: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if w.proxy, err = registry.StartProxy(registry.Upstream(s.Addr)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.proxy.Close() })
	img := empty.Image
	for i, n := range layers {
		l := layer(t, uint64(i+1), n)
		size, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		w.layers = append(w.layers, ztoc.BlobRef{Digest: ztoc.Digest(d.String()), Size: size})
		w.size += size
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(s.Addr+"/test/image:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	w.image = w.proxy.Addr + "/test/image:1"
	return w
}

// A node is a running agent.
type node struct {
	name   string
	agent  *agent.Agent
	store  *store.Store
	client *control.Client
	stop   func()
}

// start runs an agent.
func (w *world) start(name string, change func(*agent.Options)) *node {
	w.t.Helper()
	dir := filepath.Join(w.dir, name)
	st, err := store.Open(filepath.Join(dir, "store"), store.Options{Quota: 1 << 30})
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := origin.New(origin.Options{MaxWait: 2 * time.Second, ResolveWait: 2 * time.Second})
	if err != nil {
		w.t.Fatal(err)
	}
	o := agent.Options{
		Name: name, Store: st, Network: w.net.Host(name), Listen: []string{name + ":1"}, Socket: filepath.Join(dir, "agent.sock"),
		Repository: func(ref string, _ map[string]string) (origin.Repository, error) {
			r, err := origin.ParseReference(ref)
			if err != nil {
				return nil, err
			}
			return c.Repository(r)
		},
		Patience: 5 * time.Second, Drain: time.Second,
	}
	if os.Getenv("MUSTER_TEST_LOG") != "" {
		o.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", name)
	}
	if change != nil {
		change(&o)
	}
	a, err := agent.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- a.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		w.t.Fatal(err)
	}
	n := &node{name: name, agent: a, store: st}
	if n.client, err = control.Dial(o.Socket); err != nil {
		w.t.Fatal(err)
	}
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			n.client.Close()
			cancel()
			if err := <-done; err != nil {
				w.t.Errorf("agent %s: %v", name, err)
			}
			c.Close()
			st.Close()
		})
	}
	w.t.Cleanup(n.stop)
	return n
}

// swarm runs n agents, n0 to …
func (w *world) swarm(n int, change func(i int, o *agent.Options)) []*node {
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = w.start(fmt.Sprintf("n%d", i), func(o *agent.Options) {
			if change != nil {
				change(i, o)
			}
		})
	}
	return nodes
}

func hosts(n int) (list []string) {
	for i := range n {
		list = append(list, fmt.Sprintf("n%d=n%d:1", i, i))
	}
	return list
}

// stage stages the image on n hosts through the first.
func (w *world) stage(at *node, n int, change func(*control.StageRequest)) *control.Report {
	w.t.Helper()
	q := control.StageRequest{Image: w.image, Hosts: hosts(n), Ready: control.Complete, UID: -1, NoMount: true, Timeout: time.Minute}
	if change != nil {
		change(&q)
	}
	r, err := at.client.Stage(w.t.Context(), q, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, h := range r.Hosts {
		w.t.Logf("%s %s took %v store %d peer %d origin %d (%d req) sent %d late %v %s", h.Host, h.Phase, h.Took.Round(time.Millisecond), h.Bytes.Store, h.Bytes.Peer, h.Bytes.Origin, h.Bytes.OriginRequests, h.Sent, h.Late, h.Error)
	}
	w.t.Logf("makespan %v, slowest ÷ median %.2f, origin %.3f × image, %d blob requests, %d others", r.Makespan.Round(time.Millisecond), r.Ratio,
		float64(w.proxy.Bytes(registry.Match{Kind: registry.Blob}))/float64(w.size), w.proxy.Count(registry.Match{Kind: registry.Blob}),
		len(w.proxy.Log(registry.Match{}))-w.proxy.Count(registry.Match{Kind: registry.Blob}))
	return r
}

// verify looks whether a node has every layer, byte by byte.
func (w *world) verify(n *node) {
	w.t.Helper()
	for _, ref := range w.layers {
		if _, ok := n.store.Find(ref.Digest); !ok {
			w.t.Errorf("%s does not have %s", n.name, ref.Digest)
			continue
		}
		b, err := n.store.Blob(ref)
		if err == nil {
			err = b.Verify(w.t.Context())
			b.Close()
		}
		if err != nil {
			w.t.Errorf("%s: %v", n.name, err)
		}
	}
}

// originBytes checks that the image left the origin once.
func (w *world) originBytes(most float64) {
	w.t.Helper()
	if got := float64(w.proxy.Bytes(registry.Match{Kind: registry.Blob, Where: func(r *registry.Record) bool { return r.Range != "" || r.Bytes > 100e3 }})) / float64(w.size); got > most {
		w.t.Errorf("the image left the origin %.3f times, at most %.3f", got, most)
	}
}

func TestStage(t *testing.T) {
	for _, n := range []int{1, 2, 4, 8, 16} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			w := newWorld(t, 12<<20, 5<<20, 1<<20)
			nodes := w.swarm(n, nil)
			w.proxy.ResetLog()
			r := w.stage(nodes[0], n, nil)
			if r.Failed > 0 {
				t.Fatalf("%d hosts failed", r.Failed)
			}
			w.originBytes(1.03)
			if got, most := w.proxy.Count(registry.Match{Kind: registry.Blob}), 3*n+20; got > most {
				t.Errorf("%d requests for blobs, at most %d", got, most)
			}
			for _, x := range nodes {
				w.verify(x)
			}
		})
	}
}

func TestStageTwiceAsksForNothing(t *testing.T) {
	w := newWorld(t, 6<<20)
	nodes := w.swarm(3, nil)
	w.stage(nodes[0], 3, func(q *control.StageRequest) { q.Job = "a" })
	w.proxy.ResetLog()
	r := w.stage(nodes[1], 3, func(q *control.StageRequest) { q.Job = "b" })
	if got := w.proxy.Bytes(registry.Match{Kind: registry.Blob}); got > 10_000 || r.Bytes.Peer > 100_000 {
		t.Errorf("%d bytes from the origin, %d from peers", got, r.Bytes.Peer)
	}
	// Unstaging leaves no job and no hold.
	for _, job := range []string{"a", "b"} {
		if _, err := nodes[2].client.Unstage(t.Context(), control.UnstageRequest{Job: job}); err != nil {
			t.Error(err)
		}
	}
	for _, n := range nodes {
		if s, err := n.client.Status(t.Context(), control.StatusRequest{}); err != nil || len(s.Jobs) > 0 {
			t.Errorf("%s: %+v, %v", n.name, s.Jobs, err)
		}
	}
}

func TestDeadHost(t *testing.T) {
	w := newWorld(t, 12<<20, 4<<20)
	nodes := w.swarm(4, func(_ int, o *agent.Options) { o.Absent = time.Second })
	nodes[2].stop()
	r := w.stage(nodes[0], 4, nil)
	if r.Failed != 1 {
		t.Errorf("%d hosts failed", r.Failed)
	}
	for i, x := range nodes {
		if i != 2 {
			w.verify(x)
		}
	}
	w.originBytes(1.35)
}

func TestLateHost(t *testing.T) {
	w := newWorld(t, 8<<20, 4<<20)
	w.proxy.SetRate(8 << 20)
	nodes := w.swarm(3, nil)
	done := make(chan *node)
	go func() {
		time.Sleep(time.Second)
		done <- w.start("n3", nil)
	}()
	r := w.stage(nodes[0], 4, nil)
	if r.Failed != 0 {
		t.Errorf("%d hosts failed", r.Failed)
	}
	w.verify(<-done)
}

func TestOriginGoesWhenOneCopyHasLeft(t *testing.T) {
	w := newWorld(t, 8<<20, 4<<20)
	nodes := w.swarm(4, nil)
	w.stage(nodes[0], 1, nil)
	if err := w.proxy.Down(); err != nil {
		t.Fatal(err)
	}
	// The resolver may be another host: it has never heard of the image.
	r := w.stage(nodes[0], 1, func(q *control.StageRequest) { q.Job = "again" })
	if r.Failed != 0 {
		t.Errorf("%d hosts failed", r.Failed)
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t, 1<<20)
	nodes := w.swarm(1, nil)
	_, err := nodes[0].client.Stage(t.Context(), control.StageRequest{Image: w.image, Hosts: []string{"other=other:1"}, UID: -1}, nil)
	var said *control.Error
	if !errors.As(err, &said) || said.Code != 2 {
		t.Errorf("a stage elsewhere: %v", err)
	}
	// An agent that is root reads no path for others.
	if _, err := nodes[0].client.Stage(t.Context(), control.StageRequest{Image: "oci:/root/secret:latest", UID: 4711, NoMount: true}, nil); !errors.Is(err, control.ErrRefused) {
		t.Errorf("a layout for a user: %v", err)
	}
	r := w.stage(nodes[0], 1, func(q *control.StageRequest) { q.Image = w.proxy.Addr + "/test/none:1" })
	if r.Failed != 1 {
		t.Errorf("no such image: %+v", r)
	}
}
