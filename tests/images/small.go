package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
)

// sociIndexDigest is the annotation by which SOCI's second version finds its index.
const sociIndexDigest = "com.amazon.soci.index-digest"

// smallImages are those that take no time: each is written by its function.
var smallImages = []struct {
	name  string
	write func(dir string) error
}{
	{"escape", writeEscape},
	{"multi-arch", func(dir string) error { return writePlatforms(dir, "amd64", "arm64") }},
	{"arm64-only", func(dir string) error { return writePlatforms(dir, "arm64") }},
	{"docker", writeDocker},
	{"empty-layers", writeEmptyLayers},
	{"broken-soci", writeBroken(breakSOCI)},
	{"broken-diffid", writeBroken(breakDiffID)},
	{"broken-gzip-cut", writeBroken(breakGzipCut)},
	{"broken-gzip-crc", writeBroken(breakGzipCRC)},
	{"broken-tar", writeBroken(breakTar)},
	{"broken-toc-digest", writeBroken(breakTOCDigest)},
	{"broken-toc-json", writeBroken(breakTOC(func(toc []byte) []byte { return toc[:len(toc)/2] }))},
	{"broken-toc-chunk", writeBroken(breakTOC(editTOC("chunkDigest", digestOf([]byte("something else")))))},
	{"broken-toc-range", writeBroken(breakTOC(editTOC("offset", int64(1)<<40)))},
	{"broken-position", writeBroken(breakPosition)},
	{"broken-blob", writeBrokenBlob},
	{"broken-missing", writeBrokenMissing},
}

