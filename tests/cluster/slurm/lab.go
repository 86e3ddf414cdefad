// Package slurm brings up a real Slurm on the hosts of a lab (tests/cluster/lab): slurmctld on the first, slurmd and an agent on each of the
// others, munge between them, and muster put in by 'muster install slurm'.
//
//  1. All hosts share the machine's file system, so the cluster's files (slurm.conf, plug-in, scripts, munge's socket) are in one directory.
//     What each has for itself, its agent's configuration and the notes of its hooks, is beneath one path that is another directory in
//     each host's mount namespace.
//  2. Every host has an /etc/hosts and an /etc/passwd of the lab's, with the users that jobs run as.
//  3. The daemons are processes of their hosts: they end with the lab, however it ends.
//
// Packages: slurmctld, slurmd, slurm-client, munge (tests/setup). The plug-in is built with cc against libslurm-dev.
package slurm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/muster-hpc/muster/tests/cluster/lab"
)

// A User is somebody whom jobs run as. The number is also that of the group.
type User struct {
	Name string
	ID   int
	Home string
}

// A Cluster is a Slurm. Close ends it.
type Cluster struct {
	*lab.Lab
	Ctl   *lab.Host
	Nodes []*lab.Host
	Users []User

	etc    string // slurm.conf and the like
	here   string // another directory on each host
	muster string
	plugin string
}

// Options say what a cluster is made of.
type Options struct {
	Nodes  int
	Dir    string
	Muster string // the program, readable for everybody
	Plugin string // the directory that BuildPlugin has filled
	Conf   string // lines for slurm.conf, before muster's own
	// Rates of the links, Mbit/s; 0: not limited.
	Rate, OriginRate int
}

// BuildPlugin builds the plug-in and the TaskProlog in a directory, as make does.
func BuildPlugin(top, to string) error {
	cmd := exec.Command("make", "-C", top, "plugin", "PLUGIN="+to)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the plug-in (tests/setup installs gcc and libslurm-dev): %w: %s", err, out)
	}
	return nil
}

