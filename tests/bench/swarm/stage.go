package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/registry"
)

// fresh starts agents with empty stores, and drops what is written by then, so that the disk is idle.
func (b *bench) fresh(ctx context.Context, o lab.StartOptions, hosts ...*lab.Host) error {
	if err := b.ended(); err != nil {
		return err
	}
	for _, h := range b.lab.Hosts {
		if err := h.Wipe(); err != nil {
			return err
		}
	}
	if err := b.lab.Start(ctx, o, hosts...); err != nil {
		return err
	}
	if !o.Alone { // let them find each other first: that is no part of a stage
		time.Sleep(500 * time.Millisecond)
	}
	b.lab.Origin.ResetLog()
	return nil
}

// ended ends all agents.
func (b *bench) ended() (err error) {
	for _, h := range b.lab.Hosts {
		h.Kill()
	}
	return nil
}

// A measured is one stage.
type measured struct {
	*control.Report
	took float64 // s, of the command
	cpu  float64 // s, of all agents
	busy float64 // percent of the machine
	wire int64   // bytes that left the origin's link, headers included
	mem  int64   // most memory of an agent, bytes
}

// stage stages with the first of the hosts and wants it to succeed; code is the exit code that is wanted.
func (b *bench) stage(ctx context.Context, image string, code int, hosts []*lab.Host, args ...string) (m measured, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	wire, idle := b.lab.OriginSent(), ticks()
	cpu := usage(b.lab.Hosts)
	r, took, got, err := hosts[0].Stage(ctx, image, append([]string{"--hosts", b.lab.Names(hosts...)}, args...)...)
	if err != nil {
		return m, err
	}
	if got != code {
		return m, fmt.Errorf("exit code %d: %+v", got, r.Hosts)
	}
	m = measured{Report: r, took: took.Seconds(), cpu: (usage(b.lab.Hosts) - cpu).Seconds(), busy: idle.busy(), wire: b.lab.OriginSent() - wire}
	for _, h := range b.lab.Hosts {
		_, mem := h.Usage()
		m.mem = max(m.mem, mem)
	}
	return m, nil
}

// usage is the processor time of all agents that run.
func usage(hosts []*lab.Host) (d time.Duration) {
	for _, h := range hosts {
		if h.Running() {
			cpu, _ := h.Usage()
			d += cpu
		}
	}
	return d
}

// A tick is what /proc/stat says of the machine.
type tick struct{ all, idle int64 }

func ticks() (t tick) {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := bytes.Cut(b, []byte("\n"))
	for i, f := range strings.Fields(string(line)) {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil || i > 8 { // guests are in user already
			continue
		}
		t.all += n
		if i == 4 || i == 5 {
			t.idle += n
		}
	}
	return t
}

// busy is how much of the machine was used since t, percent.
func (t tick) busy() float64 {
	now := ticks()
	return 100 * (1 - float64(now.idle-t.idle)/float64(max(now.all-t.all, 1)))
}

// blobs matches what the origin gave of layers, tables and configs.
func blobs() registry.Match { return registry.Match{Kind: registry.Blob, Method: http.MethodGet} }

// origin records what the registry had to do.
func (b *bench) origin(n int, what string, size int64) {
	b.add(key(n, what+" origin bytes / image"), float64(b.lab.Origin.Bytes(registry.Match{}))/float64(size))
	b.add(key(n, what+" origin requests"), float64(b.lab.Origin.Count(blobs())))
}

// complete measures a first pull, without an index, to the last byte on the last host.
func (b *bench) complete(ctx context.Context, n int) error {
	if err := b.fresh(ctx, lab.StartOptions{}); err != nil {
		return err
	}
	m, err := b.stage(ctx, b.lab.Ref(imageName), 0, b.lab.Hosts, "--ready", "complete")
	if err != nil {
		return err
	}
	b.add(key(n, "complete"), m.took)
	b.add(key(n, "complete slowest / median"), m.Ratio)
	b.add(key(n, "complete CPU per GB"), m.cpu/(float64(b.size)*float64(n)/1e9))
	b.add(key(n, "machine busy"), m.busy)
	b.add(key(n, "agent memory"), float64(m.mem)/1e6)
	b.origin(n, "complete", b.size)
	for _, h := range m.Hosts { // nobody should be: each may cost bytes
		for _, l := range h.Late {
			say("  %s passed over %s: %s", h.Host, l.Host, l.Why)
		}
	}
	return b.check(m.Report)
}

// check wants all bytes on all hosts.
func (b *bench) check(r *control.Report) error {
	for _, h := range r.Hosts {
		if h.Phase != control.PhaseDone || h.Ready != control.Complete {
			return fmt.Errorf("host %s is not complete: %+v", h.Host, h)
		}
	}
	return nil
}

