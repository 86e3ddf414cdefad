package agent_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// private has the registry ask for credentials, and agents show those of an order.
func (w *world) private() (change func(i int, o *agent.Options), secret map[string]string) {
	w.t.Helper()
	_, err := w.proxy.RequireTokens(registry.TokenOptions{User: "alice", Password: "secret"})
	if err != nil {
		w.t.Fatal(err)
	}
	host, _, _ := strings.Cut(w.image, "/")
	return func(_ int, o *agent.Options) {
		o.Repository = func(ref string, secret map[string]string) (origin.Repository, error) {
			r, err := origin.ParseReference(ref)
			if err != nil {
				return nil, err
			}
			c, err := origin.New(origin.Options{
				MaxWait: 2 * time.Second, ResolveWait: 2 * time.Second,
				Credentials: func(context.Context, string, string) (origin.Credential, error) {
					user, password, _ := strings.Cut(secret[host], ":")
					return origin.Credential{Username: user, Password: password}, nil
				},
			})
			if err != nil {
				return nil, err
			}
			w.t.Cleanup(func() { c.Close() })
			return c.Repository(r)
		}
	}, map[string]string{host: "alice:secret"}
}

// A rogue is a host with a certificate of the cluster and no agent of ours.
type rogue struct {
	t      testing.TB
	client *peer.Client
}

func (w *world) rogue(name string) *rogue {
	c := peer.NewClient(w.net.Host(name), peer.ClientOptions{})
	w.t.Cleanup(func() { c.Close() })
	return &rogue{w.t, c}
}

// reads asks a node for the first bytes of a blob.
func (r *rogue) reads(n *node, d ztoc.Digest, h peer.Hello) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	return r.client.Read(ctx, peer.Host{Name: n.name, Addr: n.name + ":1"}, h, d, make([]byte, 1000), 0)
}

func (r *rogue) refused(n *node, d ztoc.Digest, h peer.Hello) {
	r.t.Helper()
	if err := r.reads(n, d, h); !errors.Is(err, peer.ErrDenied) {
		r.t.Errorf("%s: %v, want denied", n.name, err)
	}
}

// TestPrivateBytes shows who gets the bytes of a private image that is in a store: the hosts of jobs whose user the origin has accepted.
func TestPrivateBytes(t *testing.T) {
	w := newWorld(t, 6<<20, 2<<20)
	change, secret := w.private()
	nodes := w.swarm(3, change)
	r := w.stage(nodes[0], 2, func(q *control.StageRequest) { q.Secret, q.Job = secret, "alice" })
	if r.Failed > 0 {
		t.Fatal("not staged")
	}
	w.originBytes(1.03)
	w.verify(nodes[1])
	layer := w.layers[0]
	d := layer.Digest

	// A member of the cluster, with nothing, and with what it makes up.
	bad := w.rogue("bad")
	bad.refused(nodes[0], d, peer.Hello{})
	spec := func(hosts ...string) *planner.JobSpec {
		s := &planner.JobSpec{Planner: planner.Version, Job: "made up", Image: w.image, Manifest: d, Blobs: []planner.Blob{{BlobRef: layer}}}
		for _, h := range hosts {
			s.Hosts = append(s.Hosts, planner.Host{Name: h, Addr: h + ":1", Seed: true})
		}
		return s
	}
	s := spec("bad", "n0")
	if err := agent.Vouch(bad.client, s); err != nil {
		t.Fatal(err)
	}
	bad.refused(nodes[0], d, peer.Hello{Grant: agent.Shown(s, 0)})

	// It hands over a plan of its own, so that it is a host of a job there.
	encoded, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := peer.Ask(t.Context(), bad.client, peer.Host{Name: "n0", Addr: "n0:1"}, peer.Begin, encoded); err != nil {
		t.Fatal(err)
	}
	bad.refused(nodes[0], d, peer.Hello{Plan: s.ID().String(), Grant: agent.Shown(s, 0)})

	// Another host's word counts: for whom it names, for the layers that it names, for a while.
	s = spec("bad", "n0", "n2")
	if err := agent.Vouch(w.rogue("n2").client, s); err != nil {
		t.Fatal(err)
	}
	if err := bad.reads(nodes[0], d, peer.Hello{Grant: agent.Shown(s, 0)}); err != nil {
		t.Errorf("with a grant: %v", err)
	}
	w.rogue("worse").refused(nodes[0], d, peer.Hello{Grant: agent.Shown(s, 0)})
	bad.refused(nodes[0], w.layers[1].Digest, peer.Hello{Grant: agent.Shown(s, 0)})
	cut := agent.Shown(s, 0)
	cut[10] ^= 1 // in the time of its end
	bad.refused(nodes[0], d, peer.Hello{Grant: cut})

	// A user without credentials of his own gets nothing through a job of n2 and n0.
	r, err = nodes[2].client.Stage(t.Context(), control.StageRequest{
		Image: w.image, Hosts: []string{"n2=n2:1", "n0=n0:1"}, Ready: control.Complete, UID: -1, NoMount: true, Job: "mallory", Timeout: time.Minute,
	}, nil)
	if err != nil || r.Failed != 2 {
		t.Errorf("staged without credentials: %+v, %v", r, err)
	}

	// With credentials the bytes that n0 has come from there.
	w.proxy.ResetLog()
	r, err = nodes[2].client.Stage(t.Context(), control.StageRequest{
		Image: w.image, Hosts: []string{"n2=n2:1", "n0=n0:1"}, Ready: control.Complete, UID: -1, NoMount: true, Job: "again", Secret: secret, Timeout: time.Minute,
	}, nil)
	if err != nil || r.Failed != 0 {
		t.Fatalf("with credentials: %+v, %v", r, err)
	}
	w.originBytes(0.05)
	w.verify(nodes[2])
	if t.Failed() {
		t.Logf("%+v", r)
	}
}

// What the origin gives to anybody, any host of the cluster may have.
func TestPublicBytes(t *testing.T) {
	w := newWorld(t, 4<<20)
	n := w.swarm(1, nil)[0]
	w.stage(n, 1, nil)
	if err := w.rogue("any").reads(n, w.layers[0].Digest, peer.Hello{}); err != nil {
		t.Error(err)
	}
}
