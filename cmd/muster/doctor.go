package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/jobhooks/slurm"
	"github.com/muster-hpc/muster/peer"
)

func (a *app) doctorCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "doctor [IMAGE…]",
		Short: "what on this node keeps jobs from starting in images, each with its remedy",
		Long: `Looks at this node as an administrator would: kernel, FUSE, limits, clock, store, keys, the agent, and Slurm's configuration
where there is one. It changes nothing. Of each IMAGE it asks the registry for its manifest, from this node and as this user.

The exit code is 1 when something fails, 0 when there are warnings at most.`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.doctor(cmd.Context(), args) },
	}
	a.jsonFlag(c)
	return c
}

// A checked is one thing that doctor has looked at.
type checked struct {
	What   string `json:"what"`
	Level  string `json:"level"` // ok, or as finding has it
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

const levelOK = "ok"

// A doctor collects.
type doctor struct{ all []checked }

func (d *doctor) ok(what, format string, args ...any) {
	d.all = append(d.all, checked{what, levelOK, fmt.Sprintf(format, args...), ""})
}

func (d *doctor) bad(level, what, remedy, format string, args ...any) {
	d.all = append(d.all, checked{what, level, fmt.Sprintf(format, args...), remedy})
}

func (a *app) doctor(ctx context.Context, images []string) error {
	var d doctor
	d.kernel(ctx)
	d.limits()
	d.clock()
	a.doctorStore(&d)
	name := a.doctorKeys(&d)
	a.doctorAgent(ctx, &d, name)
	a.doctorSlurm(&d)
	for _, image := range images {
		a.doctorImage(ctx, &d, image)
	}
	if err := a.result(d.all, func(w io.Writer) { printChecked(w, d.all) }); err != nil {
		return err
	}
	for _, c := range d.all {
		if c.Level == levelFail {
			return &coded{exitOther, errSaid}
		}
	}
	return nil
}

func printChecked(w io.Writer, all []checked) {
	for _, c := range all {
		fmt.Fprintf(w, "%-4s  %-9s  %s\n", c.Level, c.What, c.Text)
		if c.Remedy != "" {
			fmt.Fprintf(w, "%15s  -> %s\n", "", c.Remedy)
		}
	}
}

func (d *doctor) kernel(ctx context.Context) {
	f := probe(ctx)
	if f.Fuse {
		d.ok("fuse", "/dev/fuse can be opened, kernel %s", f.Kernel)
	} else {
		d.bad(levelFail, "fuse", "modprobe fuse, and add it to /etc/modules-load.d", "/dev/fuse cannot be opened: no image can be mounted")
	}
	if f.Overlay {
		d.ok("overlay", "the kernel has overlayfs")
	} else {
		d.bad(levelWarn, "overlay", "modprobe overlay", "no overlayfs: programs cannot write into their images")
	}
	most := strings.TrimSpace(string(readOr("/proc/sys/user/max_user_namespaces")))
	switch {
	case most == "0" || !f.UserNS:
		d.bad(levelFail, "userns", "sysctl -w user.max_user_namespaces=100000 kernel.unprivileged_userns_clone=1", "user namespaces are switched off: no user's task can enter an image")
	case strings.TrimSpace(string(readOr("/proc/sys/kernel/unprivileged_userns_clone"))) == "0":
		d.bad(levelFail, "userns", "sysctl -w kernel.unprivileged_userns_clone=1", "ordinary users may not make user namespaces: none of their tasks can enter an image")
	case strings.TrimSpace(string(readOr("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"))) == "1":
		d.bad(levelFail, "userns", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile for muster", "AppArmor keeps users from making user namespaces: none of their tasks can enter an image")
	default:
		d.ok("userns", "user namespaces can be made, %s at most", most)
	}
}

// openFiles is what an agent with many peers and blobs has open.
const openFiles = 8192

func (d *doctor) limits() {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		d.bad(levelWarn, "limits", "", "the limit of open files: %v", err)
	} else if l.Max < openFiles {
		d.bad(levelWarn, "limits", "LimitNOFILE=65536 in the agent's unit", "at most %d open files: large jobs and images of many layers need %d", l.Max, openFiles)
	} else {
		d.ok("limits", "%d open files", l.Max)
	}
}

func (d *doctor) clock() {
	state, err := unix.Adjtimex(&unix.Timex{})
	switch {
	case time.Now().Year() < 2025:
		d.bad(levelFail, "clock", "set the clock, and run chrony", "it is %s here: no certificate is valid yet", time.Now().UTC().Format(time.RFC3339))
	case err != nil || state == unix.TIME_ERROR:
		d.bad(levelWarn, "clock", "run chrony or systemd-timesyncd", "the clock (%s) is not synchronised: certificates and logins depend on it", time.Now().UTC().Format(time.RFC3339))
	default:
		d.ok("clock", "synchronised")
	}
}

// roomFor is what an image or two take.
const roomFor = 20 << 30

func (a *app) doctorStore(d *doctor) {
	dir, err := a.cfg.storeDir()
	if err != nil {
		d.bad(levelFail, "store", "set store.dir", "%v", err)
		return
	}
	at := dir
	for { // it is made when it is first used
		if _, err := os.Stat(at); err == nil || at == "/" || at == "." {
			break
		}
		at = filepath.Dir(at)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		d.bad(levelFail, "store", "set store.dir to a directory on a local disk", "%s: %v", dir, err)
		return
	}
	if _, err := os.Stat(dir); err == nil {
		s, err := store.Open(dir, store.Options{Quota: int64(a.cfg.Store.Quota), AllowNetwork: a.cfg.Store.AllowNetworkFS})
		if errors.Is(err, fs.ErrPermission) {
			d.ok("store", "%s is another user's", dir)
			return
		}
		if err != nil {
			d.bad(levelFail, "store", "set store.dir to a directory on a local disk", "%v", err)
			return
		}
		_ = s.Close()
	}
	free := int64(st.Bavail) * st.Bsize
	switch {
	case st.Type == unix.TMPFS_MAGIC:
		d.bad(levelWarn, "store", "set store.dir to a directory on a disk", "%s is on tmpfs: what images take, jobs do not have", dir)
	case free < roomFor:
		d.bad(levelWarn, "store", "free space, or set store.dir to a larger disk", "%s: %s free: images are fetched again and again", dir, megabytes(free))
	default:
		d.ok("store", "%s: %s free", dir, megabytes(free))
	}
}

// expiry is how early a certificate's end is told.
const expiry = 30 * 24 * time.Hour

// doctorKeys looks at who this node is, and gives its name.
func (a *app) doctorKeys(d *doctor) string {
	const remedy = "'muster agent init' on the administrator's host makes them; copy hosts/NAME here"
	id, err := peer.LoadIdentity(a.cfg.Cluster.Keys)
	switch {
	case errors.Is(err, fs.ErrPermission):
		d.bad(levelWarn, "keys", "run doctor as root", "%v", err)
		return ""
	case err != nil:
		d.bad(levelFail, "keys", remedy, "%v", err)
		return ""
	}
	left := time.Until(id.Expires())
	switch {
	case left < 0:
		d.bad(levelFail, "keys", remedy, "the certificate of %s ended at %s", id.Name(), id.Expires().UTC().Format(time.RFC3339))
	case left < expiry:
		d.bad(levelWarn, "keys", remedy, "the certificate of %s ends in %d days", id.Name(), int(left.Hours()/24))
	default:
		d.ok("keys", "this node is %s until %s", id.Name(), id.Expires().UTC().Format(time.DateOnly))
	}
	if a.cfg.Agent.Name != "" && a.cfg.Agent.Name != id.Name() {
		d.bad(levelFail, "keys", "leave agent.name empty, or copy the right keys here", "agent.name is %s, the certificate is of %s", a.cfg.Agent.Name, id.Name())
	}
	return id.Name()
}

func (a *app) doctorAgent(ctx context.Context, d *doctor, name string) {
	const remedy = "systemctl enable --now muster-agent, and look at 'journalctl -u muster-agent'"
	ctx, cancel := context.WithTimeout(ctx, agentBound)
	defer cancel()
	c, err := a.agentClient()
	if err != nil {
		d.bad(levelFail, "agent", remedy, "%v", err)
		return
	}
	defer c.Close()
	s, err := c.Status(ctx, control.StatusRequest{})
	switch {
	case err != nil:
		d.bad(levelFail, "agent", remedy, "%v", err)
	case s.Draining:
		d.bad(levelWarn, "agent", remedy, "the agent is being stopped")
	case s.Version != version:
		d.bad(levelWarn, "agent", "restart the agent: mounts stay", "the agent is muster %s, this is %s", s.Version, version)
	case name != "" && s.Host != name:
		d.bad(levelFail, "agent", "restart the agent", "the agent calls itself %s, the keys are of %s", s.Host, name)
	default:
		d.ok("agent", "%s answers on %s, up %s, %d other agents known", s.Host, a.cfg.Agent.Socket, s.Up.Round(time.Second), max(0, len(s.Peers)-1))
	}
}

func (a *app) doctorSlurm(d *doctor) {
	file := slurmConf()
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		d.ok("slurm", "no %s: not a Slurm node", file)
		return
	}
	if err != nil {
		d.bad(levelWarn, "slurm", "", "%v", err)
		return
	}
	stack := slurm.Setting(b, "PlugStackConfig")
	if stack == "" {
		stack = filepath.Join(filepath.Dir(file), "plugstack.conf")
	}
	executable := func(p string) error {
		err := unix.Access(p, unix.X_OK)
		if err != nil {
			return &os.PathError{Op: "execute", Path: p, Err: err}
		}
		return nil
	}
	readable := func(p string) error { _, err := os.Stat(p); return err }
	found := slurm.Check(string(b), string(readOr(stack)), executable, readable)
	for _, f := range found {
		d.bad(f.Level, "slurm", f.Remedy, "%s", f.Text)
	}
	if len(found) == 0 {
		d.ok("slurm", "%s and %s have what it takes", file, stack)
	}
}

func (a *app) doctorImage(ctx context.Context, d *doctor, image string) {
	began := time.Now()
	repo, err := a.repository(image)
	if err == nil {
		_, err = repo.Resolve(ctx, "")
	}
	if err != nil {
		d.bad(levelFail, "registry", nextStep(err), "%v", err)
		return
	}
	d.ok("registry", "%s answers, %.2f s", image, time.Since(began).Seconds())
}
