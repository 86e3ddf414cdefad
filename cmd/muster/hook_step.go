package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/runtime"
	"github.com/muster-hpc/muster/jobhooks"
	"github.com/muster-hpc/muster/jobhooks/hostlist"
	"github.com/muster-hpc/muster/jobhooks/slurm"
	"github.com/muster-hpc/muster/lazyfs"
)

// slurmStep makes the root of one step on one node, as the user, and holds it while the plug-in opens its namespaces. It talks to the
// plug-in in lines:
//
//	say TEXT        for the user's eyes
//	env NAME=VALUE  for the tasks
//	pid N           the namespaces of this process are the root; last line when all is well
//	fail TEXT       last line otherwise
//
// It ends when the plug-in closes its standard input.
func (a *app) slurmStep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Hooks.Patience)
	defer cancel()
	talk := func(kind, text string) {
		fmt.Fprintf(a.out, "%s %s\n", kind, strings.NewReplacer("\n", " ", "\x00", "").Replace(text))
	}
	tree, err := a.stepTree(ctx, func(text string) { talk("say", jobhooks.Printable(text, 300)) })
	if err != nil {
		talk("fail", jobhooks.Printable(err.Error(), 900))
		return errSaid
	}
	h, err := a.holdStep(ctx, tree)
	if err != nil {
		talk("fail", jobhooks.Printable(err.Error(), 900))
		return errSaid
	}
	defer h.Close()
	for _, e := range stepEnv(tree) {
		if !strings.ContainsAny(e, "\n\x00") {
			talk("env", e)
		}
	}
	talk("pid", strconv.Itoa(h.Pid))
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// stepTree is where the step's image is mounted: by the job's prolog, or now, when the prolog has left it on its way or the step has an image
// of its own.
func (a *app) stepTree(ctx context.Context, say func(string)) (string, error) {
	id, image := os.Getenv("SLURM_JOB_ID"), os.Getenv(slurm.VarImage)
	if err := jobhooks.CheckImage(image, parsesAsReference); err != nil {
		return "", err
	}
	if _, err := strconv.ParseUint(id, 10, 32); err != nil {
		return "", fmt.Errorf("%w: SLURM_JOB_ID is %.40q", jobhooks.ErrEnvironment, id)
	}
	hosts, err := hostlist.Expand(os.Getenv("MUSTER_HOSTS"))
	if err != nil {
		return "", err
	}
	number, err := strconv.Atoi(os.Getenv("SLURM_NODEID"))
	if err != nil || number < 0 || number >= len(hosts) {
		return "", fmt.Errorf("%w: SLURM_NODEID is %.40q of %d nodes", jobhooks.ErrEnvironment, os.Getenv("SLURM_NODEID"), len(hosts))
	}
	node := hosts[number]
	n, err := readNote(a.notePath("slurm-"+id) + userNote)
	if err != nil {
		return "", fmt.Errorf("image %s: what the prolog has left cannot be read: %w", image, err)
	}
	if n.Image == image && n.Error != "" {
		return "", errors.New(strings.TrimPrefix(n.Error, "muster: "))
	}
	if n.Image == image && n.Rootfs != "" {
		if _, err := lazyfs.Mounted(n.Rootfs); err != nil {
			return "", fmt.Errorf("image %s: its mount %s on node %s is gone: %w", image, n.Rootfs, node, err)
		}
		return n.Rootfs, nil
	}
	ready, err := control.ParseReady(os.Getenv(slurm.VarReady))
	if err != nil {
		return "", err
	}
	j := jobhooks.Job{
		Scheduler: "slurm", ID: id, Image: image, Here: node, Hosts: hosts, Ready: ready, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()),
	}
	ref, err := origin.ParseReference(image)
	if err != nil {
		return "", err
	}
	secret, err := userSecret(ctx, ref)
	if err != nil {
		say(fmt.Sprintf("image %s: going on without a login: %v", image, err))
	}
	said := time.Now()
	o := a.stageJob(ctx, j, secret, a.cfg.Hooks.Patience, func(h control.HostState) {
		if time.Since(said) > 5*time.Second && node == j.Hosts[0] {
			said = time.Now()
			say(fmt.Sprintf("image %s: %s, %s of %s", image, h.Phase, megabytes(h.Present), megabytes(h.Total)))
		}
	})
	if o.Code != 0 {
		return "", errors.New(strings.TrimPrefix(jobhooks.Message(j, o), "muster: "))
	}
	if o.Mount == "" {
		return "", fmt.Errorf("image %s: not mounted on node %s after %v", image, node, o.Took.Round(time.Second))
	}
	return o.Mount, nil
}

// holdStep makes the step's root: the tree, what programs expect of the host, home and working directory, and what the user binds.
func (a *app) holdStep(ctx context.Context, tree string) (*runtime.Holding, error) {
	o := runtime.HoldOptions{
		Tree: tree, WritableSize: int64(a.cfg.Run.WritableSize),
		Optional: append([]string{"/tmp", "/var/tmp"}, a.cfg.Entry.Binds...),
	}
	for _, d := range []string{os.Getenv("HOME"), os.Getenv("MUSTER_WORKDIR")} {
		if filepath.IsAbs(d) && filepath.Clean(d) != "/" {
			o.Optional = append(o.Optional, filepath.Clean(d))
		}
	}
	// Slurm runs it once the image is entered.
	if p := slurm.Setting(readOr(slurmConf()), "TaskProlog"); filepath.IsAbs(p) {
		o.Optional = append(o.Optional, p)
	}
	for b := range strings.SplitSeq(os.Getenv("MUSTER_BIND"), ",") {
		if b == "" {
			continue
		}
		bind, err := runtime.ParseBind(b)
		if err != nil {
			return nil, err
		}
		o.Binds = append(o.Binds, bind)
	}
	return runtime.Hold(ctx, o)
}

// stepEnv is what the image says of its programs' environment, over what the job has. PATH is never the host's: programs are the image's.
func stepEnv(tree string) []string {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(tree), "config.json"))
	var c struct {
		Config struct{ Env []string } `json:"config"`
	}
	if err == nil {
		_ = json.Unmarshal(b, &c) // what the agent has left there is an image's config; a damaged one is an empty one
	}
	return append([]string{"PATH=" + runtime.DefaultPath}, c.Config.Env...)
}
