package images

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
)

// TOCDigest is the annotation with the digest of an eStargz table of contents.
const TOCDigest = estargz.TOCJSONDigestAnnotation

// A dialect is one way to compress the two layers of a tree.
type dialect struct {
	name         string
	changes      int // how often its bytes changed: part of its version
	libs, python func(archive []byte) (Blob, error)
	joined       bool // one layer of both archives, by libs
}

// dialects are the images of one tree, libs and python, in every way that muster reads. All of them
// run: sh, coreutils and python3 are there.
var dialects = []dialect{
	{name: "gzip", libs: gzipped(Gzip), python: gzipped(Gzip)},
	{name: "gzip-members", libs: gzipped(GzipMembers), python: gzipped(GzipMembers)},
	{
		name:   "gzip-pigz",
		libs:   gzipped(func(b []byte) []byte { return GzipPigz(b, false) }),
		python: gzipped(func(b []byte) []byte { return GzipPigz(b, true) }),
	},
	{name: "gzip-stored", libs: gzipped(GzipStored), python: gzipped(GzipAlternating)},
	{name: "gzip-extras", libs: gzipped(GzipExtras), python: gzipped(GzipExtras)},
	{name: "gzip-zeros", libs: gzipped(GzipZeros), python: gzipped(GzipZeros)},
	{name: "gzip-giant", libs: gzipped(GzipGiant), joined: true},
	{name: "tar", libs: plain, python: plain},
	{name: "zstd-single", changes: 1, libs: zstded(ZstdSingle), python: zstded(ZstdStream)},
	{name: "zstd-frames", libs: zstded(ZstdFrames), python: zstded(ZstdFrames)},
	{name: "zstd-chunked-stargz", libs: ZstdStargz, python: ZstdStargz},
	{name: "zstd-chunked-podman", libs: ZstdPodman, python: ZstdPodman},
	{name: "estargz", libs: EStargz, python: EStargz},
}

func gzipped(f func([]byte) []byte) func([]byte) (Blob, error) {
	return func(archive []byte) (Blob, error) { return NewLayer(MediaLayerGzip, f(archive), archive), nil }
}

func zstded(f func([]byte) []byte) func([]byte) (Blob, error) {
	return func(archive []byte) (Blob, error) { return NewLayer(MediaLayerZstd, f(archive), archive), nil }
}

func plain(archive []byte) (Blob, error) { return NewLayer(MediaLayerTar, archive, archive), nil }

// baseConfig runs python3.
var baseConfig = RunConfig{Env: []string{PathEnv, "LANG=C.UTF-8"}, Cmd: []string{"python3", "-c", "print(1)"}}

// build makes the image of one dialect.
func (d dialect) build(_ context.Context, b *build) error {
	libs, err := readBase(b, "libs")
	if err != nil {
		return err
	}
	python, err := readBase(b, "python")
	if err != nil {
		return err
	}
	var layers []Blob
	if d.joined {
		l, err := d.libs(TarOf(libs, python))
		if err != nil {
			return err
		}
		layers = []Blob{l}
	} else {
		l, err := d.libs(libs)
		if err != nil {
			return err
		}
		p, err := d.python(python)
		if err != nil {
			return err
		}
		layers = []Blob{l, p}
	}
	return WriteImage(b.layout(d.name), Image{Layers: layers, Config: baseConfig, Comment: d.name})
}

// buildMixed makes an image of one layer of each kind: a gzip layer that tests push an index for, a
// small gzip layer, one in a single zstd frame, and an eStargz one.
func buildMixed(_ context.Context, b *build) error {
	var archives [][]byte
	for _, g := range baseGroups {
		a, err := readBase(b, g.name)
		if err != nil {
			return err
		}
		archives = append(archives, a)
	}
	small := Layer(Dir("opt"), Dir("opt/muster"), File("opt/muster/hello.py", "import json, sys\nprint(json.dumps({'python': sys.version_info[:2]}))\n"))
	stdlib, err := EStargz(archives[2])
	if err != nil {
		return err
	}
	layers := []Blob{
		NewLayer(MediaLayerGzip, Gzip(archives[0]), archives[0]), small,
		NewLayer(MediaLayerZstd, ZstdStream(archives[1]), archives[1]), stdlib,
	}
	config := baseConfig
	config.Cmd = []string{"python3", "/opt/muster/hello.py"}
	return WriteImage(b.layout("mixed"), Image{Layers: layers, Config: config, Comment: "mixed"})
}

