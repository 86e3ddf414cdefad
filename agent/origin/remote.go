package origin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// remote is a repository of a registry.
type remote struct {
	c   *Client
	up  *upstream
	ref Reference
}

var _ Repository = (*remote)(nil)

func (r *remote) Reference() Reference { return r.ref }

func (r *remote) RangesIgnored() bool {
	for _, e := range r.up.endpoints {
		if e.cfg.pull && !e.noRange.Load() && !(e.mirror && !e.answered.Load()) {
			return false
		}
	}
	return true
}

var acceptManifests = http.Header{"Accept": {strings.Join([]string{MediaTypeManifest, MediaTypeIndex, MediaTypeDocker, MediaTypeDockerList, "*/*;q=0.1"}, ", ")}}

// document fetches a bounded body, asking again when it breaks on the way. check may refuse it; then
// the next endpoint is asked.
func (r *remote) document(ctx context.Context, c *call, check func(http.Header, []byte) error) ([]byte, http.Header, error) {
	p := newPatience(r.c.o.ResolveWait)
	no := map[*endpoint]*refusal{}
	for {
		a, err := r.doExcept(ctx, c, p, no)
		if err != nil {
			return nil, nil, err
		}
		tooLong := time.AfterFunc(p.max, func() { a.Body.Close() }) // a trickle never ends otherwise
		b, err := a.read(MaxDocument)
		tooLong.Stop()
		f := (*refusal)(nil)
		switch {
		case ctx.Err() != nil:
			return nil, nil, context.Cause(ctx)
		case errors.Is(err, errTooLong):
			f = a.refuse(r, c, elsewhere, ErrUnsupported, fmt.Sprintf("more than %d bytes", MaxDocument), "")
		case err != nil:
			f = r.broken(a.e, c, a.rec.Host, bare(err))
		default:
			if err = check(a.Header, b); err == nil {
				return b, a.Header, nil
			}
			f = a.refuse(r, c, elsewhere, ErrProtocol, clean(err.Error()), "")
			f.err.Cause = err
			for _, s := range []error{ErrDigest, ErrUnsupported, ErrProtocol} {
				if errors.Is(err, s) {
					f.err.Err, f.err.Cause = s, nil
					f.err.Message = strings.TrimPrefix(f.err.Message, s.Error()+": ")
				}
			}
		}
		a.e.failed(a.t0)
		if f.verdict == elsewhere {
			no[a.e] = f
			continue
		}
		p.tries++
		if time.Since(p.since) > p.max {
			return nil, nil, r.exhausted(c, f, p, 0)
		}
		if err := sleep(ctx, jitter(p.tries-1)); err != nil {
			return nil, nil, err
		}
	}
}

var errTooLong = errors.New("too long")

// read reads the whole body, at most limit bytes.
func (a *answer) read(limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(&watched{a: a}, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = errTooLong
	}
	if err == nil && a.ContentLength >= 0 && int64(len(b)) != a.ContentLength && a.Request.Method != http.MethodHead {
		err = io.ErrUnexpectedEOF
	}
	a.drop(err)
	return b, err
}

func (r *remote) Manifest(ctx context.Context, tagOrDigest string) (Manifest, error) {
	return r.manifest(ctx, tagOrDigest, needResolve)
}

// manifest is Manifest; with needPush the registry itself is asked, for mirrors may be behind.
func (r *remote) manifest(ctx context.Context, tagOrDigest string, whom need) (Manifest, error) {
	c := &call{kind: KindManifest, op: "manifest " + tagOrDigest, path: "manifests/" + tagOrDigest, header: acceptManifests, need: whom}
	if d, err := ztoc.ParseDigest(tagOrDigest); err == nil {
		c.digest = d
		if whom == needResolve {
			c.need = needPull
		}
	} else if !validTag(tagOrDigest) {
		return Manifest{}, usage(tagOrDigest, "neither a tag nor a digest", "")
	}
	var m Manifest
	b, h, err := r.document(ctx, c, func(h http.Header, b []byte) error {
		got := ztoc.DigestOf(b)
		want := string(c.digest)
		if want == "" {
			want = h.Get("Docker-Content-Digest") // a tag's only check; a lie here and in the body is consistent
		}
		if strings.HasPrefix(want, "sha256:") && want != string(got) {
			return fmt.Errorf("%w: it hashes to %s", ErrDigest, got)
		}
		_, err := parseManifest(h.Get("Content-Type"), b)
		return err
	})
	if err != nil {
		return m, err
	}
	p, err := parseManifest(h.Get("Content-Type"), b)
	if err != nil {
		return m, err
	}
	return Manifest{MediaType: p.mediaType, Digest: ztoc.DigestOf(b), Body: b}, nil
}

func validTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	return strings.IndexFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.' || c == '-')
	}) < 0
}

func (r *remote) Resolve(ctx context.Context, platform string) (Image, error) {
	return resolve(ctx, r, r.ref, r.ref.target(), platform)
}

// maxNesting bounds indexes within indexes.
const maxNesting = 4

// resolve goes from a tag or digest to a manifest for platform and its config; the same for both kinds
// of repository.
func resolve(ctx context.Context, repo Repository, ref Reference, target, wish string) (Image, error) {
	img := Image{Ref: ref}
	want, err := parsePlatform(wish)
	if err != nil {
		return img, err
	}
	var m manifest
	for depth := 0; ; depth++ {
		doc, err := repo.Manifest(ctx, target)
		if err != nil {
			return img, err
		}
		if m, err = parseManifest(doc.MediaType, doc.Body); err != nil {
			return img, imageError(ref, "manifest "+target, err)
		}
		img.Digest, img.MediaType, img.Manifest = doc.Digest, m.mediaType, doc.Body
		if !m.index {
			break
		}
		if depth == maxNesting {
			return img, imageError(ref, "manifest "+target, fmt.Errorf("%w: indexes within indexes within indexes", ErrUnsupported))
		}
		img.IndexDigest, img.IndexManifest = doc.Digest, doc.Body
		if img.IndexDescriptor, err = m.choose(want); err != nil {
			return img, imageError(ref, "", err)
		}
		target = string(img.IndexDescriptor.Digest)
	}
	if err := m.checkImage(); err != nil {
		return img, imageError(ref, "manifest "+target, err)
	}
	if img.Config, err = ReadBlob(ctx, repo, m.config, MaxDocument); err != nil {
		return img, err
	}
	if img.ConfigFile, img.DiffIDs, err = parseConfig(img.Config, len(m.layers)); err != nil {
		return img, imageError(ref, "config "+string(m.config.Digest), err)
	}
	img.Layers, img.Annotations = m.layers, m.annotations
	have := newPlatform(img.ConfigFile.OS, img.ConfigFile.Architecture, img.ConfigFile.Variant)
	img.Platform = have.String()
	if img.Platform == "" {
		img.Platform = want.String() // an image that says nothing runs where it runs
	} else if img.IndexDigest == "" && want.runs(have) == 0 || have.os != want.os || have.arch != want.arch {
		return img, imageError(ref, "", platformError(want, []string{img.Platform}))
	}
	return img, nil
}

// imageError puts the image's name on an error made where it was not known.
func imageError(ref Reference, op string, err error) error {
	var e *Error
	if errors.As(err, &e) {
		cp := *e
		cp.Image = ref.String()
		return &cp
	}
	for _, s := range []error{ErrUnsupported, ErrProtocol, ErrDigest} {
		if errors.Is(err, s) {
			return &Error{Op: op, Image: ref.String(), Message: strings.TrimPrefix(err.Error(), s.Error()+": "), Err: s}
		}
	}
	return err
}

// maxTags bounds a tag list.
const maxTags = 100_000

func (r *remote) Tags(ctx context.Context) ([]string, error) {
	var tags []string
	q := url.Values{"n": {"1000"}}
	for {
		var page struct{ Tags []string }
		c := &call{kind: KindTags, op: "tags", path: "tags/list", query: q, need: needResolve}
		_, h, err := r.document(ctx, c, func(_ http.Header, b []byte) error { return json.Unmarshal(b, &page) })
		if err != nil {
			return nil, err
		}
		tags = append(tags, page.Tags...)
		next, err := url.Parse(nextLink(h))
		if err != nil || next.RawQuery == "" || len(page.Tags) == 0 || len(tags) > maxTags {
			break
		}
		// Only the query is taken from the link: another host or path would get our credentials.
		last := next.Query().Get("last")
		if last == "" || last == q.Get("last") {
			break
		}
		q = next.Query()
		q.Del("ns")
	}
	slices.Sort(tags)
	return slices.Compact(tags), nil
}
