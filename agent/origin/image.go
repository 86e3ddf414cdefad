package origin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/muster-hpc/muster/ztoc"
)

// Media types that muster decides on.
const (
	MediaTypeManifest   = string(types.OCIManifestSchema1)
	MediaTypeConfig     = string(types.OCIConfigJSON)
	MediaTypeLayerGzip  = string(types.OCILayer)
	MediaTypeIndex      = string(types.OCIImageIndex)
	MediaTypeDocker     = string(types.DockerManifestSchema2)
	MediaTypeDockerList = string(types.DockerManifestList)
)

// MaxDocument bounds manifests, indexes and configs, bytes. Docker's own limit is 4 MiB for manifests.
const MaxDocument = 8 << 20

// maxBlob bounds what a descriptor may claim, bytes: sums of sizes must not overflow.
const maxBlob = 1 << 44

// A Descriptor names a blob or manifest.
type Descriptor struct {
	MediaType    string
	Digest       ztoc.Digest
	Size         int64 // bytes
	Annotations  map[string]string
	ArtifactType string
	Platform     string   // "linux/arm64/v8", for a manifest within an index
	URLs         []string // where a foreign layer lies
}

// Ref is the descriptor as ztoc says it.
func (d Descriptor) Ref() ztoc.BlobRef { return ztoc.BlobRef{Digest: d.Digest, Size: d.Size} }

// An Image is a reference resolved for one platform. Only its digests travel from here on.
type Image struct {
	Ref         Reference
	Digest      ztoc.Digest // of Manifest
	MediaType   string
	Manifest    []byte
	Config      []byte
	ConfigFile  Config
	Layers      []Descriptor  // bottom first
	DiffIDs     []ztoc.Digest // one per layer
	Platform    string
	Annotations map[string]string // the manifest's own
	// The index the manifest was chosen from, for discovery of SOCI v2; empty if Ref names a manifest.
	IndexDigest     ztoc.Digest
	IndexManifest   []byte
	IndexDescriptor Descriptor // the manifest's descriptor in that index, with its annotations
}

// Size is the bytes of all layer blobs, each blob counted once.
func (i Image) Size() int64 {
	var n int64
	seen := map[ztoc.Digest]bool{}
	for _, l := range i.Layers {
		if !seen[l.Digest] {
			seen[l.Digest] = true
			n += l.Size
		}
	}
	return n
}

// A Config is what muster uses of an image's config.
type Config struct {
	OS, Architecture, Variant string
	Entrypoint, Cmd, Env      []string
	WorkingDir                string
	User                      string
	StopSignal                string
	Volumes                   []string // sorted
	Labels                    map[string]string
}

// A Manifest is a manifest or index as it was fetched: Body hashes to Digest.
type Manifest struct {
	MediaType string
	Digest    ztoc.Digest
	Body      []byte
}

// manifest is what a parsed manifest or index comes down to; one of its two lists is empty.
type manifest struct {
	mediaType    string
	index        bool
	config       Descriptor
	layers       []Descriptor
	manifests    []Descriptor
	annotations  map[string]string
	subject      ztoc.Digest
	artifactType string
}