// buildSmall writes all of smallImages.
func buildSmall(_ context.Context, b *build) error {
	for _, s := range smallImages {
		if err := s.write(b.layout(s.name)); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func smallNames() []string {
	var names []string
	for _, s := range smallImages {
		names = append(names, s.name)
	}
	return names
}

// sayConfig runs the one program of the small images.
var sayConfig = RunConfig{Env: []string{PathEnv}, Cmd: []string{"/bin/say"}}

// writeEscape is what must give an unprivileged user nothing: programs that are root by their mode or
// by a capability, and device nodes that anybody may open. Each program prints "uid 0" and exits 0 when
// it could become root.
func writeEscape(dir string) error {
	dev := func(name string, typ byte, major, minor int64) Entry {
		return Entry{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o666, ModTime: Epoch, Devmajor: major, Devminor: minor}}
	}
	named := func(name string, mode int64) Entry { return program(name).With(mode, 0, 0) }
	return WriteImage(dir, Image{Config: sayConfig, Layers: []Blob{
		Layer(
			Dir("."), Dir("bin"), program("bin/say"), named("bin/setuid-root", 0o4755), named("bin/setgid-root", 0o2755),
			program("bin/cap-setuid").Xattr("security.capability", CapSetuid),
			Dir("etc"), File("etc/passwd", "root:x:0:0:root:/root:/bin/say\nuser:x:1000:1000::/:/bin/say\n"), File("etc/shadow", "root:*:1::::::\n").With(0o600, 0, 0),
			Dir("nodes"), dev("nodes/null", tar.TypeChar, 1, 3), dev("nodes/mem", tar.TypeChar, 1, 1), dev("nodes/loop", tar.TypeBlock, 7, 0),
			Dir("tmp").With(0o1777, 0, 0),
		),
		// Once more by another layer's hard link and in a directory of its own.
		Layer(Dir("opt"), Hardlink("opt/setuid-link", "bin/setuid-root").With(0o4755, 0, 0), named("opt/setuid-root", 0o6755)),
	}})
}

// writePlatforms is an image index of one image for each architecture, and an attestation as
// buildkit adds it. The file /arch names the architecture.
func writePlatforms(dir string, architectures ...string) error {
	var list []Descriptor
	for _, arch := range architectures {
		p := Platform{Architecture: arch, OS: "linux"}
		if arch == "arm64" {
			p.Variant = "v8"
		}
		d, err := AddImage(dir, Image{
			Platform: p, Config: sayConfig,
			Layers: []Blob{Layer(Dir("."), Dir("bin"), program("bin/say"), File("arch", arch+"\n"))},
		})
		if err != nil {
			return err
		}
		list = append(list, d)
	}
	statement := []byte(`{"_type":"https://in-toto.io/Statement/v0.1"}`)
	attestation, err := AddImage(dir, Image{
		Platform: Platform{Architecture: "unknown", OS: "unknown"},
		Layers:   []Blob{NewLayer("application/vnd.in-toto+json", statement, statement)},
	})
	if err != nil {
		return err
	}
	attestation.Annotations = map[string]string{
		"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": list[0].Digest,
	}
	index := NewBlob(MediaIndex, IndexJSON(append(list, attestation)...))
	if err := AddBlob(dir, index); err != nil {
		return err
	}
	return WriteTag(dir, index.Descriptor)
}

// writeDocker is an image of Docker's own media types, as most of Docker Hub is.
func writeDocker(dir string) error {
	return WriteImage(dir, Image{Docker: true, Config: sayConfig, Layers: []Blob{
		Layer(Dir("."), Dir("bin"), program("bin/say")), Layer(Dir("opt"), File("opt/file", "second layer\n")),
	}})
}

// writeEmptyLayers has the same empty layer several times, as old builders leave one for every line
// that changes no file.
func writeEmptyLayers(dir string) error {
	empty := Layer()
	return WriteImage(dir, Image{Config: sayConfig, Layers: []Blob{
		empty, Layer(Dir("."), Dir("bin"), program("bin/say")), empty, empty, Layer(File("last", "last\n")), empty,
	}})
}

// payload is an archive of 6 MiB that does not compress, so that its layer is not fetched whole for
// being small: bin/say, data/first, data/big and data/last.
func payload() []byte {
	big := make([]byte, 6<<20)
	rand.NewChaCha8([32]byte{6}).Read(big)
	return Tar(Dir("."), Dir("bin"), program("bin/say"), Dir("data"), File("data/first", "first\n"), File("data/big", string(big)), File("data/last", "last\n"))
}

// intact is the layer of payload.
var intact = sync.OnceValue(func() Blob {
	archive := payload()
	return NewLayer(MediaLayerGzip, Gzip(archive), archive)
})

// writeBroken writes an image whose second layer is damaged by damage.
func writeBroken(damage func(image *Image) error) func(dir string) error {
	return func(dir string) error {
		image := Image{Config: sayConfig, Layers: []Blob{
			Layer(Dir("."), File("intact", "a layer without fault\n")), intact(),
		}}
		if err := damage(&image); err != nil {
			return err
		}
		return WriteImage(dir, image)
	}
}

// breakSOCI names a SOCI index that does not exist: what a copy for one platform leaves behind.
func breakSOCI(image *Image) error {
	image.Annotations = map[string]string{sociIndexDigest: digestOf([]byte("no such index"))}
	return nil
}

// breakDiffID lies in the config about what the layer inflates to.
func breakDiffID(image *Image) error {
	image.Layers[1].DiffID = digestOf([]byte("something else"))
	return nil
}

// breakGzipCut ends the layer in the middle of a block, with a digest that is right.
func breakGzipCut(image *Image) error {
	data := image.Layers[1].data
	image.Layers[1] = NewLayer(MediaLayerGzip, data[:len(data)*2/3], payload())
	return nil
}

// breakGzipCRC gives the member a wrong checksum.
func breakGzipCRC(image *Image) error {
	data := bytes.Clone(image.Layers[1].data)
	data[len(data)-5] ^= 1
	image.Layers[1] = NewLayer(MediaLayerGzip, data, payload())
	return nil
}

// breakTar damages the header of the last file.
func breakTar(image *Image) error {
	archive := payload()
	archive[bytes.LastIndex(archive, []byte("data/last"))] = 'X'
	image.Layers[1] = NewLayer(MediaLayerGzip, Gzip(archive), archive)
	return nil
}

// breakTOCDigest annotates an eStargz layer with another digest than its table has.
func breakTOCDigest(image *Image) error {
	l, err := EStargz(payload())
	image.Layers[1] = l.Annotate(TOCDigest, digestOf([]byte("another table")))
	return err
}

// breakTOC gives an eStargz layer a changed table, with the right digest in the annotation.
func breakTOC(change func(toc []byte) []byte) func(image *Image) error {
	return func(image *Image) error {
		l, err := eStargz(payload(), 1<<20)
		if err != nil {
			return err
		}
		const footerSize = 51
		footer := l.data[len(l.data)-footerSize:]
		var at int64
		if _, err := fmt.Sscanf(string(footer[16:32]), "%x", &at); err != nil {
			return fmt.Errorf("footer: %w", err)
		}
		z, err := gzip.NewReader(bytes.NewReader(l.data[at:]))
		if err != nil {
			return err
		}
		tr := tar.NewReader(z)
		if _, err := tr.Next(); err != nil {
			return err
		}
		var toc bytes.Buffer
		if _, err := toc.ReadFrom(tr); err != nil {
			return err
		}
		changed := change(toc.Bytes())
		table := Gzip(Tar(File("stargz.index.json", string(changed))))
		data := append(append(bytes.Clone(l.data[:at]), table...), footer...)
		archive, err := Gunzip(NewBlob(MediaLayerGzip, data))
		if err != nil {
			return err
		}
		image.Layers[1] = NewLayer(MediaLayerGzip, data, archive).Annotate(TOCDigest, digestOf(changed))
		return nil
	}
}

// editTOC sets key of the second chunk of data/big.
func editTOC(key string, value any) func(toc []byte) []byte {
	return func(toc []byte) []byte {
		var t map[string]any
		if err := json.Unmarshal(toc, &t); err != nil {
			panic(err) // the library just wrote it
		}
		entries, _ := t["entries"].([]any)
		for _, e := range entries {
			if e, ok := e.(map[string]any); ok && e["type"] == "chunk" {
				e[key] = value
				return mustJSON(t)
			}
		}
		panic("no chunk in the table")
	}
}

// breakPosition says that a zstd:chunked table lies behind the blob's end.
func breakPosition(image *Image) error {
	l, err := ZstdPodman(payload())
	image.Layers[1] = l.Annotate(PodmanPosition, fmt.Sprintf("%d:1000:5000:1", l.Size+1000))
	return err
}

// writeBrokenBlob flips a byte of the layer in the layout, so that its digest is wrong.
func writeBrokenBlob(dir string) error { return damageLayer(dir, false) }

// writeBrokenMissing leaves the layer out of the layout.
func writeBrokenMissing(dir string) error { return damageLayer(dir, true) }

func damageLayer(dir string, remove bool) error {
	if err := writeBroken(func(*Image) error { return nil })(dir); err != nil {
		return err
	}
	layers, err := ReadLayout(dir)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "blobs", "sha256", hexOf(layers[1].Digest))
	if remove {
		return os.Remove(path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 0x10
	return os.WriteFile(path, data, 0o644)
}
