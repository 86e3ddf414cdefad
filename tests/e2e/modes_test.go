package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
)

// TestModesOfMixed (F15, F18): an image whose layers are of four kinds; each one's mode is reported with the
// reason, and --require-lazy names what stands in the way.
func TestModesOfMixed(t *testing.T) {
	ref := indexed(t, "mixed") // covers its big gzip layer: the others need none, or cannot have one
	h := newHost(t, 0)
	dir := h.mountPoint()
	s := parse(t, h.must("mount", "--json", ref, dir).stdout)
	want := []struct{ mode, reason string }{
		{"index", ""},
		{"pulled", "small"},
		{"derived", "no index covers it, or its form has no restart points"},
		{"toc", ""},
	}
	if len(s.Layers) != len(want) {
		t.Fatalf("%+v", s.Layers)
	}
	for i, l := range s.Layers {
		if l.Mode != want[i].mode || (l.Reason != "") != (want[i].reason != "") {
			t.Errorf("layer %d is %s %s because %q, want %+v", i, l.Format, l.Mode, l.Reason, want[i])
		}
		t.Logf("layer %d: %s %s, %s", i, l.Format, l.Mode, l.Reason)
	}
	var out strings.Builder
	cmd := h.command("run", ref)
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "python") {
		t.Errorf("it does not run: %v %q", err, out.String())
	}

	fresh := newHost(t, 0)
	zstd := strings.TrimPrefix(s.Layers[2].Digest, "sha256:")[:8]
	r := fresh.muster("mount", "--require-lazy", ref, fresh.mountPoint())
	if r.code != 9 {
		t.Errorf("--require-lazy: exit code %d", r.code)
	}
	plainMessage(t, r.stderr, ref, zstd)
	small := strings.TrimPrefix(s.Layers[1].Digest, "sha256:")[:8]
	if strings.Contains(r.stderr, small) {
		t.Errorf("it complains of the small layer: %s", r.stderr)
	}
	r = fresh.muster("run", "--require-lazy", ref, "true")
	if r.code != 125 {
		t.Errorf("run --require-lazy: exit code %d", r.code)
	}
	plainMessage(t, r.stderr, ref, zstd)
	// Once it was opened nothing stands in the way any more.
	h.must("run", "--require-lazy", ref)
}

// TestRequireLazy (F15) without any index: refused, with the reason; with one: passed.
func TestRequireLazy(t *testing.T) {
	h := newHost(t, 0)
	ref := big(t, 1)
	r := h.muster("run", "--index-use=false", "--require-lazy", ref)
	if r.code != 125 {
		t.Errorf("exit code %d", r.code)
	}
	plainMessage(t, r.stderr, ref, bigLayer(1).Digest[:15], "index")
	h.clean("a refused run")
	if r, s := h.reported("--require-lazy", ref); r.code != 0 || s.Layers[1].Mode != "index" {
		t.Errorf("exit code %d, %s, %+v", r.code, r.stderr, s.Layers)
	}
}

// TestDamagedImages: each works, with a reason where something was passed over, or fails with the code that
// fits and a message that names image, layer and cause. Nothing is left behind either way.
func TestDamagedImages(t *testing.T) {
	tests := []struct {
		image  string
		code   int
		reason string // of the second layer, when it works
		words  []string
	}{
		{"broken-soci", 0, "index", nil},
		{"broken-diffid", 0, "", nil}, // digests are what is promised; the lie in the config harms nobody
		{"broken-gzip-cut", 6, "", []string{"layer"}},
		{"broken-gzip-crc", 6, "", []string{"layer"}},
		{"broken-tar", 6, "", []string{"layer"}},
		{"broken-toc-digest", 0, "table of contents", nil},
		{"broken-toc-json", 0, "table of contents", nil},
		{"broken-toc-range", 0, "table of contents", nil},
		{"broken-position", 0, "table of contents", nil},
		{"broken-blob", 6, "", []string{"layer"}},
		{"broken-missing", 3, "", []string{"layer"}},
	}
	for _, tt := range tests {
		t.Run(tt.image, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, 0)
			ref := "oci:" + layout(t, tt.image)
			dir := h.mountPoint()
			r := h.muster("mount", "--json", ref, dir)
			if r.code != tt.code {
				t.Fatalf("exit code %d, want %d: %s%s", r.code, tt.code, r.stdout, r.stderr)
			}
			if tt.code != 0 {
				layers, err := images.ReadLayout(layout(t, tt.image))
				if err == nil {
					tt.words = append(tt.words, layers[1].Digest[7:15])
				}
				plainMessage(t, r.stderr, append(tt.words, tt.image)...)
				h.clean("a mount that failed")
				if names, _ := filepath.Glob(dir + "/*"); len(names) > 0 {
					t.Errorf("something is mounted: %v", names)
				}
				if r := h.muster("run", ref); r.code != 125 {
					t.Errorf("run: exit code %d", r.code)
				}
				h.clean("a run that failed")
				return
			}
			s := parse(t, r.stdout)
			if l := s.Layers[1]; !strings.Contains(l.Reason, tt.reason) {
				t.Errorf("the layer is %s because %q, want %q", l.Mode, l.Reason, tt.reason)
			}
			if b, err := os.ReadFile(dir + "/data/last"); err != nil || string(b) != "last\n" {
				t.Errorf("%q, %v", b, err)
			}
			if b, err := os.ReadFile(dir + "/data/big"); err != nil || len(b) != 6<<20 {
				t.Errorf("%d bytes, %v", len(b), err)
			}
		})
	}
}

