package images

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// Media types of what layouts hold.
const (
	MediaManifest  = "application/vnd.oci.image.manifest.v1+json"
	MediaIndex     = "application/vnd.oci.image.index.v1+json"
	MediaConfig    = "application/vnd.oci.image.config.v1+json"
	MediaLayerTar  = "application/vnd.oci.image.layer.v1.tar"
	MediaLayerGzip = "application/vnd.oci.image.layer.v1.tar+gzip"
	MediaLayerZstd = "application/vnd.oci.image.layer.v1.tar+zstd"
)

const (
	mediaDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaDockerConfig   = "application/vnd.docker.container.image.v1+json"
	mediaDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// A Blob is a layer or another object of an image: what its descriptor says, and its bytes, either
// in memory or in a file.
type Blob struct {
	Descriptor
	DiffID string // of a layer: digest of its tar archive

	data []byte // nil when path is set
	path string
}

// A Descriptor is how OCI's JSON refers to a blob.
type Descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *Platform         `json:"platform,omitempty"`
}

// A Platform is where an image runs.
type Platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

// Open reads the blob's bytes.
func (b Blob) Open() (io.ReadCloser, error) {
	if b.path != "" {
		return os.Open(b.path)
	}
	return io.NopCloser(bytes.NewReader(b.data)), nil
}

// Bytes is the blob's bytes. It panics when a file cannot be read.
func (b Blob) Bytes() []byte {
	if b.path == "" {
		return b.data
	}
	data, err := os.ReadFile(b.path)
	if err != nil {
		panic(err)
	}
	return data
}

// Annotate is b with an annotation set in its descriptor.
func (b Blob) Annotate(key, value string) Blob {
	b.Annotations = maps.Clone(b.Annotations)
	if b.Annotations == nil {
		b.Annotations = map[string]string{}
	}
	b.Annotations[key] = value
	return b
}

// NewBlob is a blob of bytes that are not a layer.
func NewBlob(mediaType string, data []byte) Blob {
	return Blob{Descriptor: Descriptor{MediaType: mediaType, Digest: digestOf(data), Size: int64(len(data))}, data: data}
}

// NewLayer is a layer whose blob is given ready made, with the archive that it holds.
func NewLayer(mediaType string, blob, archive []byte) Blob {
	b := NewBlob(mediaType, blob)
	b.DiffID = digestOf(archive)
	return b
}

// Layer is a gzip layer of entries.
func Layer(entries ...Entry) Blob {
	archive := Tar(entries...)
	return NewLayer(MediaLayerGzip, Gzip(archive), archive)
}

// Gzip compresses as docker does: Go's own encoder at its default level, no name, no time.
func Gzip(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b) // a bytes.Buffer does not fail
	z.Close()
	return out.Bytes()
}

// An Image is what WriteImage writes. Its zero Platform means linux/amd64.
type Image struct {
	Layers      []Blob
	Platform    Platform
	Config      RunConfig
	Annotations map[string]string // of the manifest
	Comment     string            // goes into the config's history
	Docker      bool              // Docker's media types instead of OCI's
}

// A RunConfig is the part of an image's config that says how to run it.
type RunConfig struct {
	User       string            `json:"User,omitempty"`
	Env        []string          `json:"Env,omitempty"`
	Entrypoint []string          `json:"Entrypoint,omitempty"`
	Cmd        []string          `json:"Cmd,omitempty"`
	WorkingDir string            `json:"WorkingDir,omitempty"`
	Labels     map[string]string `json:"Labels,omitempty"`
}

// PathEnv is the PATH that images of Debian have.
const PathEnv = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// WriteLayout writes an image of layers, bottom first, as an OCI layout in dir under the tag "latest".
func WriteLayout(dir string, layers ...Blob) error {
	return WriteImage(dir, Image{Layers: layers, Config: RunConfig{Env: []string{PathEnv}, Cmd: []string{"/bin/sh"}}})
}

// WriteImage writes an image as an OCI layout in dir under the tag "latest".
func WriteImage(dir string, image Image) error {
	m, err := AddImage(dir, image)
	if err != nil {
		return err
	}
	return WriteTag(dir, m)
}

// AddImage writes an image's blobs and its manifest into the layout dir, untagged.
func AddImage(dir string, image Image) (Descriptor, error) {
	p := image.Platform
	if p == (Platform{}) {
		p = Platform{Architecture: "amd64", OS: "linux"}
	}
	manifestMedia, configMedia := MediaManifest, MediaConfig
	if image.Docker {
		manifestMedia, configMedia = mediaDockerManifest, mediaDockerConfig
	}
	type history struct {
		Created   string `json:"created"`
		CreatedBy string `json:"created_by"`
	}
	type rootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	config := struct {
		Created string `json:"created"`
		Platform
		Config  RunConfig `json:"config"`
		RootFS  rootFS    `json:"rootfs"`
		History []history `json:"history"`
	}{
		Created: Epoch.Format("2006-01-02T15:04:05Z"), Platform: p, Config: image.Config,
		RootFS: rootFS{"layers", []string{}}, History: []history{},
	}
	manifest := struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        Descriptor        `json:"config"`
		Layers        []Descriptor      `json:"layers"`
		Annotations   map[string]string `json:"annotations,omitempty"`
	}{SchemaVersion: 2, MediaType: manifestMedia, Layers: []Descriptor{}, Annotations: image.Annotations}
	for i, l := range image.Layers {
		if err := AddBlob(dir, l); err != nil {
			return Descriptor{}, err
		}
		by := fmt.Sprintf("layer %d", i)
		if image.Comment != "" {
			by += " of " + image.Comment
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
		config.History = append(config.History, history{config.Created, by})
		d := l.Descriptor
		if image.Docker && d.MediaType == MediaLayerGzip {
			d.MediaType = mediaDockerLayer
		}
		manifest.Layers = append(manifest.Layers, d)
	}
	c := NewBlob(configMedia, mustJSON(config))
	if err := AddBlob(dir, c); err != nil {
		return Descriptor{}, err
	}
	manifest.Config = c.Descriptor
	m := NewBlob(manifestMedia, mustJSON(manifest))
	m.Platform = &p
	return m.Descriptor, AddBlob(dir, m)
}

