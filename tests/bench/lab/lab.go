// Package lab is what benchmarks share: a registry behind a link of a chosen rate, containerd as the
// others use it, a plain unpacked directory, and clocks that stop at the first byte of output.
//
// The link is a pair of virtual interfaces to a network namespace of its own, shaped by tc tbf on both
// ends; Debian's docker-registry runs behind it. Everything a lab makes ends with Close: processes,
// namespace, directories.
package lab

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

const (
	hostIP     = "10.77.61.1"
	registryIP = "10.77.61.2"
	port       = "5000"
)

// A Lab is a registry behind a link. One at a time on a machine.
type Lab struct {
	Dir      string // scratch, removed by Close
	netns    string
	registry *exec.Cmd
	closers  []func()
}

// New makes the namespace, the link and the registry. It needs root and Debian's docker-registry and
// iproute2.
func New(ctx context.Context) (_ *Lab, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the benchmark makes network namespaces and mounts: run it as root")
	}
	dir, err := os.MkdirTemp("/var/tmp", "muster-bench-")
	if err != nil {
		return nil, err
	}
	l := &Lab{Dir: dir, netns: "muster-bench"}
	l.closers = append(l.closers, func() { os.RemoveAll(dir) })
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	run("ip", "netns", "del", l.netns)  //nolint:errcheck // left by one that was killed
	run("ip", "link", "del", "mbench0") //nolint:errcheck
	for _, c := range [][]string{
		{"netns", "add", l.netns},
		{"link", "add", "mbench0", "type", "veth", "peer", "name", "mbench1", "netns", l.netns},
		{"addr", "add", hostIP + "/30", "dev", "mbench0"},
		{"link", "set", "mbench0", "up"},
		{"-n", l.netns, "addr", "add", registryIP + "/30", "dev", "mbench1"},
		{"-n", l.netns, "link", "set", "mbench1", "up"},
		{"-n", l.netns, "link", "set", "lo", "up"},
	} {
		if err := run("ip", c...); err != nil {
			return nil, err
		}
	}
	l.closers = append(l.closers, func() {
		run("ip", "netns", "del", l.netns)  //nolint:errcheck
		run("ip", "link", "del", "mbench0") //nolint:errcheck
	})
	return l, l.startRegistry(ctx)
}

// Host is the registry as clients name it: host:port.
func (l *Lab) Host() string { return registryIP + ":" + port }

// Close ends everything the lab started.
func (l *Lab) Close() {
	for i := len(l.closers) - 1; i >= 0; i-- {
		l.closers[i]()
	}
	l.closers = nil
}

// Rate shapes the link, in Mbit/s each way; 0 lifts the limit.
func (l *Lab) Rate(mbit int) error {
	ends := [][]string{{"qdisc", "%s", "dev", "mbench0", "root"}, {"-n", l.netns, "qdisc", "%s", "dev", "mbench1", "root"}}
	for _, end := range ends {
		args := append([]string(nil), end...)
		for i, a := range args {
			if a == "%s" {
				args[i] = map[bool]string{true: "del", false: "replace"}[mbit == 0]
			}
		}
		if mbit == 0 {
			run("tc", args...) //nolint:errcheck // there may be no limit yet
			continue
		}
		args = append(args, "tbf", "rate", strconv.Itoa(mbit)+"mbit", "burst", "256kb", "latency", "100ms")
		if err := run("tc", args...); err != nil {
			return err
		}
	}
	return nil
}

// Received is the bytes this side has received over the link, headers included.
func (l *Lab) Received() int64 {
	b, err := os.ReadFile("/sys/class/net/mbench0/statistics/rx_bytes")
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n
}

func (l *Lab) startRegistry(ctx context.Context) error {
	conf := filepath.Join(l.Dir, "registry.yml")
	text := "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage:\n  filesystem: {rootdirectory: " +
		filepath.Join(l.Dir, "registry") + ", maxthreads: 200}\nhttp: {addr: \"" + registryIP + ":" + port + "\"}\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return err
	}
	l.registry = exec.Command("ip", "netns", "exec", l.netns, "docker-registry", "serve", conf)
	if err := l.Start(l.registry, "registry.log"); err != nil {
		return err
	}
	return Wait(ctx, 20*time.Second, func() error {
		resp, err := http.Get("http://" + l.Host() + "/v2/")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// Start starts a process that ends with the lab, or with this process; its output goes to a log in
// the lab's directory.
func (l *Lab) Start(cmd *exec.Cmd, log string) error {
	f, err := os.Create(filepath.Join(l.Dir, log))
	if err != nil {
		return err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w (apt-get install it, or run make demo once)", cmd.Path, err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }() //nolint:errcheck // killed below
	l.closers = append(l.closers, func() { Stop(cmd, done) })
	return nil
}

// Stop asks a process group to end and kills it after five seconds.
func Stop(cmd *exec.Cmd, done <-chan struct{}) {
	syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) //nolint:errcheck
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) //nolint:errcheck
		<-done
	}
}

