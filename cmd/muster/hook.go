package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/jobhooks"
)

func (a *app) hookCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "hook",
		Short: "what schedulers call before, in and after a job",
		Long: `Schedulers call these, nobody else has to: 'muster install slurm' puts them where Slurm looks. They take what they
need from the environment that the scheduler gives them.`,
	}
	c.AddCommand(a.slurmHooks(), a.secretCommand())
	return c
}

// parsesAsReference is jobhooks' question about a reference.
func parsesAsReference(s string) error {
	_, err := origin.ParseReference(s)
	return err
}

// stageJob has the agent stage a job's image on this node, and comes back when it is as ready as was asked for, has failed, or at the
// deadline. It never fails: what goes wrong is the outcome.
func (a *app) stageJob(ctx context.Context, j jobhooks.Job, secret map[string]string, deadline time.Duration, each func(control.HostState)) jobhooks.Outcome {
	began := time.Now()
	var o jobhooks.Outcome
	failed := func(err error) jobhooks.Outcome {
		o.Code, o.Text, o.Took = exitCode(err), err.Error(), time.Since(began)
		return o
	}
	c, err := a.agentClient()
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	q := control.StageRequest{
		Job: j.Stage(), Image: j.Image, Hosts: j.Hosts, Ready: j.Ready, UID: int64(j.UID), GID: int64(j.GID), Here: true, Secret: secret,
	}
	report, err := c.Stage(ctx, q, func(e control.StageEvent) {
		for _, h := range e.Hosts {
			o.Mount, o.Ready = h.Mount, h.Ready
			if each != nil {
				each(h)
			}
		}
	})
	if err == nil && report != nil {
		for _, h := range report.Hosts {
			if h.Phase == control.PhaseFailed {
				return failed(&control.Error{Text: h.Error, Code: max(h.Code, 1)})
			}
		}
	}
	if err != nil && ctx.Err() != nil { // it goes on without us
		o.Late, o.Took = true, time.Since(began)
		return o
	}
	if err != nil {
		return failed(err)
	}
	o.Took = time.Since(began)
	return o
}

// A jobNote is what a node's prolog knows of a job, for the hooks after it: for root in a file of root's own, which is believed, and for
// the job's user in one of his.
type jobNote struct {
	Job    string `json:"job"`
	Image  string `json:"image"`
	UID    uint32 `json:"uid"`
	Rootfs string `json:"rootfs,omitempty"` // empty: not mounted yet, or never
	Error  string `json:"error,omitempty"`  // why it never will be
	Code   int    `json:"code,omitempty"`
}

// notePath is where a job's note is. The name is the ID, which was checked to be a number or such.
func (a *app) notePath(stage string) string { return filepath.Join(a.cfg.Hooks.Jobs, stage) }

// userNote is the copy for the user, rootfsLink a link to the mount for those who cannot read JSON (task-prolog.c).
const (
	userNote   = ".user"
	rootfsLink = ".rootfs"
)

func (a *app) writeNote(j jobhooks.Job, n jobNote) error {
	if err := os.MkdirAll(a.cfg.Hooks.Jobs, 0o711); err != nil {
		return err
	}
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	write := func(path string, uid, gid uint32) error {
		tmp := path + ".new"
		_ = os.Remove(tmp)
		f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		if err = errors.Join(err, f.Chown(int(uid), int(gid)), f.Close()); err != nil {
			return err
		}
		return os.Rename(tmp, path)
	}
	path := a.notePath(j.Stage())
	if n.Rootfs != "" {
		_ = os.Remove(path + rootfsLink)
		if err := os.Symlink(n.Rootfs, path+rootfsLink); err != nil {
			return err
		}
	}
	return errors.Join(write(path, 0, 0), write(path+userNote, j.UID, j.GID))
}

// readNote reads a note; one that is not there is empty.
func readNote(path string) (n jobNote, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil
	}
	if err != nil {
		return n, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil || len(b) == 0 { // empty: the plug-in's mark that a step has an image
		return n, err
	}
	return n, json.Unmarshal(b, &n)
}

func (a *app) removeNote(stage string) {
	for _, kind := range []string{"", userNote, rootfsLink} {
		_ = os.Remove(a.notePath(stage) + kind)
	}
}

// secretCommand prints what this user may show to an image's registry. Root's prolog runs it as the user, so that nobody but him reads his files
// and runs his helpers.
func (a *app) secretCommand() *cobra.Command {
	return &cobra.Command{
		Use: "secret IMAGE", Hidden: true, Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := origin.ParseReference(args[0])
			if err != nil {
				return err
			}
			secret, err := userSecret(cmd.Context(), ref)
			if err != nil {
				return err
			}
			return json.NewEncoder(a.out).Encode(secret)
		},
	}
}

// secretWait bounds what a user's home directory and helpers may take; maxSecret what they may say.
const (
	secretWait = 3 * time.Second
	maxSecret  = 64 << 10
)

// secretOf is what a job's user may show to the image's registry, found by a process of his. Nothing is an answer too: most images are
// public. When that process does not come back, because a home directory hangs, it is left behind.
func secretOf(ctx context.Context, j jobhooks.Job) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, secretWait)
	defer cancel()
	exe, err := os.Executable()
	if err != nil {
		return nil
	}
	home, ok := homeOf(ctx, j.UID)
	if !ok {
		return nil
	}
	cmd := exec.CommandContext(ctx, exe, "--config", os.DevNull, "hook", "secret", j.Image)
	cmd.Dir = "/"
	cmd.Env = []string{"HOME=" + home, "PATH=/usr/local/bin:/usr/bin:/bin", "USER=" + j.User}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: j.UID, Gid: j.GID}}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	out := limited{left: maxSecret}
	cmd.Stdout = &out
	cmd.WaitDelay = time.Second
	done := make(chan error, 1)
	go func() { done <- cmd.Run() }()
	select {
	case err = <-done:
	case <-time.After(secretWait + 2*time.Second):
		return nil
	}
	var secret map[string]string
	if err != nil || json.Unmarshal(out.b.Bytes(), &secret) != nil {
		return nil
	}
	return secret
}

// limited keeps so many bytes of what is written.
type limited struct {
	b    bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	l.b.Write(p[:n])
	return len(p), nil
}

// homeOf is a user's home directory, where users are: files, LDAP, sssd.
func homeOf(ctx context.Context, uid uint32) (string, bool) {
	cmd := exec.CommandContext(ctx, "getent", "passwd", strconv.FormatUint(uint64(uid), 10))
	cmd.Env = []string{"PATH=/usr/bin:/bin"}
	out, err := cmd.Output()
	f := strings.Split(strings.TrimSpace(string(out)), ":")
	if err != nil || len(f) < 7 || !filepath.IsAbs(f[5]) {
		return "", false
	}
	return f[5], true
}

// say leaves a line in the hook's own output, which schedulers keep when a hook fails, and some always.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.err, "muster: "+format+"\n", args...)
}
