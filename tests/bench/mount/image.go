package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

const (
	files    = 8
	fileSize = 48 << 20 // bytes, that do not compress
	fillRate = 10 << 20 // bytes per second that the registry gives a mount that fills
)

// makeImage writes the image: data/0 and so on. It returns the digest of its layer.
func makeImage(layout string) (string, error) {
	entries := []images.Entry{images.Dir("data")}
	for i := range files {
		b := make([]byte, fileSize)
		rand.NewChaCha8([32]byte{byte(i)}).Read(b)
		entries = append(entries, images.File(fmt.Sprintf("data/%d", i), string(b)))
	}
	layer := images.Layer(entries...)
	return string(layer.Descriptor.Digest), images.WriteImage(layout, images.Image{Layers: []images.Blob{layer}})
}

// serveRegistry is the registry, in a process of its own. It says two addresses: that of one which answers at once and that of
// the same one behind a rate limit.
func serveRegistry(args []string) error {
	h, err := registry.NewHandler(args[0], registry.Options{})
	if err != nil {
		return err
	}
	fast, err := registry.StartProxy(h)
	if err != nil {
		return err
	}
	defer fast.Close()
	slow, err := registry.StartProxy(h)
	if err != nil {
		return err
	}
	defer slow.Close()
	slow.SetRate(fillRate)
	if _, err := registry.Push(context.Background(), fast.Addr+"/bench:latest", args[1], ""); err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(fast.Addr + " " + slow.Addr); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// An order is the request of a mount that fills.
type order struct{ Ref, Store string }

// build makes the source of a mount that fetches its whole image in the background, beginning at once, as a start-up profile of
// everything would.
func build(ctx context.Context, r mountd.Request) (*mountd.Source, error) {
	var o order
	if err := json.Unmarshal(r.Request, &o); err != nil {
		return nil, err
	}
	c, err := origin.New(origin.Options{})
	if err != nil {
		return nil, err
	}
	ref, err := origin.ParseReference(o.Ref)
	if err != nil {
		return nil, err
	}
	repo, err := c.Repository(ref)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(o.Store, store.Options{})
	if err != nil {
		return nil, err
	}
	img, err := image.Open(ctx, image.Options{Repo: repo, Store: st, Table: r.Table, Log: slog.Default()})
	if err != nil {
		return nil, err
	}
	all := lazyfs.Profile{}
	for i, l := range img.Config().Layers {
		all.Ranges = append(all.Ranges, lazyfs.ProfileRange{Layer: i, End: l.Ztoc.Span(l.Ztoc.NumSpans() - 1).Out.End})
	}
	return &mountd.Source{
		Config: img.Config(), Mount: lazyfs.MountOptions{Name: "bench", AllowOther: true}, Table: img.TableFile(), State: []byte("again"),
		Close:   func() error { return errors.Join(img.Close(), st.Close()) },
		Serving: func(ctx context.Context, s *lazyfs.Server) { s.Ahead(ctx, all) },
	}, nil
}

// download fetches the image's largest layer again and again at the same rate and throws it away: what the network and the
// registry cost by themselves.
func download(args []string) error {
	if err := json.NewEncoder(os.Stdout).Encode(""); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, os.Stdin); cancel() }() //nolint:errcheck // any end is the end
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, args[0], nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			break
		}
		io.Copy(io.Discard, resp.Body) //nolint:errcheck // it is ended
		resp.Body.Close()
	}
	return nil
}