// parseManifest reads a manifest or an index of either dialect. contentType decides only where the
// document does not say itself what it is.
func parseManifest(contentType string, body []byte) (manifest, error) {
	var m manifest
	if len(body) > MaxDocument {
		return m, fmt.Errorf("%w: manifest of %d bytes, at most %d are read", ErrUnsupported, len(body), MaxDocument)
	}
	var probe struct {
		SchemaVersion int64             `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Manifests     []json.RawMessage `json:"manifests"`
		Layers        []json.RawMessage `json:"layers"`
		FSLayers      []json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(body, &probe); err != nil {
		return m, fmt.Errorf("%w: manifest is not JSON: %s", ErrProtocol, clean(err.Error()))
	}
	if probe.SchemaVersion == 1 || probe.FSLayers != nil {
		return m, fmt.Errorf("%w: an image of Docker's schema 1; push it again with a current docker or skopeo", ErrUnsupported)
	}
	m.mediaType = probe.MediaType
	if m.mediaType == "" {
		m.mediaType, _, _ = strings.Cut(contentType, ";")
	}
	switch m.mediaType {
	case MediaTypeIndex, MediaTypeDockerList:
		m.index = true
	case MediaTypeManifest, MediaTypeDocker:
	default:
		if probe.Manifests == nil && probe.Layers == nil {
			return m, fmt.Errorf("%w: a document of type %.100q is no image manifest", ErrUnsupported, m.mediaType)
		}
		m.index = probe.Manifests != nil
		m.mediaType = MediaTypeManifest
		if m.index {
			m.mediaType = MediaTypeIndex
		}
	}
	// One document must not be a manifest to one reader and an index to another.
	if m.index && probe.Layers != nil || !m.index && probe.Manifests != nil {
		return m, fmt.Errorf("%w: a manifest with both layers and manifests", ErrProtocol)
	}
	if m.index {
		p, err := v1.ParseIndexManifest(bytes.NewReader(body))
		if err != nil {
			return m, fmt.Errorf("%w: index: %s", ErrProtocol, clean(err.Error()))
		}
		m.annotations, m.artifactType = p.Annotations, p.ArtifactType
		m.manifests, err = descriptors(p.Manifests)
		if err == nil && p.Subject != nil {
			m.subject, err = ztoc.ParseDigest(p.Subject.Digest.String())
		}
		return m, err
	}
	p, err := v1.ParseManifest(bytes.NewReader(body))
	if err != nil {
		return m, fmt.Errorf("%w: manifest: %s", ErrProtocol, clean(err.Error()))
	}
	m.annotations, m.artifactType = p.Annotations, p.ArtifactType
	if m.config, err = descriptor(p.Config); err != nil {
		return m, err
	}
	if p.Subject != nil {
		if m.subject, err = ztoc.ParseDigest(p.Subject.Digest.String()); err != nil {
			return m, fmt.Errorf("%w: subject: %s", ErrProtocol, clean(err.Error()))
		}
	}
	m.layers, err = descriptors(p.Layers)
	return m, err
}

func descriptors(in []v1.Descriptor) ([]Descriptor, error) {
	out := make([]Descriptor, len(in))
	for i, d := range in {
		var err error
		if out[i], err = descriptor(d); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func descriptor(d v1.Descriptor) (Descriptor, error) {
	dig, err := ztoc.ParseDigest(d.Digest.String())
	if err != nil {
		return Descriptor{}, fmt.Errorf("%w: descriptor: %s", ErrUnsupported, clean(err.Error()))
	}
	if d.Size < 0 || d.Size > maxBlob {
		return Descriptor{}, fmt.Errorf("%w: descriptor of %s claims %d bytes", ErrProtocol, dig, d.Size)
	}
	out := Descriptor{
		MediaType: string(d.MediaType), Digest: dig, Size: d.Size, Annotations: d.Annotations,
		ArtifactType: d.ArtifactType, URLs: d.URLs,
	}
	if d.Platform != nil {
		out.Platform = platformName(d.Platform.OS, d.Platform.Architecture, d.Platform.Variant)
	}
	return out, nil
}

// parseConfig reads an image's config and checks it against the number of layers.
func parseConfig(body []byte, layers int) (Config, []ztoc.Digest, error) {
	cf, err := v1.ParseConfigFile(bytes.NewReader(body))
	if err != nil {
		return Config{}, nil, fmt.Errorf("%w: config: %s", ErrProtocol, clean(err.Error()))
	}
	c := Config{
		OS: cf.OS, Architecture: cf.Architecture, Variant: cf.Variant,
		Entrypoint: cf.Config.Entrypoint, Cmd: cf.Config.Cmd, Env: cf.Config.Env,
		WorkingDir: cf.Config.WorkingDir, User: cf.Config.User, StopSignal: cf.Config.StopSignal,
		Labels: cf.Config.Labels,
	}
	for v := range cf.Config.Volumes {
		c.Volumes = append(c.Volumes, v)
	}
	slices.Sort(c.Volumes)
	if len(cf.RootFS.DiffIDs) != layers {
		return Config{}, nil, fmt.Errorf("%w: %d layers, but the config lists %d diff IDs", ErrProtocol, layers, len(cf.RootFS.DiffIDs))
	}
	ids := make([]ztoc.Digest, layers)
	for i, h := range cf.RootFS.DiffIDs {
		if ids[i], err = ztoc.ParseDigest(h.String()); err != nil {
			return Config{}, nil, fmt.Errorf("%w: diff ID: %s", ErrUnsupported, clean(err.Error()))
		}
	}
	return c, ids, nil
}

// imageConfig reports whether a type of config, or an artifact type derived from it as go-containerregistry
// does for every descriptor it writes, is that of a container image.
func imageConfig(t string) bool {
	return t == "" || t == string(types.OCIConfigJSON) || t == string(types.DockerConfigJSON)
}

// checkImage refuses what is a manifest but no container image, and layers that lie elsewhere.
func (m manifest) checkImage() error {
	switch {
	case imageConfig(m.config.MediaType):
	case m.artifactType != "":
		return fmt.Errorf("%w: an artifact of type %.100q, not a container image", ErrUnsupported, m.artifactType)
	default:
		return fmt.Errorf("%w: an artifact of type %.100q, not a container image", ErrUnsupported, m.config.MediaType)
	}
	for i, l := range m.layers {
		if len(l.URLs) > 0 || !types.MediaType(l.MediaType).IsDistributable() {
			return fmt.Errorf("%w: layer %d of %d is a foreign layer (%.100s), kept outside the registry; rebuild the image without it", ErrUnsupported, i+1, len(m.layers), l.MediaType)
		}
	}
	return nil
}

// DefaultPlatform is this machine's: "linux/amd64".
func DefaultPlatform() string { return runtime.GOOS + "/" + runtime.GOARCH }

type platform struct{ os, arch, variant string }

func parsePlatform(s string) (platform, error) {
	if s == "" {
		s = DefaultPlatform()
	}
	parts := strings.Split(s, "/")
	if len(parts) == 1 {
		parts = append([]string{"linux"}, parts...) // "arm64" as people write it
	}
	if len(parts) > 3 || slices.Contains(parts, "") {
		return platform{}, usage(s, "not a platform", "platforms look like linux/amd64 or linux/arm64/v8")
	}
	return newPlatform(parts[0], parts[1], append(parts, "")[2]), nil
}

// newPlatform brings the spellings in use to one: x86_64 and aarch64 occur, and v1 and v8 are what
// amd64 and arm64 mean when they say nothing.
func newPlatform(os, arch, variant string) platform {
	p := platform{strings.ToLower(os), strings.ToLower(arch), strings.ToLower(variant)}
	switch p.arch {
	case "x86_64", "x86-64":
		p.arch = "amd64"
	case "aarch64":
		p.arch = "arm64"
	case "armhf":
		p.arch, p.variant = "arm", "v7"
	}
	if p.arch == "amd64" && p.variant == "v1" || p.arch == "arm64" && p.variant == "v8" {
		p.variant = ""
	}
	return p
}

func (p platform) String() string { return platformName(p.os, p.arch, p.variant) }

func platformName(os, arch, variant string) string {
	s := os + "/" + arch
	if variant != "" {
		s += "/" + variant
	}
	if s == "/" {
		return ""
	}
	return s
}

// runs reports how well an image of platform h suits a wish for p: 0 not at all, more is better. A wish
// without a variant takes the plainest there is: code for amd64/v3 may not run here.
func (p platform) runs(h platform) int {
	switch {
	case h.os != p.os || h.arch != p.arch:
		return 0
	case h.variant == p.variant:
		return 100
	case p.variant != "" && h.variant == "":
		return 50
	case p.variant == "" && p.arch == "arm" && h.variant == "v8":
		return 10
	case p.variant == "" && p.arch == "arm":
		return 40 + len(h.variant) + int(h.variant[len(h.variant)-1]-'0')%10
	case p.variant == "" && p.arch == "amd64":
		return 0
	case p.variant == "":
		return 20
	}
	return 0
}

// choose picks the manifest of an index for a platform; the error lists what there is.
func (m manifest) choose(want platform) (Descriptor, error) {
	var (
		best  Descriptor
		score int
		have  []string
	)
	for _, d := range m.manifests {
		t := types.MediaType(d.MediaType)
		if !t.IsImage() && !t.IsIndex() || d.Annotations["vnd.docker.reference.type"] != "" || !imageConfig(d.ArtifactType) {
			continue // attestations and indexes of other tools
		}
		if d.Platform == "" && len(m.manifests) == 1 {
			return d, nil // says nothing; the config will
		}
		if d.Platform == "" || strings.HasPrefix(d.Platform, "unknown/") {
			continue
		}
		have = append(have, d.Platform)
		parts := append(strings.Split(d.Platform, "/"), "", "")
		if s := want.runs(newPlatform(parts[0], parts[1], parts[2])); s > score {
			best, score = d, s
		}
	}
	if score == 0 {
		return best, platformError(want, have)
	}
	return best, nil
}

func platformError(want platform, have []string) error {
	slices.Sort(have)
	have = slices.Compact(have)
	message := fmt.Sprintf("it does not exist for %s, only for %s", want, clean(strings.Join(have, ", ")))
	if len(have) == 0 {
		message = fmt.Sprintf("it does not exist for %s, and does not say for what it does", want)
	}
	return &Error{
		Message: message,
		Next:    "choose one with --platform", Err: ErrPlatform,
	}
}
