package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Containerd is a containerd with state of its own, as fresh as the day it was installed.
type Containerd struct {
	dir  string
	sock string
	cmd  *exec.Cmd
	done chan struct{}
	n    int
}

// StartContainerd starts one in a new directory beneath the lab's. Stop removes it.
func (l *Lab) StartContainerd(ctx context.Context) (*Containerd, error) {
	dir, err := os.MkdirTemp(l.Dir, "containerd-")
	if err != nil {
		return nil, err
	}
	c := &Containerd{dir: dir, sock: filepath.Join(dir, "c.sock"), done: make(chan struct{})}
	conf := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]\n[grpc]\n  address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), c.sock)
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte(conf), 0o644); err != nil {
		return nil, err
	}
	c.cmd = exec.Command("containerd", "--config", path)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c.cmd.Stdout, c.cmd.Stderr = log, log
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { c.cmd.Wait(); close(c.done) }() //nolint:errcheck // ended by Stop
	l.closers = append(l.closers, c.Stop)
	err = Wait(ctx, 20*time.Second, func() error { return run("ctr", "--address", c.sock, "version") })
	return c, err
}

// Pull pulls and unpacks an image over plain HTTP and says how long that took.
func (c *Containerd) Pull(ref string) (time.Duration, error) {
	start := time.Now()
	err := run("ctr", "--address", c.sock, "-n", "bench", "images", "pull", "--plain-http", ref)
	return time.Since(start), err
}

// Command runs args in a new container of the image.
func (c *Containerd) Command(ref string, args ...string) *exec.Cmd {
	c.n++
	a := []string{"--address", c.sock, "-n", "bench", "run", "--rm", "--net-host", ref, fmt.Sprintf("b%d", c.n)}
	return exec.Command("ctr", append(a, args...)...)
}

// Stop ends containerd and removes everything it had.
func (c *Containerd) Stop() {
	if c.cmd == nil {
		return
	}
	c.cmd.Process.Kill() //nolint:errcheck
	<-c.done
	c.cmd = nil
	exec.Command("sh", "-c", "grep -F "+c.dir+" /proc/mounts | cut -d' ' -f2 | xargs -r umount -l").Run() //nolint:errcheck
	os.RemoveAll(c.dir)
}
