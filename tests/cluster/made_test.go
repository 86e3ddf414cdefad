package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/images"
)

// made pushes an image of so many MiB that do not compress, in two layers, and returns the SHA-256 of its files data/* one behind the other.
func (c *cluster) made(name string, mib int) (image, string) {
	c.t.Helper()
	source := rand.NewChaCha8([32]byte{byte(len(name)), name[0], name[len(name)-1]})
	h := sha256.New()
	dir := c.t.TempDir()
	if err := images.WriteImage(dir, images.Image{
		Config: images.RunConfig{Env: []string{images.PathEnv}, Cmd: []string{"/bin/true"}},
		Layers: []images.Blob{files(source, h, 0, mib/3), files(source, h, 100, mib-mib/3)},
	}); err != nil {
		c.t.Fatal(err)
	}
	return c.pushLayout(name, dir), hex.EncodeToString(h.Sum(nil))
}

// files is a layer of files of 1 MiB, data/100 and so on.
func files(source *rand.ChaCha8, h hash.Hash, from, n int) images.Blob {
	entries := []images.Entry{images.Dir("data")}
	for k := range n {
		b := make([]byte, 1<<20)
		source.Read(b) //nolint:errcheck // never fails
		h.Write(b)
		entries = append(entries, images.File(fmt.Sprintf("data/%03d", from+k), string(b)))
	}
	return images.Layer(entries...)
}

// index pushes an index beside an image, so that it can be mounted before its bytes are there.
func (c *cluster) index(name string) {
	c.t.Helper()
	store := filepath.Join(c.t.TempDir(), "store")
	defer os.RemoveAll(store)
	cmd := exec.Command(binary, "--store-dir", store, "--quiet", "--origin-plain-http", c.Direct(), "index", "push", "--min-layer", "1", c.Direct()+"/"+name+":latest")
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("index push: %v: %s", err, out)
	}
	c.Origin.ResetLog()
}

// A reading is a host's reader of all files of a mount.
type reading struct {
	c    *cluster
	host *lab.Host
	cmd  *exec.Cmd
	out  strings.Builder
	errs strings.Builder
}

// read begins to read every file of a mount, each opened when it is its turn.
func (c *cluster) read(h *lab.Host, mount string) *reading {
	c.t.Helper()
	r := &reading{c: c, host: h}
	r.cmd = h.Command("bash", "-c", `set -o pipefail; cat "$1"/data/* | sha256sum`, "read", mount)
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.errs
	if mount == "" {
		c.t.Fatal("no mount")
	}
	if err := r.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	return r
}

// is waits for the end of the reading, which must have gone well.
func (r *reading) is(sum string) {
	r.c.t.Helper()
	err := r.cmd.Wait()
	if err != nil || !strings.HasPrefix(r.out.String(), sum) {
		r.c.t.Errorf("reading on %s: %v: %s%s, want %s", r.host.Name, err, r.out.String(), r.errs.String(), sum)
	}
}
