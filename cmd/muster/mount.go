package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// A mountRequest is what the process of a mount is told.
type mountRequest struct {
	Image       string
	Platform    string
	RequireLazy bool
	SELinux     string
	Config      Config
}

// A mountState is what a successor of a mount's server needs besides.
type mountState struct{ Image string }

// A mountEvent is what the process of a mount tells while it opens the image. One field is set.
type mountEvent struct {
	Progress *image.Snapshot `json:",omitempty"`
	Opened   *image.Summary  `json:",omitempty"`
}

func (a *app) mountCommand() *cobra.Command {
	var f imageFlags
	var selinux string
	c := &cobra.Command{
		Use:   "mount IMAGE DIR",
		Short: "mount an image read-only on a directory, for any runtime that takes one",
		Long: `Mounts IMAGE on DIR and returns when its files can be read. What is read is fetched then.
The mount is read-only, nosuid and nodev. Root's mounts show the image's owners and are
open to every user; another user's mounts are his alone, and every file in them is his.

'muster umount DIR' ends it. A server of the mount that dies is replaced under it.`,
		Args: arguments(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.mount(cmd.Context(), args[0], args[1], f, selinux)
		},
	}
	f.add(c)
	c.Flags().StringVar(&selinux, "selinux-context", "", "SELinux context of the image's files")
	a.jsonFlag(c)
	return c
}

func (a *app) mount(ctx context.Context, ref, dir string, f imageFlags, selinux string) error {
	cfg := a.cfg
	var err error
	// The mount's process works in / and may have another environment.
	if cfg.Store.Dir, err = cfg.storeDir(); err != nil {
		return err
	}
	if r, err := origin.ParseReference(ref); err != nil {
		return err
	} else if r.Layout != "" {
		ref = r.String()
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		if c, err := lazyfs.Mounted(real); err == nil {
			return usagef("%s: %s is mounted on %s already; 'muster umount' ends that", ref, strings.TrimPrefix(c.Source, "muster#"), dir)
		}
	}
	request, err := json.Marshal(mountRequest{ref, f.platform, f.requireLazy, selinux, cfg})
	if err != nil {
		return err
	}
	// The store is made, or refused, before anything of ours lies in its directory.
	st, err := a.openStore()
	if err != nil {
		return err
	}
	_ = st.Close()
	log, err := mountLog(cfg.Store.Dir)
	if err != nil {
		return err
	}
	defer log.Close()
	made := false
	if err := os.Mkdir(dir, 0o755); err == nil {
		made = true
	} else if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", ref, err)
	}
	var seen struct {
		sync.Mutex
		progress image.Snapshot
		opened   image.Summary
	}
	stop := a.showOpening(ref, func() image.Snapshot {
		seen.Lock()
		defer seen.Unlock()
		return seen.progress
	})
	m, err := mountd.Start(ctx, mountd.Options{Dir: dir, Request: request, Log: log, OnEvent: func(b []byte) {
		var e mountEvent
		if json.Unmarshal(b, &e) != nil {
			return
		}
		seen.Lock()
		defer seen.Unlock()
		if e.Progress != nil {
			seen.progress = *e.Progress
		}
		if e.Opened != nil {
			seen.opened = *e.Opened
		}
	}})
	stop()
	if err != nil {
		if made {
			_ = os.Remove(dir)
		}
		var told *mountd.Error
		if errors.As(err, &told) {
			return &coded{told.Code, err}
		}
		return fmt.Errorf("%s: %w", ref, err)
	}
	r := mounted{seen.opened, m.Dir, m.Parent}
	return a.result(r, func(w io.Writer) { r.print(w, a.quiet) })
}

// A mounted is what mount prints.
type mounted struct {
	image.Summary
	Dir     string `json:"dir"`
	Process int    `json:"pid"`
}

func (m mounted) print(w io.Writer, quiet bool) {
	fmt.Fprintf(w, "%s is mounted on %s\n", m.Image, m.Dir)
	if quiet {
		return
	}
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	defer tw.Flush()
	for _, l := range m.Layers {
		fmt.Fprintf(tw, "  layer %s\t%s\t%s\t%s\t%s\n", short(l.Digest), megabytes(l.Size), l.Format, l.Mode, l.Reason)
	}
}

// maxMountLog is when the log of mounts is begun anew, bytes.
const maxMountLog = 8 << 20

