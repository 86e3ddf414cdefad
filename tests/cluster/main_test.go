// Package cluster runs real agents on hosts of a lab (tests/cluster/lab): real links, a real registry, real kills. It needs root
// and the Debian packages that tests/setup installs.
//
// Every test is named after the row of docs/failure-modes.md that it is about, where there is one. No test asserts a time; what
// counts is bytes, requests and results. What takes minutes runs in `make e2e-long` only.
package cluster

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// long says that what takes minutes is wanted too.
var long = os.Getenv("MUSTER_LONG") != ""

// takesLong ends a test that is for make e2e-long.
func takesLong(t testing.TB) {
	t.Helper()
	if !long {
		t.Skip("make e2e-long runs this")
	}
}

// binary is the muster under test, built once.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "muster-cluster-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "muster")
	build := exec.Command("go", "build", "-o", binary, "../../cmd/muster")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building muster: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// A cluster is a lab in a test.
type cluster struct {
	*lab.Lab
	t testing.TB
}

// newCluster makes n hosts behind links of so many Mbit/s, whose agents do not run yet.
func newCluster(t testing.TB, n, rate int) *cluster {
	t.Helper()
	l, err := lab.New(t.Context(), lab.Options{Hosts: n, Rate: rate, Binary: binary, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, h := range l.Hosts {
				b, _ := os.ReadFile(h.Log())
				t.Logf("log of %s:\n%s", h.Name, b[max(0, len(b)-6000):])
			}
		}
		l.Close()
	})
	return &cluster{l, t}
}

// start starts agents, all of them when none is named.
func (c *cluster) start(o lab.StartOptions, hosts ...*lab.Host) {
	c.t.Helper()
	if err := c.Start(c.t.Context(), o, hosts...); err != nil {
		c.t.Fatal(err)
	}
}

// An image is one in the cluster's registry.
type image struct {
	ref    string
	layers []images.Descriptor
	size   int64 // of the layers, bytes
}

// push copies a test image to the registry.
func (c *cluster) push(name string) image {
	c.t.Helper()
	dir, err := images.Get(name)
	if err != nil {
		c.t.Fatal(err)
	}
	return c.pushLayout(name, dir)
}

func (c *cluster) pushLayout(name, dir string) image {
	c.t.Helper()
	ref, err := c.Push(c.t.Context(), name, dir)
	if err != nil {
		c.t.Fatal(err)
	}
	i := image{ref: ref}
	blobs, err := images.ReadLayout(dir)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, b := range blobs {
		i.layers = append(i.layers, b.Descriptor)
		i.size += b.Size
	}
	c.Origin.ResetLog()
	return i
}

// bound is how long a stage may take at most: much longer than it should, so that a busy machine is no failure.
const bound = 5 * time.Minute

// stage has a host stage an image and expects exit code want.
func (c *cluster) stage(at *lab.Host, want int, i image, args ...string) *control.Report {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), bound)
	defer cancel()
	r, took, code, err := at.Stage(ctx, i.ref, args...)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, h := range r.Hosts {
		c.t.Logf("%s %s took %v, bytes store %d peer %d origin %d in %d requests, sent %d, late %v %s", h.Host, h.Phase,
			h.Took.Round(time.Millisecond), h.Bytes.Store, h.Bytes.Peer, h.Bytes.Origin, h.Bytes.OriginRequests, h.Sent, h.Late, h.Error)
	}
	c.t.Logf("%v (makespan %v), slowest ÷ median %.2f, origin %.3f images", took.Round(time.Millisecond), r.Makespan.Round(time.Millisecond), r.Ratio, c.copies(i))
	if code != want {
		c.t.Fatalf("exit code %d, want %d", code, want)
	}
	return r
}

// layerBytes matches what the origin gave of layers.
func layerBytes() registry.Match { return registry.Match{Kind: registry.Blob, Method: http.MethodGet} }

// copies is how many times the image has left the origin.
func (c *cluster) copies(i image) float64 {
	return float64(c.Origin.Bytes(layerBytes())) / float64(i.size)
}

// once fails the test when more than one image's worth of bytes has left the origin.
func (c *cluster) once(i image) {
	c.t.Helper()
	c.atMost(i, 1.03)
}

func (c *cluster) atMost(i image, copies float64) {
	c.t.Helper()
	if got := c.copies(i); got > copies {
		c.t.Errorf("%.3f images left the origin, want at most %.2f", got, copies)
	}
}

// complete fails the test unless the hosts' stores have every layer, byte by byte.
func (c *cluster) complete(i image, hosts ...*lab.Host) {
	c.t.Helper()
	for _, h := range hosts {
		st, err := store.Open(h.Store(), store.Options{Quota: 20 << 30})
		if err != nil {
			c.t.Fatal(err)
		}
		for _, l := range i.layers {
			b, err := st.Blob(ztoc.BlobRef{Digest: ztoc.Digest(l.Digest), Size: l.Size})
			if err != nil {
				c.t.Errorf("%s: %v", h.Name, err)
				continue
			}
			if !b.Complete() {
				c.t.Errorf("%s: layer %s is not complete", h.Name, l.Digest)
			} else if err := b.Verify(c.t.Context()); err != nil {
				c.t.Errorf("%s: layer %s: %v", h.Name, l.Digest, err)
			}
			b.Close()
		}
		st.Close()
	}
}
