// Command mount measures how little a mount is in the way: what its users notice when its processes are replaced, and
// what a program that computes on all cores loses beside it.
//
//  1. The image (image.go) is made once, pushed to an embedded registry in a process of its own, with an index
//     beside it, and mounted by the muster under test.
//  2. pauses.go: server, parent and both with a keeper are killed, and upgrades made; how long until the mount answers.
//  3. beside.go: a loop of fixed work on every core, beside nothing, an idle mount, a mount that fetches its whole image in
//     the background, and a plain download at the same rate, in turns.
//  4. read.go: reading with a cold page cache when everything is local, with and without backing files, beside ext4.
//
// Each step adds rows; the order is that of steps.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/tests/bench/report"
)

// steps are what is measured, by name.
var steps = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"pauses", (*bench).pauses},
	{"beside", (*bench).beside},
	{"reads", (*bench).reads},
}

func main() {
	mountd.Main(build, func(error) int { return 1 }) // the mount that fills is this program's own
	if len(os.Args) > 1 && roles[os.Args[1]] != nil {
		if err := roles[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench-mount:", err)
			os.Exit(1)
		}
		return
	}
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 8, "rounds per row")
	flag.IntVar(&b.kills, "kills", 30, "deaths per row")
	flag.StringVar(&b.muster, "muster", "build/muster", "binary to measure")
	only := flag.String("only", "", "steps to run, separated by commas; default all, and only then the result is kept")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends at once
	err := b.run(ctx, *only)
	b.close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-mount:", err)
		os.Exit(1)
	}
}

// roles are what this program does besides, in processes of its own.
var roles = map[string]func(args []string) error{
	"as-registry": serveRegistry,
	"as-loop":     loop,
	"as-keeper":   keep,
	"as-download": download,
	"as-program":  touchSelf,
}

type bench struct {
	rounds, kills int
	muster        string
	dir           string // scratch
	ref           string // the image
	slow          string // the same, at fillRate
	layer         string // digest of its layer
	rows          []report.Row
	closers       []func()
}

func (b *bench) close() {
	for _, f := range slices.Backward(b.closers) {
		f()
	}
}

func (b *bench) run(ctx context.Context, only string) (err error) {
	if b.muster, err = filepath.Abs(b.muster); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("/var/tmp", "muster-bench-"); err != nil {
		return err
	}
	b.closers = append(b.closers, func() { os.RemoveAll(b.dir) })
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, s := range steps {
		if only != "" && !slices.Contains(strings.Split(only, ","), s.name) {
			continue
		}
		if err := s.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	if only != "" {
		for _, r := range b.rows {
			fmt.Printf("%-70s %.4g %s %s\n", r.Name, r.Value, r.Unit, r.Target)
		}
		return nil
	}
	_, err = report.Write(os.Stdout, "mount", b.rows)
	return err
}

// prepare makes the image and serves it.
func (b *bench) prepare(ctx context.Context) error {
	layout := filepath.Join(b.dir, "layout")
	layer, err := makeImage(layout)
	if err != nil {
		return err
	}
	b.layer = layer
	cmd, addrs, err := b.helper("as-registry", filepath.Join(b.dir, "registry"), layout)
	if err != nil {
		return err
	}
	b.closers = append(b.closers, func() { cmd.end() }) //nolint:errcheck // its own words are on standard error
	fast, slow, _ := strings.Cut(addrs, " ")
	b.ref, b.slow = fast+"/bench:latest", slow+"/bench:latest"
	return b.call(ctx, "index", "push", b.ref)
}

// call runs muster.
func (b *bench) call(ctx context.Context, args ...string) error {
	_, err := b.output(ctx, args...)
	return err
}

func (b *bench) output(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, b.muster, append([]string{"--store-dir", filepath.Join(b.dir, "store")}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("muster %s: %w: %s", args[0], err, stderr.String())
	}
	return out, err
}

// mount mounts the image with the muster under test on a new directory, and gives that and how to unmount.
func (b *bench) mount(ctx context.Context) (dir string, umount func() error, err error) {
	if dir, err = os.MkdirTemp(b.dir, "mnt-"); err != nil {
		return "", nil, err
	}
	if err := b.call(ctx, "mount", b.ref, dir); err != nil {
		return "", nil, err
	}
	b.closers = append(b.closers, func() { exec.Command("umount", "-l", dir).Run() }) //nolint:errcheck // it is gone, usually
	return dir, func() error { return b.call(ctx, "umount", dir) }, nil
}

// A helper is this program in a role of its own. It says one line when it is ready, and ends with its standard input.
type helper struct {
	*exec.Cmd
	stdin io.Closer
}

// helper starts a role. What it says is a JSON string on a line.
func (b *bench) helper(role string, args ...string) (*helper, string, error) {
	h := &helper{Cmd: exec.Command("/proc/self/exe", append([]string{role}, args...)...)}
	h.Stderr = os.Stderr
	var err error
	if h.stdin, err = h.StdinPipe(); err != nil {
		return nil, "", err
	}
	out, err := h.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := h.Start(); err != nil {
		return nil, "", err
	}
	var said string
	if err := json.NewDecoder(out).Decode(&said); err != nil {
		return nil, "", errors.Join(fmt.Errorf("%s: %w", role, err), h.end())
	}
	return h, said, nil
}

func (h *helper) end() error {
	h.stdin.Close()
	return h.Wait()
}
