package origin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// F32: whatever a registry makes of the question, it is "no index" with a reason.
func TestReferrersOfOddRegistries(t *testing.T) {
	any := registry.Match{Kind: registry.Referrers}
	tests := []struct {
		name   string
		fault  registry.Action
		reason string
	}{
		{"404 json", registry.Answer(404, `{"errors":[{"code":"NOT_FOUND","message":"no"}]}`), "no referrers API"},
		{"404 page (Quay of old)", registry.Answer(404, "<html>404</html>"), "no referrers API"},
		{"page (a login proxy)", registry.HTML(), "web page"},
		{"redirect to a page (Artifact Registry)", registry.Answer(302, "", "Location", "https://127.0.0.1:1/login"), "connect"},
		{"redirect loop", registry.Answer(302, "", "Location", "/v2/test/referrers/"+string(layer().Digest)), "redirect"},
		{"redirect to nowhere", registry.Answer(302, ""), "redirect"},
		{"400", registry.Answer(400, "bad"), "400"},
		{"405", registry.Answer(405, ""), "405"},
		{"403", registry.Answer(403, `{"errors":[{"code":"DENIED"}]}`), "403"},
		{"500 (Harbor 2.8)", registry.Answer(500, "oops"), "500"},
		{"empty body", registry.Answer(200, ""), "JSON"},
		{"cut json", registry.Answer(200, `{"schemaVersion":2,"manifests":[`), "JSON"},
		{"another json", registry.Answer(200, `{"repositories":[]}`), "no image manifest"},
		{"a manifest", registry.Answer(200, `{"schemaVersion":2,"layers":[],"config":{"digest":"`+string(layer().Digest)+`","size":1}}`), "not a list"},
		{"null list", registry.Answer(200, `{"schemaVersion":2,"mediaType":"`+MediaTypeIndex+`","manifests":null}`), "nothing refers"},
		{"bad digests", registry.Answer(200, `{"schemaVersion":2,"manifests":[{"digest":"sha1:abc","size":1}]}`), "unsupported hash"},
		{"other types only", registry.Answer(200, `{"schemaVersion":2,"mediaType":"`+MediaTypeIndex+`","manifests":[{"artifactType":"application/x","digest":"`+string(layer().Digest)+`","size":1}]}`), "nothing refers"},
		{"reset", registry.Reset(), "EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			o := quick()
			o.ResolveWait = quick().Idle
			repo := w.open(o)
			w.Inject(any, 0, tt.fault)
			refs, err := repo.Referrers(context.Background(), layer().Digest, MediaTypeSOCIv1)
			if err != nil || len(refs.Manifests) > 0 || !strings.Contains(refs.Reason, tt.reason) {
				t.Errorf("%+v, %v", refs, err)
			}
			x, reason, err := FindIndex(context.Background(), repo, Image{Digest: layer().Digest})
			if err != nil || len(x.Ztocs) > 0 || reason == "" {
				t.Errorf("%+v %q %v", x, reason, err)
			}
			if strings.Contains(reason, "\n") || len(reason) > 700 {
				t.Errorf("reason %q", reason)
			}
		})
	}
	t.Run("broken fallback tag", func(t *testing.T) {
		w := newWorld(t, registry.Options{})
		repo := w.open(quick())
		for _, fault := range []registry.Action{registry.HTML(), registry.Answer(200, "{}"), registry.Answer(403, "")} {
			w.Clear()
			w.Inject(registry.Match{Kind: registry.Manifest, Path: "/sha256-"}, 0, fault)
			refs, err := repo.Referrers(context.Background(), layer().Digest, "")
			if err != nil || len(refs.Manifests) > 0 || !strings.Contains(refs.Reason, "tag sha256-") {
				t.Errorf("%+v, %v", refs, err)
			}
		}
	})
	t.Run("context", func(t *testing.T) {
		w := newWorld(t, registry.Options{})
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, _, err := FindIndex(ctx, w.open(quick()), Image{Digest: layer().Digest}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func soci(i int) []LayerZtoc {
	return []LayerZtoc{{Layer: Descriptor{Digest: layer().Digest, MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Size: layerSize}, SpanSize: 1 << 22, Encoded: fmt.Appendf(nil, "ztoc %d", i)}}
}

// An index that is pushed is found again, on every kind of origin.
func TestIndexThereAndBack(t *testing.T) {
	debian, err := registry.StartDebian(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer debian.Close()
	if _, err := registry.PushAll(context.Background(), debian.Addr+"/test", newLayout(t)); err != nil {
		t.Fatal(err)
	}
	for name, where := range map[string]string{
		"referrers API": newWorld(t, registry.Options{Referrers: true}).repo, "fallback tag": newWorld(t, registry.Options{}).repo,
		"debian's registry": debian.Addr + "/test", "layout": "oci:" + newLayout(t),
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			repo := openRepo(t, newClient(t, quick()), where+":one")
			img, err := repo.Resolve(ctx, "linux/amd64")
			if err != nil {
				t.Fatal(err)
			}
			x, reason, err := FindIndex(ctx, repo, img)
			if err != nil || len(x.Ztocs) > 0 || reason == "" {
				t.Errorf("before: %+v %q %v", x, reason, err)
			}
			d, err := PushIndex(ctx, repo, img, "tool 1", soci(1))
			if err != nil {
				t.Fatal(err)
			}
			again, err := PushIndex(ctx, repo, img, "tool 1", soci(1))
			if err != nil || again != d {
				t.Errorf("%s, %v", again, err)
			}
			x, reason, err = FindIndex(ctx, repo, img)
			if err != nil || reason != "" || x.Digest != d || x.Version != 1 || x.Tool != "tool 1" || len(x.Ztocs) != 1 {
				t.Fatalf("%+v %q %v", x, reason, err)
			}
			z := x.Ztocs[layer().Digest]
			b, err := ReadBlob(ctx, repo, z, 1<<20)
			if err != nil || string(b) != "ztoc 1" || x.Size() != 6 || z.Annotations["com.amazon.soci.span-size"] != "4194304" {
				t.Errorf("%q %v %+v", b, err, z)
			}
			refs, err := repo.Referrers(ctx, img.Digest, MediaTypeSOCIv1)
			if err != nil || len(refs.Manifests) != 1 || refs.Fallback != (name == "fallback tag" || name == "debian's registry") {
				t.Errorf("%+v %v", refs, err)
			}
			// The image is what it was.
			if after, err := repo.Resolve(ctx, "linux/amd64"); err != nil || after.Digest != img.Digest {
				t.Error(after.Digest, err)
			}
			if _, err := ReadBlob(ctx, repo, z, 3); !errors.Is(err, ErrUnsupported) {
				t.Error("a blob above the limit is read:", err)
			}
			if name == "layout" {
				return
			}
			if tags, err := repo.Tags(ctx); err != nil || !slices.Contains(tags, "one") {
				t.Error(tags, err)
			}
		})
	}
}

// Several writers of one fallback tag: none is lost.
func TestFallbackTagRace(t *testing.T) {
	w := newWorld(t, registry.Options{})
	ctx := context.Background()
	img, err := w.open(quick()).Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	// Slow enough that the writers' reads and writes overlap.
	w.Inject(registry.Match{Kind: registry.Manifest, Path: "/sha256-", Method: "PUT"}, 6, registry.Delay(30*1e6))
	var wg sync.WaitGroup
	const writers = 5
	for i := range writers {
		wg.Go(func() {
			if _, err := PushIndex(ctx, w.open(quick()), img, fmt.Sprint("tool ", i), soci(i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	refs, err := w.open(quick()).Referrers(ctx, img.Digest, MediaTypeSOCIv1)
	if err != nil || len(refs.Manifests) != writers {
		t.Errorf("%d of %d entries, %v", len(refs.Manifests), writers, err)
	}
	if n := w.Count(registry.Match{Kind: registry.Manifest, Path: "/sha256-", Method: "PUT"}); n <= writers {
		t.Errorf("%d writes for %d writers: they did not collide, the test tests nothing", n, writers)
	}
	// All hosts choose the same among several.
	a, _, _ := FindIndex(ctx, w.open(quick()), img)
	b, _, _ := FindIndex(ctx, w.open(quick()), img)
	if a.Digest == "" || a.Digest != b.Digest {
		t.Errorf("%s and %s", a.Digest, b.Digest)
	}
}

// A tag that somebody uses for something else is not overwritten.
func TestFallbackTagTaken(t *testing.T) {
	w := newWorld(t, registry.Options{})
	ctx := context.Background()
	repo := w.open(quick())
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.PushManifest(ctx, img.MediaType, img.Manifest, fallbackTag(img.Digest)); err != nil {
		t.Fatal(err)
	}
	_, err = PushIndex(ctx, repo, img, "t", soci(1))
	wantError(t, err, ErrUnsupported, fallbackTag(img.Digest), "not a list")
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
	for d, why := range map[string]string{
		string(ztoc.DigestOf([]byte("gone"))): "not found", "../x": "no digest", string(img.Digest): "not a SOCI index",
	} {
		x, reason, err := FindIndex(ctx, repo, named(d))
		if err != nil || len(x.Ztocs) > 0 || !strings.Contains(reason, why) {
			t.Errorf("%s: %+v %q %v", d, x, reason, err)
		}
	}
	// Falls back on an index that refers to the image.
	v1, err := PushIndex(ctx, repo, img, "one", soci(1))
	if err != nil {
		t.Fatal(err)
	}
	if x, _, err := FindIndex(ctx, repo, named(string(ztoc.DigestOf([]byte("gone"))))); err != nil || x.Digest != v1 {
		t.Errorf("%+v %v", x, err)
	}
	body, blobs, err := EncodeIndex(img, "two", soci(2))
	if err != nil {
		t.Fatal(err)
	}
	for d, b := range blobs {
		if err := repo.PushBlob(ctx, ztoc.BlobRef{Digest: d, Size: int64(len(b))}, opener(b)); err != nil {
			t.Fatal(err)
		}
	}
	text := strings.ReplaceAll(string(body), MediaTypeSOCIv1, MediaTypeSOCIv2)
	i, j := strings.Index(text, `"subject":`), strings.Index(text, `"annotations":{"com.amazon.soci.build`)
	text = text[:i] + text[j:]
	v2, err := repo.PushManifest(ctx, MediaTypeManifest, []byte(text), "")
	if err != nil {
		t.Fatal(err)
	}
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

// An index about other layers, or with descriptors that cannot be, is none.
func TestIndexOfOtherLayers(t *testing.T) {
	w := newWorld(t, registry.Options{Referrers: true})
	ctx := context.Background()
	repo := w.open(quick())
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	other := soci(1)
	other[0].Layer.Digest = ztoc.DigestOf([]byte("another layer"))
	if _, err := PushIndex(ctx, repo, img, "t", other); err != nil {
		t.Fatal(err)
	}
	x, reason, err := FindIndex(ctx, repo, img)
	if err != nil || len(x.Ztocs) > 0 || !strings.Contains(reason, "no ztoc for a layer") {
		t.Errorf("%+v %q %v", x, reason, err)
	}
	_, err = PushIndex(ctx, repo, img, "t", nil)
	wantError(t, err, ErrUsage)
}
