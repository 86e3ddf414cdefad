package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// MountConf is what the processes of mounts are told besides the image.
type MountConf struct {
	Quota        int64 // of the store, as the agent has it
	AllowNetwork bool
	Log          *os.File `json:"-"` // where they write what goes wrong; nil: nowhere
	SELinux      string
}

// A mountRequest is what the process of a staged mount is told. Its first field tells it from other requests.
type mountRequest struct {
	Agent        string            `json:"agent"` // the socket
	Job          string            `json:"job"`
	Image        string            `json:"image"` // name@digest
	Platform     string            `json:"platform,omitempty"`
	Store        string            `json:"store"`
	Presentation tree.Presentation `json:"presentation"`
	MountConf
}

// What is in a job's directory of mounts: the mount point, and the image's config, which tells who starts programs in the tree about
// its environment.
const (
	mountName  = "rootfs"
	configName = "config.json"
)

// mountDir is where a job's image is mounted: in a directory that only the job's user may enter.
func (a *Agent) mountDir(id string) string {
	return filepath.Join(a.o.Mounts, store.Key(id)[:16], mountName)
}

// mountImage has processes of their own mount the image. The tables are in the store, so nothing is waited for.
func (j *job) mountImage(ctx context.Context, img origin.Image) error {
	o, dir := j.asked(), j.a.mountDir(j.id)
	if _, err := lazyfs.Mounted(dir); err != nil { // else an agent before this one has made it
		if err := makeMountDir(dir, o, img.Config); err != nil {
			return err
		}
	}
	q := mountRequest{
		Agent: j.a.o.Socket, Job: j.id, Image: img.Ref.WithDigest(img.Digest).String(), Platform: o.Platform, Store: j.a.o.Store.Dir(),
		MountConf: j.a.o.MountConf,
	}
	if o.UID != 0 {
		q.Presentation = tree.Presentation{User: true, UID: o.UID, GID: o.GID}
	}
	request, err := json.Marshal(q)
	if err != nil {
		return err
	}
	if _, err := lazyfs.Mounted(dir); err == nil { // an agent before this one has mounted it
		j.a.keep(ctx, dir)
		j.change(func(s *control.HostState) { s.Mount = dir })
		return nil
	}
	m, err := mountd.Start(ctx, mountd.Options{Dir: dir, Request: request, Log: j.a.o.MountConf.Log})
	if err != nil {
		RemoveMountDir(dir)
		var told *mountd.Error
		if errors.As(err, &told) {
			return &control.Error{Text: fmt.Sprintf("mount %s: %s", o.Image, told.Text), Code: told.Code}
		}
		return fmt.Errorf("mount %s: %w", o.Image, err)
	}
	j.a.keep(ctx, dir)
	j.change(func(s *control.HostState) { s.Mount = m.Dir })
	j.a.metrics.mounts.Inc()
	j.a.remember(j)
	return nil
}

// keep takes a mount into the agent's care: should its processes all be killed at once, they are started again.
func (a *Agent) keep(ctx context.Context, dir string) {
	if err := a.keeper.Keep(ctx, dir); err != nil {
		a.log.Warn("a mount would not survive the death of all its processes", "mount", dir, "cause", err)
	}
}

