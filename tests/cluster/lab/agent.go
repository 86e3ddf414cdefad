package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	benchlab "github.com/muster-hpc/muster/tests/bench/lab"
)

// A node is a host's agent.
type node struct {
	cmd    *exec.Cmd
	pid    int
	done   chan struct{}
	client *control.Client
	log    *os.File
}

// StartOptions change what an agent is started with.
type StartOptions struct {
	// Alone leaves the agent without anybody to join: it learns of others by host lists only.
	Alone bool
	// Set are settings by key, as the config file has them, instead of the lab's.
	Set map[string]string
	// Keys is the directory of the host's certificate and keys; empty: what the lab's CA has issued.
	Keys string
	// Binary is another muster than the lab's.
	Binary string
	// NoWait returns as soon as the process runs: the agent may not answer yet.
	NoWait bool
}

// Issue makes the cluster's CA and a certificate for each host, as an administrator would. Start calls it when nobody has.
func (l *Lab) Issue() error {
	if l.issued {
		return nil
	}
	var names []string
	for _, h := range l.Hosts {
		names = append(names, h.Name)
	}
	out, err := exec.Command(l.o.Binary, "agent", "init", l.cluster(), "--hosts", strings.Join(names, ",")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("muster agent init: %w: %s", err, out)
	}
	l.issued = true
	return nil
}

// cluster is where the administrator keeps what belongs to the cluster.
func (l *Lab) cluster() string { return filepath.Join(l.Dir, "cluster") }

// Start starts the agents of some hosts, all of them when none is named, and waits until they answer.
func (l *Lab) Start(ctx context.Context, o StartOptions, hosts ...*Host) error {
	if len(hosts) == 0 {
		hosts = l.Hosts
	}
	wanted := o.NoWait
	o.NoWait = true
	for _, h := range hosts {
		if err := h.Start(ctx, o); err != nil {
			return err
		}
	}
	if wanted {
		return nil
	}
	for _, h := range hosts {
		if err := h.await(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Start starts the host's agent. What an earlier one has left in its store is there again.
func (h *Host) Start(ctx context.Context, o StartOptions) error {
	if h.node.cmd != nil {
		return fmt.Errorf("host %s: its agent runs", h.Name)
	}
	if err := h.lab.Issue(); err != nil {
		return err
	}
	config, err := h.configure(o)
	if err != nil {
		return err
	}
	binary := h.lab.o.Binary
	if o.Binary != "" {
		binary = o.Binary
	}
	log, err := os.OpenFile(h.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	cmd := h.Command(binary, "agent", "--config", config)
	cmd.Env = h.env()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		log.Close()
		return fmt.Errorf("host %s: %w", h.Name, err)
	}
	n := node{cmd: cmd, done: make(chan struct{}), log: log}
	go func() { cmd.Wait(); close(n.done) }() //nolint:errcheck // its log tells
	if n.client, err = control.Dial(h.Socket()); err != nil {
		return err
	}
	h.node = n
	if err := benchlab.Wait(ctx, 20*time.Second, func() (err error) {
		h.node.pid, err = pidOf(cmd)
		return err
	}); err != nil {
		return fmt.Errorf("host %s: its agent ended at once: %s", h.Name, h.lastWords())
	}
	if o.NoWait {
		return nil
	}
	return h.await(ctx)
}

// await waits until the agent answers.
func (h *Host) await(ctx context.Context) error {
	err := benchlab.Wait(ctx, 60*time.Second, func() error {
		select {
		case <-h.node.done:
			return errors.New("it has ended")
		default:
		}
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := h.node.client.Status(ask, control.StatusRequest{})
		return err
	})
	if err != nil {
		return fmt.Errorf("host %s: its agent does not answer: %w: %s", h.Name, err, h.lastWords())
	}
	return nil
}

// configure writes the agent's configuration.
func (h *Host) configure(o StartOptions) (string, error) {
	keys := o.Keys
	if keys == "" {
		keys = filepath.Join(h.lab.cluster(), "hosts", h.Name)
	}
	set := map[string]string{
		"store.dir":         quote(h.Store()),
		"store.quota":       "20GiB",
		"agent.socket":      quote(h.Socket()),
		"agent.mounts":      quote(filepath.Join(h.Dir, "mounts")),
		"network.control":   quote(h.addr),
		"network.data":      "[" + quote(network+"0.0/16") + "]",
		"network.port":      strconv.Itoa(AgentPort),
		"cluster.keys":      quote(keys),
		"origin.plain-http": "[" + quote(OriginAddr) + "]",
		"log.level":         "info",
		"log.format":        "json",
	}
	if !o.Alone {
		var join []string
		for _, other := range h.lab.Hosts[:min(3, len(h.lab.Hosts))] {
			join = append(join, quote(other.addr))
		}
		set["cluster.join"] = "[" + strings.Join(join, ", ") + "]"
	}
	maps.Copy(set, o.Set)
	var b strings.Builder
	group := ""
	for _, key := range slices.Sorted(maps.Keys(set)) {
		g, leaf, ok := strings.Cut(key, ".")
		if !ok {
			g, leaf = "", key
		}
		if g != group && ok {
			fmt.Fprintf(&b, "%s:\n", g)
			group = g
		}
		if ok {
			leaf = "  " + leaf
		}
		fmt.Fprintf(&b, "%s: %s\n", leaf, set[key])
	}
	path := filepath.Join(h.Dir, "agent.yaml")
	return path, os.WriteFile(path, []byte(b.String()), 0o644)
}

func quote(s string) string { return strconv.Quote(s) }

// Paths of the host: its agent's store, socket and log.
func (h *Host) Store() string  { return filepath.Join(h.Dir, "store") }
func (h *Host) Socket() string { return filepath.Join(h.Dir, "agent.sock") }
func (h *Host) Log() string    { return filepath.Join(h.Dir, "agent.log") }

func (h *Host) env() []string {
	return append(os.Environ(), "MUSTER_AGENT_SOCKET="+h.Socket(), "MUSTER_STORE_DIR="+h.Store(), "HOME="+h.Dir, "MUSTER_ORIGIN_PLAIN_HTTP="+OriginAddr)
}

// Agent is a client of the host's agent.
func (h *Host) Agent() *control.Client { return h.node.client }

// Running reports whether the agent's process is there.
func (h *Host) Running() bool {
	if h.node.cmd == nil {
		return false
	}
	select {
	case <-h.node.done:
		return false
	default:
		return true
	}
}

// Stop ends the agent as systemd would, and says when it had to be killed.
func (h *Host) Stop() error {
	if h.node.cmd == nil {
		return nil
	}
	syscall.Kill(h.node.pid, syscall.SIGTERM) //nolint:errcheck // it may have ended
	select {
	case <-h.node.done:
		h.node.ended()
		return nil
	case <-time.After(40 * time.Second):
		h.Kill()
		return fmt.Errorf("host %s: its agent did not end within 40 s of SIGTERM", h.Name)
	}
}

// Kill ends the agent without a word.
func (h *Host) Kill() {
	if h.node.cmd == nil {
		return
	}
	syscall.Kill(h.node.pid, syscall.SIGKILL) //nolint:errcheck // it may have ended
	h.node.ended()
}

// Signal sends the agent a signal: SIGSTOP has it stall, with its connections open.
func (h *Host) Signal(s syscall.Signal) error {
	err := syscall.Kill(h.node.pid, s)
	if s == syscall.SIGCONT {
		h.node.wake()
	}
	return err
}

// wake wakes nsenter, which stops itself when what it runs is stopped.
func (n *node) wake() { n.cmd.Process.Signal(syscall.SIGCONT) } //nolint:errcheck // it may have ended

func (n *node) ended() {
	if n.cmd == nil {
		return
	}
	n.wake()
	<-n.done
	n.client.Close()
	n.log.Close()
	*n = node{}
}

// Wipe empties the host's store. No agent runs.
func (h *Host) Wipe() error {
	if h.node.cmd != nil {
		return fmt.Errorf("host %s: its agent runs", h.Name)
	}
	return errors.Join(os.RemoveAll(h.Store()), os.RemoveAll(h.Log()))
}

// Usage is the agent's processor time so far and the most memory that it has had, bytes.
func (h *Host) Usage() (cpu time.Duration, memory int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.node.pid))
	if err == nil {
		if i := bytes.LastIndexByte(b, ')'); i > 0 {
			if f := strings.Fields(string(b[i+1:])); len(f) > 12 {
				user, _ := strconv.ParseInt(f[11], 10, 64)
				system, _ := strconv.ParseInt(f[12], 10, 64)
				cpu = time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100 everywhere
			}
		}
	}
	b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/status", h.node.pid))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			memory = kb << 10
		}
	}
	return cpu, memory
}

