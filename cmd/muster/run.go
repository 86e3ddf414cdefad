package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/runtime"
	"github.com/muster-hpc/muster/lazyfs"
)

// runFlags are the flags of muster run.
type runFlags struct {
	imageFlags
	binds      []string
	env        []string
	workdir    string
	user       string
	entrypoint string
	readOnly   bool
	tty        string
	report     string
	selinux    string
}

func (a *app) runCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run [flags] IMAGE [COMMAND [ARG…]]",
		Short: "run a command in an image, fetching what it reads while it runs",
		Long: `Mounts IMAGE, runs COMMAND (or what the image names) in it, and cleans up. The exit
code is the command's own, 128 + N when signal N ended it, 125 when muster itself
failed, 126 when the command cannot be executed and 127 when it is not there.

IMAGE is a name as docker has it (debian:12, ghcr.io/org/app@sha256:…), or
oci:/path[:tag] for an OCI layout.

What the command sees: the image, writable (what is written is kept in memory and
gone at the end) unless --read-only; a small /dev; the host's network, /dev/shm,
/sys (read-only), /etc/resolv.conf and /etc/hosts; only its own processes. Nothing
else of the host is there: use --bind for home and scratch directories.

For root the image's owners and its User are kept, as docker would. Anybody else
runs the command as himself, owns every file, and has no more rights than before.

--runtime chooses what starts the command. For root the first that is installed of
  ` + strings.Join(runtime.Names(true), ", ") + `
and for others of
  ` + strings.Join(runtime.Names(false), ", ") + `
"builtin" needs no other program. With runc a user finds himself to be root, of
nothing but his own files.

Signals (TERM, INT, HUP, QUIT, USR1, USR2, …) and the size of the terminal are passed on.`,
		Args: arguments(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return failedRun(a.run(cmd.Context(), f, args[0], args[1:]))
		},
	}
	// What comes after IMAGE belongs to the command.
	c.Flags().SetInterspersed(false)
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return failedRun(usage(err)) })
	f.add(c)
	fl := c.Flags()
	fl.StringArrayVarP(&f.binds, "bind", "b", nil, "show a file or directory of the host in the image: SRC[:DST[:ro]]")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "set a variable: NAME=VALUE, or NAME or a pattern like 'SLURM_*' to pass on one's own")
	fl.StringVarP(&f.workdir, "workdir", "w", "", "working directory in the image")
	fl.StringVarP(&f.user, "user", "u", "", "user to run as, USER[:GROUP], names or numbers (root only)")
	fl.StringVar(&f.entrypoint, "entrypoint", "", "program to run instead of the image's entrypoint")
	fl.BoolVar(&f.readOnly, "read-only", false, "let the command write nowhere but in binds and /dev/shm (with ch-run also in a /tmp of its own)")
	fl.StringVarP(&f.tty, "tty", "t", "auto", "give the command a terminal: true, false, or auto: when standard input and output are one")
	fl.Lookup("tty").NoOptDefVal = "true"
	fl.StringVar(&f.report, "report", "", "write how the image was opened and what was fetched to this file, as JSON")
	fl.StringVar(&f.selinux, "selinux-context", "", "SELinux context of the image's files")
	// The runtime is a setting like others; here it is one of the flags people look for.
	if fl := c.InheritedFlags().Lookup("run-runtime"); fl != nil {
		fl.Hidden = false
	}
	fl.String("runtime", "", "same as --run-runtime")
	c.PreRun = func(cmd *cobra.Command, _ []string) {
		if r, _ := cmd.Flags().GetString("runtime"); r != "" {
			a.cfg.Run.Runtime = r
		}
	}
	return c
}

// failedRun gives what muster itself did wrong the code 125, so that it is not taken for the command's.
func failedRun(err error) error {
	var command *runtime.CommandError
	switch {
	case err == nil || errors.Is(err, errSaid):
		return err
	case errors.As(err, &command):
		return &coded{command.Code, err}
	}
	return &coded{exitRunFailed, err}
}

