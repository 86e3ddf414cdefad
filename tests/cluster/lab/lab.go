package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/registry"
)

// Options say what a cluster is made of.
type Options struct {
	Hosts int
	// Rate is that of every link, in Mbit/s each way. 0: not limited.
	Rate int
	// OriginRate is that of the registry's link; 0: Rate.
	OriginRate int
	// Dir has everything; it is removed at the end. Empty: a new directory in TMPDIR.
	Dir string
	// Binary is the muster under test.
	Binary string
	// Registry is a directory of docker-registry that has images already, to be shared by labs one after the other. Empty: a new one.
	Registry string
	// Keep leaves Dir there, for a look at the logs.
	Keep bool
}

// A Lab is a cluster. Close ends everything.
type Lab struct {
	Dir    string
	Hosts  []*Host
	Origin *registry.Proxy // in front of the registry, at OriginAddr

	o      Options
	sw     *Host // the switch
	reg    *Host // where the registry's link ends
	debian *registry.Server
	issued bool // the cluster has a CA
}

const (
	network = "10.78."
	// OriginIP is where the registry's link leads; OriginAddr is the registry as hosts name it.
	OriginIP   = network + "0.1"
	OriginAddr = OriginIP + ":5000"
	// AgentPort is where agents listen.
	AgentPort = 7464
)

// New makes a cluster whose agents do not run yet. It needs root.
func New(ctx context.Context, o Options) (_ *Lab, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab makes network namespaces and mounts: run it as root")
	}
	for _, tool := range []string{"ip", "tc", "nsenter", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w: tests/setup installs it (iproute2, util-linux)", err)
		}
	}
	l := &Lab{Dir: o.Dir, o: o}
	if l.Dir == "" {
		if l.Dir, err = os.MkdirTemp("", "muster-lab-"); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if l.sw, err = l.newHost("switch"); err != nil {
		return nil, err
	}
	if err := l.sw.ip("link add br0 type bridge", "link set br0 up"); err != nil {
		return nil, err
	}
	if l.reg, err = l.newHost("origin"); err != nil {
		return nil, err
	}
	if o.OriginRate == 0 {
		o.OriginRate = o.Rate
	}
	if err := l.connect(l.reg, OriginIP, o.OriginRate); err != nil {
		return nil, err
	}
	for i := range o.Hosts {
		h, err := l.newHost(fmt.Sprintf("h%d", i))
		if err != nil {
			return nil, err
		}
		l.Hosts = append(l.Hosts, h)
		if err := l.connect(h, fmt.Sprintf("%s%d.%d", network, 1+i/250, 1+i%250), o.Rate); err != nil {
			return nil, err
		}
	}
	return l, l.startOrigin()
}

// startOrigin runs the registry and the proxy.
func (l *Lab) startOrigin() (err error) {
	dir := l.o.Registry
	if dir == "" {
		dir = filepath.Join(l.Dir, "registry")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if l.debian, err = registry.StartDebian(dir); err != nil {
		return err
	}
	return l.reg.Inside(func() (err error) {
		l.Origin, err = registry.StartProxyAt(OriginAddr, l.debian.Handler())
		return err
	})
}

// Push copies the image of an OCI layout to the registry and gives its reference there. No link is used.
func (l *Lab) Push(ctx context.Context, name, layout string) (ref string, err error) {
	_, err = registry.Push(ctx, l.debian.Addr+"/"+name+":latest", layout, "")
	return l.Ref(name), err
}

// Ref is an image of the registry as hosts name it.
func (l *Lab) Ref(name string) string { return OriginAddr + "/" + name + ":latest" }

// Direct is the registry's address outside of the cluster, behind no link.
func (l *Lab) Direct() string { return l.debian.Addr }

// Close ends everything.
func (l *Lab) Close() {
	for _, h := range l.Hosts {
		h.close()
	}
	if l.Origin != nil {
		l.Origin.Close()
	}
	if l.debian != nil {
		l.debian.Close()
	}
	for _, h := range []*Host{l.reg, l.sw} {
		if h != nil {
			h.close()
		}
	}
	if !l.o.Keep {
		os.RemoveAll(l.Dir)
	}
}

// RequireTokens has the registry want tokens, from a server beside it.
func (l *Lab) RequireTokens(o registry.TokenOptions) (t *registry.Tokens, err error) {
	o.Addr = OriginIP + ":5001"
	err = l.reg.Inside(func() error {
		t, err = l.Origin.RequireTokens(o)
		return err
	})
	return t, err
}

// OriginSent is the bytes that the registry has sent over its link, headers of all kinds included.
func (l *Lab) OriginSent() int64 { _, tx := l.reg.Counters(); return tx }

// OriginCommand is a command on the machine that the registry's link leads to. SweepOrigin ends what still runs there.
func (l *Lab) OriginCommand(name string, args ...string) *exec.Cmd {
	return l.reg.Command(name, args...)
}
func (l *Lab) SweepOrigin() { l.reg.Sweep() }

// OriginCut takes the registry's link down, without a word to anybody; OriginHeal brings it back.
func (l *Lab) OriginCut() error  { return l.reg.Cut() }
func (l *Lab) OriginHeal() error { return l.reg.Heal() }

// OriginRate shapes the registry's link, in Mbit/s.
func (l *Lab) OriginRate(mbit int) error { return l.reg.Rate(mbit) }

// Rate shapes every link, the registry's too.
func (l *Lab) Rate(mbit int) error {
	for _, h := range append([]*Host{l.reg}, l.Hosts...) {
		if err := h.Rate(mbit); err != nil {
			return err
		}
	}
	return nil
}

// Names are the hosts as --hosts takes them: name=address:port.
func (l *Lab) Names(hosts ...*Host) string {
	if len(hosts) == 0 {
		hosts = l.Hosts
	}
	var list []string
	for _, h := range hosts {
		list = append(list, h.Name+"="+h.Addr())
	}
	return strings.Join(list, ",")
}

// Inside runs f on a thread that is in the host's network: sockets made in it belong there.
func (h *Host) Inside(f func() error) error {
	runtime.LockOSThread()
	away := false
	defer func() {
		if !away {
			runtime.UnlockOSThread()
		}
	}()
	here, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(here)
	there, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", h.pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(there)
	if err := unix.Setns(there, unix.CLONE_NEWNET); err != nil {
		return err
	}
	err = f()
	if back := unix.Setns(here, unix.CLONE_NEWNET); back != nil {
		away = true // the thread stays locked, and ends with its goroutine
		return back
	}
	return err
}

func run(cmd *exec.Cmd, stdin string) error {
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out), stdin)
	}
	return nil
}
