package origin

import (
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

func TestPushBlob(t *testing.T) {
	uploads := registry.Match{Kind: registry.Upload}
	put := registry.Match{Kind: registry.Upload, Method: "PUT"}
	ctx := context.Background()
	body := layerBytes(9, 100_000)
	ref := ztoc.BlobRef{Digest: ztoc.DigestOf(body), Size: int64(len(body))}
	tests := []struct {
		name  string
		m     registry.Match
		fault registry.Action
		times int
		opens int // at most
	}{
		{"plain", uploads, registry.Delay(0), 0, 1},
		{"reset", put, registry.Reset(), 1, 2},
		{"session lost", put, registry.Answer(404, `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}`), 1, 2},
		{"500", put, registry.Answer(500, ""), 1, 2},
		{"429 at the start", registry.Match{Kind: registry.Upload, Method: "POST"}, registry.TooMany(time.Second), 1, 1},
		{"503 at the start", registry.Match{Kind: registry.Upload, Method: "POST"}, registry.Answer(503, ""), 2, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			repo := w.open(quick())
			w.Inject(tt.m, tt.times, tt.fault)
			opens := 0
			open := func() (io.ReadCloser, error) {
				opens++
				return bytesBody(body), nil
			}
			if err := repo.PushBlob(ctx, ref, open); err != nil {
				t.Fatal(err)
			}
			if opens > tt.opens {
				t.Errorf("the blob was opened %d times", opens)
			}
			got, err := readRange(ctx, repo, ref.Digest, ztoc.Range{})
			if err != nil || string(got) != string(body) {
				t.Error(err)
			}
			opens = 0
			if err := repo.PushBlob(ctx, ref, open); err != nil || opens > 0 {
				t.Errorf("pushed twice: %d, %v", opens, err)
			}
		})
	}
	t.Run("errors", func(t *testing.T) {
		w := newWorld(t, registry.Options{})
		repo := w.open(quick())
		bad := ztoc.BlobRef{Digest: ztoc.DigestOf([]byte("x")), Size: 1}
		wantError(t, repo.PushBlob(ctx, bad, opener([]byte("y"))), ErrDigest, "DIGEST_INVALID", w.Addr)
		reading := errors.New("disk on fire")
		if err := repo.PushBlob(ctx, bad, func() (io.ReadCloser, error) { return nil, reading }); !errors.Is(err, reading) {
			t.Error(err)
		}
		err := repo.PushBlob(ctx, ztoc.BlobRef{Digest: layer().Digest, Size: 5}, nil)
		wantError(t, err, ErrDigest, "400000")
		w.Inject(uploads, 0, registry.Answer(403, `{"errors":[{"code":"DENIED","message":"read only"}]}`))
		wantError(t, repo.PushBlob(ctx, bad, opener([]byte("x"))), ErrUnauthorized, "read only", "docker login")
		w.Clear()
		w.Inject(uploads, 0, registry.Answer(202, ""))
		wantError(t, repo.PushBlob(ctx, bad, opener([]byte("x"))), ErrProtocol, "location")
		w.Clear()
		w.Inject(uploads, 0, registry.Answer(307, "", "Location", "http://127.0.0.1:1/"))
		wantError(t, repo.PushBlob(ctx, bad, opener([]byte("x"))), ErrProtocol, "redirects an upload")
	})
	t.Run("empty", func(t *testing.T) {
		w := newWorld(t, registry.Options{})
		repo := w.open(quick())
		none := ztoc.BlobRef{Digest: ztoc.DigestOf(nil)}
		if err := repo.PushBlob(ctx, none, opener(nil)); err != nil {
			t.Fatal(err)
		}
		if b, err := readRange(ctx, repo, none.Digest, ztoc.Range{}); err != nil || len(b) != 0 {
			t.Error(b, err)
		}
	})
	t.Run("debian's registry, with a token", func(t *testing.T) {
		s, err := registry.StartDebian(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		p, err := registry.StartProxy(s.Handler())
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if _, err := p.RequireTokens(registry.TokenOptions{}); err != nil {
			t.Fatal(err)
		}
		repo := openRepo(t, newClient(t, quick()), p.Addr+"/a/b:c")
		if err := repo.PushBlob(ctx, ref, opener(body)); err != nil {
			t.Fatal(err)
		}
		got, err := readRange(ctx, repo, ref.Digest, ztoc.Range{Start: 5, End: 50_000})
		if err != nil || string(got) != string(body[5:50_000]) {
			t.Error(err)
		}
		wantError(t, repo.PushBlob(ctx, ztoc.BlobRef{Digest: ztoc.DigestOf([]byte("x")), Size: 1}, opener([]byte("y"))), ErrDigest, "DIGEST_INVALID")
	})
}

func TestPushManifestIsChecked(t *testing.T) {
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	ctx := context.Background()
	_, err := repo.PushManifest(ctx, MediaTypeManifest, []byte("<html>"), "t")
	wantError(t, err, ErrProtocol)
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	_, err = repo.PushManifest(ctx, img.MediaType, img.Manifest, "no/tag")
	wantError(t, err, ErrUsage)
	w.Inject(registry.Match{Kind: registry.Manifest, Method: http.MethodPut}, 1, registry.Answer(201, "", "Docker-Content-Digest", string(layer().Digest)))
	_, err = repo.PushManifest(ctx, img.MediaType, img.Manifest, "tag")
	wantError(t, err, ErrDigest, string(layer().Digest))
	d, err := repo.PushManifest(ctx, img.MediaType, img.Manifest, "tag")
	if err != nil || d != img.Digest {
		t.Error(d, err)
	}
}
