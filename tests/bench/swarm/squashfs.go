package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	benchlab "github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// squashfs makes the image's squashfs, as a site would before the job. It says why it cannot.
func (b *bench) squashfs(layout string) string {
	for tool, pkg := range map[string]string{"mksquashfs": "squashfs-tools", "nbdkit": "nbdkit", "nbdfuse": "libnbd-bin", "umoci": "umoci"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Sprintf("%s is missing (Debian package %s)", tool, pkg)
		}
	}
	plain := b.path("plain")
	defer os.RemoveAll(plain)
	bundle, err := benchlab.Unpack(layout, plain)
	if err != nil {
		return err.Error()
	}
	b.squash = b.path("image.squashfs")
	out, err := exec.Command("mksquashfs", bundle.Root(), b.squash, "-comp", "zstd", "-Xcompression-level", "6", "-noappend", "-quiet", "-no-progress").CombinedOutput()
	if err != nil {
		return fmt.Sprintf("mksquashfs: %v: %s", err, out)
	}
	return ""
}

// mountNetwork mounts the file that nbdkit serves: the file as a file by nbdfuse, its squashfs by a loop device.
const mountNetwork = `set -e
mkdir -p "$1/nbd" "$1/root"
nbdfuse -r "$1/nbd/image" nbd://"$2" </dev/null >/dev/null 2>&1 &
for i in $(seq 500); do [ -s "$1/nbd/image" ] && break; sleep 0.01; done
mount -t squashfs -o loop,ro "$1/nbd/image" "$1/root"
shift 2
root=$1; shift
exec chroot "$root" "$@"`

// overNetwork measures the program's first output on all hosts over one squashfs behind the origin's link.
func (b *bench) overNetwork(ctx context.Context, n int) error {
	if b.reason != "" {
		return nil
	}
	if err := b.ended(); err != nil {
		return err
	}
	server := b.lab.OriginCommand("nbdkit", "-f", "-r", "--port", "10809", "file", b.squash)
	if err := server.Start(); err != nil {
		return err
	}
	defer func() { b.lab.SweepOrigin(); server.Wait() }() //nolint:errcheck // killed
	time.Sleep(300 * time.Millisecond)
	sent := b.lab.OriginSent()
	began := time.Now()
	err := b.everywhere(func(h *lab.Host) error {
		dir := filepath.Join(h.Dir, "squashfs")
		args := append([]string{"-c", mountNetwork, "mount", dir, lab.OriginIP, filepath.Join(dir, "root")}, start...)
		return h.Until(ctx, h.Command("bash", args...), "1")
	})
	took := time.Since(began)
	wire := b.lab.OriginSent() - sent
	for _, h := range b.lab.Hosts {
		dir := filepath.Join(h.Dir, "squashfs")
		out, e := h.Command("sh", "-c", "umount "+dir+"/root; umount "+dir+"/nbd; true").CombinedOutput()
		if e != nil {
			err = errors.Join(err, fmt.Errorf("umount on %s: %w: %s", h.Name, e, out))
		}
		h.Sweep()
	}
	if err != nil {
		return err
	}
	b.add(key(n, "squashfs first output"), took.Seconds())
	b.add(key(n, "squashfs origin bytes / image"), float64(wire)/float64(b.size))
	return nil
}
