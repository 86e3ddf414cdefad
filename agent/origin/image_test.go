package origin

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

func TestResolve(t *testing.T) {
	w := newWorld(t, registry.Options{})
	c := newClient(t, quick())
	for _, name := range []string{"one", "many"} {
		img, err := openRepo(t, c, w.repo+":"+name).Resolve(context.Background(), "linux/amd64")
		if err != nil {
			t.Fatal(err)
		}
		if ztoc.DigestOf(img.Manifest) != img.Digest || img.MediaType != MediaTypeManifest || img.Platform != "linux/amd64" {
			t.Errorf("%+v", img)
		}
		if len(img.Layers) != 2 || img.Layers[0].Ref() != layer() || len(img.DiffIDs) != 2 || img.Size() != layerSize*3/2 {
			t.Errorf("%+v", img.Layers)
		}
		cf := img.ConfigFile
		if !slices.Equal(cf.Entrypoint, []string{"/bin/tool"}) || !slices.Equal(cf.Cmd, []string{"--help"}) || !slices.Equal(cf.Env, []string{"A=b"}) ||
			cf.WorkingDir != "/w" || cf.User != "7:8" || cf.StopSignal != "SIGINT" || !slices.Equal(cf.Volumes, []string{"/a", "/b"}) || len(img.Config) == 0 {
			t.Errorf("%+v", cf)
		}
		if (img.IndexDigest != "") != (name == "many") || img.IndexDigest != "" && ztoc.DigestOf(img.IndexManifest) != img.IndexDigest {
			t.Errorf("index %s", img.IndexDigest)
		}
		// By digest: the same image.
		again, err := openRepo(t, c, w.repo+"@"+string(img.Digest)).Resolve(context.Background(), "linux/amd64")
		if err != nil || again.Digest != img.Digest {
			t.Error(again.Digest, err)
		}
	}
	many := openRepo(t, c, w.repo+":many")
	for _, p := range []string{"linux/arm64", "arm64", "linux/arm64/v8", "linux/aarch64"} {
		img, err := many.Resolve(context.Background(), p)
		if err != nil || img.Platform != "linux/arm64" {
			t.Errorf("%s: %s %v", p, img.Platform, err)
		}
	}
	_, err := many.Resolve(context.Background(), "linux/s390x")
	wantError(t, err, ErrPlatform, w.repo+":many", "linux/s390x", "linux/amd64, linux/arm64/v8", "--platform")
	_, err = openRepo(t, c, w.repo+":one").Resolve(context.Background(), "linux/arm64")
	wantError(t, err, ErrPlatform, "linux/amd64", "linux/arm64")
	_, err = many.Resolve(context.Background(), "a/b/c/d")
	wantError(t, err, ErrUsage)
	_, err = openRepo(t, c, w.repo+":none").Resolve(context.Background(), "")
	wantError(t, err, ErrNotFound, w.repo+":none", "404", "MANIFEST_UNKNOWN", "check name and tag")
	tags, err := many.Tags(context.Background())
	if err != nil || !slices.Equal(tags, []string{"many", "one"}) {
		t.Error(tags, err)
	}
}

func TestChoosePlatform(t *testing.T) {
	index := func(platforms ...string) manifest {
		m := manifest{index: true}
		for i, p := range platforms {
			m.manifests = append(m.manifests, Descriptor{MediaType: MediaTypeManifest, Platform: p, Size: int64(i)})
		}
		return m
	}
	for _, tt := range []struct {
		want string
		have []string
		pick int // -1: none
	}{
		{"linux/amd64", []string{"linux/arm64", "linux/amd64"}, 1},
		{"linux/amd64", []string{"linux/amd64/v3", "linux/amd64"}, 1},
		{"linux/amd64", []string{"linux/amd64/v3"}, -1}, // may not run here
		{"linux/amd64/v3", []string{"linux/amd64", "linux/amd64/v3"}, 1},
		{"linux/amd64/v3", []string{"linux/amd64"}, 0},
		{"linux/amd64/v2", []string{"linux/amd64/v3"}, -1},
		{"linux/arm64", []string{"linux/arm/v7", "linux/arm64/v8"}, 1},
		{"linux/arm", []string{"linux/arm/v5", "linux/arm/v7", "linux/arm/v6"}, 1},
		{"linux/amd64", []string{"windows/amd64", "unknown/unknown"}, -1},
		{"linux/amd64", []string{""}, 0}, // says nothing: the config will
		{"linux/amd64", []string{"", ""}, -1},
		{"linux/amd64", nil, -1},
	} {
		p, err := parsePlatform(tt.want)
		if err != nil {
			t.Fatal(err)
		}
		d, err := index(tt.have...).choose(p)
		if tt.pick < 0 {
			wantError(t, err, ErrPlatform)
			continue
		}
		if err != nil || d.Size != int64(tt.pick) {
			t.Errorf("%s of %q: %d, %v", tt.want, tt.have, d.Size, err)
		}
	}
	m := index("linux/amd64", "linux/amd64", "linux/amd64")
	m.manifests[0].Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	m.manifests[1].ArtifactType = artifactType
	p, _ := parsePlatform("linux/amd64")
	if d, err := m.choose(p); err != nil || d.Size != 2 {
		t.Error(d, err)
	}
}

