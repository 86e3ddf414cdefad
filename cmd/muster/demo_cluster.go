package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/tests/registry"
)

// demoHosts is how many hosts the demo's cluster has.
const demoHosts = 4

// demoInstance is what the demo's report takes its hosts for.
const demoInstance = "p5.48xlarge"

// A demoHost is a host of the demo's cluster: an agent on loopback with a store, keys and mounts of its own.
type demoHost struct {
	name, addr string
	dir        string
	log        bytes.Buffer
	cmd        *exec.Cmd
	over       chan struct{} // closed when the agent has ended
}

func (h *demoHost) socket() string { return filepath.Join(h.dir, "agent.sock") }

// cluster stages the image on all hosts of a small cluster as one job, runs the program on each, and shows the
// agents' report.
func (d *demonstration) cluster(ctx context.Context, img origin.Image) (err error) {
	out := d.app.out
	hosts, err := d.startHosts(ctx)
	defer func() { err = errors.Join(err, stopHosts(hosts)) }()
	if err != nil {
		return err
	}
	var list []string
	for _, h := range hosts {
		list = append(list, h.name+"="+h.addr)
	}
	d.proxy.ResetLog()
	stage := func(ready control.Ready) (r control.Report, err error) {
		text, err := d.on(ctx, hosts[0], "stage", d.ref, "--job", "demo", "--hosts", strings.Join(list, ","), "--ready", string(ready), "--json").Output()
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		return r, err
	}
	// However the demo ends, no mount stays.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		text, unstage := d.on(ctx, hosts[0], "unstage", "demo").CombinedOutput()
		if unstage != nil {
			err = errors.Join(err, fmt.Errorf("unstage: %w: %s", unstage, text))
		}
	}()
	began := time.Now()
	r, err := stage(control.Mounted)
	if err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	fmt.Fprintf(out, "   mounted on all hosts after %.2f s; now the program runs on each\n", time.Since(began).Seconds())
	var wg sync.WaitGroup
	errs := make([]error, len(r.Hosts))
	for i, h := range r.Hosts {
		wg.Go(func() {
			cmd := exec.CommandContext(ctx, "chroot", append([]string{h.Mount}, demoProgram...)...)
			cmd.Env = []string{"PATH=/usr/bin:/bin"}
			text, err := cmd.CombinedOutput()
			if err != nil {
				errs[i] = fmt.Errorf("host %s: %w: %s", h.Host, err, text)
				return
			}
			fmt.Fprintf(out, "   %s: %s (%.2f s after the job's start)\n", h.Host, bytes.TrimSpace(text), time.Since(began).Seconds())
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if _, err = stage(control.Complete); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	text, err := d.on(ctx, hosts[0], "report", "demo", "--instance", demoInstance).Output()
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	fmt.Fprintf(out, "\n   What the agents remember of it: 'muster report demo --instance %s'\n%s", demoInstance, text)
	var sent int64
	for _, q := range d.proxy.Log(registry.Match{}) {
		sent += q.Bytes
	}
	fmt.Fprintf(out, "  the registry sent %s for %d hosts; pulled by each host, it would have been %s\n", megabytes(sent), demoHosts, megabytes(demoHosts*img.Size()))
	return nil
}

// on is this program as a client of h's agent.
func (d *demonstration) on(ctx context.Context, h *demoHost, args ...string) *exec.Cmd {
	return d.self(ctx, filepath.Join(h.name, "store"), append([]string{"--agent-socket", h.socket()}, args...)...)
}

func (d *demonstration) startHosts(ctx context.Context) (hosts []*demoHost, err error) {
	if out, err := d.self(ctx, "store", "agent", "init", filepath.Join(d.dir, "cluster"), "--hosts", fmt.Sprintf("host[1-%d]", demoHosts)).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("agent init: %w: %s", err, out)
	}
	for i := range demoHosts {
		h := &demoHost{name: fmt.Sprintf("host%d", i+1), over: make(chan struct{})}
		h.dir = filepath.Join(d.dir, h.name)
		if err := os.Mkdir(h.dir, 0o755); err != nil {
			return hosts, err
		}
		port, err := freePort()
		if err != nil {
			return hosts, err
		}
		h.addr = "127.0.0.1:" + port
		gossip, err := freePort()
		if err != nil {
			return hosts, err
		}
		h.cmd = d.on(context.WithoutCancel(ctx), h, "agent", "--agent-mounts", filepath.Join(h.dir, "mounts"),
			"--cluster-keys", filepath.Join(d.dir, "cluster", "hosts", h.name), "--network-control", "127.0.0.1", "--network-port", port,
			"--network-gossip-port", gossip)
		h.cmd.Stdout, h.cmd.Stderr = &h.log, &h.log
		h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := h.cmd.Start(); err != nil {
			return hosts, err
		}
		hosts = append(hosts, h)
		go func() {
			_ = h.cmd.Wait() // what it says is shown by whoever misses it
			close(h.over)
		}()
	}
	for _, h := range hosts {
		if err := d.await(ctx, h); err != nil {
			return hosts, err
		}
	}
	return hosts, nil
}

// await waits until the agent of h answers.
func (d *demonstration) await(ctx context.Context, h *demoHost) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		if d.on(ctx, h, "status").Run() == nil {
			return nil
		}
		select {
		case <-h.over:
			return fmt.Errorf("the agent of %s has ended: %s", h.name, h.log.Bytes())
		case <-ctx.Done():
			return fmt.Errorf("the agent of %s does not answer: %w", h.name, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func stopHosts(hosts []*demoHost) (err error) {
	for _, h := range hosts {
		err = errors.Join(err, h.cmd.Process.Signal(syscall.SIGTERM))
	}
	for _, h := range hosts {
		select {
		case <-h.over:
		case <-time.After(30 * time.Second):
			err = errors.Join(err, fmt.Errorf("the agent of %s does not end; it is killed", h.name), h.cmd.Process.Kill())
		}
	}
	return err
}

// freePort is a port nobody listens on at this moment.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, errors.Join(err, l.Close())
}