// makeMountDir makes a job's directory of mounts. While anything is made in it, it is the agent's own.
func makeMountDir(dir string, o order, config []byte) error {
	own := filepath.Dir(dir)
	if err := os.MkdirAll(filepath.Dir(own), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(own, 0o700); errors.Is(err, fs.ErrExist) && os.Geteuid() == 0 {
		err = os.Lchown(own, 0, 0)
		if err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	_ = os.Remove(filepath.Join(own, configName))
	f, err := os.OpenFile(filepath.Join(own, configName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(config)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	if os.Geteuid() == 0 && o.UID != 0 {
		return os.Lchown(own, int(o.UID), int(o.GID))
	}
	return nil
}

// RemoveMountDir removes what makeMountDir made, once nothing is mounted there.
func RemoveMountDir(dir string) {
	_ = os.Remove(dir)
	_ = os.Remove(filepath.Join(filepath.Dir(dir), configName))
	_ = os.Remove(filepath.Dir(dir))
}

// unmount takes a job's mount away. busy says that somebody was inside.
func (a *Agent) unmount(ctx context.Context, dir string) (busy bool, err error) {
	defer RemoveMountDir(dir)
	if _, err := lazyfs.Mounted(dir); err != nil {
		return false, nil
	}
	return mountd.Unmount(ctx, dir)
}

// IsMount reports whether a mount process's request is for BuildMount.
func IsMount(request []byte) bool {
	var q mountRequest
	return json.Unmarshal(request, &q) == nil && q.Store != "" && q.Job != ""
}

// BuildMount finds what a staged mount serves (mountd.Builder). Everything that it needs is in the store; bytes that are not, it asks of the
// agent.
func BuildMount(ctx context.Context, r mountd.Request) (*mountd.Source, error) {
	var q mountRequest
	if err := json.Unmarshal(r.Request, &q); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	ref, err := origin.ParseReference(q.Image)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(q.Store, store.Options{Quota: q.Quota, AllowNetwork: q.AllowNetwork})
	if err != nil {
		return nil, err
	}
	c, err := control.Dial(q.Agent)
	if err != nil {
		_ = st.Close()
		return nil, err
	}
	through := &throughAgent{client: c, ref: ref, job: q.Job}
	img, err := image.Open(ctx, image.Options{
		Repo: through, Store: st, Platform: q.Platform, Presentation: q.Presentation, Table: r.Table, Unclaimed: true,
		Temporary: through.temporary, Patience: agentPatience, PatientPrefetch: true, Log: slog.Default(),
	})
	closeAll := func() error {
		var err error
		if img != nil {
			err = img.Close()
		}
		_ = c.Close()
		_ = st.Close()
		return err
	}
	if err != nil {
		img = nil
		_ = closeAll()
		return nil, err
	}
	return &mountd.Source{
		Config: img.Config(), Mount: lazyfs.MountOptions{Name: q.Image, Context: q.SELinux, AllowOther: os.Geteuid() == 0},
		Table: img.TableFile(), State: []byte("{}"), Close: closeAll,
		Serving: func(ctx context.Context, s *lazyfs.Server) {
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { tellFirstRead(ctx, c, q.Job, s) })
			img.Guess(ctx, s)
		},
	}, nil
}

// How often a mount looks whether a program reads: seldom when it has been idle for long, so that it costs nothing.
const (
	firstReadEvery = 50 * time.Millisecond
	firstReadShare = 100 // of the time so far
	firstReadMost  = 2 * time.Second
)

// tellFirstRead tells the agent when a program begins to read in the mount.
func tellFirstRead(ctx context.Context, c *control.Client, job string, s *lazyfs.Server) {
	began := time.Now()
	for s.Stats().Reads == 0 {
		select {
		case <-time.After(min(max(firstReadEvery, time.Since(began)/firstReadShare), firstReadMost)):
		case <-ctx.Done():
			return
		}
	}
	seen := time.Now()
	for range 5 { // the agent may be started again just now, or still be writing the stage down
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := c.FirstRead(ask, control.FirstReadRequest{Job: job, Ago: time.Since(seen)})
		cancel()
		if err == nil {
			return
		}
		select {
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// agentPatience is how long a reader of a mount waits for an agent that does not answer: long enough for an upgrade.
const agentPatience = 2 * time.Minute

// throughAgent is the origin of a staged mount: the agent. There is nothing to resolve and nothing to look for.
type throughAgent struct {
	client *control.Client
	ref    origin.Reference
	job    string
}

var (
	_ origin.Repository = (*throughAgent)(nil)
	_ fetch.Rejecter    = (*throughAgent)(nil)
)

// errOnlyAgent says that a mount looked for something that the stage should have left in the store.
var errOnlyAgent = errors.New("not in the store, and a staged mount asks no registry")

func (t *throughAgent) Reference() origin.Reference { return t.ref }
func (t *throughAgent) RangesIgnored() bool         { return false }

func (t *throughAgent) Resolve(context.Context, string) (origin.Image, error) {
	return origin.Image{}, fmt.Errorf("image %s: %w", t.ref, errOnlyAgent)
}

func (t *throughAgent) Manifest(context.Context, string) (origin.Manifest, error) {
	return origin.Manifest{}, errOnlyAgent
}

func (t *throughAgent) Referrers(context.Context, ztoc.Digest, string) (origin.Referrers, error) {
	return origin.Referrers{Reason: errOnlyAgent.Error()}, nil
}

func (t *throughAgent) Tags(context.Context) ([]string, error) { return nil, errOnlyAgent }

func (t *throughAgent) PushBlob(context.Context, ztoc.BlobRef, func() (io.ReadCloser, error)) error {
	return errOnlyAgent
}

func (t *throughAgent) PushManifest(context.Context, string, []byte, string) (ztoc.Digest, error) {
	return "", errOnlyAgent
}

func (t *throughAgent) Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error) {
	return t.client.Read(ctx, control.ReadRequest{Job: t.job, Image: t.ref.String(), Blob: ztoc.BlobRef{Digest: d}, Range: r, Ahead: fetch.Priority(ctx) == ztoc.Prefetch})
}

// Reject tells the agent that bytes did not match.
func (t *throughAgent) Reject(d ztoc.Digest, r ztoc.Range, cause error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = t.client.Reject(ctx, control.ReadRequest{Job: t.job, Image: t.ref.String(), Blob: ztoc.BlobRef{Digest: d}, Range: r, Wrong: cause.Error()})
}

// temporary says which errors go away by themselves: an agent that is being restarted.
func (t *throughAgent) temporary(err error) bool {
	var said *control.Error
	return !errors.As(err, &said) && !errors.Is(err, control.ErrRefused)
}