func TestParseManifestRefuses(t *testing.T) {
	const d = `"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2`
	const config = `"config":{"mediaType":"application/vnd.oci.image.config.v1+json",` + d + `}`
	for _, tt := range []struct {
		name, body string
		sentinel   error
		words      string
	}{
		{"html", "<html>", ErrProtocol, "JSON"},
		{"null", "null", ErrUnsupported, ""},
		{"schema 1", `{"schemaVersion":1,"fsLayers":[]}`, ErrUnsupported, "schema 1"},
		{"something", `{"schemaVersion":2,"mediaType":"text/x"}`, ErrUnsupported, "text/x"},
		{"both", `{"schemaVersion":2,"mediaType":"` + MediaTypeManifest + `",` + config + `,"layers":[],"manifests":[]}`, ErrProtocol, "both"},
		{"index with layers", `{"schemaVersion":2,"mediaType":"` + MediaTypeIndex + `","layers":[]}`, ErrProtocol, "both"},
		{"negative size", `{"schemaVersion":2,"layers":[{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":-1}],` + config + `}`, ErrProtocol, "-1"},
		{"huge size", `{"schemaVersion":2,"layers":[{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":9000000000000000000}],` + config + `}`, ErrProtocol, ""},
		{"sha512", `{"schemaVersion":2,"layers":[{"digest":"sha512:` + strings.Repeat("a", 128) + `","size":1}],` + config + `}`, ErrUnsupported, "sha256"},
		{"no digest", `{"schemaVersion":2,"layers":[{"size":1}],` + config + `}`, ErrUnsupported, ""},
		{"path as digest", `{"schemaVersion":2,"layers":[{"digest":"../../etc/passwd","size":1}],` + config + `}`, ErrProtocol, ""},
		{"too long", `{"schemaVersion":2,"a":"` + strings.Repeat("x", MaxDocument) + `"}`, ErrUnsupported, "bytes"},
	} {
		_, err := parseManifest("", []byte(tt.body))
		t.Log(tt.name, fmt.Sprintf("%.150v", err))
		wantError(t, err, tt.sentinel, tt.words)
	}
	for _, tt := range []struct{ name, body, words string }{
		{"foreign by type", `{"schemaVersion":2,"layers":[{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",` + d + `}],` + config + `}`, "foreign"},
		{"foreign by urls", `{"schemaVersion":2,"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","urls":["http://x"],` + d + `}],` + config + `}`, "foreign"},
		{"artifact", `{"schemaVersion":2,"artifactType":"application/x","layers":[],"config":{"mediaType":"application/vnd.oci.empty.v1+json",` + d + `}}`, "application/x"},
		{"helm", `{"schemaVersion":2,"layers":[],"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json",` + d + `}}`, "helm"},
	} {
		m, err := parseManifest("", []byte(tt.body))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		wantError(t, m.checkImage(), ErrUnsupported, tt.words)
	}
	// zstd and unknown compressions are the business of others (F18).
	for _, kind := range []string{"application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.oci.image.layer.v1.tar", "application/x-odd"} {
		m, err := parseManifest("", []byte(`{"schemaVersion":2,"layers":[{"mediaType":"`+kind+`",`+d+`}],`+config+`}`))
		if err != nil || m.checkImage() != nil || m.layers[0].MediaType != kind {
			t.Errorf("%s: %v %v", kind, err, m.checkImage())
		}
	}
}

