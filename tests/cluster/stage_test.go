package cluster

import (
	"fmt"
	"testing"

	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// TestF25Stage is the whole: one image's worth of bytes leaves the registry, and every host has all of it.
func TestF25Stage(t *testing.T) {
	sizes := []int{4}
	if long {
		sizes = []int{1, 2, 4, 8, 16}
	}
	for _, n := range sizes {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			c := newCluster(t, n, 200)
			i := c.push("debian-python")
			c.start(lab.StartOptions{})
			c.stage(c.Hosts[0], 0, i, "--hosts", c.Names(), "--ready", "complete")
			c.once(i)
			// About one request for 8 MiB of layers, and what it takes to find out what the image is.
			if got, most := c.Origin.Count(layerBytes()), 2*int(i.size>>23)+2*len(i.layers)+10; got > most {
				t.Errorf("%d requests for blobs, want at most %d", got, most)
			}
			c.complete(i, c.Hosts...)
		})
	}
}
