package runtime

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The part of OCI's runtime-spec config.json that is used here.
type (
	ociSpec struct {
		Version string     `json:"ociVersion"`
		Process ociProcess `json:"process"`
		Root    ociRoot    `json:"root"`
		Mounts  []ociMount `json:"mounts"`
		Linux   ociLinux   `json:"linux"`
	}
	ociProcess struct {
		Terminal        bool                `json:"terminal"`
		ConsoleSize     *ociSize            `json:"consoleSize,omitempty"`
		User            ociUser             `json:"user"`
		Args            []string            `json:"args"`
		Env             []string            `json:"env"`
		Cwd             string              `json:"cwd"`
		Capabilities    map[string][]string `json:"capabilities"`
		NoNewPrivileges bool                `json:"noNewPrivileges"`
	}
	ociSize struct {
		Height uint16 `json:"height"`
		Width  uint16 `json:"width"`
	}
	ociUser struct {
		UID    int   `json:"uid"`
		GID    int   `json:"gid"`
		Groups []int `json:"additionalGids,omitempty"`
	}
	ociRoot struct {
		Path     string `json:"path"`
		ReadOnly bool   `json:"readonly"`
	}
	ociMount struct {
		Destination string   `json:"destination"`
		Type        string   `json:"type"`
		Source      string   `json:"source"`
		Options     []string `json:"options"`
	}
	ociLinux struct {
		Namespaces    []ociNamespace `json:"namespaces"`
		UIDMappings   []ociMapping   `json:"uidMappings,omitempty"`
		GIDMappings   []ociMapping   `json:"gidMappings,omitempty"`
		MaskedPaths   []string       `json:"maskedPaths"`
		ReadonlyPaths []string       `json:"readonlyPaths"`
	}
	ociNamespace struct {
		Type string `json:"type"`
	}
	ociMapping struct {
		Container int `json:"containerID"`
		Host      int `json:"hostID"`
		Size      int `json:"size"`
	}
)

// containerCapabilities are docker's default ones, less CAP_MKNOD: no device cgroup guards the devices.
var containerCapabilities = []int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW, unix.CAP_SYS_CHROOT, unix.CAP_AUDIT_WRITE, unix.CAP_SETFCAP,
}

var capabilityNames = map[int]string{
	unix.CAP_CHOWN: "CAP_CHOWN", unix.CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE", unix.CAP_FOWNER: "CAP_FOWNER", unix.CAP_FSETID: "CAP_FSETID",
	unix.CAP_KILL: "CAP_KILL", unix.CAP_SETGID: "CAP_SETGID", unix.CAP_SETUID: "CAP_SETUID", unix.CAP_SETPCAP: "CAP_SETPCAP",
	unix.CAP_NET_BIND_SERVICE: "CAP_NET_BIND_SERVICE", unix.CAP_NET_RAW: "CAP_NET_RAW", unix.CAP_SYS_CHROOT: "CAP_SYS_CHROOT",
	unix.CAP_AUDIT_WRITE: "CAP_AUDIT_WRITE", unix.CAP_SETFCAP: "CAP_SETFCAP",
}

