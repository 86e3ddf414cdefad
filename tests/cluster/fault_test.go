package cluster

import (
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// soon does something while a stage is under way: when the swarm has moved a part of the image.
func (c *cluster) soon(i image, f func()) (done chan struct{}) {
	done = make(chan struct{})
	go func() {
		defer close(done)
		for c.copies(i) < 0.3 && c.t.Context().Err() == nil {
			time.Sleep(20 * time.Millisecond)
		}
		f()
	}()
	return done
}

// othersDone fails the test unless all hosts but one are done.
func othersDone(t testing.TB, r *control.Report, bad *lab.Host) {
	t.Helper()
	for _, h := range r.Hosts {
		if h.Host != bad.Name && h.Phase != control.PhaseDone {
			t.Errorf("%s: %s %s", h.Host, h.Phase, h.Error)
		}
	}
}

// An agent is killed in the middle: the others have everything, and little is fetched twice.
func TestKilledInTheMiddle(t *testing.T) {
	takesLong(t)
	c := newCluster(t, 8, 50)
	i, _ := c.made("killed", 24)
	c.start(lab.StartOptions{})
	bad := c.Hosts[2]
	done := c.soon(i, bad.Kill)
	r, _, code, err := c.Hosts[0].Stage(t.Context(), i.ref, "--hosts", c.Names(), "--ready", "complete")
	<-done
	if err != nil || code == 0 || r.Failed != 1 {
		t.Fatalf("exit code %d, %v", code, err)
	}
	othersDone(t, r, bad)
	for _, h := range c.Hosts {
		if h != bad {
			c.complete(i, h)
		}
	}
	c.atMost(i, 1.5)
}

// A host stalls, its connections open: it is passed over, and has the image too when it goes on.
func TestF23StalledPeer(t *testing.T) {
	c := newCluster(t, 4, 50)
	i, _ := c.made("f23", 18)
	c.start(lab.StartOptions{})
	bad := c.Hosts[1]
	done := c.soon(i, func() {
		bad.Signal(syscall.SIGSTOP) //nolint:errcheck
		time.Sleep(6 * time.Second)
		bad.Signal(syscall.SIGCONT) //nolint:errcheck
	})
	c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete")
	<-done
	c.complete(i, c.Hosts...)
	c.atMost(i, 1.75)
}

// A link is cut and healed: as above, and nobody is told.
func TestLinkCutAndHealed(t *testing.T) {
	takesLong(t)
	c := newCluster(t, 8, 50)
	i, _ := c.made("cut", 30)
	c.start(lab.StartOptions{})
	bad := c.Hosts[3]
	done := c.soon(i, func() {
		bad.Cut() //nolint:errcheck
		time.Sleep(8 * time.Second)
		bad.Heal() //nolint:errcheck
	})
	c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete")
	<-done
	c.complete(i, c.Hosts...)
	c.atMost(i, 1.75)
}

// A trickle never trips a timer for silence. Who sends one passes nothing on, and gets the image all the same.
func TestF24TricklingPeer(t *testing.T) {
	takesLong(t)
	c := newCluster(t, 4, 100)
	i, _ := c.made("f24", 6)
	c.start(lab.StartOptions{})
	if err := c.Hosts[2].Slow(20); err != nil {
		t.Fatal(err)
	}
	c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete")
	c.complete(i, c.Hosts...)
	c.atMost(i, 2)
}

// Many stages at once on few hosts: all end, and each image leaves the origin about once.
func TestF29ManyStagesAtOnce(t *testing.T) {
	n, stages := 3, 4
	if long {
		n, stages = 8, 24
	}
	c := newCluster(t, n, 0)
	c.start(lab.StartOptions{})
	codes := make(chan int, stages)
	var all []image
	for k := range stages {
		i, _ := c.made(string(rune('a'+k))+"-f29", 3)
		all = append(all, i)
	}
	for k, i := range all {
		go func() {
			_, _, code, err := c.Hosts[k%n].Stage(t.Context(), i.ref, "--hosts", c.Names(), "--ready", "complete", "--no-mount")
			if err != nil {
				t.Error(err)
			}
			codes <- code
		}()
	}
	for range stages {
		if code := <-codes; code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
	var bytes int64
	for _, i := range all {
		c.complete(i, c.Hosts...)
		bytes += i.size
	}
	if got := c.Origin.Bytes(layerBytes()); float64(got) > 1.1*float64(bytes) {
		t.Errorf("%d bytes of layers left the origin, the images have %d", got, bytes)
	}
}
