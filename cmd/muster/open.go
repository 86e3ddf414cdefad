package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	goruntime "runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/tree"
)

// imageFlags are the flags of commands that open an image.
type imageFlags struct {
	platform    string
	requireLazy bool
}

func (f *imageFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.platform, "platform", "", "platform of the image, such as linux/arm64; default this machine's")
	c.Flags().BoolVar(&f.requireLazy, "require-lazy", false, "fail when a layer of 4 MiB or more would have to be fetched whole first")
}

// client makes the client to registries, with the credentials of whoever runs muster.
func (a *app) client() (*origin.Client, error) {
	return origin.New(origin.Options{
		Version:     version,
		Credentials: origin.Docker(),
		CertsDir:    a.cfg.Origin.CertsDir,
		PlainHTTP:   a.cfg.Origin.PlainHTTP,
		MaxWait:     a.cfg.Origin.Patience,
		ResolveWait: a.cfg.Origin.ResolvePatience,
		MaxConns:    a.cfg.Origin.Connections,
	})
}

// repository opens the repository of an image as people write it.
func (a *app) repository(ref string) (origin.Repository, error) {
	r, err := origin.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	return c.Repository(r)
}

// openStore opens the store, as configured or where it belongs.
func (a *app) openStore() (*store.Store, error) {
	dir, err := a.cfg.storeDir()
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return store.Open(dir, store.Options{Quota: int64(a.cfg.Store.Quota), AllowNetwork: a.cfg.Store.AllowNetworkFS, Logger: slog.Default()})
}

// presentation is how the image's owners look to whoever runs muster: root has use for real ones, others
// would find files that belong to nobody.
func presentation() tree.Presentation {
	if os.Geteuid() == 0 {
		return tree.Presentation{}
	}
	return tree.Presentation{User: true, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}

// An opened is an image with what it was opened by. Close closes all.
type opened struct {
	*image.Image
	store *store.Store
}

func (o *opened) Close() error {
	err := o.Image.Close()
	_ = o.store.Close()
	return err
}

// openImage opens ref and shows how far it is. What fails names the image.
func (a *app) openImage(ctx context.Context, ref string, f imageFlags, command []string, onFetch func(fetch.Event)) (*opened, error) {
	progress := new(image.Progress)
	defer a.showOpening(ref, progress.Snapshot)()
	return a.openWith(ctx, ref, image.Options{
		Platform: f.platform, RequireLazy: f.requireLazy, Command: command, OnFetch: onFetch, Progress: progress,
	})
}

// openWith opens ref as o and the configuration say.
func (a *app) openWith(ctx context.Context, ref string, o image.Options) (*opened, error) {
	if n := a.cfg.Cores; n > 0 {
		goruntime.GOMAXPROCS(n)
	}
	repo, err := a.repository(ref)
	if err != nil {
		return nil, err
	}
	st, err := a.openStore()
	if err != nil {
		return nil, err
	}
	o.Repo, o.Store, o.Presentation = repo, st, presentation()
	o.SpanSize, o.NoIndex = int64(a.cfg.Index.SpanSize), !a.cfg.Index.Use
	o.Tool, o.Requests, o.Log = "muster "+version, a.cfg.Origin.Connections, slog.Default()
	img, err := image.Open(ctx, o)
	if err != nil {
		_ = st.Close()
		if !strings.Contains(err.Error(), ref) {
			err = fmt.Errorf("%s: %w", ref, err)
		}
		return nil, err
	}
	return &opened{img, st}, nil
}

// mountOptions are those of every mount that muster makes.
func mountOptions(name, selinux string) lazyfs.MountOptions {
	return lazyfs.MountOptions{Name: name, Context: selinux, AllowOther: os.Geteuid() == 0}
}