// A whole image of which every document may be wrong, as a registry would serve it.
func TestResolveRefuses(t *testing.T) {
	w := newWorld(t, registry.Options{})
	ctx := context.Background()
	c := newClient(t, quick())
	repo := openRepo(t, c, w.repo+":odd")
	config := []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`)
	push := func(b []byte) string {
		d := ztoc.DigestOf(b)
		if err := repo.PushBlob(ctx, ztoc.BlobRef{Digest: d, Size: int64(len(b))}, opener(b)); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf(`"digest":%q,"size":%d`, d, len(b))
	}
	image := func(config []byte, layers string) string {
		return `{"schemaVersion":2,"mediaType":"` + MediaTypeDocker + `","config":{"mediaType":"application/vnd.docker.container.image.v1+json",` + push(config) + `},"layers":[` + layers + `]}`
	}
	put := func(body string) {
		if _, err := repo.PushManifest(ctx, MediaTypeDocker, []byte(body), "odd"); err != nil {
			t.Fatal(err)
		}
	}
	put(image(config, ""))
	if img, err := repo.Resolve(ctx, "linux/amd64"); err != nil || len(img.Layers) != 0 || img.MediaType != MediaTypeDocker {
		t.Error("docker schema 2 without layers:", err)
	}
	put(image([]byte(`{}`), ""))
	if img, err := repo.Resolve(ctx, "linux/amd64"); err != nil || img.Platform != "linux/amd64" {
		t.Error("a config that says nothing:", err)
	}
	put(image(config, `{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip",`+push([]byte("l"))+`}`))
	_, err := repo.Resolve(ctx, "linux/amd64")
	wantError(t, err, ErrProtocol, "1 layers", "0 diff IDs", ":odd")
	put(image([]byte("<html>"), ""))
	_, err = repo.Resolve(ctx, "linux/amd64")
	wantError(t, err, ErrProtocol, "config")
	put(image(slices.Concat(config, []byte(strings.Repeat(" ", MaxDocument))), ""))
	_, err = repo.Resolve(ctx, "linux/amd64")
	wantError(t, err, ErrUnsupported, "at most")
	put(image(config, `{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip","urls":["https://x"],`+push([]byte("l"))+`}`))
	_, err = repo.Resolve(ctx, "linux/amd64")
	wantError(t, err, ErrUnsupported, "foreign", ":odd")

	// A config whose bytes are not what the manifest says.
	put(image(config, ""))
	w.Inject(registry.Match{Kind: registry.Blob}, 0, registry.FlipAt(3))
	_, err = repo.Resolve(ctx, "linux/amd64")
	wantError(t, err, ErrDigest, string(ztoc.DigestOf(config)))
}

func FuzzParseManifest(f *testing.F) {
	body := artifact(Image{Digest: layer().Digest, MediaType: MediaTypeManifest}, 1)
	f.Add("", body)
	index, err := encodeIndex([]Descriptor{{MediaType: MediaTypeManifest, Digest: layer().Digest, Platform: "linux/arm/v7"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(MediaTypeIndex, index)
	f.Add(MediaTypeDocker, []byte(`{"schemaVersion":1,"fsLayers":[]}`))
	f.Fuzz(func(t *testing.T, kind string, b []byte) {
		m, err := parseManifest(kind, b)
		if err != nil {
			return
		}
		for _, d := range slices.Concat(m.layers, m.manifests) {
			if _, err := ztoc.ParseDigest(string(d.Digest)); err != nil || d.Size < 0 {
				t.Errorf("%+v", d)
			}
		}
		for _, p := range []string{"linux/amd64", "linux/arm"} {
			want, _ := parsePlatform(p)
			m.choose(want)
		}
		m.checkImage()
		parseConfig(b, len(m.layers))
	})
}

func FuzzParseConfig(f *testing.F) {
	b, err := json.Marshal(map[string]any{"os": "linux", "rootfs": map[string]any{"diff_ids": []string{string(layer().Digest)}}, "config": map[string]any{"Volumes": map[string]any{"/a": map[string]any{}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, ids, err := parseConfig(b, 1); err == nil && len(ids) != 1 {
			t.Error(ids)
		}
	})
}