// WriteTag makes dir a layout whose index.json holds d under the tag "latest".
func WriteTag(dir string, d Descriptor) error {
	const refName = "org.opencontainers.image.ref.name"
	a := map[string]string{refName: "latest"}
	for k, v := range d.Annotations {
		a[k] = v
	}
	d.Annotations = a
	if err := os.WriteFile(filepath.Join(dir, "index.json"), IndexJSON(d), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

// IndexJSON is an OCI image index of manifests.
func IndexJSON(manifests ...Descriptor) []byte {
	return mustJSON(struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Manifests     []Descriptor `json:"manifests"`
	}{2, MediaIndex, manifests})
}

// AddBlob puts b into the layout dir, where it may be already. A blob in a file below dir is moved.
func AddBlob(dir string, b Blob) error {
	to := filepath.Join(dir, "blobs", "sha256", hexOf(b.Digest))
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if b.path == "" {
		return os.WriteFile(to, b.data, 0o644)
	}
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	// Blobs in files were just written and never change: a second name is as good as a copy.
	if err := os.Link(b.path, to); err == nil {
		return nil
	}
	return copyFile(b.path, to)
}

// ReadLayout returns the layers, bottom first, of the only image of the layout dir.
func ReadLayout(dir string) ([]Blob, error) {
	var index struct{ Manifests []Descriptor }
	if err := readJSON(filepath.Join(dir, "index.json"), &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) != 1 || index.Manifests[0].MediaType == MediaIndex {
		return nil, fmt.Errorf("%s does not hold just one image", dir)
	}
	var manifest struct {
		Config Descriptor
		Layers []Descriptor
	}
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := readJSON(filepath.Join(blobs, hexOf(index.Manifests[0].Digest)), &manifest); err != nil {
		return nil, err
	}
	var config struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := readJSON(filepath.Join(blobs, hexOf(manifest.Config.Digest)), &config); err != nil {
		return nil, err
	}
	if len(config.RootFS.DiffIDs) != len(manifest.Layers) {
		return nil, fmt.Errorf("%s: %d layers but %d diff IDs", dir, len(manifest.Layers), len(config.RootFS.DiffIDs))
	}
	var layers []Blob
	for i, d := range manifest.Layers {
		layers = append(layers, Blob{Descriptor: d, DiffID: config.RootFS.DiffIDs[i], path: filepath.Join(blobs, hexOf(d.Digest))})
	}
	return layers, nil
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Gunzip is the archive of a gzip layer.
func Gunzip(b Blob) ([]byte, error) {
	f, err := b.Open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// A layerFile streams a layer's archive into a compressed file and sums both sides.
type layerFile struct {
	f       *os.File
	z       io.WriteCloser // nil when not compressed
	outer   hash.Hash
	inner   hash.Hash
	size    int64
	media   string
	toInner io.Writer
}

// newLayerFile makes a gzip layer in a new file of dir.
func newLayerFile(dir string) (*layerFile, error) {
	f, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return nil, err
	}
	l := &layerFile{f: f, outer: sha256.New(), inner: sha256.New(), media: MediaLayerGzip}
	z := gzip.NewWriter(l.blob())
	l.z, l.toInner = z, io.MultiWriter(l.inner, z)
	return l, nil
}

// blob is the writer of the compressed side.
func (l *layerFile) blob() io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		l.outer.Write(p)
		n, err := l.f.Write(p)
		l.size += int64(n)
		return n, err
	})
}

// Write takes bytes of the archive.
func (l *layerFile) Write(p []byte) (int, error) { return l.toInner.Write(p) }

// finish closes the file and describes the layer.
func (l *layerFile) finish() (Blob, error) {
	if err := l.z.Close(); err != nil {
		l.f.Close()
		return Blob{}, err
	}
	if err := errors.Join(l.f.Chmod(0o644), l.f.Close()); err != nil {
		return Blob{}, err
	}
	return Blob{
		Descriptor: Descriptor{
			MediaType: l.media, Size: l.size,
			Digest: digestFrom(l.outer),
		},
		DiffID: digestFrom(l.inner),
		path:   l.f.Name(),
	}, nil
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// mustJSON marshals values of this package, which cannot fail.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// hexOf is the part of a digest that names a file.
func hexOf(digest string) string { return strings.TrimPrefix(digest, "sha256:") }

// Digests are plain strings here and not ztoc's: so that tests inside package ztoc and below can use
// this package.
func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func digestFrom(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }
