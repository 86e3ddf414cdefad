package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/ztoc"
)

// A studyImage is one image of a study. What it has been made of is set by makeImage.
type studyImage struct {
	Bytes  int64 // compressed, of all layers, about
	Layers int
	ref    string
	only   string // of images that are made for one run: which

	digests  []ztoc.Digest // of the layers
	sizes    []int64
	size     int64 // of all layers
	unpacked int64
}

// makeImage makes an image and pushes it. The same parameters give the same bytes, so that what a registry has already is not sent again.
func (a *app) makeImage(ctx context.Context, img *studyImage) error {
	if img.digests != nil {
		return nil
	}
	repo, err := a.repository(img.ref)
	if err != nil {
		return err
	}
	ref, err := origin.ParseReference(img.ref)
	if err != nil {
		return err
	}
	type descriptor struct {
		MediaType string      `json:"mediaType"`
		Digest    ztoc.Digest `json:"digest"`
		Size      int64       `json:"size"`
	}
	var layers []descriptor
	var diffs []string
	for i := range img.Layers {
		f, err := os.CreateTemp("", "muster-study-")
		if err != nil {
			return err
		}
		l, err := writeStudyLayer(f, studySeed(img, i), img.Bytes/int64(img.Layers))
		if err == nil {
			err = repo.PushBlob(ctx, l.ref, func() (io.ReadCloser, error) { return os.Open(f.Name()) })
		}
		if err = errors.Join(err, f.Close(), os.Remove(f.Name())); err != nil {
			return err
		}
		layers = append(layers, descriptor{origin.MediaTypeLayerGzip, l.ref.Digest, l.ref.Size})
		diffs = append(diffs, l.diff)
		img.sizes = append(img.sizes, l.ref.Size)
		img.size += l.ref.Size
		img.unpacked += l.unpacked
	}
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
	if err != nil {
		return err
	}
	c := ztoc.BlobRef{Digest: ztoc.DigestOf(config), Size: int64(len(config))}
	if err := repo.PushBlob(ctx, c, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil }); err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": origin.MediaTypeManifest,
		"config": descriptor{origin.MediaTypeConfig, c.Digest, c.Size}, "layers": layers,
	})
	if err != nil {
		return err
	}
	if _, err := repo.PushManifest(ctx, origin.MediaTypeManifest, manifest, ref.Tag); err != nil {
		return err
	}
	for _, l := range layers {
		img.digests = append(img.digests, l.Digest)
	}
	return nil
}

// fresh is an image like img that no host has: agents keep what they have brought.
func (img *studyImage) fresh(only string) *studyImage {
	return &studyImage{Bytes: img.Bytes, Layers: img.Layers, ref: img.ref + "-" + only, only: only}
}

// studySeed tells the layers of images apart.
func studySeed(img *studyImage, layer int) [32]byte {
	return sha256.Sum256(fmt.Appendf(nil, "muster study %d %d %d %s", img.Bytes, img.Layers, layer, img.only))
}

// A studyLayer is what a layer came to.
type studyLayer struct {
	ref      ztoc.BlobRef
	diff     string
	unpacked int64
}

// Files of a layer: sizes as programs and their libraries have them, and pages that compress to about two fifths, as those do: two
// fifths are text of few words, two fifths tables of small numbers, one fifth noise.
const (
	studyFileLeast = 2 << 10
	studyFileMost  = 256 << 10
	studyChunk     = 1 << 10
)

// writeStudyLayer writes a gzipped tar of files until it has about so many compressed bytes.
func writeStudyLayer(w io.Writer, seed [32]byte, bytes int64) (l studyLayer, err error) {
	random := rand.New(rand.NewChaCha8(seed))
	packed := &counter{w: w, sum: sha256.New()}
	z, err := gzip.NewWriterLevel(packed, gzip.BestSpeed)
	if err != nil {
		return l, err
	}
	plain := &counter{w: z, sum: sha256.New()}
	t := tar.NewWriter(plain)
	for i := 0; packed.n < bytes; i++ {
		left := (bytes - packed.n) * 2 // about what it takes uncompressed
		size := min(studyFileLeast<<random.IntN(8), studyFileMost, int(max(left, studyChunk)))
		if err := t.WriteHeader(&tar.Header{Name: fmt.Sprintf("opt/%x/%d/file%d", seed[:4], i/100, i), Mode: 0o644, Size: int64(size)}); err != nil {
			return l, err
		}
		if _, err := t.Write(studyContent(random, size)); err != nil {
			return l, err
		}
		if err := z.Flush(); err != nil { // so that packed tells what there is
			return l, err
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return l, err
	}
	l.ref = ztoc.BlobRef{Digest: ztoc.DigestFromSum([32]byte(packed.sum.Sum(nil))), Size: packed.n}
	l.diff, l.unpacked = fmt.Sprintf("sha256:%x", plain.sum.Sum(nil)), plain.n
	return l, nil
}

var studyWords = []string{"the ", "import ", "return ", "node", "float64 ", "lib/", "self.", "index", "\n    ", "result = ", "value", "error: ", "(x, y)", "0x00", "if not ", "module\n"}

// studyContent is size bytes of files as programs have them.
func studyContent(r *rand.Rand, size int) []byte {
	b := make([]byte, 0, size+studyChunk)
	for len(b) < size {
		end := len(b) + studyChunk
		switch r.IntN(5) {
		case 0, 1:
			for len(b) < end {
				b = append(b, studyWords[r.IntN(len(studyWords))]...)
			}
		case 2, 3:
			for len(b) < end {
				b = binary.LittleEndian.AppendUint32(b, uint32(r.ExpFloat64()*300))
			}
		default:
			for len(b) < end {
				b = binary.LittleEndian.AppendUint64(b, r.Uint64())
			}
		}
	}
	return b[:size]
}

// A counter counts and hashes what passes.
type counter struct {
	w   io.Writer
	n   int64
	sum hash.Hash
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	c.sum.Write(p[:n])
	return n, err
}