// Muster runs a muster command on the host and gives what it printed and its exit code.
func (h *Host) Muster(ctx context.Context, args ...string) (stdout, stderr string, code int, err error) {
	cmd := h.Command(h.lab.o.Binary, args...)
	cmd.Env = h.env()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		return "", "", -1, err
	}
	stop := context.AfterFunc(ctx, func() {
		if pid, err := pidOf(cmd); err == nil {
			syscall.Kill(pid, syscall.SIGKILL) //nolint:errcheck
		}
		cmd.Process.Kill() //nolint:errcheck
	})
	defer stop()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		err = nil
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode(), errors.Join(err, ctx.Err())
}

// Stage has the host stage an image with `muster stage --json`, and gives the report also when hosts have failed.
func (h *Host) Stage(ctx context.Context, image string, args ...string) (r *control.Report, took time.Duration, code int, err error) {
	began := time.Now()
	stdout, stderr, code, err := h.Muster(ctx, append([]string{"stage", "--json", image}, args...)...)
	took = time.Since(began)
	if err != nil {
		return nil, took, code, fmt.Errorf("muster stage on %s: %w: %s", h.Name, err, last(stderr, 2000))
	}
	r = new(control.Report)
	if json.Unmarshal([]byte(stdout), r) != nil {
		return nil, took, code, fmt.Errorf("muster stage on %s: exit code %d: %s%s", h.Name, code, last(stdout, 1000), last(stderr, 2000))
	}
	return r, took, code, nil
}

// lastWords are the end of the agent's log.
func (h *Host) lastWords() string {
	b, _ := os.ReadFile(h.Log())
	return last(string(b), 2000)
}

func last(s string, n int) string { return strings.TrimSpace(s[max(0, len(s)-n):]) }
