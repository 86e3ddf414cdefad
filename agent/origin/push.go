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

	"github.com/muster-hpc/muster/ztoc"
)

// pushTries bounds how often an upload is begun anew.
const pushTries = 4

// PushBlob uploads in one PUT: POST for an upload session, PUT with the digest. The registry checks the
// digest; its answer is checked again.
func (r *remote) PushBlob(ctx context.Context, ref ztoc.BlobRef, open func() (io.ReadCloser, error)) error {
	if _, err := ztoc.ParseDigest(string(ref.Digest)); err != nil || ref.Size < 0 {
		return usage(string(ref.Digest), "not a blob", "")
	}
	have, err := r.hasBlob(ctx, ref)
	if err != nil || have {
		return err
	}
	p := newPatience(r.c.o.MaxWait)
	for try := 0; ; try++ {
		err := r.upload(ctx, ref, open, p)
		var e *Error
		if err == nil || ctx.Err() != nil || try+1 == pushTries || !errors.As(err, &e) || e.Err != ErrUnreachable && e.Status != http.StatusNotFound && e.Status != http.StatusRequestedRangeNotSatisfiable {
			return err
		}
		// The session is lost (404, 416) or the connection broke: begin a new one.
		if err := sleep(ctx, jitter(try)); err != nil {
			return err
		}
	}
}

// hasBlob asks the registry itself, not a mirror, whether a blob is there in its full size.
func (r *remote) hasBlob(ctx context.Context, ref ztoc.BlobRef) (bool, error) {
	c := &call{
		kind: KindBlob, op: "blob " + string(ref.Digest), method: http.MethodHead, path: "blobs/" + string(ref.Digest),
		need: needPush, digest: ref.Digest,
	}
	a, err := r.do(ctx, c, newPatience(r.c.o.ResolveWait))
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	a.drop(nil)
	if a.ContentLength >= 0 && a.ContentLength != ref.Size {
		return false, &Error{Op: c.op, Image: r.ref.String(), Host: a.rec.Host, Message: fmt.Sprintf("it has %d bytes there, not %d", a.ContentLength, ref.Size), Err: ErrDigest}
	}
	return true, nil
}

func (r *remote) upload(ctx context.Context, ref ztoc.BlobRef, open func() (io.ReadCloser, error), p *patience) error {
	op := "upload of blob " + string(ref.Digest)
	a, err := r.do(ctx, &call{
		kind: KindUpload, op: op, method: http.MethodPost, path: "blobs/uploads/", need: needPush,
		status: []int{http.StatusAccepted}, body: func() (io.ReadCloser, error) { return http.NoBody, nil },
	}, p)
	if err != nil {
		return err
	}
	a.drop(nil)
	at, err := a.Request.URL.Parse(a.Header.Get("Location"))
	if err != nil || a.Header.Get("Location") == "" || at.User != nil || at.Scheme != "http" && at.Scheme != "https" {
		return &Error{Op: op, Image: r.ref.String(), Host: a.rec.Host, Status: a.StatusCode, Message: "no usable upload location in its answer", Err: ErrProtocol}
	}
	if at.Host == a.Request.URL.Host {
		at.Scheme = a.Request.URL.Scheme // a registry behind a TLS proxy says http of itself
	}
	// One try only: the body has been read, and a session may be used once.
	put := &call{
		kind: KindUpload, op: op, method: http.MethodPut, abs: at, query: url.Values{"digest": {string(ref.Digest)}},
		header: http.Header{"Content-Type": {"application/octet-stream"}}, need: needPush, digest: ref.Digest,
		status: []int{http.StatusCreated, http.StatusAccepted, http.StatusNoContent},
		body:   open, size: ref.Size,
	}
	a, err = r.ask(ctx, a.e, put)
	if err != nil {
		var f *refusal
		if errors.As(err, &f) && ctx.Err() == nil {
			return f.err
		}
		return err
	}
	a.drop(nil)
	if got := a.Header.Get("Docker-Content-Digest"); got != "" && got != string(ref.Digest) {
		return &Error{Op: op, Image: r.ref.String(), Host: a.rec.Host, Message: "the registry stored it as " + clean(got), Err: ErrDigest}
	}
	return nil
}

func (r *remote) PushManifest(ctx context.Context, mediaType string, body []byte, tag string) (ztoc.Digest, error) {
	d := ztoc.DigestOf(body)
	m, err := parseManifest(mediaType, body)
	if err != nil {
		return "", imageError(r.ref, "manifest "+string(d), err)
	}
	target := string(d)
	if tag != "" {
		if !validTag(tag) {
			return "", usage(tag, "not a tag", "tags are letters, digits, '_', '.' and '-', at most 128")
		}
		target = tag
	}
	h, err := r.putManifest(ctx, target, mediaType, body, d)
	if err != nil {
		return "", err
	}
	if m.subject != "" && h.Get("OCI-Subject") == "" {
		desc := Descriptor{MediaType: m.mediaType, Digest: d, Size: int64(len(body)), Annotations: m.annotations, ArtifactType: m.kind()}
		if err := r.addToFallback(ctx, m.subject, desc); err != nil {
			return "", err
		}
	}
	return d, nil
}

