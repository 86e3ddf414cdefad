package origin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// layerBytes are the contents of the test image's layers: not tar, which nobody here looks into.
func layerBytes(i, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(i)})
	r.Read(b)
	return b
}

const layerSize = 400_000

// testImage is an image of two layers for linux/amd64.
func testImage(t testing.TB, arch string) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(
		mutate.MediaType(empty.Image, types.OCIManifestSchema1),
		static.NewLayer(layerBytes(1, layerSize), types.OCILayer),
		static.NewLayer(layerBytes(2, layerSize/2), types.OCILayer))
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", arch
	cf.Config = v1.Config{
		Entrypoint: []string{"/bin/tool"}, Cmd: []string{"--help"}, Env: []string{"A=b"}, WorkingDir: "/w", User: "7:8",
		StopSignal: "SIGINT", Volumes: map[string]struct{}{"/b": {}, "/a": {}},
	}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

// newLayout writes images for amd64 ("one"), an index of amd64 and arm64 ("many") into a layout.
func newLayout(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	l, err := ocilayout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	amd, arm := testImage(t, "amd64"), testImage(t, "arm64")
	tag := func(s string) ocilayout.Option {
		return ocilayout.WithAnnotations(map[string]string{refName: s})
	}
	if err := l.AppendImage(amd, tag("one")); err != nil {
		t.Fatal(err)
	}
	many := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}})
	if err := l.AppendIndex(many, tag("many")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// world is a registry with the test images in it behind a proxy.
type world struct {
	*registry.Proxy
	t    testing.TB
	repo string // "127.0.0.1:port/test"
}

func newWorld(t testing.TB, o registry.Options) *world {
	t.Helper()
	h, err := registry.NewHandler(t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	p, err := registry.StartProxy(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	w := &world{p, t, p.Addr + "/test"}
	if _, err := registry.PushAll(context.Background(), w.repo, newLayout(t)); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); p.Conns() > 0 && time.Since(begun) < 10*time.Second; {
		time.Sleep(time.Millisecond) // for the pushing side to be gone
	}
	p.ResetLog()
	return w
}

// quick are options whose timers suit tests.
func quick() Options {
	return Options{
		Version: "test", CertsDir: "/nonexistent", Proxy: func(*http.Request) (*neturl, error) { return nil, nil },
		MaxWait: 20 * time.Second, ResolveWait: 10 * time.Second, Idle: 500 * time.Millisecond, MirrorIdle: 300 * time.Millisecond,
		RateWindow: 300 * time.Millisecond,
	}
}

func newClient(t testing.TB, o Options) *Client {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.fallbackPause = 0
	t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) open(o Options) Repository {
	w.t.Helper()
	return openRepo(w.t, newClient(w.t, o), w.repo+":one")
}

func openRepo(t testing.TB, c *Client, name string) Repository {
	t.Helper()
	ref, err := ParseReference(name)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := c.Repository(ref)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

// layer is the first layer's descriptor.
func layer() ztoc.BlobRef {
	b := layerBytes(1, layerSize)
	return ztoc.BlobRef{Digest: ztoc.DigestOf(b), Size: layerSize}
}

func readRange(ctx context.Context, repo Repository, d ztoc.Digest, r ztoc.Range) ([]byte, error) {
	rc, err := repo.Blob(ctx, d, r)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// wantRange reads a range of the first layer and compares.
func wantRange(t testing.TB, repo Repository, r ztoc.Range) {
	t.Helper()
	got, err := readRange(context.Background(), repo, layer().Digest, r)
	want := layerBytes(1, layerSize)
	if (r != ztoc.Range{}) {
		want = want[r.Start:r.End]
	}
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: %d bytes of %d, right: %t, error %v", r, len(got), len(want), bytes.Equal(got, want), err)
	}
}

// wantError checks an error's sentinel and that its text holds every one of words, and no secret.
func wantError(t testing.TB, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("error %v, want %v", err, sentinel)
	}
	t.Log(err) // go test -v: how all of them read
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not tell %q", err, w)
		}
	}
	for _, s := range []string{"hunter2", "Signature=", "Bearer ", "Basic "} {
		if strings.Contains(err.Error(), s) {
			t.Errorf("error %q gives away %q", err, s)
		}
	}
}

func writeFile(t testing.TB, text string, path ...string) string {
	t.Helper()
	name := filepath.Join(path...)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func opener(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return bytesBody(b), nil }
}

// copyAll counts what r still gives.
func copyAll(r io.Reader) (int64, error) { return io.Copy(io.Discard, r) }