// New brings a cluster up: all nodes idle, all agents answering.
func New(ctx context.Context, o Options) (_ *Cluster, err error) {
	for _, tool := range []string{"slurmctld", "slurmd", "srun", "munged", "setpriv"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w: tests/setup installs slurmctld, slurmd, slurm-client and munge", err)
		}
	}
	l, err := lab.New(ctx, lab.Options{Hosts: o.Nodes + 1, Rate: o.Rate, OriginRate: o.OriginRate, Binary: o.Muster, Dir: o.Dir})
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		Lab: l, Ctl: l.Hosts[0], Nodes: l.Hosts[1:], etc: filepath.Join(l.Dir, "etc"), here: filepath.Join(l.Dir, "here"), muster: o.Muster, plugin: o.Plugin,
	}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if err := os.MkdirAll(filepath.Join(l.Dir, "home"), 0o755); err != nil {
		return nil, err
	}
	for i, name := range []string{"ada", "bob"} {
		u := User{name, 4711 + i, filepath.Join(l.Dir, "home", name)}
		if err := errors.Join(os.MkdirAll(u.Home, 0o700), os.Chown(u.Home, u.ID, u.ID)); err != nil {
			return nil, err
		}
		c.Users = append(c.Users, u)
	}
	for _, d := range []string{c.etc, c.here, filepath.Join(l.Dir, "munge"), filepath.Join(l.Dir, "state")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := c.hostFiles(); err != nil {
		return nil, err
	}
	if err := c.configure(o); err != nil {
		return nil, err
	}
	if err := c.startDaemons(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// hostFiles gives every host the lab's names and users, and its own directory at the common path.
func (c *Cluster) hostFiles() error {
	hosts := "127.0.0.1 localhost\n"
	for _, h := range c.Hosts {
		hosts += h.IP() + " " + h.Name + "\n"
	}
	files := map[string]string{"hosts": hosts}
	for _, f := range []string{"passwd", "group"} {
		b, err := os.ReadFile("/etc/" + f)
		if err != nil {
			return err
		}
		files[f] = string(b)
	}
	for _, u := range c.Users {
		files["passwd"] += fmt.Sprintf("%s:x:%d:%d::%s:/bin/bash\n", u.Name, u.ID, u.ID, u.Home)
		files["group"] += fmt.Sprintf("%s:x:%d:\n", u.Name, u.ID)
	}
	for f, text := range files {
		if err := os.WriteFile(filepath.Join(c.etc, f), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, h := range c.Hosts {
		script := fmt.Sprintf("set -e; mount --bind %s %s\n", h.Dir, c.here)
		for f := range files {
			script += fmt.Sprintf("mount --bind %s /etc/%s\n", filepath.Join(c.etc, f), f)
		}
		if out, err := h.Command("sh", "-c", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", h.Name, err, out)
		}
	}
	return nil
}

// configure writes slurm.conf, and has muster install itself into it.
func (c *Cluster) configure(o Options) error {
	var names []string
	nodes := ""
	for _, h := range c.Nodes {
		names = append(names, h.Name)
		nodes += fmt.Sprintf("NodeName=%s NodeAddr=%s CPUs=4 RealMemory=2000 State=UNKNOWN\n", h.Name, h.IP())
	}
	conf := strings.NewReplacer("@DIR@", c.Dir, "@CTL@", c.Ctl.Name, "@IP@", c.Ctl.IP(), "@NODES@", strings.Join(names, ",")).Replace(`ClusterName=lab
SlurmctldHost=@CTL@(@IP@)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=@DIR@/munge/sock
CredType=cred/munge
StateSaveLocation=@DIR@/state
SlurmdSpoolDir=@DIR@/%n/spool
SlurmctldPidFile=@DIR@/slurmctld.pid
SlurmdPidFile=@DIR@/%n/slurmd.pid
SlurmctldLogFile=@DIR@/slurmctld.log
SlurmdLogFile=@DIR@/%n/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=nohold_on_prolog_fail,sched_interval=2,bf_interval=2
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=120
InactiveLimit=0
KillWait=5
PlugStackConfig=@DIR@/etc/plugstack.conf
PartitionName=batch Nodes=@NODES@ Default=YES MaxTime=60 State=UP
`) + nodes + o.Conf
	// Naming the plug-in keeps slurmd from looking for a control group hierarchy that these hosts do not show.
	files := map[string]string{"slurm.conf": conf, "cgroup.conf": "CgroupPlugin=cgroup/v1\n", "plugstack.conf": ""}
	for f, text := range files {
		if err := os.WriteFile(filepath.Join(c.etc, f), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, h := range c.Hosts {
		if err := os.MkdirAll(filepath.Join(h.Dir, "spool"), 0o755); err != nil {
			return err
		}
	}
	return c.Install()
}

// Install runs 'muster install slurm' with more arguments.
func (c *Cluster) Install(more ...string) error {
	// The file that --config names is another one on each host; here it has to be there at all.
	args := append([]string{
		"--config", filepath.Join(c.here, "agent.yaml"), "--hooks-jobs", c.Jobs(), "install", "slurm", "--conf", c.etc,
		"--hooks", filepath.Join(c.etc, "hooks"), "--plugin", filepath.Join(c.here, "spank_muster.so"), "--from", c.plugin,
	}, more...)
	for _, h := range c.Hosts {
		config := filepath.Join(h.Dir, "agent.yaml")
		if _, err := os.Stat(config); err != nil {
			if err := os.WriteFile(config, []byte("{}\n"), 0o644); err != nil {
				return err
			}
		}
		if out, err := h.Command(c.muster, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: muster install slurm: %w: %s", h.Name, err, out)
		}
	}
	return nil
}

// Muster runs muster on a node, as root.
func (c *Cluster) Muster(h *lab.Host, args ...string) (string, error) {
	cmd := h.Command(c.muster, append([]string{"--config", filepath.Join(c.here, "agent.yaml")}, args...)...)
	cmd.Env = c.env()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Jobs is hooks.jobs of every host.
func (c *Cluster) Jobs() string { return filepath.Join(c.here, "jobs") }

// Settings are the agents' for this cluster.
func (c *Cluster) Settings(more map[string]string) map[string]string {
	set := map[string]string{"hooks.jobs": strconv.Quote(c.Jobs())}
	for k, v := range more {
		set[k] = v
	}
	return set
}

// start starts a daemon on a host. What it says goes to a file.
func (c *Cluster) start(h *lab.Host, name string, args ...string) error {
	log, err := os.OpenFile(filepath.Join(h.Dir, name+".out"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := h.Command(name, args...)
	cmd.Env = c.env()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait() //nolint:errcheck // it ends with its host
	return nil
}

func (c *Cluster) env() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=dumb", "LC_ALL=C", "SLURM_CONF=" + filepath.Join(c.etc, "slurm.conf"), "TMPDIR=" + os.TempDir()}
}

func (c *Cluster) startDaemons(ctx context.Context) error {
	munge := filepath.Join(c.Dir, "munge")
	key := make([]byte, 1024)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(munge, "key"), key, 0o400); err != nil {
		return err
	}
	if err := c.start(c.Ctl, "munged", "--foreground", "--force", "--key-file="+munge+"/key", "--socket="+munge+"/sock", "--pid-file="+munge+"/pid",
		"--log-file="+munge+"/log", "--seed-file="+munge+"/seed"); err != nil {
		return err
	}
	if err := c.Await(ctx, time.Minute, "munge's socket", func() bool { _, err := os.Stat(munge + "/sock"); return err == nil }); err != nil {
		return err
	}
	if err := c.start(c.Ctl, "slurmctld", "-D", "-c"); err != nil {
		return err
	}
	for _, h := range c.Nodes {
		if err := c.StartNode(h); err != nil {
			return err
		}
	}
	if err := c.Start(ctx, lab.StartOptions{Set: c.Settings(nil)}, c.Nodes...); err != nil {
		return err
	}
	return c.Await(ctx, 2*time.Minute, "idle nodes", func() bool {
		out, err := c.Slurm("sinfo", "-h", "-t", "idle", "-o", "%D")
		return err == nil && strings.TrimSpace(out) == strconv.Itoa(len(c.Nodes))
	})
}

// StartNode starts a node's slurmd.
func (c *Cluster) StartNode(h *lab.Host) error {
	return c.start(h, "slurmd", "-D", "-N", h.Name)
}

// Await waits for something that comes by itself.
func (c *Cluster) Await(ctx context.Context, limit time.Duration, what string, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for !ready() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("no %s after %v", what, limit)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// Slurm runs a client on the controller, as root.
func (c *Cluster) Slurm(name string, args ...string) (string, error) {
	cmd := c.Ctl.Command(name, args...)
	cmd.Env = c.env()
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// As is a command on the controller as a user, in his home directory.
func (c *Cluster) As(u User, name string, args ...string) *exec.Cmd {
	id := strconv.Itoa(u.ID)
	cmd := c.Ctl.Command("setpriv", append([]string{"--reuid", id, "--regid", id, "--clear-groups", "sh", "-c", `cd "$HOME" && exec "$@"`, "sh", name}, args...)...)
	cmd.Env = append(c.env(), "TMPDIR=/tmp", "HOME="+u.Home, "USER="+u.Name, "LOGNAME="+u.Name)
	return cmd
}

// A Result is what a command said.
type Result struct {
	Out, Err string
	Code     int
}

// runBound is how long Run waits for a command: it may be one that Slurm never lets begin.
const runBound = 3 * time.Minute

// Run runs a command as a user.
func (c *Cluster) Run(u User, name string, args ...string) Result {
	cmd := c.As(u, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	err := cmd.Start()
	if err == nil {
		// Ended by SIGTERM, nsenter's child would go on.
		late := time.AfterFunc(runBound, func() {
			_ = cmd.Process.Kill()
			_, _ = c.Slurm("scancel", "-u", u.Name)
		})
		err = cmd.Wait()
		if !late.Stop() {
			err = fmt.Errorf("no end after %v: %w", runBound, err)
		}
	}
	r := Result{Out: out.String(), Err: errs.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		r.Code = exit.ExitCode()
	case err != nil:
		r.Code, r.Err = -1, r.Err+err.Error()
	}
	return r
}

// Logs are the last bytes of a file of each host.
func (c *Cluster) Logs(name string, most int) string {
	var b strings.Builder
	for _, h := range c.Hosts {
		text, err := os.ReadFile(filepath.Join(h.Dir, name))
		if err == nil {
			fmt.Fprintf(&b, "-- %s %s\n%s\n", h.Name, name, text[max(0, len(text)-most):])
		}
	}
	return b.String()
}
