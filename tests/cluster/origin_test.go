package cluster

import (
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/registry"
)

// logIn gives root on a host the credentials of alice.
func (c *cluster) logIn(h *lab.Host) {
	c.t.Helper()
	dir := filepath.Join(h.Dir, ".docker")
	text := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, lab.OriginAddr, base64.StdEncoding.EncodeToString([]byte("alice:secret")))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// Tokens hold a second, a stage takes longer: it goes on with new ones.
func TestF6TokensExpire(t *testing.T) {
	c := newCluster(t, 2, map[bool]int{false: 40, true: 8}[long])
	i, _ := c.made("f6", 15)
	tokens, err := c.RequireTokens(registry.TokenOptions{TTL: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{})
	c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete")
	c.atMost(i, 1.1)
	c.complete(i, c.Hosts...)
	if tokens.Issued() < 2 {
		t.Errorf("%d tokens: none expired, and nothing was tested", tokens.Issued())
	}
}

// The prologs of all hosts ask at once, and the registry is slow: each piece is asked for once, over few connections.
func TestF14AllAskAtOnce(t *testing.T) {
	c := newCluster(t, 4, 200)
	i, _ := c.made("f14", 12)
	if err := c.OriginRate(40); err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{})
	c.Origin.ResetLog()
	codes := make(chan error, len(c.Hosts))
	for _, h := range c.Hosts {
		go func() {
			_, _, code, err := h.Stage(t.Context(), i.ref, "--hosts", c.Names(), "--ready", "complete")
			if err == nil && code != 0 {
				err = fmt.Errorf("%s: exit code %d", h.Name, code)
			}
			codes <- err
		}()
	}
	for range c.Hosts {
		if err := <-codes; err != nil {
			t.Error(err)
		}
	}
	c.once(i)
	if got, most := c.Origin.PeakConns(), 6*len(c.Hosts); got > most {
		t.Errorf("%d connections to the registry at once, want at most %d", got, most)
	}
	c.complete(i, c.Hosts...)
}

// A host that is known to have the image has lost it meanwhile: that costs a question.
func TestF26HolderHasLostIt(t *testing.T) {
	c := newCluster(t, 3, 200)
	i, _ := c.made("f26", 9)
	c.start(lab.StartOptions{})
	lost := c.Hosts[1]
	c.stage(lost, 0, i, "--ready", "complete", "--no-mount")
	time.Sleep(time.Second) // it is announced
	lost.Kill()
	if err := lost.Wipe(); err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{}, lost)
	c.Origin.ResetLog()
	two := []*lab.Host{c.Hosts[0], c.Hosts[2]}
	c.stage(two[0], 0, i, "--hosts", c.Names(two...), "--ready", "complete")
	c.once(i)
	c.complete(i, two...)
}

// An image that is private stays so when it is on the hosts: whoever has no credentials of his own is refused.
func TestF30PrivateImage(t *testing.T) {
	c := newCluster(t, 2, 200)
	i, _ := c.made("f30", 3)
	if _, err := c.RequireTokens(registry.TokenOptions{User: "alice", Password: "secret"}); err != nil {
		t.Fatal(err)
	}
	c.start(lab.StartOptions{})
	h := c.Hosts[0]
	c.stage(h, 4, i, "--hosts", c.Names(), "--ready", "complete", "--job", "nobody")
	c.logIn(h)
	c.stage(h, 0, i, "--hosts", c.Names(), "--ready", "complete", "--job", "alice")
	if err := os.RemoveAll(filepath.Join(h.Dir, ".docker")); err != nil {
		t.Fatal(err)
	}
	c.stage(h, 4, i, "--hosts", c.Names(), "--ready", "complete", "--job", "root")
}

// An agent whose certificate another CA has issued gets nothing, and costs the others little.
func TestF30Stranger(t *testing.T) {
	c := newCluster(t, 3, 200)
	i, _ := c.made("stranger", 6)
	other := filepath.Join(t.TempDir(), "other")
	if out, err := exec.Command(binary, "agent", "init", other, "--hosts", "h2").CombinedOutput(); err != nil {
		t.Fatalf("agent init: %v: %s", err, out)
	}
	stranger := c.Hosts[2]
	c.start(lab.StartOptions{}, c.Hosts[:2]...)
	c.start(lab.StartOptions{Keys: filepath.Join(other, "hosts", "h2")}, stranger)
	r, _, code, err := c.Hosts[0].Stage(t.Context(), i.ref, "--hosts", c.Names(), "--ready", "complete")
	if err != nil || code == 0 || r.Failed != 1 {
		t.Errorf("exit code %d, %v, %+v", code, err, r)
	}
	c.complete(i, c.Hosts[:2]...)
	if b, _ := os.ReadFile(stranger.Log()); strings.Contains(string(b), `"msg":"staged"`) {
		t.Error("the stranger has staged the image")
	}
}