// EStargz makes an eStargz layer as ctr-remote does, with chunks of 4 MiB.
func EStargz(archive []byte) (Blob, error) { return eStargz(archive, 0) }

// eStargz makes an eStargz layer with chunks of chunkSize bytes, 0 for the usual 4 MiB.
func eStargz(archive []byte, chunkSize int) (Blob, error) {
	return buildStargz(archive, MediaLayerGzip, nil, estargz.WithChunkSize(chunkSize), estargz.WithCompression(&pooledGzip{
		GzipCompressor: estargz.NewGzipCompressorWithLevel(gzip.DefaultCompression), GzipDecompressor: &estargz.GzipDecompressor{},
	}))
}

// pooledGzip is the library's gzip, but with encoders used again: making one for each chunk takes
// longer than compressing it.
type pooledGzip struct {
	*estargz.GzipCompressor
	*estargz.GzipDecompressor
	pool sync.Pool
}

// Writer starts a gzip member.
func (p *pooledGzip) Writer(w io.Writer) (estargz.WriteFlushCloser, error) {
	if z, ok := p.pool.Get().(*gzip.Writer); ok {
		z.Reset(w)
		return &pooledWriter{z, p}, nil
	}
	return &pooledWriter{gzip.NewWriter(w), p}, nil
}

// A pooledWriter gives its encoder back when its member ends.
type pooledWriter struct {
	*gzip.Writer
	from *pooledGzip
}

func (w *pooledWriter) Close() error {
	err := w.Writer.Close()
	w.from.pool.Put(w.Writer)
	return err
}

// ZstdStargz makes a zstd:chunked layer of the stargz-snapshotter's kind.
func ZstdStargz(archive []byte) (Blob, error) {
	notes := map[string]string{}
	c := &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: notes}
	return buildStargz(archive, MediaLayerZstd, notes, estargz.WithCompression(struct {
		*zstdchunked.Compressor
		*zstdchunked.Decompressor
	}{c, &zstdchunked.Decompressor{}}))
}

// buildStargz has the stargz-snapshotter's library make a layer; what it puts into notes during that
// goes into the annotations.
func buildStargz(archive []byte, media string, notes map[string]string, options ...estargz.Option) (Blob, error) {
	// A fixed number of workers: it decides about the bytes.
	options = append(options, estargz.WithParallelism(2))
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(archive), 0, int64(len(archive))), options...)
	if err != nil {
		return Blob{}, err
	}
	defer blob.Close()
	data, err := io.ReadAll(blob)
	if err != nil {
		return Blob{}, err
	}
	if err := blob.Close(); err != nil {
		return Blob{}, err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return Blob{}, err
	}
	l := NewBlob(media, data)
	l.DiffID = blob.DiffID().String()
	l = l.Annotate(TOCDigest, blob.TOCDigest().String()).Annotate(estargz.StoreUncompressedSizeAnnotation, itoa(size))
	for k, v := range notes {
		l = l.Annotate(k, v)
	}
	return l, nil
}

// manyChunks is how many files estargz-50k has, each one chunk.
const manyChunks = 50_000

// buildManyChunks makes an eStargz layer of very many small chunks, on top of a layer to run.
func buildManyChunks(_ context.Context, b *build) error {
	r := rand.New(rand.NewPCG(50, 1000))
	entries := []Entry{Dir("data")}
	for i := range manyChunks {
		if i%500 == 0 {
			entries = append(entries, Dir(fmt.Sprintf("data/%03d", i/500)))
		}
		// 100 to 900 bytes that compress to about two thirds.
		body := make([]byte, 100+r.IntN(800))
		for j := range body {
			body[j] = "abcdefghijklmnopqrstuvwxyz 0123456789\n"[r.IntN(38)]
		}
		entries = append(entries, File(fmt.Sprintf("data/%03d/%05d.txt", i/500, i), string(body)))
	}
	l, err := EStargz(Tar(entries...))
	if err != nil {
		return err
	}
	tools := Layer(Dir("."), Dir("bin"), program("bin/say"))
	return WriteImage(b.layout("estargz-50k"), Image{Layers: []Blob{tools, l}, Config: RunConfig{Env: []string{PathEnv}, Cmd: []string{"/bin/say"}}, Comment: "estargz-50k"})
}
