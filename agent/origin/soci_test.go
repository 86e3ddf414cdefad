package origin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// pushSOCI pushes a SOCI index of img with a ztoc for layer.
func pushSOCI(t *testing.T, repo Repository, img Image, version int, tool string, layer ztoc.Digest) ztoc.Digest {
	t.Helper()
	ctx := context.Background()
	z := []byte("ztoc of " + tool)
	for _, b := range [][]byte{z, []byte("{}")} {
		if err := repo.PushBlob(ctx, ztoc.BlobRef{Digest: ztoc.DigestOf(b), Size: int64(len(b))}, opener(b)); err != nil {
			t.Fatal(err)
		}
	}
	kind, subject := MediaTypeSOCIv1, fmt.Sprintf(`"subject":{"mediaType":%q,"digest":%q,"size":%d},`, img.MediaType, img.Digest, len(img.Manifest))
	if version == 2 {
		kind, subject = MediaTypeSOCIv2, ""
	}
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},%s"annotations":{%q:%q},
		"layers":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{%q:%q}}]}`,
		MediaTypeManifest, kind, ztoc.DigestOf([]byte("{}")), subject, annTool, tool, MediaTypeZtoc, ztoc.DigestOf(z), len(z), annLayerDigest, layer)
	d, err := repo.PushManifest(ctx, MediaTypeManifest, []byte(body), "")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// With several indexes all hosts choose the same: the one that covers most.
func TestIndexThatRefersToTheImage(t *testing.T) {
	t.Parallel()
	for _, api := range []bool{false, true} {
		w := newWorld(t, registry.Options{Referrers: api})
		ctx := context.Background()
		repo := w.open(quick())
		img, err := repo.Resolve(ctx, "linux/amd64")
		if err != nil {
			t.Fatal(err)
		}
		pushSOCI(t, repo, img, 1, "elsewhere", ztoc.DigestOf([]byte("another layer")))
		x, reason, err := FindIndex(ctx, repo, img)
		if err != nil || len(x.Ztocs) > 0 || !strings.Contains(reason, "no ztoc for a layer") {
			t.Errorf("%+v %q %v", x, reason, err)
		}
		pushSOCI(t, repo, img, 1, "small", img.Layers[1].Digest)
		want := pushSOCI(t, repo, img, 1, "large", img.Layers[0].Digest)
		x, reason, err = FindIndex(ctx, repo, img)
		if err != nil || reason != "" || x.Digest != want || x.Version != 1 || x.Tool != "large" || x.Size() != int64(len("ztoc of large")) {
			t.Fatalf("%+v %q %v", x, reason, err)
		}
		b, err := ReadBlob(ctx, repo, x.Ztocs[img.Layers[0].Digest], 1<<20)
		if err != nil || string(b) != "ztoc of large" {
			t.Errorf("%q %v", b, err)
		}
	}
	w := newWorld(t, registry.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := FindIndex(ctx, w.open(quick()), Image{Digest: layer().Digest}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// SOCI v2: the image names its index; a name that leads nowhere is a reason, not an error.
func TestIndexNamedByTheImage(t *testing.T) {
	w := newWorld(t, registry.Options{Referrers: true})
	ctx := context.Background()
	repo := w.open(quick())
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	named := func(d string) Image {
		cp := img
		cp.Annotations = map[string]string{annIndexDigest: d}
		return cp
	}
	gone := string(ztoc.DigestOf([]byte("gone")))
	for d, why := range map[string]string{gone: "not found", "../x": "no digest", string(img.Digest): "not a SOCI index"} {
		x, reason, err := FindIndex(ctx, repo, named(d))
		if err != nil || len(x.Ztocs) > 0 || !strings.Contains(reason, why) {
			t.Errorf("%s: %+v %q %v", d, x, reason, err)
		}
	}
	// Falls back on an index that refers to the image.
	v1 := pushSOCI(t, repo, img, 1, "one", img.Layers[0].Digest)
	if x, _, err := FindIndex(ctx, repo, named(gone)); err != nil || x.Digest != v1 {
		t.Errorf("%+v %v", x, err)
	}
	v2 := pushSOCI(t, repo, img, 2, "two", img.Layers[0].Digest)
	x, reason, err := FindIndex(ctx, repo, named(string(v2)))
	if err != nil || x.Digest != v2 || x.Version != 2 || x.Tool != "two" || reason != "" {
		t.Errorf("%+v %q %v", x, reason, err)
	}
	// Named by its descriptor in the image's index only.
	cp := img
	cp.IndexManifest, err = encodeIndex([]Descriptor{{MediaType: MediaTypeManifest, Digest: img.Digest}, {
		MediaType: MediaTypeManifest, Digest: v2, ArtifactType: MediaTypeSOCIv2, Annotations: map[string]string{annImageDigest: string(img.Digest)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if x, _, err := FindIndex(ctx, repo, cp); err != nil || x.Digest != v2 {
		t.Errorf("%+v %v", x, err)
	}
}
