package origin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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
			refs, err := repo.Referrers(context.Background(), layer().Digest, artifactType)
			if err != nil || len(refs.Manifests) > 0 || !strings.Contains(refs.Reason, tt.reason) {
				t.Errorf("%+v, %v", refs, err)
			}
			x, reason, err := FindIndex(context.Background(), repo, Image{Digest: layer().Digest})
			if err != nil || len(x.Ztocs) > 0 || reason == "" {
				t.Errorf("%+v %q %v", x, reason, err)
			}
			if strings.Contains(refs.Reason, "\n") || len(refs.Reason) > 700 {
				t.Errorf("reason %q", refs.Reason)
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
		if _, err := w.open(quick()).Referrers(ctx, layer().Digest, ""); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

const artifactType = "application/vnd.amazon.soci.index.v1+json"

// artifact is the manifest of something that refers to img, as SOCI writes its indexes.
func artifact(img Image, i int) []byte {
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":%d},"annotations":{"n":"%d"}}`,
		MediaTypeManifest, artifactType, ztoc.DigestOf([]byte("{}")), img.MediaType, img.Digest, len(img.Manifest), i)
}

func pushArtifact(t testing.TB, repo Repository, img Image, i int) ztoc.Digest {
	t.Helper()
	if err := repo.PushBlob(context.Background(), ztoc.BlobRef{Digest: ztoc.DigestOf([]byte("{}")), Size: 2}, opener([]byte("{}"))); err != nil {
		t.Error(err)
	}
	d, err := repo.PushManifest(context.Background(), MediaTypeManifest, artifact(img, i), "")
	if err != nil {
		t.Error(err)
	}
	return d
}

// What is pushed beside an image is found again, on every kind of origin.
func TestReferrersThereAndBack(t *testing.T) {
	t.Parallel()
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
			refs, err := repo.Referrers(ctx, img.Digest, artifactType)
			if err != nil || len(refs.Manifests) > 0 || refs.Reason == "" {
				t.Errorf("before: %+v %v", refs, err)
			}
			d := pushArtifact(t, repo, img, 1)
			if again := pushArtifact(t, repo, img, 1); again != d {
				t.Errorf("%s, then %s", d, again)
			}
			for _, kind := range []string{artifactType, ""} {
				refs, err = repo.Referrers(ctx, img.Digest, kind)
				if err != nil || len(refs.Manifests) != 1 || refs.Reason != "" || refs.Fallback != (name == "fallback tag" || name == "debian's registry") {
					t.Fatalf("%q: %+v %v", kind, refs, err)
				}
				if got := refs.Manifests[0]; got.Digest != d || got.ArtifactType != artifactType || got.Size != int64(len(artifact(img, 1))) {
					t.Errorf("%q: %+v", kind, got)
				}
			}
			if refs, err := repo.Referrers(ctx, img.Digest, "application/other"); err != nil || len(refs.Manifests) > 0 || refs.Reason == "" {
				t.Errorf("%+v %v", refs, err)
			}
			// The image is what it was.
			if after, err := repo.Resolve(ctx, "linux/amd64"); err != nil || after.Digest != img.Digest {
				t.Error(after.Digest, err)
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

// A list of before OCI 1.1 does not tell types: the manifests do.
func TestReferrersWithoutTypes(t *testing.T) {
	w := newWorld(t, registry.Options{})
	ctx := context.Background()
	repo := w.open(quick())
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	d := pushArtifact(t, repo, img, 1)
	list, err := encodeIndex([]Descriptor{
		{MediaType: MediaTypeManifest, Digest: img.Digest, Size: int64(len(img.Manifest))},
		{MediaType: MediaTypeManifest, Digest: d, Size: int64(len(artifact(img, 1)))},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.PushManifest(ctx, MediaTypeIndex, list, fallbackTag(img.Digest)); err != nil {
		t.Fatal(err)
	}
	refs, err := repo.Referrers(ctx, img.Digest, artifactType)
	if err != nil || len(refs.Manifests) != 1 || refs.Manifests[0].Digest != d {
		t.Errorf("%+v %v", refs, err)
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
	puts := registry.Match{Kind: registry.Manifest, Path: "/sha256-", Method: "PUT"}
	w.Inject(puts, 6, registry.Delay(30*time.Millisecond))
	var wg sync.WaitGroup
	const writers = 5
	for i := range writers {
		wg.Go(func() { pushArtifact(t, w.open(quick()), img, i) })
	}
	wg.Wait()
	refs, err := w.open(quick()).Referrers(ctx, img.Digest, artifactType)
	if err != nil || len(refs.Manifests) != writers {
		t.Errorf("%d of %d entries, %v", len(refs.Manifests), writers, err)
	}
	if n := w.Count(puts); n <= writers {
		t.Errorf("%d writes for %d writers: they did not collide, the test tests nothing", n, writers)
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
	_, err = repo.PushManifest(ctx, MediaTypeManifest, artifact(img, 1), "")
	wantError(t, err, ErrUnsupported, fallbackTag(img.Digest), "not a list")
}

func TestReadBlob(t *testing.T) {
	w := newWorld(t, registry.Options{})
	ctx := context.Background()
	repo := w.open(quick())
	d := Descriptor{Digest: layer().Digest, Size: layerSize}
	if b, err := ReadBlob(ctx, repo, d, layerSize); err != nil || len(b) != layerSize {
		t.Error(len(b), err)
	}
	_, err := ReadBlob(ctx, repo, d, layerSize-1)
	wantError(t, err, ErrUnsupported, "at most")
	w.Inject(anyBlob, 1, registry.FlipAt(layerSize-1))
	_, err = ReadBlob(ctx, repo, d, layerSize)
	wantError(t, err, ErrDigest, string(d.Digest))
	_, err = ReadBlob(ctx, repo, Descriptor{Digest: layer().Digest, Size: layerSize + 1}, 1<<30)
	wantError(t, err, ErrDigest)
	_, err = ReadBlob(ctx, repo, Descriptor{Digest: layer().Digest}, 1<<30)
	wantError(t, err, ErrDigest)
	if b, err := ReadBlob(ctx, repo, Descriptor{Digest: ztoc.DigestOf(nil)}, 0); err != nil || len(b) != 0 {
		t.Error(b, err)
	}
}
