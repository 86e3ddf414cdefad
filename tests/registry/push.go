package registry

import (
	"context"
	"fmt"
	"net/http"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Push copies one image (or image index) of the OCI layout at dir to reference ("127.0.0.1:5000/name:tag",
// plain HTTP). tag is its org.opencontainers.image.ref.name in the layout; "" is the layout's only image.
// It returns the digest of what was pushed.
func Push(ctx context.Context, reference, dir, tag string) (string, error) {
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		return "", err
	}
	root, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return "", err
	}
	m, err := root.IndexManifest()
	if err != nil {
		return "", err
	}
	var found []v1.Descriptor
	for _, d := range m.Manifests {
		if n := d.Annotations["org.opencontainers.image.ref.name"]; tag == "" || n == tag {
			found = append(found, d)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s has %d images called %q", dir, len(found), tag)
	}
	return found[0].Digest.String(), pushOne(ctx, ref, root, found[0])
}

// PushAll copies every tagged image of the layout at dir to repository ("127.0.0.1:5000/name") under its
// tag, and returns the tags.
func PushAll(ctx context.Context, repository, dir string) ([]string, error) {
	root, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	m, err := root.IndexManifest()
	if err != nil {
		return nil, err
	}
	var tags []string
	for _, d := range m.Manifests {
		tag := d.Annotations["org.opencontainers.image.ref.name"]
		if tag == "" {
			continue
		}
		ref, err := name.ParseReference(repository+":"+tag, name.Insecure)
		if err != nil {
			return tags, err
		}
		if err := pushOne(ctx, ref, root, d); err != nil {
			return tags, fmt.Errorf("%s: %w", tag, err)
		}
		tags = append(tags, tag)
	}
	return tags, nil
}

func pushOne(ctx context.Context, ref name.Reference, root v1.ImageIndex, d v1.Descriptor) error {
	t := &http.Transport{Proxy: nil}
	defer t.CloseIdleConnections()
	o := []remote.Option{remote.WithContext(ctx), remote.WithTransport(t)}
	if d.MediaType.IsIndex() {
		idx, err := root.ImageIndex(d.Digest)
		if err != nil {
			return err
		}
		return remote.WriteIndex(ref, idx, o...)
	}
	img, err := root.Image(d.Digest)
	if err != nil {
		return err
	}
	return remote.Write(ref, img, o...)
}