// TestTableThatLies: an eStargz table whose chunk digest is wrong gives an error to who reads that chunk, and the
// right bytes of all else.
func TestTableThatLies(t *testing.T) {
	h := newHost(t, 0)
	dir := h.mount("oci:" + layout(t, "broken-toc-chunk"))
	if b, err := os.ReadFile(dir + "/data/last"); err != nil || string(b) != "last\n" {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := os.ReadFile(dir + "/data/big"); err == nil {
		t.Errorf("%d bytes of a file whose chunk does not match", len(b))
	}
}

// TestUnknownLayers (F18): a media type nobody knows is no reason to fail when the bytes are understood, and names
// itself when they are not.
func TestUnknownLayers(t *testing.T) {
	base := images.Layer(images.Dir("."), images.Dir("bin"), images.File("bin/say", string(say())).With(0o755, 0, 0))
	archive := images.Tar(images.File("file", "content\n"))
	for _, tt := range []struct {
		name, mediaType string
		blob            []byte
		code            int
	}{
		{"gzip", "application/vnd.example.layer.v9+gzip", images.Gzip(archive), 0},
		{"tar", "application/vnd.example.layer.v9", archive, 0},
		{"zstd", "application/vnd.example.layer.v9+zstd", images.ZstdSingle(archive), 0},
		{"lz4", "application/vnd.example.layer.v9+lz4", append([]byte{4, 0x22, 0x4d, 0x18}, archive...), 9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ref := made(t, "unknown-"+tt.name, images.Image{
				Config: images.RunConfig{Cmd: []string{"/bin/say"}}, Layers: []images.Blob{base, images.NewLayer(tt.mediaType, tt.blob, archive)},
			})
			h := newHost(t, 0)
			dir := h.mountPoint()
			r := h.muster("mount", ref, dir)
			if r.code != tt.code {
				t.Fatalf("exit code %d, want %d: %s", r.code, tt.code, r.stderr)
			}
			if tt.code != 0 {
				plainMessage(t, r.stderr, ref, "layer")
				return
			}
			if b, err := os.ReadFile(dir + "/file"); err != nil || string(b) != "content\n" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

// TestOddRegistries (F32): whatever a registry makes of the question for an index, the image runs; the reason says
// what happened.
func TestOddRegistries(t *testing.T) {
	ref := made(t, "odd", bigImage(9))
	referrers := registry.Match{Kind: registry.Referrers}
	fallback := registry.Match{Kind: registry.Manifest, Where: func(r *registry.Record) bool { return strings.HasPrefix(r.Ref, "sha256-") }}
	for _, tt := range []struct {
		name   string
		match  registry.Match
		action registry.Action
	}{
		{"a page (Artifact Registry)", referrers, registry.HTML()},
		{"a redirect to a page", referrers, registry.Answer(302, "", "Location", "/login")},
		{"404", referrers, registry.Answer(404, "not found")},
		{"500 (Harbor 2.8)", referrers, registry.Answer(500, `{"errors":[{"code":"UNKNOWN","message":"unknown"}]}`)},
		{"403", referrers, registry.Answer(403, `{"errors":[{"code":"DENIED"}]}`)},
		{"an empty list (Harbor 2.9)", referrers, registry.Answer(200, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":null}`, "Content-Type", "application/vnd.oci.image.index.v1+json")},
		{"half an answer", referrers, registry.Answer(200, `{"schemaVersion":2,"manif`)},
		{"a page for the fallback tag", fallback, registry.HTML()},
		{"no subject (Quay)", fallback, registry.Answer(404, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := front(t)
			p.Inject(tt.match, 0, tt.action)
			r, s := newHost(t, 0).reported("--origin-resolve-patience", "2s", through(p, ref))
			if r.code != 0 || r.stdout != "uid 0\n" {
				t.Fatalf("exit code %d, %q, %s", r.code, r.stdout, r.stderr)
			}
			if l := s.Layers[1]; l.Mode != "pulled" || l.Reason == "" {
				t.Errorf("%s because %q", l.Mode, l.Reason)
			} else {
				t.Log(l.Reason)
			}
		})
	}
}

// TestIndexPushRace (F32): several hosts push indexes of one image at the same moment to a registry that has only
// the fallback tag; none is lost.
func TestIndexPushRace(t *testing.T) {
	ref := made(t, "race", bigImage(8))
	const hosts = 4
	p := front(t)
	// A little apart is what loses entries; at once is what this makes them.
	p.Inject(registry.Match{Kind: registry.Manifest, Method: http.MethodPut}, 0, registry.Delay(30e6))
	var wg sync.WaitGroup
	for i := range hosts {
		h := newHost(t, 0)
		wg.Go(func() {
			cmd := h.command("index", "push", "--index-span-size", fmt.Sprintf("%dKiB", 512<<i), "--soci-span-size", fmt.Sprintf("%dKiB", 512<<i), through(p, ref))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	wg.Wait()
	var list []struct{ Digest string }
	out := newHost(t, 0).must("index", "list", "--json", ref).stdout
	if unmarshal(t, out, &list); len(list) != hosts {
		t.Errorf("%d indexes of %d are there: %s", len(list), hosts, out)
	}
}