func (r *remote) putManifest(ctx context.Context, target, mediaType string, body []byte, d ztoc.Digest) (http.Header, error) {
	c := &call{
		kind: KindManifest, op: "push of manifest " + target, method: http.MethodPut, path: "manifests/" + target,
		header: http.Header{"Content-Type": {mediaType}}, need: needPush, digest: d,
		status: []int{http.StatusCreated, http.StatusAccepted, http.StatusNoContent},
		body:   func() (io.ReadCloser, error) { return bytesBody(body), nil }, size: int64(len(body)),
	}
	a, err := r.do(ctx, c, newPatience(r.c.o.ResolveWait))
	if err != nil {
		return nil, err
	}
	a.drop(nil)
	if got := a.Header.Get("Docker-Content-Digest"); got != "" && got != string(d) {
		return nil, &Error{Op: c.op, Image: r.ref.String(), Host: a.rec.Host, Message: "the registry stored it as " + clean(got), Err: ErrDigest}
	}
	return a.Header, nil
}

// fallbackTries bounds the attempts to get an entry into a fallback tag against other writers.
const fallbackTries = 10

// addToFallback enters desc into the list under subject's fallback tag. Registries have no
// compare-and-swap, so: read, add, put, and read again after a pause in which another writer, who read
// before our put, would have overwritten it; if the entry is gone, once more.
func (r *remote) addToFallback(ctx context.Context, subject ztoc.Digest, desc Descriptor) error {
	tag := fallbackTag(subject)
	for try := range fallbackTries {
		list, err := r.fallbackList(ctx, tag)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list, func(d Descriptor) bool { return d.Digest == desc.Digest }) {
			return nil
		}
		body, err := encodeIndex(append(list, desc))
		if err != nil {
			return err
		}
		if _, err := r.putManifest(ctx, tag, MediaTypeIndex, body, ztoc.DigestOf(body)); err != nil {
			return err
		}
		survived := true
		for range 2 {
			if err := sleep(ctx, jitter(try)+r.c.fallbackPause); err != nil {
				return err
			}
			now, err := r.fallbackList(ctx, tag)
			if err != nil {
				return err
			}
			if survived = slices.ContainsFunc(now, func(d Descriptor) bool { return d.Digest == desc.Digest }); !survived {
				break
			}
		}
		if survived {
			return nil
		}
	}
	return &Error{Op: "tag " + tag, Image: r.ref.String(), Host: r.up.registry, Message: fmt.Sprintf("others keep overwriting it (%d tries)", fallbackTries), Next: "push again later", Err: ErrUnreachable}
}

// fallbackList is what the fallback tag lists; a tag that is missing or something else is an empty list.
func (r *remote) fallbackList(ctx context.Context, tag string) ([]Descriptor, error) {
	m, err := r.manifest(ctx, tag, needPush)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, err := parseManifest(m.MediaType, m.Body)
	if err != nil || !p.index {
		return nil, &Error{Op: "tag " + tag, Image: r.ref.String(), Host: r.up.registry, Message: "it is not a list of referrers", Next: "delete the tag if nobody needs it", Err: ErrUnsupported}
	}
	return p.manifests, nil
}

// jsonDescriptor is a Descriptor as OCI writes it.
type jsonDescriptor struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Digest       ztoc.Digest       `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	Platform     *jsonPlatform     `json:"platform,omitempty"`
}

type jsonPlatform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

func (d Descriptor) json() jsonDescriptor {
	j := jsonDescriptor{MediaType: d.MediaType, ArtifactType: d.ArtifactType, Digest: d.Digest, Size: d.Size, Annotations: d.Annotations}
	if d.Platform != "" {
		if p, err := parsePlatform(d.Platform); err == nil {
			j.Platform = &jsonPlatform{OS: p.os, Architecture: p.arch, Variant: p.variant}
		}
	}
	return j
}

// encodeIndex writes an image index.
func encodeIndex(list []Descriptor) ([]byte, error) {
	doc := struct {
		SchemaVersion int              `json:"schemaVersion"`
		MediaType     string           `json:"mediaType"`
		Manifests     []jsonDescriptor `json:"manifests"`
	}{2, MediaTypeIndex, []jsonDescriptor{}}
	for _, d := range list {
		doc.Manifests = append(doc.Manifests, d.json())
	}
	return json.Marshal(doc)
}