// run tells the story: namespaces and image at the same time, then the server, then the command.
func (a *app) run(ctx context.Context, f runFlags, ref string, args []string) error {
	o, err := a.runtimeOptions(f, ref)
	if err != nil {
		return err
	}
	began := time.Now()
	opening, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	type start struct {
		session *runtime.Session
		err     error
	}
	staged := make(chan start, 1)
	go func() {
		s, err := runtime.Start(opening, o)
		if err != nil {
			giveUp(err) // no use in pulling an image that cannot be run here
		}
		staged <- start{s, err}
	}()
	img, err := a.openImage(opening, ref, f.imageFlags, args, nil)
	if err != nil {
		giveUp(err)
	}
	st := <-staged
	if st.err != nil && (err == nil || context.Cause(opening) == st.err) {
		err = fmt.Errorf("%s: %w", ref, st.err)
	}
	if st.session != nil {
		defer st.session.Close()
	}
	if img != nil {
		defer img.Close()
	}
	if err != nil {
		return err
	}

	command, err := commandOf(img.Resolved.ConfigFile, f, args, o.Terminal)
	if err != nil {
		return fmt.Errorf("%s: %w", ref, err)
	}
	serve := img.Config()
	if serve.Compat, err = lazyfs.ParseCompat(os.Getenv(lazyfs.CompatVariable)); err != nil {
		return usage(err)
	}
	// Requests that need no inflating must find a processor while others inflate.
	serve.Inflaters = goruntime.GOMAXPROCS(0)
	goruntime.GOMAXPROCS(serve.Inflaters + 2)
	serve.Memory = runMemory
	server, err := lazyfs.New(serve)
	if err != nil {
		return fmt.Errorf("%s: %w", ref, err)
	}
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	served := make(chan error, 1)
	go func() {
		err := server.Serve(serving, st.session.Device())
		if err != nil {
			_ = st.session.Close() // nobody answers the command's reads any more
		}
		served <- err
	}()
	guessed := make(chan struct{})
	go func() { defer close(guessed); img.Guess(serving, server) }()
	ready := time.Now()

	signals := make(chan os.Signal, 16)
	runtime.Notify(signals)
	code, err := st.session.Run(ctx, command, signals, func() { a.handOver(signals) })

	// The stage ends first: with it goes the mount, and with the mount the server, by itself.
	err = errors.Join(err, st.session.Close())
	select {
	case serveErr := <-served:
		if serveErr != nil {
			err = fmt.Errorf("serving the image: %w", serveErr)
		}
	case <-time.After(serveWait):
	}
	stopServing()
	<-guessed
	_ = st.session.Device().Close()
	if f.report != "" {
		err = errors.Join(err, writeReport(f.report, runReport{
			Summary: img.Summary(), Server: server.Stats(), Ready: ready.Sub(began).Seconds(), Took: time.Since(began).Seconds(), Exit: code,
		}))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", ref, err)
	}
	return finished(code)
}

// runMemory bounds the inflated bytes at hand. It is more than a mount has, since here a program is certain to start, and
// starts come back to spans they have left. It is given back when reading ends.
const runMemory = 96 << 20

// serveWait bounds how long the server may take to notice that its mount is gone.
const serveWait = 5 * time.Second

// A runReport is what --report writes.
type runReport struct {
	image.Summary
	Server lazyfs.Stats `json:"server"`
	Ready  float64      `json:"ready_seconds"` // from the start to a mounted image
	Took   float64      `json:"total_seconds"`
	Exit   int          `json:"exit"`
}

func writeReport(file string, r runReport) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// runtimeOptions is what is known before the image is.
func (a *app) runtimeOptions(f runFlags, ref string) (o runtime.Options, err error) {
	o = runtime.Options{
		Name: ref, ReadOnly: f.readOnly, Runtime: a.cfg.Run.Runtime, WritableSize: int64(a.cfg.Run.WritableSize), Context: f.selinux,
	}
	for _, s := range f.binds {
		b, err := runtime.ParseBind(s)
		if err != nil {
			return o, usage(err)
		}
		o.Binds = append(o.Binds, b)
	}
	both := isTerminal(os.Stdin) && isTerminal(os.Stdout)
	switch f.tty {
	case "auto":
		o.Terminal = both
	case "true":
		if !both {
			return o, usagef("--tty: standard input and output are no terminal")
		}
		o.Terminal = true
	case "false":
	default:
		return o, usagef("--tty is %q: it must be auto, true or false", f.tty)
	}
	if o.Runtime != "" && !slices.Contains(runtime.Names(os.Geteuid() == 0), o.Runtime) {
		return o, usagef("--runtime is %q: it must be one of %s", o.Runtime, strings.Join(runtime.Names(os.Geteuid() == 0), ", "))
	}
	return o, nil
}

// commandOf puts together what the image says and what the user says, by docker's rules.
func commandOf(c origin.Config, f runFlags, args []string, terminal bool) (runtime.Command, error) {
	r := runtime.Command{Dir: c.WorkingDir, Env: slices.Clone(c.Env)}
	switch {
	case f.entrypoint != "":
		r.Args = append([]string{f.entrypoint}, args...)
	case len(args) > 0:
		r.Args = slices.Concat(c.Entrypoint, args)
	default:
		r.Args = slices.Concat(c.Entrypoint, c.Cmd)
	}
	if f.workdir != "" {
		if !path.IsAbs(f.workdir) {
			return r, usagef("--workdir %q is not absolute", f.workdir)
		}
		r.Dir = f.workdir
	}
	// The image's user exists for root only; others are themselves in any image.
	r.User = f.user
	if r.User == "" && os.Geteuid() == 0 {
		r.User = c.User
	}
	if t := os.Getenv("TERM"); terminal && t != "" {
		r.Env = append(r.Env, "TERM="+t)
	}
	for _, e := range f.env {
		more, err := expandEnv(e, os.Environ())
		if err != nil {
			return r, err
		}
		r.Env = append(r.Env, more...)
	}
	return r, nil
}

// expandEnv is what one --env means: NAME=VALUE, or those of ours whose names match.
func expandEnv(e string, ours []string) (all []string, err error) {
	name, _, given := strings.Cut(e, "=")
	if name == "" {
		return nil, usagef("--env %q has no name", e)
	}
	if given {
		return []string{e}, nil
	}
	for _, kv := range ours {
		n, _, _ := strings.Cut(kv, "=")
		ok, err := path.Match(name, n)
		if err != nil {
			return nil, usagef("--env %q: %w", e, err)
		}
		if ok {
			all = append(all, kv)
		}
	}
	return all, nil
}