// spec is the config.json for p. The root is complete: no mount is left to the runtime but one of /dev
// on itself, which tells it not to make devices. There is no PID namespace: the stage's is used, so
// that a signal ends a command that does not handle it, as outside, which it would not do to process 1.
func (s *stage) spec(p process) ociSpec {
	spec := ociSpec{
		Version: "1.0.2",
		Process: ociProcess{
			Terminal: s.o.Terminal,
			User:     ociUser{p.uid, p.gid, p.groups},
			Args:     append([]string{p.path}, p.args[1:]...),
			Env:      p.env,
			Cwd:      p.dir,
		},
		Root:   ociRoot{s.root, s.o.ReadOnly},
		Mounts: []ociMount{{"/dev", "bind", filepath.Join(s.root, "dev"), []string{"rbind"}}},
		Linux: ociLinux{
			Namespaces:    []ociNamespace{{"mount"}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
	if s.o.Terminal {
		// Whoever sets it later is too late for a command that asks at once.
		if ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ); err == nil {
			spec.Process.ConsoleSize = &ociSize{ws.Row, ws.Col}
		}
	}
	if s.user {
		// The only identity there is; runc insists on being root of its user namespace.
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, ociNamespace{"user"})
		spec.Linux.UIDMappings = []ociMapping{{0, s.uid, 1}}
		spec.Linux.GIDMappings = []ociMapping{{0, s.gid, 1}}
		spec.Process.User = ociUser{}
		spec.Process.NoNewPrivileges = true
		spec.Process.Capabilities = map[string][]string{}
		return spec
	}
	var names []string
	for _, c := range containerCapabilities {
		names = append(names, capabilityNames[c])
	}
	spec.Process.Capabilities = map[string][]string{"bounding": names, "permitted": names, "effective": names}
	return spec
}

func (s *stage) startRunc(binary string, p process) (running, error) {
	// As if rootless, so that cgroups it may not make are no error.
	return s.startOCI(binary, p, "--rootless=true")
}

func (s *stage) startCrun(binary string, p process) (running, error) {
	// crun refuses the two hierarchies of a hybrid host, also when it is to leave both alone.
	if _, err := os.Stat("/sys/fs/cgroup/unified/cgroup.procs"); err == nil {
		_ = unix.Mount("/sys/fs/cgroup/unified", "/sys/fs/cgroup", "", unix.MS_BIND, "")
	}
	return s.startOCI(binary, p, "--cgroup-manager=disabled")
}

// startOCI lets an OCI runtime start p detached: then the command's process is the stage's child, and
// nothing stands between the command and its signals and exit code.
func (s *stage) startOCI(binary string, p process, global ...string) (r running, err error) {
	if err := hideCgroups(); err != nil {
		return r, err
	}
	b, err := json.Marshal(s.spec(p))
	if err != nil {
		return r, err
	}
	bundle, state := filepath.Join(s.dir, "bundle"), filepath.Join(s.dir, "state")
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o600); err != nil {
		return r, err
	}
	log, pidFile := filepath.Join(bundle, "log"), filepath.Join(bundle, "pid")
	args := append(global, "--root", state, "--log", log, "--log-format", "json",
		"run", "--detach", "--bundle", bundle, "--pid-file", pidFile)
	received := make(chan *os.File, 1)
	if s.o.Terminal {
		path := filepath.Join(bundle, "console")
		console, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return r, err
		}
		defer console.Close()
		args = append(args, "--console-socket", path)
		go func() { received <- receiveConsole(console) }()
	}
	cmd := exec.Command(binary, append(args, "muster")...)
	cmd.Env = os.Environ()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	pid, err := s.forkPlain(cmd)
	if err != nil {
		return r, err
	}
	// Detached, it ends as soon as the command runs, and has sent the terminal by then.
	if code := waitChild(pid); code != 0 {
		return r, runtimeError(binary, log, code)
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return r, err
	}
	r.pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || r.pid <= 1 {
		return r, fmt.Errorf("%s wrote no process number", binary)
	}
	r.ends = r.pid
	if s.o.Terminal {
		if r.terminal = <-received; r.terminal == nil {
			return r, fmt.Errorf("%s sent no terminal", binary)
		}
	}
	return r, nil
}

func receiveConsole(l *net.UnixListener) *os.File {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil
	}
	defer c.Close()
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil
	}
	control, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(control) != 1 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil || len(fds) != 1 {
		return nil
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "terminal")
}

// runtimeError is what the runtime wrote to its log, or that it wrote nothing.
func runtimeError(binary, log string, code int) error {
	b, _ := os.ReadFile(log)
	var last string
	for line := range strings.Lines(string(b)) {
		var l struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Level == "error" {
			last = l.Msg
		}
	}
	name := filepath.Base(binary)
	switch {
	case last == "":
		return fmt.Errorf("%s ended with code %d", name, code)
	case strings.Contains(last, "exec format error") || strings.Contains(last, "permission denied"):
		return &CommandError{126, name + ": " + last}
	case strings.Contains(last, "no such file or directory") && strings.Contains(last, "exec "):
		return &CommandError{127, name + ": " + last + " (is its interpreter in the image?)"}
	}
	return fmt.Errorf("%s: %s", name, last)
}

// hideCgroups makes the cgroup file systems read-only in the stage's mount namespace. A runtime that may
// not make a cgroup leaves the command in the caller's, where it is accounted, and nothing is left when
// everything is killed.
func hideCgroups() error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 || (f[4] != "/sys/fs/cgroup" && !strings.HasPrefix(f[4], "/sys/fs/cgroup/")) {
			continue
		}
		at, err := openPath(unix.AT_FDCWD, f[4], 0)
		if err != nil {
			continue // hidden by another mount, so hidden from the runtime too
		}
		err = makeReadOnly(at)
		_ = at.Close()
		if err != nil {
			return fmt.Errorf("making %s read-only: %w", f[4], err)
		}
	}
	return nil
}
