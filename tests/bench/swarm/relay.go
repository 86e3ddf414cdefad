package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	benchlab "github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/cluster/lab"
	"github.com/muster-hpc/muster/tests/images"
)

// relayWord makes this program a relay: relay LISTEN FROM DIR BLOB…
const relayWord = "relay"

// relayMain is one host of the store-and-forward tree: it fetches blobs whole, one after the other, from FROM (a registry or another relay)
// into DIR, and gives each to whoever asks as soon as it has all of it. It prints a line when it has the last one, and goes on serving.
func relayMain(args []string) {
	fail := func(err error) { fmt.Println("failed:", err); os.Exit(1) }
	listen, from, dir, names := args[0], args[1], args[2], args[3:]
	ready := map[string]chan struct{}{}
	for _, n := range names {
		ready[n] = make(chan struct{})
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		fail(err)
	}
	path := func(name string) string { return filepath.Join(dir, strings.ReplaceAll(name, ":", "-")) }
	go func() {
		fail(http.ListenAndServe(listen, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			name := strings.TrimPrefix(r.URL.Path, "/")
			if ready[name] == nil {
				http.NotFound(w, r)
				return
			}
			select {
			case <-ready[name]:
				http.ServeFile(w, r, path(name))
			case <-r.Context().Done():
			}
		})))
	}()
	for _, n := range names {
		if err := fetchWhole(from+"/"+n, path(n)); err != nil {
			fail(err)
		}
		close(ready[n])
	}
	fmt.Println("done")
	select {}
}

// fetchWhole fetches a file, asking again while nobody listens yet.
func fetchWhole(url, path string) error {
	var resp *http.Response
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		var err error
		if resp, err = http.Get(url); err == nil {
			break
		}
		if time.Since(began) > 20*time.Second {
			return err
		}
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(url + ": " + resp.Status)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(f, resp.Body)
	return err
}

// tree measures whole layers passed on along a binary tree of hosts.
func (b *bench) tree(ctx context.Context, n int) error {
	if err := b.ended(); err != nil {
		return err
	}
	layout, err := images.Get(imageName)
	if err != nil {
		return err
	}
	layers, err := benchlab.Layers(layout)
	if err != nil {
		return err
	}
	var names []string
	for _, l := range layers {
		names = append(names, "sha256:"+filepath.Base(l.Path))
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	began := time.Now()
	err = b.everywhere(func(h *lab.Host) error {
		i := 0
		for k, x := range b.lab.Hosts {
			if x == h {
				i = k
			}
		}
		from := "http://" + lab.OriginAddr + "/v2/" + imageName + "/blobs"
		if i > 0 {
			from = "http://" + b.lab.Hosts[(i-1)/2].IP() + ":8080"
		}
		cmd := h.Command(self, append([]string{relayWord, ":8080", from, filepath.Join(h.Dir, "relay")}, names...)...)
		return h.Until(ctx, cmd, "done")
	})
	took := time.Since(began)
	for _, h := range b.lab.Hosts {
		h.Sweep()
		err = errors.Join(err, os.RemoveAll(filepath.Join(h.Dir, "relay")))
	}
	if err != nil {
		return err
	}
	b.add(key(n, "tree of whole layers"), took.Seconds())
	return nil
}
