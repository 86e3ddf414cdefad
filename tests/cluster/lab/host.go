package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A Host is a machine of the cluster.
type Host struct {
	Name string
	Dir  string // what is on the host's disk: store, log, mounts

	lab  *Lab
	pid  int // of the process that keeps the namespaces
	init *exec.Cmd
	done chan struct{}
	addr string
	rate int
	node node // its agent

	behind sync.WaitGroup // readers of commands that go on
}

// hold is what keeps a host's namespaces: process 1 of them, which collects whoever loses his parent.
const hold = `mount --make-rprivate / && mount -t proc proc /proc && hostname "$1" && ip link set lo up || exit 1
echo up; exec 2>/dev/null
while :; do sleep 3600 & wait; done`

func (l *Lab) newHost(name string) (*Host, error) {
	h := &Host{Name: name, Dir: filepath.Join(l.Dir, name), lab: l, done: make(chan struct{})}
	if err := os.MkdirAll(h.Dir, 0o755); err != nil {
		return nil, err
	}
	h.init = exec.Command("bash", "-c", hold, "hold", name)
	h.init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL, Setpgid: true,
	}
	h.init.Stderr = os.Stderr
	out, err := h.init.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := h.init.Start(); err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	h.pid = h.init.Process.Pid
	up, _ := bufio.NewReader(out).ReadString('\n')
	go func() { h.init.Wait(); close(h.done) }() //nolint:errcheck // killed by close
	if up != "up\n" {
		h.close()
		return nil, fmt.Errorf("host %s did not come up", name)
	}
	return h, nil
}

// close ends the host and all that runs on it.
func (h *Host) close() {
	h.init.Process.Kill() //nolint:errcheck
	<-h.done
	h.behind.Wait()
	h.node.ended()
}

// Command is a command on the host, not yet started. Nothing kills it when its parent is killed; it ends with the host.
func (h *Host) Command(name string, args ...string) *exec.Cmd {
	enter := []string{"-t", strconv.Itoa(h.pid), "-m", "-n", "-p", "-u", "--", name}
	cmd := exec.Command("nsenter", append(enter, args...)...)
	cmd.Dir = "/"
	return cmd
}

// Until runs a command that Command has made until it prints the line, or ends. It goes on running after that: see Sweep.
func (h *Host) Until(ctx context.Context, cmd *exec.Cmd, line string) error {
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, h.Sweep)
	defer stop()
	found := make(chan bool, 1)
	h.behind.Go(func() {
		s := bufio.NewScanner(out)
		for s.Scan() {
			if s.Text() == line {
				select {
				case found <- true:
				default:
				}
			}
		}
		cmd.Wait() //nolint:errcheck // what was wanted of it was the line
		found <- false
	})
	if <-found {
		return nil
	}
	return fmt.Errorf("on %s: %s ended without %q: %s", h.Name, name(cmd), line, last(errs.String(), 1000))
}

// name is what a command runs.
func name(cmd *exec.Cmd) string {
	for i, a := range cmd.Args {
		if a == "--" && i+1 < len(cmd.Args) {
			return filepath.Base(cmd.Args[i+1])
		}
	}
	return cmd.Path
}

// Sweep kills every process of the host, its agent too.
func (h *Host) Sweep() {
	// Process 1 of the namespace is spared: kill(-1) reaches all others.
	exec.Command("nsenter", "-t", strconv.Itoa(h.pid), "-m", "-p", "--", "bash", "-c", "kill -KILL -1").Run() //nolint:errcheck // it kills itself too
	h.behind.Wait()
	h.node.ended()
}

// pidOf is the process that nsenter runs for a started Command, as seen from outside.
func pidOf(cmd *exec.Cmd) (int, error) {
	n := cmd.Process.Pid
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", n, n))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) == 0 {
		return 0, errors.New("the command does not run yet")
	}
	return strconv.Atoi(f[0])
}

// connect gives the host a link.
func (l *Lab) connect(h *Host, ip string, rate int) error {
	h.addr = ip
	port := h.port()
	if err := l.sw.ip(
		fmt.Sprintf("link add %s type veth peer name eth0 netns %d", port, h.pid),
		"link set "+port+" master br0", "link set "+port+" up",
	); err != nil {
		return err
	}
	if err := h.ip("addr add "+ip+"/16 dev eth0", "link set eth0 up"); err != nil {
		return err
	}
	return h.Rate(rate)
}

// port is the switch's end of the host's link.
func (h *Host) port() string { return "p" + h.Name }

// ip runs iproute2 commands in the host's network.
func (h *Host) ip(lines ...string) error { return h.batch("ip", lines...) }

func (h *Host) batch(tool string, lines ...string) error {
	return run(exec.Command("nsenter", "-t", strconv.Itoa(h.pid), "-n", tool, "-batch", "-"), strings.Join(lines, "\n")+"\n")
}

// Rate shapes the host's link, in Mbit/s each way; 0 lifts the limit.
func (h *Host) Rate(mbit int) error {
	was := h.rate
	h.rate = mbit
	if mbit == 0 {
		if was == 0 {
			return nil
		}
		return errors.Join(h.batch("tc", "qdisc del dev eth0 root"), h.lab.sw.batch("tc", "qdisc del dev "+h.port()+" root"))
	}
	// A burst of some frames of 64 KiB, which is what the kernel moves at once here; a queue of 50 ms, as a switch has.
	const shape = " root tbf rate %dmbit burst 192kb latency 50ms"
	return errors.Join(
		h.batch("tc", fmt.Sprintf("qdisc replace dev eth0"+shape, mbit)),
		h.lab.sw.batch("tc", fmt.Sprintf("qdisc replace dev "+h.port()+shape, mbit)),
	)
}

// Slow divides the link's rate by factor.
func (h *Host) Slow(factor int) error { return h.Rate(max(1, h.rate/factor)) }

// Cut takes the host's link down: nobody is told. Heal brings it back.
func (h *Host) Cut() error { return h.lab.sw.ip("link set " + h.port() + " down") }

// Heal ends Cut.
func (h *Host) Heal() error { return h.lab.sw.ip("link set " + h.port() + " up") }

// Addr is where the host's agent listens.
func (h *Host) Addr() string { return fmt.Sprintf("%s:%d", h.addr, AgentPort) }

// IP is the host's address.
func (h *Host) IP() string { return h.addr }

// Counters are the bytes that went over the host's link since it was made, headers included.
func (h *Host) Counters() (received, sent int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", h.pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(b)) {
		name, rest, ok := strings.Cut(line, ":")
		if f := strings.Fields(rest); ok && strings.TrimSpace(name) == "eth0" && len(f) > 8 {
			received, _ = strconv.ParseInt(f[0], 10, 64)
			sent, _ = strconv.ParseInt(f[8], 10, 64)
		}
	}
	return received, sent
}
