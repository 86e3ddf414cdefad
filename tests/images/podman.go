package images

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// Annotations of zstd:chunked as podman writes it.
const (
	PodmanChecksum = "io.github.containers.zstd-chunked.manifest-checksum"
	PodmanPosition = "io.github.containers.zstd-chunked.manifest-position"
	PodmanTarSplit = "io.github.containers.zstd-chunked.tarsplit-position"
)

// A podmanEntry is an entry of podman's table of contents.
type podmanEntry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	Linkname    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	Size        int64             `json:"size,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	ModTime     *time.Time        `json:"modtime,omitempty"`
	Devmajor    int64             `json:"devMajor,omitempty"`
	Devminor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string]string `json:"xattrs,omitempty"`
	Digest      string            `json:"digest,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	EndOffset   int64             `json:"endOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
	ChunkType   string            `json:"chunkType,omitempty"`
}

var podmanTypes = map[byte]string{
	tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeBlock: "block",
	tar.TypeDir: "dir", tar.TypeFifo: "fifo", tar.TypeSymlink: "symlink",
}

// ZstdPodman makes a zstd:chunked layer of the kind that podman and buildah push: the archive as it
// is, a frame for each chunk of content and one for what lies between two files; behind it, in
// skippable frames, the table of contents, tar-split's record of the headers, and a footer.
func ZstdPodman(archive []byte) (Blob, error) {
	var out []byte
	var entries []podmanEntry
	frame := func(data []byte) {
		if len(data) > 0 {
			out = append(out, zstdFrame(data)...)
		}
	}
	r := bytes.NewReader(archive)
	tr := tar.NewReader(r)
	done := 0 // bytes of the archive that are in frames
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Blob{}, err
		}
		typ, ok := podmanTypes[h.Typeflag]
		if !ok {
			return Blob{}, fmt.Errorf("podman's table cannot hold %q of type %q", h.Name, h.Typeflag)
		}
		e := podmanEntry{
			Type: typ, Name: h.Name, Linkname: h.Linkname, Mode: h.Mode, Size: h.Size, UID: h.Uid, GID: h.Gid,
			ModTime: &h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor,
		}
		for k, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				if e.Xattrs == nil {
					e.Xattrs = map[string]string{}
				}
				e.Xattrs[name] = base64.StdEncoding.EncodeToString([]byte(v))
			}
		}
		if h.Typeflag != tar.TypeReg || h.Size == 0 {
			entries = append(entries, e)
			continue // its header waits for the next frame
		}
		start := len(archive) - r.Len()
		frame(archive[done:start])
		content := archive[start : start+int(h.Size)]
		done = start + len(content)

		chunks := podmanChunks(content)
		first := len(entries)
		entries = append(entries, e)
		entries[first].Digest = digestOf(content)
		entries[first].Offset = int64(len(out))
		at := int64(0)
		for i, c := range chunks {
			if i > 0 {
				entries = append(entries, podmanEntry{Type: "chunk", Name: h.Name, ChunkOffset: at})
			}
			if len(chunks) > 1 {
				ce := &entries[len(entries)-1]
				ce.Offset, ce.ChunkSize, ce.ChunkDigest = int64(len(out)), int64(len(c)), digestOf(c)
				if len(bytes.Trim(c, "\x00")) == 0 {
					ce.ChunkType = "zeros"
				}
			}
			frame(c)
			at += int64(len(c))
		}
		entries[first].EndOffset = int64(len(out))
	}
	frame(archive[done:])

	split, err := tarSplit(archive)
	if err != nil {
		return Blob{}, err
	}
	packedSplit := zstdFrame(split)
	toc := mustJSON(struct {
		Version        int           `json:"version"`
		Entries        []podmanEntry `json:"entries"`
		TarSplitDigest string        `json:"tarSplitDigest"`
	}{1, entries, digestOf(packedSplit)})
	packedTOC := zstdFrame(toc)

	tocAt := len(out) + 8
	out = append(out, skippable(0, packedTOC)...)
	splitAt := len(out) + 8
	out = append(out, skippable(0, packedSplit)...)
	var footer []byte
	for _, n := range []int{tocAt, len(packedTOC), len(toc), 1, splitAt, len(packedSplit), len(split)} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	footer = append(footer, "GNUlInUx"...)
	out = append(out, skippable(0, footer)...)

	return NewLayer(MediaLayerZstd, out, archive).
		Annotate(PodmanChecksum, digestOf(packedTOC)).
		Annotate(PodmanPosition, fmt.Sprintf("%d:%d:%d:1", tocAt, len(packedTOC), len(toc))).
		Annotate(PodmanTarSplit, fmt.Sprintf("%d:%d:%d", splitAt, len(packedSplit), len(split))), nil
}

// podmanChunks cuts content into chunks of 16 to 112 KiB whose lengths the content decides, a stand-in
// for podman's rolling checksum, and into runs of at least 1 KiB of zeros.
func podmanChunks(content []byte) [][]byte {
	const hole = 1 << 10
	zeros := make([]byte, hole)
	var chunks [][]byte
	for len(content) > 0 {
		n := 0
		for n < len(content) && content[n] == 0 {
			n++
		}
		if n < hole {
			n = min(len(content), 16<<10+int(content[0])*384)
			if i := bytes.Index(content[1:n], zeros[:]); i >= 0 && content[0] != 0 {
				n = 1 + i
			}
		}
		chunks = append(chunks, content[:n])
		content = content[n:]
	}
	return chunks
}

// tarSplit is tar-split's record of an archive: its headers and padding, and the names and sums of its
// files.
func tarSplit(archive []byte) ([]byte, error) {
	var out bytes.Buffer
	in, done, err := asm.NewInputTarStreamWithDone(bytes.NewReader(archive), storage.NewJSONPacker(&out), nil)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	if _, err := io.Copy(io.Discard, in); err != nil {
		return nil, err
	}
	if err := <-done; err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