// mountLogRoom is what each mount has of the log even when the disk is full, bytes.
const mountLogRoom = 16 << 10

// mountLog is where the processes of mounts write what goes wrong after their command has ended.
func mountLog(store string) (*os.File, error) {
	if err := os.MkdirAll(store, 0o755); err != nil {
		return nil, err
	}
	file := filepath.Join(store, "mount.log")
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if st, err := os.Stat(file); err == nil && st.Size() > maxMountLog {
		flags |= os.O_TRUNC
	}
	log, err := os.OpenFile(file, flags, 0o600)
	if err != nil {
		return nil, err
	}
	// The warning that the disk is full must find room on it. Where this cannot be had the log is as it was.
	if st, err := log.Stat(); err == nil {
		_ = unix.Fallocate(int(log.Fd()), unix.FALLOC_FL_KEEP_SIZE, st.Size(), mountLogRoom)
	}
	return log, nil
}

// reportEvery is how often a mount's process tells how far it is.
const reportEvery = 200 * time.Millisecond

// buildMount runs in the process of a mount: it opens the image that a request names, or opens it again
// for the successor of a server that died.
func buildMount(ctx context.Context, r mountd.Request) (*mountd.Source, error) {
	if agent.IsMount(r.Request) { // a staged image: what is not in the store the agent brings
		return agent.BuildMount(ctx, r)
	}
	var q mountRequest
	if err := json.Unmarshal(r.Request, &q); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	a := &app{out: os.Stdout, err: os.Stderr, cfg: q.Config, quiet: true}
	if err := a.openLog(); err != nil {
		return nil, err
	}
	ref := q.Image
	if r.State != nil {
		// A digest, which is kept: nobody has to be asked.
		var s mountState
		if err := json.Unmarshal(r.State, &s); err != nil {
			return nil, fmt.Errorf("state: %w", err)
		}
		ref = s.Image
	}
	tell := func(e mountEvent) {
		if b, err := json.Marshal(e); err == nil {
			r.Report(b)
		}
	}
	progress := new(image.Progress)
	opening, opened := context.WithCancel(ctx)
	told := make(chan struct{})
	go func() {
		defer close(told)
		tick := time.NewTicker(reportEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s := progress.Snapshot()
				tell(mountEvent{Progress: &s})
			case <-opening.Done():
				return
			}
		}
	}()
	img, err := a.openWith(ctx, ref, image.Options{Platform: q.Platform, RequireLazy: q.RequireLazy, Progress: progress, Table: r.Table})
	opened()
	<-told
	if err != nil {
		return nil, err
	}
	summary := img.Summary()
	tell(mountEvent{Opened: &summary})
	state, err := json.Marshal(mountState{img.Resolved.Ref.WithDigest(img.Resolved.Digest).String()})
	if err != nil {
		_ = img.Close()
		return nil, err
	}
	// Opening took more memory than serving does; what it left goes back before the mount idles for days.
	debug.FreeOSMemory()
	serve := img.Config()
	if n := q.Config.Cores; n > 0 {
		// Requests that need no inflating must find a processor while others inflate.
		serve.Inflaters = n
		goruntime.GOMAXPROCS(n + 2)
	}
	return &mountd.Source{
		Config: serve, Mount: mountOptions(q.Image, q.SELinux), Table: img.TableFile(), State: state, Close: img.Close,
		Serving: func(ctx context.Context, s *lazyfs.Server) { img.Guess(ctx, s) },
	}, nil
}

func (a *app) umountCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "umount DIR…",
		Short: "end mounts of muster",
		Long: `Unmounts and waits until the mount's processes have ended. When something inside is still in
use the mount is detached: nobody new finds it, those inside are served a little longer.`,
		Args: arguments(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			type ended struct {
				Dir  string `json:"dir"`
				Busy bool   `json:"busy"`
			}
			done := []ended{}
			var failed error
			for _, dir := range args {
				busy, err := mountd.Unmount(cmd.Context(), dir)
				if err != nil {
					failed = errors.Join(failed, err)
					continue
				}
				done = append(done, ended{dir, busy})
			}
			err := a.result(done, func(io.Writer) {
				for _, d := range done {
					if d.Busy && !a.quiet {
						fmt.Fprintf(a.err, "muster: %s was still in use and is detached: who is inside is served a little longer\n", d.Dir)
					}
				}
			})
			return errors.Join(failed, err)
		},
	}
	a.jsonFlag(c)
	return c
}
