package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// freeze gets the JobSpec that all hosts of the job share: made here when this host is the job's resolver, else asked of it, or handed over
// by a host that has it already.
func (j *job) freeze(ctx context.Context) error {
	select {
	case b := <-j.offered:
		return j.use(b, nil)
	default:
	}
	var errs []error
	asked := j.asked()
	for _, name := range planner.Resolver(j.id, j.a.resolvers(asked.names())) {
		encoded, content, err := j.specFrom(ctx, asked, name)
		if err == nil {
			if err = j.use(encoded, content); err == nil {
				return nil
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		errs = append(errs, err)
		var said *origin.Error
		if errors.As(err, &said) || errors.Is(err, errSaid) {
			break // the origin has answered: others would hear the same
		}
		j.a.log.Warn("a resolver is passed over", "job", j.id, "host", name, "cause", err)
	}
	err := errors.Join(errs...)
	if strings.HasPrefix(err.Error(), asked.Image) { // what an origin says begins with it
		return fmt.Errorf("image %w", err)
	}
	return fmt.Errorf("image %s: %w", asked.Image, err)
}

// errSaid marks what a resolver has found out about an image, as against a resolver that could not be asked.
var errSaid = errors.New("the resolver says")

// finalMark begins an answer to specQuestion that is no JobSpec: what the origin has said of the image, in the words and with the exit code
// that every host of the job is to give.
const finalMark = "final "

// final is such an answer, or nil when asking again, or asking others, might help.
func (a *Agent) final(err error) []byte {
	e := &control.Error{Text: err.Error(), Code: a.o.ExitCode(err)}
	var told *control.Error
	var said *origin.Error
	switch {
	case errors.As(err, &told):
		e = told
	case errors.As(err, &said):
		e.Text = said.Error()
	}
	if !slices.Contains(finalCodes, e.Code) {
		return nil
	}
	b, err := json.Marshal(e)
	if err != nil {
		return nil
	}
	return append([]byte(finalMark), b...)
}

// finalCodes are the exit codes of what only people can put right: a wrong name, no such image, not authorised, not supported.
var finalCodes = []int{2, 3, 4, 9}

func finalOf(b []byte) *control.Error {
	text, ok := bytes.CutPrefix(b, []byte(finalMark))
	var e control.Error
	if !ok || json.Unmarshal(text, &e) != nil {
		return nil
	}
	return &e
}

// A saidError is what another resolver was told; it is errSaid.
type saidError struct{ what *control.Error }

func (s *saidError) Error() string   { return s.what.Text }
func (s *saidError) Unwrap() []error { return []error{errSaid, s.what} }

// specFrom gets the JobSpec from one resolver, or from whoever offers it meanwhile.
func (j *job) specFrom(ctx context.Context, asked order, name string) (encoded []byte, content map[ztoc.Digest][]byte, err error) {
	if name == j.a.o.Name {
		spec, content, err := j.a.resolve(ctx, asked)
		if err != nil {
			return nil, nil, err
		}
		encoded, err = spec.Encode()
		return encoded, content, err
	}
	i := slices.IndexFunc(asked.Hosts, func(h peer.Host) bool { return h.Name == name })
	q, err := json.Marshal(asked)
	if err != nil {
		return nil, nil, err
	}
	asking, stop := context.WithCancel(ctx)
	defer stop()
	type answer struct {
		b   []byte
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		b, err := peer.Ask(asking, j.a.client, asked.Hosts[i], specQuestion, q)
		if final := finalOf(b); err == nil && final != nil {
			err = &saidError{final}
		}
		answered <- answer{b, err}
	}()
	select {
	case a := <-answered:
		return a.b, nil, a.err
	case b := <-j.offered:
		return b, nil, nil
	}
}

// resolve makes the JobSpec of an order, and the content of those of its blobs that no registry has.
func (a *Agent) resolve(ctx context.Context, o order) (*planner.JobSpec, map[ztoc.Digest][]byte, error) {
	repo, err := a.o.Repository(o.Image, o.Secret)
	if err != nil {
		return nil, nil, err
	}
	found, err := image.Survey(ctx, image.Options{
		Repo: repo, Store: a.o.Store, Platform: o.Platform, NoIndex: a.o.NoIndex, AskAlways: true, Log: a.log,
		SpanSize: a.o.SpanSize, Tool: a.o.Tool,
	})
	said := false
	if err == nil {
		said, err = a.mayHave(o, found)
	}
	if err != nil {
		return nil, nil, err
	}
	spec := &planner.JobSpec{
		Planner: planner.Version, Job: o.id(), Image: found.Image.Ref.WithDigest(found.Image.Digest).String(), Manifest: found.Image.Digest,
	}
	var content map[ztoc.Digest][]byte
	if spec.Blobs, content, err = Blobs(found); err != nil {
		return nil, nil, err
	}
	for _, h := range o.Hosts {
		spec.Hosts = append(spec.Hosts, planner.Host{Name: h.Name, Addr: h.Addr, Seed: a.o.Seed(h.Name), Group: a.o.Group(h.Name)})
	}
	if said {
		if err := vouch(a.client, spec, len(o.Secret) == 0); err != nil {
			a.log.Warn("other hosts are not told that the origin accepts the user", "job", o.Job, "cause", err)
		}
	}
	return spec, content, spec.Validate()
}

// mayHave is the verdict on a user and an image. The origin has given it when it answered; what it said is kept, so that it counts when the
// origin cannot be asked. There may be none (said is false) for root, who goes on without.
func (a *Agent) mayHave(o order, found *image.Surveyed) (said bool, err error) {
	verdict := func(who string) string {
		return store.Key("may have " + found.Image.Ref.WithDigest(found.Image.Digest).String() + " " + who)
	}
	user, anybody := verdict("uid "+itoa(o.UID)), verdict("anybody")
	if !found.Offline {
		key := user
		if len(o.Secret) == 0 {
			key = anybody
		}
		if err := a.o.Store.Put(store.KindRef, key, func(w io.Writer) error { _, err := io.WriteString(w, "yes"); return err }); err != nil {
			a.log.Debug("a verdict is not kept", "cause", err)
		}
		return true, nil
	}
	for _, key := range []string{anybody, user} {
		if f, err := a.o.Store.Get(store.KindRef, key); err == nil {
			return true, f.Close()
		}
	}
	if o.UID == 0 {
		return false, nil
	}
	a.audit("refused", "job", o.Job, "image", o.Image, "uid", o.UID, "cause", "the origin cannot be asked")
	return false, fmt.Errorf("image %s: %w: the origin cannot be asked whether uid %d may have it", o.Image, origin.ErrUnreachable, o.UID)
}

// resolvers are the hosts that may resolve: those that may reach the origin, or all when nobody is known to.
func (a *Agent) resolvers(names []string) []string {
	var may []string
	for _, n := range names {
		if a.o.Seed(n) {
			may = append(may, n)
		}
	}
	if may == nil {
		return names
	}
	return may
}

// use makes the plan, and readies what the steps need: blobs, chain, counters.
func (j *job) use(encoded []byte, content map[ztoc.Digest][]byte) error {
	spec, err := planner.DecodeJobSpec(encoded)
	if err != nil {
		return err
	}
	if spec.Job != j.id {
		return fmt.Errorf("%w: it is for job %s, not %s", planner.ErrInvalid, spec.Job, j.id)
	}
	plan, err := planner.New(spec)
	if err != nil {
		return err
	}
	me := plan.Host(j.a.o.Name)
	if me < 0 {
		return fmt.Errorf("%w: this host, %s, is not among its hosts", planner.ErrInvalid, j.a.o.Name)
	}
	blobs := make([]*held, 0, len(spec.Blobs))
	present := int64(0)
	for _, b := range spec.Blobs {
		h, err := j.a.shelf.open(b.BlobRef)
		if err == nil && content[b.Digest] != nil {
			err = h.WriteAt(content[b.Digest], 0)
		}
		if err != nil {
			for _, h := range blobs {
				h.close()
			}
			return err
		}
		blobs = append(blobs, h)
		if b.Kind == planner.Layer {
			present += h.blob.Present()
		}
	}
	j.spec, j.encoded, j.plan, j.me, j.blobs = spec, encoded, plan, me, blobs
	j.fromStore.Store(present)
	j.accept(content)
	j.chain = fetch.New(fetch.Options{
		Store:    fetch.StoreFunc(func(ref ztoc.BlobRef) (fetch.Blob, error) { return j.a.fetchBlob(ref) }),
		Origin:   source{j},
		Requests: j.a.o.Requests,
		Temporary: func(err error) bool {
			return !errors.Is(err, origin.ErrUnauthorized) && !errors.Is(err, origin.ErrNotFound)
		},
		Patience: j.a.o.Patience,
	})
	j.change(func(s *control.HostState) { s.Total = j.size() })
	j.a.know(j)
	return nil
}

// A fetchBlob is a blob of the shelf as the chain wants it.
type fetchBlob struct{ *held }

func (a *Agent) fetchBlob(ref ztoc.BlobRef) (fetch.Blob, error) {
	h, err := a.shelf.open(ref)
	if err != nil {
		return nil, err
	}
	return fetchBlob{h}, nil
}

func (b fetchBlob) Missing(r ztoc.Range) []ztoc.Range           { return b.blob.Missing(r) }
func (b fetchBlob) ReadAt(p []byte, off int64) error            { return b.blob.ReadAt(p, off) }
func (b fetchBlob) Drop(r ztoc.Range)                           { b.blob.Drop(r) }
func (b fetchBlob) Claim(r ztoc.Range) (by ztoc.Range, ok bool) { return b.blob.Claim(r) }
func (b fetchBlob) Release(r ztoc.Range)                        { b.blob.Release(r) }
func (b fetchBlob) WillNeed(r ztoc.Range)                       { b.blob.WillNeed(r) }
func (b fetchBlob) Close() error                                { b.close(); return nil }

// know enters a job under its plan, and wakes who waits for it.
func (a *Agent) know(j *job) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.plans[j.plan.ID().String()] = j
	a.wake()
}

// wake tells who waits for a job that there is news. The caller holds a.mu.
func (a *Agent) wake() {
	close(a.news)
	a.news = make(chan struct{})
}

// specQuestion is peer.Spec for those who wait for a resolver that is at work.
var specQuestion = func() peer.Question[[]byte, []byte] {
	q := peer.Spec
	q.Timeout = 2 * time.Minute
	return q
}()