// warm measures a stage with an index and a profile, until the program can start without the network, and that start.
func (b *bench) warm(ctx context.Context, n int) error {
	if err := b.fresh(ctx, lab.StartOptions{}); err != nil {
		return err
	}
	began := time.Now()
	m, err := b.stage(ctx, b.lab.Ref(indexed), 0, b.lab.Hosts, "--ready", "warm")
	if err != nil {
		return err
	}
	b.add(key(n, "warm"), m.took)
	for _, h := range m.Hosts {
		say("  %s: %s", h.Host, phases(h))
	}
	mounts := map[string]string{}
	for _, h := range m.Hosts {
		mounts[h.Host] = h.Mount
	}
	if err := b.everywhere(func(h *lab.Host) error { return b.program(ctx, h, mounts[h.Name]) }); err != nil {
		return err
	}
	b.add(key(n, "first output"), time.Since(began).Seconds())
	// The rest goes on coming. What is asked for now is there already or on its way.
	m, err = b.stage(ctx, b.lab.Ref(indexed), 0, b.lab.Hosts, "--ready", "complete")
	if err != nil {
		return err
	}
	b.add(key(n, "complete after warm"), time.Since(began).Seconds())
	b.origin(n, "warm and complete", b.size+b.indexSize)
	return b.check(m.Report)
}

// phases are what a host did when.
func phases(h control.HostState) string {
	var b strings.Builder
	for _, p := range h.Phases {
		fmt.Fprintf(&b, "%s %.2f–%.2f, ", p.Name, p.Start.Seconds(), p.End.Seconds())
	}
	fmt.Fprintf(&b, "%.1f MB from peers, %.1f MB from the origin", float64(h.Bytes.Peer)/1e6, float64(h.Bytes.Origin)/1e6)
	return b.String()
}

// everywhere does something on all hosts at once.
func (b *bench) everywhere(f func(h *lab.Host) error) error {
	errs := make([]error, len(b.lab.Hosts))
	var wg sync.WaitGroup
	for i, h := range b.lab.Hosts {
		wg.Go(func() { errs[i] = f(h) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// program runs the program in a tree on a host.
func (b *bench) program(ctx context.Context, h *lab.Host, root string) error {
	cmd := h.Command("chroot", append([]string{root}, start...)...)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasSuffix(string(out), "1\n") {
		return fmt.Errorf("%v on %s in %s: %w: %s", start, h.Name, root, err, out)
	}
	return ctx.Err()
}

// alone measures the same stage when every host pulls for itself.
func (b *bench) alone(ctx context.Context, n int) error {
	if err := b.fresh(ctx, lab.StartOptions{Alone: true}); err != nil {
		return err
	}
	began := time.Now()
	if err := b.everywhere(func(h *lab.Host) error {
		r, _, code, err := h.Stage(ctx, b.lab.Ref(imageName), "--hosts", b.lab.Names(h), "--ready", "complete")
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d: %+v", code, r.Hosts)
		}
		return err
	}); err != nil {
		return err
	}
	b.add(key(n, "without peers"), time.Since(began).Seconds())
	b.add(key(n, "without peers origin bytes / image"), float64(b.lab.Origin.Bytes(blobs()))/float64(b.size))
	return nil
}

// dialects are images whose layers have no restart points of their own, or other tables.
var dialects = []string{"zstd-single", "estargz"}

// layers stages images of other dialects on four hosts: bytes and requests are what counts.
func (b *bench) layers(ctx context.Context) error {
	const n = 4
	if err := b.open(ctx, n); err != nil {
		return err
	}
	for _, name := range dialects {
		if err := b.fresh(ctx, lab.StartOptions{}); err != nil {
			return err
		}
		m, err := b.stage(ctx, b.lab.Ref(name), 0, b.lab.Hosts, "--ready", "complete")
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := b.check(m.Report); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		b.add(key(n, name+" complete"), m.took)
		b.origin(n, name, m.Size)
	}
	return nil
}

// pair measures what passing on costs: one host has the image, another gets it over a link without a limit.
func (b *bench) pair(ctx context.Context) error {
	if err := b.open(ctx, 2); err != nil {
		return err
	}
	if err := b.lab.Rate(0); err != nil {
		return err
	}
	for range b.rounds {
		if err := b.fresh(ctx, lab.StartOptions{}); err != nil {
			return err
		}
		one := b.lab.Hosts[:1]
		if _, err := b.stage(ctx, b.lab.Ref(imageName), 0, one, "--ready", "complete", "--no-mount", "--job", "first"); err != nil {
			return err
		}
		m, err := b.stage(ctx, b.lab.Ref(imageName), 0, b.lab.Hosts, "--ready", "complete", "--no-mount", "--job", "second")
		if err != nil {
			return err
		}
		for _, h := range m.Hosts {
			say("  %s: %s", h.Host, phases(h))
		}
		b.add(key(2, "passing on, unshaped"), m.took)
		b.add(key(2, "passing on, CPU per GB"), m.cpu/(float64(b.size)/1e9))
	}
	return nil
}

// path is a file of the bench.
func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }
