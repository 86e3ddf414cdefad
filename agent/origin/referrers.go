package origin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// Referrers is what refers to a manifest. With no Manifests, Reason says why, for people.
type Referrers struct {
	Manifests []Descriptor
	Reason    string
	// Fallback says that the registry has no referrers API and the list is from the subject's tag.
	Fallback bool
}

// fallbackTag is the tag under which referrers of subject are listed where the API is missing (OCI
// distribution specification 1.1, "Unavailable Referrers API").
func fallbackTag(subject ztoc.Digest) string { return "sha256-" + subject.Hex() }

// maxPages bounds the pages of a referrers list.
const maxPages = 20

func (r *remote) Referrers(ctx context.Context, subject ztoc.Digest, artifactType string) (Referrers, error) {
	if _, err := ztoc.ParseDigest(string(subject)); err != nil {
		return Referrers{}, usage(string(subject), "not a digest", "")
	}
	list, why, err := r.referrersAPI(ctx, subject, artifactType)
	if err != nil {
		return Referrers{}, err
	}
	out := Referrers{}
	if out.Manifests, err = r.ofType(ctx, list, artifactType); err != nil {
		return Referrers{}, err
	}
	if len(out.Manifests) > 0 {
		return out, nil
	}
	// Also where the API answered with an empty list: registries that gained it later do not move the
	// tags that clients pushed before.
	m, err := r.Manifest(ctx, fallbackTag(subject))
	switch {
	case ctx.Err() != nil:
		return out, context.Cause(ctx)
	case errors.Is(err, ErrNotFound):
		out.Reason = why + ", and no tag " + fallbackTag(subject)
		return out, nil
	case err != nil:
		out.Reason = why + "; tag " + fallbackTag(subject) + ": " + brief(err)
		return out, nil
	}
	out.Fallback = true
	p, err := parseManifest(m.MediaType, m.Body)
	switch {
	case err != nil:
		out.Reason = why + "; tag " + fallbackTag(subject) + ": " + clean(err.Error())
	case !p.index:
		out.Reason = why + "; tag " + fallbackTag(subject) + " is not a list"
	default:
		out.Manifests, err = r.ofType(ctx, p.manifests, artifactType)
		if len(out.Manifests) == 0 {
			out.Reason = "none of this type in tag " + fallbackTag(subject)
		}
		return out, err
	}
	return out, nil
}

// brief is an error without the image's name, to be put behind other words.
func brief(err error) string {
	var e *Error
	if !errors.As(err, &e) {
		return clean(err.Error())
	}
	cp := *e
	cp.Image, cp.Next, cp.Op = "", "", ""
	return cp.Error()
}

// referrersWait bounds how long the API is asked. An index saves seconds: waiting longer for it than it saves, on a
// registry that answers the API with 500 (Harbor has), would be worse than going without.
const referrersWait = 4 * time.Second

// referrersAPI asks the API. Whatever it answers but the end of whole is no error: why says what it was.
func (r *remote) referrersAPI(whole context.Context, subject ztoc.Digest, artifactType string) (list []Descriptor, why string, err error) {
	ctx, cancel := context.WithTimeout(whole, referrersWait)
	defer cancel()
	q := url.Values{}
	if artifactType != "" {
		q.Set("artifactType", artifactType)
	}
	for range maxPages {
		var page manifest
		c := &call{
			kind: KindReferrers, op: "referrers of " + string(subject), path: "referrers/" + string(subject),
			query: q, need: needResolve, digest: subject, header: http.Header{"Accept": {MediaTypeIndex}},
		}
		_, h, err := r.document(ctx, c, func(h http.Header, b []byte) error {
			if strings.Contains(h.Get("Content-Type"), "html") {
				return fmt.Errorf("%w: a web page", ErrProtocol)
			}
			var err error
			page, err = parseManifest(h.Get("Content-Type"), b)
			if err == nil && !page.index {
				err = fmt.Errorf("%w: not a list of manifests", ErrProtocol)
			}
			return err
		})
		switch {
		case whole.Err() != nil:
			return nil, "", context.Cause(whole)
		case ctx.Err() != nil:
			return list, fmt.Sprintf("referrers API: no useful answer within %v", referrersWait), nil
		case errors.Is(err, ErrNotFound):
			return list, "no referrers API", nil
		case err != nil:
			return list, "referrers API: " + brief(err), nil
		}
		list = append(list, page.manifests...)
		next, err := url.Parse(nextLink(h))
		if err != nil || next.RawQuery == "" || next.RawQuery == q.Encode() {
			break
		}
		q = next.Query() // nothing but the query is taken from the link
		q.Del("ns")
	}
	return list, "nothing refers to it", nil
}

// maxUntyped bounds how many manifests are fetched because a list does not tell their type.
const maxUntyped = 8

// ofType keeps the manifests of a type: registries may ignore the wish. Lists written before OCI 1.1 do not
// tell types; the manifests do. The error is the end of ctx.
func (r *remote) ofType(ctx context.Context, list []Descriptor, artifactType string) ([]Descriptor, error) {
	if artifactType == "" {
		return list, nil
	}
	var out []Descriptor
	asked := 0
	for _, d := range list {
		if d.ArtifactType == "" && asked < maxUntyped {
			asked++
			m, err := r.Manifest(ctx, string(d.Digest))
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err == nil {
				if p, err := parseManifest(m.MediaType, m.Body); err == nil {
					d.ArtifactType = p.kind()
				}
			}
		}
		if d.ArtifactType == artifactType {
			out = append(out, d)
		}
	}
	return out, nil
}

// kind is a manifest's artifact type: its own, else its config's media type.
func (m manifest) kind() string { return cmp.Or(m.artifactType, m.config.MediaType) }