// Sleep waits for d, or until ctx is done.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// Wait calls ready until it gives nil, at most for the given time.
func Wait(ctx context.Context, limit time.Duration, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready after %v: %w", limit, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// FirstOutput runs cmd and gives the time to the first byte it prints, or to its end when it prints
// nothing, and to its end. A command that fails is an error with what it said.
func FirstOutput(cmd *exec.Cmd) (first, whole time.Duration, err error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	var b [1]byte
	n, _ := out.Read(b[:])
	first = time.Since(start)
	io.Copy(io.Discard, out) //nolint:errcheck // the exit code tells
	err = cmd.Wait()
	whole = time.Since(start)
	if n == 0 {
		first = whole
	}
	if err != nil {
		return first, whole, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, tail(stderr.Bytes()))
	}
	return first, whole, nil
}

// Tar reads everything beneath dir as tar does, and throws it away.
func Tar(ctx context.Context, dir string) error {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "tar", "-C", dir, "-cf", "-", ".")
	cmd.Stdout, cmd.Stderr = struct{ io.Writer }{io.Discard}, &stderr // a pipe: tar notices /dev/null and reads nothing
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tar of %s: %w: %s", dir, err, tail(stderr.Bytes()))
	}
	return nil
}

// DropCaches empties the page cache, so that what is read next comes from the disk.
func DropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o644)
}

// Bundle is a plain unpacked image that runc can run.
type Bundle struct {
	dir string
	n   int
}

// Unpack unpacks an OCI layout's image with umoci into dir.
func Unpack(layout, dir string) (*Bundle, error) {
	if err := run("umoci", "unpack", "--image", layout+":latest", dir); err != nil {
		return nil, err
	}
	return &Bundle{dir: dir}, nil
}

// Root is the unpacked tree.
func (b *Bundle) Root() string { return filepath.Join(b.dir, "rootfs") }

// Command runs args in the bundle with runc, sharing the host's network as muster run does.
func (b *Bundle) Command(args ...string) (*exec.Cmd, error) {
	conf := filepath.Join(b.dir, "config.json")
	text, err := os.ReadFile(conf)
	if err != nil {
		return nil, err
	}
	var c map[string]any
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, err
	}
	process, _ := c["process"].(map[string]any)
	linux, _ := c["linux"].(map[string]any)
	if process == nil || linux == nil {
		return nil, fmt.Errorf("%s: not a runtime config", conf)
	}
	process["args"], process["terminal"] = args, false
	delete(process, "rlimits")
	linux["namespaces"] = []map[string]string{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}}
	if text, err = json.Marshal(c); err != nil {
		return nil, err
	}
	if err := os.WriteFile(conf, text, 0o644); err != nil {
		return nil, err
	}
	b.n++
	return exec.Command("runc", "run", "--bundle", b.dir, fmt.Sprintf("muster-bench-%d-%d", os.Getpid(), b.n)), nil
}

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, tail(out))
	}
	return nil
}

func tail(b []byte) string {
	s := strings.TrimSpace(string(b))
	return s[max(0, len(s)-600):]
}

// A Layer is a layer blob of an OCI layout.
type Layer struct {
	Path string
	Size int64 // bytes
}

// Inflate inflates the layer on one core and gives the number of bytes that come out.
func (l Layer) Inflate() (int64, error) {
	f, err := os.Open(l.Path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return inflate.NewReader(f, inflate.Options{}).WriteTo(io.Discard)
}

// Layers are the layers of a layout's only image, the largest first.
func Layers(layout string) ([]Layer, error) {
	var index, manifest struct {
		Manifests []struct{ Digest string }
		Layers    []struct {
			Digest string
			Size   int64
		}
	}
	if err := readJSON(filepath.Join(layout, "index.json"), &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) == 0 {
		return nil, fmt.Errorf("%s: no image", layout)
	}
	if err := readJSON(blobPath(layout, index.Manifests[0].Digest), &manifest); err != nil {
		return nil, err
	}
	var out []Layer
	for _, l := range manifest.Layers {
		out = append(out, Layer{blobPath(layout, l.Digest), l.Size})
	}
	slices.SortFunc(out, func(a, b Layer) int { return cmp.Compare(b.Size, a.Size) })
	return out, nil
}

func blobPath(layout, digest string) string {
	return filepath.Join(layout, "blobs", strings.Replace(digest, ":", "/", 1))
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
