package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// demoProgram is what the demo runs: it reads a good part of Python and all of numpy's core.
var demoProgram = []string{"python3", "-c", `import numpy; print("numpy", numpy.__version__, "says", int(numpy.arange(10).sum()))`}

func (a *app) demoCommand() *cobra.Command {
	link := int64(1000)
	c := &cobra.Command{
		Use:   "demo LAYOUT",
		Short: "show muster at work: a registry, a real image, a program run from it, a cluster",
		Long: `Starts a registry in this process, puts the image of the OCI layout LAYOUT into it, which has to have Python and
numpy, and runs a program from it: after a plain pull and unpack; with muster, knowing nothing of the image; with
muster again; with muster on a host that is new, with an index beside the image; and on the four hosts of a small
cluster, an agent each on loopback, that pull it once for all. Needs root. 'make demo' builds an image and calls this.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.demo(cmd.Context(), args[0], link)
		},
	}
	c.Flags().Int64Var(&link, "link", link, "speed of the registry's link in Mbit/s; 0: as fast as this machine")
	return c
}

// A demonstration is the state of one demo.
type demonstration struct {
	app   *app
	proxy *registry.Proxy
	ref   string
	dir   string // removed at the end
	rows  []demoRow
}

// A demoRow is one way to run the program.
type demoRow struct {
	name     string
	began    time.Time
	first    time.Duration // until the program's first output
	requests []registry.Record
}

func (r demoRow) bytes() (n int64) {
	for _, q := range r.requests {
		n += q.Bytes
	}
	return n
}

func (a *app) demo(ctx context.Context, layout string, link int64) (err error) {
	say := func(format string, args ...any) { fmt.Fprintf(a.out, "\n"+format+"\n", args...) }
	if os.Geteuid() != 0 {
		return &coded{exitUnsupported, errors.New("the demo unpacks an image and mounts: run it as root")}
	}
	d := &demonstration{app: a}
	if d.dir, err = os.MkdirTemp("", "muster-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	handler, err := registry.NewHandler(filepath.Join(d.dir, "registry"), registry.Options{Referrers: true})
	if err != nil {
		return err
	}
	if d.proxy, err = registry.StartProxy(handler); err != nil {
		return err
	}
	defer d.proxy.Close()
	name := filepath.Base(layout)
	d.ref = d.proxy.Addr + "/" + name + ":demo"
	if _, err := registry.Push(ctx, d.ref, layout, ""); err != nil {
		return err
	}
	if link > 0 {
		d.proxy.SetRate(link * registry.Mbit)
		say("A registry at %s, %d Mbit/s, has the image %s.", d.proxy.Addr, link, name)
	} else {
		say("A registry at %s has the image %s.", d.proxy.Addr, name)
	}
	img, err := d.resolve(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(a.out, "%d layers, %s compressed. The program: %s\n", len(img.Layers), megabytes(img.Size()), strings.Join(demoProgram, " "))

	say("1. Plain: pull everything, unpack everything, then run.")
	if err := d.measure("plain pull and unpack", func() (time.Time, error) { return d.plain(ctx, img) }); err != nil {
		return err
	}
	say("2. muster, the first time: the image has no index, so it is streamed once, without unpacking.")
	if err := d.measure("muster, first time, no index", func() (time.Time, error) { return d.muster(ctx, "store") }); err != nil {
		return err
	}
	say("3. muster, again on this host.")
	if err := d.measure("muster, again", func() (time.Time, error) { return d.muster(ctx, "store") }); err != nil {
		return err
	}
	say("4. An index is pushed beside the image: 'muster index push'. Then muster on a host that is new.")
	if out, err := d.self(ctx, "store", "index", "push", d.ref).CombinedOutput(); err != nil {
		return fmt.Errorf("index push: %w: %s", err, out)
	}
	if err := d.measure("muster, new host, with an index", func() (time.Time, error) { return d.muster(ctx, "new") }); err != nil {
		return err
	}

	say("What each way cost:")
	d.print(a.out)
	say("What was fetched when, in MB, in way 4:")
	printFetches(a.out, d.rows[3], img)

	say("5. A cluster of %d hosts, an agent each: a job starts on all of them at once.", demoHosts)
	if err := d.cluster(ctx, img); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	return nil
}

func (d *demonstration) resolve(ctx context.Context) (origin.Image, error) {
	repo, err := d.app.repository(d.ref)
	if err != nil {
		return origin.Image{}, err
	}
	return repo.Resolve(ctx, "")
}

// measure runs the program in one way, which returns when its first output came.
func (d *demonstration) measure(name string, way func() (time.Time, error)) error {
	d.proxy.ResetLog()
	r := demoRow{name: name, began: time.Now()}
	first, err := way()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	r.first = first.Sub(r.began)
	r.requests = d.proxy.Log(registry.Match{})
	d.rows = append(d.rows, r)
	fmt.Fprintf(d.app.out, "   first output after %.2f s\n", r.first.Seconds())
	return nil
}

// self is this program with a store of the demo's.
func (d *demonstration) self(ctx context.Context, store string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"--store-dir", filepath.Join(d.dir, store)}, args...)...)
	cmd.Args[0] = "muster"
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// muster runs the program with muster run.
func (d *demonstration) muster(ctx context.Context, store string) (time.Time, error) {
	cmd := d.self(ctx, store, append([]string{"run", "--tty=false", d.ref}, demoProgram...)...)
	return d.firstOutput(cmd)
}

// firstOutput runs cmd to its end, shows its output, and says when that began.
func (d *demonstration) firstOutput(cmd *exec.Cmd) (first time.Time, err error) {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return first, err
	}
	cmd.Stderr = d.app.err
	if err := cmd.Start(); err != nil {
		return first, err
	}
	var text bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, readErr := out.Read(buf)
		if n > 0 && first.IsZero() {
			first = time.Now()
		}
		text.Write(buf[:n])
		if readErr != nil {
			break
		}
	}
	err = cmd.Wait()
	fmt.Fprintf(d.app.out, "   %s\n", strings.TrimSpace(text.String()))
	if err == nil && first.IsZero() {
		err = errors.New("the program wrote nothing")
	}
	return first, err
}

// pullsAtOnce is docker's and containerd's default number of layers downloaded at a time.
const pullsAtOnce = 3

// plain does what a container engine does: download the layers, a few at a time, unpack them in order
// with tar as they arrive, then run the program in the directory.
func (d *demonstration) plain(ctx context.Context, img origin.Image) (time.Time, error) {
	repo, err := d.app.repository(d.ref)
	if err != nil {
		return time.Time{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	files := make([]chan error, len(img.Layers))
	slots := make(chan struct{}, pullsAtOnce)
	file := func(i int) string { return filepath.Join(d.dir, fmt.Sprintf("layer-%d", i)) }
	for i, l := range img.Layers {
		files[i] = make(chan error, 1)
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			files[i] <- download(ctx, repo, l, file(i))
		}()
	}
	root := filepath.Join(d.dir, "plain")
	if err := os.Mkdir(root, 0o755); err != nil {
		return time.Time{}, err
	}
	for i := range files {
		err := <-files[i]
		if err == nil {
			var out []byte
			if out, err = exec.CommandContext(ctx, "tar", "-C", root, "-xzf", file(i)).CombinedOutput(); err != nil {
				err = fmt.Errorf("tar: %w: %s", err, out)
			}
		}
		if err != nil {
			cancel()
			for _, rest := range files[i+1:] {
				<-rest
			}
			return time.Time{}, err
		}
	}
	cmd := exec.CommandContext(ctx, "chroot", append([]string{root}, demoProgram...)...)
	cmd.Env = []string{"PATH=/usr/bin:/bin"}
	return d.firstOutput(cmd)
}

func download(ctx context.Context, repo origin.Repository, l origin.Descriptor, file string) error {
	body, err := repo.Blob(ctx, l.Digest, ztoc.Range{End: l.Size})
	if err != nil {
		return err
	}
	defer body.Close()
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, body)
	return errors.Join(err, f.Close())
}

func (d *demonstration) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 2, 8, 3, ' ', 0)
	fmt.Fprintln(tw, "   \tfirst output\tof plain\tfetched\trequests")
	for i, r := range d.rows {
		fmt.Fprintf(tw, "%d  %s\t%.2f s\t%.0f%%\t%s\t%d\n", i+1, r.name, r.first.Seconds(),
			100*r.first.Seconds()/d.rows[0].first.Seconds(), megabytes(r.bytes()), len(r.requests))
	}
	_ = tw.Flush()
}

// fetchSlices is how many columns the table of fetches has.
const fetchSlices = 8

// printFetches shows in which part of a run how much came of what.
func printFetches(w io.Writer, r demoRow, img origin.Image) {
	total := r.first
	for _, q := range r.requests {
		total = max(total, q.Time.Add(q.Duration).Sub(r.began))
	}
	// Row 0 is everything that is no layer.
	cells := make([][fetchSlices]float64, len(img.Layers)+1)
	for _, q := range r.requests {
		row := 1 + slices.IndexFunc(img.Layers, func(l origin.Descriptor) bool { return q.Kind == registry.Blob && q.Ref == string(l.Digest) })
		// The bytes of a request are spread evenly over its time.
		took := max(q.Duration, time.Microsecond)
		for i := range fetchSlices {
			lo, hi := total*time.Duration(i)/fetchSlices, total*time.Duration(i+1)/fetchSlices
			from := q.Time.Sub(r.began)
			if part := min(hi, from+took) - max(lo, from); part > 0 {
				cells[row][i] += float64(q.Bytes) * float64(part) / float64(took)
			}
		}
	}
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "until\t")
	for i := range fetchSlices {
		fmt.Fprintf(tw, "%.2f s\t", (total * time.Duration(i+1) / fetchSlices).Seconds())
	}
	fmt.Fprintln(tw)
	for row, sums := range cells {
		if row == 0 {
			fmt.Fprint(tw, "manifests and index\t")
		} else {
			fmt.Fprintf(tw, "layer %d of %s\t", row, megabytes(img.Layers[row-1].Size))
		}
		for _, b := range sums {
			if b < 5000 {
				fmt.Fprint(tw, ".\t")
			} else {
				fmt.Fprintf(tw, "%.2f\t", b/1e6)
			}
		}
		fmt.Fprintln(tw)
	}
	_ = tw.Flush()
}
