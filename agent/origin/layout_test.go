package origin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

func TestLayout(t *testing.T) {
	dir := newLayout(t)
	ctx := context.Background()
	c := newClient(t, quick())
	repo := openRepo(t, c, "oci:"+dir+":many")
	img, err := repo.Resolve(ctx, "linux/arm64")
	if err != nil || img.Platform != "linux/arm64" || img.IndexDigest == "" || img.Layers[0].Ref() != layer() {
		t.Errorf("%+v %v", img, err)
	}
	for _, r := range []ztoc.Range{{Start: 0, End: 1}, {Start: 399_999, End: 400_000}, middle, wholeBlob} {
		wantRange(t, repo, r)
	}
	tags, err := repo.Tags(ctx)
	if err != nil || !slices.Equal(tags, []string{"many", "one"}) {
		t.Error(tags, err)
	}
	_, err = openRepo(t, c, "oci:"+dir+":none").Resolve(ctx, "")
	wantError(t, err, ErrNotFound, "many, one", dir)
	_, err = openRepo(t, c, "oci:"+dir).Resolve(ctx, "")
	wantError(t, err, ErrUsage, "many, one", "oci:"+dir+":TAG")
	_, err = repo.Resolve(ctx, "linux/s390x")
	wantError(t, err, ErrPlatform, "linux/amd64, linux/arm64/v8")
	byDigest, err := openRepo(t, c, "oci:"+dir+"@"+string(img.Digest)).Resolve(ctx, "linux/arm64")
	if err != nil || byDigest.Digest != img.Digest {
		t.Error(err)
	}
	_, err = readRange(ctx, repo, layer().Digest, ztoc.Range{Start: 0, End: layerSize + 1})
	wantError(t, err, ErrDigest, "400000")
	_, err = readRange(ctx, repo, ztoc.DigestOf([]byte("none")), middle)
	wantError(t, err, ErrNotFound)
	_, err = readRange(ctx, repo, "sha256:../../etc/passwd", middle)
	wantError(t, err, ErrUsage)
	for _, name := range []string{"oci:" + t.TempDir(), "oci:/nonexistent/dir:x"} {
		ref, err := ParseReference(name)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Repository(ref)
		wantError(t, err, ErrNotFound, "oci-layout")
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := repo.Resolve(ended, ""); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestLayoutWithOneImage(t *testing.T) {
	dir := newLayout(t)
	ctx := context.Background()
	img, err := openRepo(t, newClient(t, quick()), "oci:"+dir+":one").Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	entry := func(d ztoc.Digest, n int, more string) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d%s}`, MediaTypeManifest, d, n, more)
	}
	index := func(entries ...string) {
		writeFile(t, `{"schemaVersion":2,"manifests":[`+strings.Join(entries, ",")+`]}`, dir, "index.json")
	}
	repo := openRepo(t, newClient(t, quick()), "oci:"+dir)
	index(entry(img.Digest, len(img.Manifest), ""))
	if got, err := repo.Resolve(ctx, "linux/amd64"); err != nil || got.Digest != img.Digest {
		t.Error("no tag needed:", err)
	}
	index(entry(img.Digest, len(img.Manifest), `,"annotations":{"io.containerd.image.name":"docker.io/library/x:v7","org.opencontainers.image.ref.name":"v7"}`))
	if got, err := openRepo(t, newClient(t, quick()), "oci:"+dir+":v7").Resolve(ctx, "linux/amd64"); err != nil || got.Digest != img.Digest {
		t.Error("containerd's name:", err)
	}
	index(entry(ztoc.DigestOf([]byte("a")), 1, `,"platform":{"os":"linux","architecture":"s390x"}`), entry(img.Digest, len(img.Manifest), `,"platform":{"os":"linux","architecture":"amd64"}`))
	if got, err := repo.Resolve(ctx, "linux/amd64"); err != nil || got.Digest != img.Digest {
		t.Error("index.json as the image's index:", err)
	}
	writeFile(t, "{", dir, "index.json")
	_, err = repo.Resolve(ctx, "")
	wantError(t, err, ErrProtocol, "index.json")
	writeFile(t, `{"imageLayoutVersion":"9.0"}`, dir, "oci-layout")
	ref, _ := ParseReference("oci:" + dir)
	_, err = newClient(t, quick()).Repository(ref)
	wantError(t, err, ErrUnsupported, "9.0")
}

// What lies where a blob should be may be anything.
func TestLayoutIsHostile(t *testing.T) {
	dir := newLayout(t)
	ctx := context.Background()
	repo := openRepo(t, newClient(t, quick()), "oci:"+dir+":one")
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(dir, "blobs/sha256", layer().Digest.Hex())
	replace := func(make func() error) {
		t.Helper()
		if err := errors.Join(os.RemoveAll(blob), make()); err != nil {
			t.Fatal(err)
		}
	}
	outside := writeFile(t, strings.Repeat("secret", layerSize), t.TempDir(), "shadow")
	replace(func() error { return os.Symlink(outside, blob) })
	_, err = readRange(ctx, repo, layer().Digest, middle)
	wantError(t, err, ErrUnsupported, "escapes")
	replace(func() error { return syscall.Mkfifo(blob, 0o644) })
	done := make(chan error, 1)
	go func() {
		_, err := readRange(ctx, repo, layer().Digest, middle)
		done <- err
	}()
	select {
	case err := <-done:
		wantError(t, err, ErrUnsupported, "regular")
	case <-time.After(5 * time.Second):
		t.Fatal("blocked on a fifo")
	}
	replace(func() error { return os.Mkdir(blob, 0o755) })
	_, err = readRange(ctx, repo, layer().Digest, middle)
	wantError(t, err, ErrUnsupported, "regular")

	// Cut while it is read: an error, no short body.
	replace(func() error { return os.WriteFile(blob, layerBytes(1, layerSize), 0o644) })
	rc, err := repo.Blob(ctx, layer().Digest, middle)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if err := os.Truncate(blob, 2000); err != nil {
		t.Fatal(err)
	}
	if n, err := copyAll(rc); err == nil || n > 1000 {
		t.Errorf("%d bytes, %v", n, err)
	}
	// Another manifest under the digest's name.
	writeFile(t, string(img.Manifest)+" ", dir, "blobs/sha256", img.Digest.Hex())
	_, err = repo.Resolve(ctx, "linux/amd64")
	wantError(t, err, ErrDigest, string(img.Digest))
}

func TestLayoutWriters(t *testing.T) {
	dir := newLayout(t)
	ctx := context.Background()
	c := newClient(t, quick())
	repo := openRepo(t, c, "oci:"+dir+":one")
	img, err := repo.Resolve(ctx, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := repo.PushManifest(ctx, img.MediaType, img.Manifest, fmt.Sprint("tag", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	tags, err := repo.Tags(ctx)
	if err != nil || len(tags) != 10 {
		t.Error(tags, err)
	}
	err = repo.PushBlob(ctx, ztoc.BlobRef{Digest: ztoc.DigestOf([]byte("x")), Size: 1}, opener([]byte("y")))
	wantError(t, err, ErrDigest)
	left, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/.muster-*"))
	if err != nil || len(left) > 0 {
		t.Error("temporary files left:", left)
	}
}
