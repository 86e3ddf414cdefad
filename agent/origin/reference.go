package origin

import (
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/muster-hpc/muster/ztoc"
)

// A Reference names an image: in a registry, or in an OCI layout on a file system.
//
// Exactly one of Registry and Layout is set. Tag and Digest may both be given; then the digest is what
// is fetched and the tag is only for people. The zero Reference names nothing.
type Reference struct {
	Registry   string      // host or host:port as people write it: "docker.io", "localhost:5000"
	Repository string      // "library/debian"; empty for a layout
	Layout     string      // absolute, clean path of the layout's directory
	Tag        string      // empty: see Digest; for a layout both may be empty: its only image
	Digest     ztoc.Digest // of the manifest or index
}

const (
	dockerHub    = "docker.io"            // as people, certs.d and ?ns= write it
	dockerHubAPI = "registry-1.docker.io" // where its registry answers
	layoutPrefix = "oci:"
)

// ParseReference understands docker-like names ("debian", "ghcr.io/org/name:tag", "host:5000/name@sha256:…",
// also with a leading "docker://") and OCI layouts ("oci:/path", "oci:/path:tag", "oci:/path@sha256:…").
// A relative layout path is taken from the working directory. Errors are ErrUsage.
func ParseReference(s string) (Reference, error) {
	if rest, ok := strings.CutPrefix(s, layoutPrefix); ok {
		return parseLayoutReference(s, rest)
	}
	bare := strings.TrimPrefix(s, "docker://")
	if u, err := url.Parse(bare); err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" {
		return Reference{}, usage(s, "an image name has no "+u.Scheme+"://", "write "+u.Host+u.Path+"; for a registry without TLS use --plain-http")
	}
	base, dig, hasDigest := strings.Cut(bare, "@")
	tag, err := name.NewTag(base)
	if err != nil {
		hint := "names look like registry.example.org/group/name:tag or name@sha256:<64 hex digits>"
		if low := strings.ToLower(base); low != base {
			if _, e := name.NewTag(low); e == nil {
				hint = "repository names are in lower case"
			}
		}
		return Reference{}, usage(s, "not an image name", hint)
	}
	if tag.RepositoryStr() == "" {
		return Reference{}, usage(s, "no repository name", "names look like registry.example.org/group/name:tag")
	}
	ref := Reference{Registry: tag.RegistryStr(), Repository: tag.RepositoryStr()}
	if ref.Registry == name.DefaultRegistry || ref.Registry == dockerHubAPI {
		ref.Registry = dockerHub
	}
	if !hasDigest {
		ref.Tag = tag.TagStr()
		return ref, nil
	}
	if ref.Digest, err = ztoc.ParseDigest(dig); err != nil {
		return Reference{}, usage(s, "the part after @ is not a sha256 digest", "write sha256: and 64 hex digits in lower case")
	}
	if strings.HasSuffix(base, ":"+tag.TagStr()) {
		ref.Tag = tag.TagStr()
	}
	return ref, nil
}

func parseLayoutReference(whole, s string) (Reference, error) {
	var ref Reference
	path, dig, ok := strings.Cut(s, "@")
	if ok {
		d, err := ztoc.ParseDigest(dig)
		if err != nil {
			return Reference{}, usage(whole, "the part after @ is not a sha256 digest", "write oci:/path@sha256:<64 hex digits>")
		}
		ref.Digest = d
	}
	// The last colon starts a tag unless a slash follows: oci:/scratch/a:b/c is a path.
	if i := strings.LastIndexByte(path, ':'); i >= 0 && !strings.Contains(path[i:], "/") {
		path, ref.Tag = path[:i], path[i+1:]
	}
	if path == "" {
		return Reference{}, usage(whole, "no path", "write oci:/path/to/layout:tag")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return Reference{}, usage(whole, err.Error(), "give an absolute path")
	}
	ref.Layout = abs
	return ref, nil
}

// String is the reference in full, as ParseReference reads it back.
func (r Reference) String() string {
	s := r.Name()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + string(r.Digest)
	}
	return s
}

// Name is the reference without tag and digest.
func (r Reference) Name() string {
	if r.Layout != "" {
		return layoutPrefix + r.Layout
	}
	if r.Registry == "" {
		return ""
	}
	return r.Registry + "/" + r.Repository
}

// WithDigest is r pinned to d.
func (r Reference) WithDigest(d ztoc.Digest) Reference {
	r.Digest = d
	return r
}

// target is what to ask for: the digest if there is one.
func (r Reference) target() string {
	if r.Digest != "" {
		return string(r.Digest)
	}
	return r.Tag
}

func usage(image, message, next string) error {
	return &Error{Image: fmt.Sprintf("%.200q", image), Message: message, Next: next, Err: ErrUsage}
}
