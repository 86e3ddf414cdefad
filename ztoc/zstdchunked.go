package ztoc

import (
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Annotations of a zstd:chunked layer's descriptor. The prefix tells the dialect: containers/storage
// (podman, buildah, skopeo) or stargz-snapshotter (nerdctl, buildkit).
const (
	zstdChunkedStorage  = "io.github.containers.zstd-chunked.manifest-"
	zstdChunkedStargz   = "io.containers.zstd-chunked.manifest-"
	zstdChunkedPosition = "position" // offset:length:inflated length:type
	zstdChunkedChecksum = "checksum" // of the table as it is in the blob, compressed
)

// The footers: the last skippable frame's content, little endian words and a magic word at the end.
const (
	zstdStorageFooter = 64
	zstdStargzFooter  = 40
	zstdStorageMagic  = "GNUlInUx"
	zstdStargzMagic   = "GnUlInUx"
	zstdTypeCRFS      = 1 // the only type of table there is
)

// A ChunkedTOC says where the table of contents of a zstd:chunked layer is and how it is proven.
type ChunkedTOC struct {
	At       Range  // of the blob: one zstd frame, inside a skippable one
	Inflated int64  // bytes of JSON
	Checksum Digest // of the bytes At; may be empty if JSON is not
	JSON     Digest // of the inflated table; may be empty if Checksum is not
}

// ZstdChunkedFooter is what of a blob of size bytes to fetch when the annotations do not say where the
// table of contents is.
func ZstdChunkedFooter(size int64) Range { return Range{max(0, size-zstdStorageFooter), size} }

// Announced is the format with a table of its own that a layer's descriptor announces; 0 when it announces none.
func Announced(mediaType string, annotations map[string]string) Format {
	toc := annotations[EStargzDigestAnnotation] // zstd:chunked by stargz tools has it too
	if strings.HasSuffix(mediaType, "zstd") {
		if toc+annotations[zstdChunkedStorage+zstdChunkedChecksum]+annotations[zstdChunkedStargz+zstdChunkedChecksum] != "" {
			return FormatZstdChunked
		}
		return 0
	}
	if toc != "" {
		return FormatEStargz
	}
	return 0
}

// ZstdChunkedTOC finds the table of contents by a layer's annotations, and where those do not give its
// position by footer, the bytes of ZstdChunkedFooter(size), which may be nil otherwise. It returns
// ErrUnsupported when the layer is not zstd:chunked or nothing proves its table.
func ZstdChunkedTOC(annotations map[string]string, footer []byte, size int64) (t ChunkedTOC, err error) {
	checksum, json := "", annotations[EStargzDigestAnnotation]
	position := ""
	for _, prefix := range []string{zstdChunkedStorage, zstdChunkedStargz} {
		if s := annotations[prefix+zstdChunkedChecksum]; s != "" && checksum == "" {
			checksum, position = s, annotations[prefix+zstdChunkedPosition]
		}
	}
	for _, d := range []struct {
		s   string
		dst *Digest
	}{{checksum, &t.Checksum}, {json, &t.JSON}} {
		if d.s == "" {
			continue
		}
		if *d.dst, err = ParseDigest(d.s); err != nil {
			return t, fmt.Errorf("%w: zstd:chunked table of contents: %w", ErrInvalid, err)
		}
	}
	if t.Checksum == "" && t.JSON == "" {
		return t, fmt.Errorf("%w: no digest of a zstd:chunked table of contents", ErrUnsupported)
	}
	var words [4]uint64 // offset, length, inflated length, type
	switch {
	case position != "":
		fields := strings.Split(position, ":")
		if len(fields) != len(words) {
			return t, fmt.Errorf("%w: position %.100q", ErrInvalid, position)
		}
		for i, f := range fields {
			if words[i], err = strconv.ParseUint(f, 10, 63); err != nil {
				return t, fmt.Errorf("%w: position %.100q", ErrInvalid, position)
			}
		}
	case len(footer) >= zstdStorageFooter && strings.HasSuffix(string(footer), zstdStorageMagic):
		footer = footer[len(footer)-zstdStorageFooter:]
	case len(footer) >= zstdStargzFooter && strings.HasSuffix(string(footer), zstdStargzMagic):
		footer = footer[len(footer)-zstdStargzFooter:]
	default:
		return t, fmt.Errorf("%w: no zstd:chunked footer", ErrUnsupported)
	}
	if position == "" {
		for i := range words {
			words[i] = binary.LittleEndian.Uint64(footer[8*i:])
		}
	}
	if words[3] != zstdTypeCRFS {
		return t, fmt.Errorf("%w: zstd:chunked table of type %d", ErrUnsupported, words[3])
	}
	if words[0] > uint64(size) || words[1] > uint64(size)-words[0] || words[0] < 8 {
		return t, fmt.Errorf("%w: zstd:chunked table at %d, %d bytes, in a blob of %d", ErrInvalid, words[0], words[1], size)
	}
	if words[1] > maxTOC || words[2] > maxTOC {
		return t, fmt.Errorf("%w: table of contents of %d bytes", ErrUnsupported, max(words[1], words[2]))
	}
	t.At = Range{int64(words[0]), int64(words[0] + words[1])}
	t.Inflated = int64(words[2])
	return t, nil
}

// ParseZstdChunked makes the view of a zstd:chunked layer, of either dialect, from its own table of
// contents. It reads that from blob, of size bytes, in one read, or two when the annotations do not
// say where it is. annotations are those of the layer's descriptor. Set Blob on the result before use.
//
// Errors are as ParseEStargz's.
func ParseZstdChunked(blob io.ReaderAt, size int64, annotations map[string]string) (*Ztoc, error) {
	t, err := ZstdChunkedTOC(annotations, nil, size)
	if err != nil && (t.Checksum != "" || t.JSON != "") && annotations[zstdChunkedStorage+zstdChunkedPosition] == "" &&
		annotations[zstdChunkedStargz+zstdChunkedPosition] == "" {
		footer, ferr := readRange(blob, ZstdChunkedFooter(size))
		if ferr != nil {
			return nil, ferr
		}
		t, err = ZstdChunkedTOC(annotations, footer, size)
	}
	if err != nil {
		return nil, err
	}
	b, err := readRange(blob, t.At)
	if err != nil {
		return nil, err
	}
	if got := DigestOf(b); t.Checksum != "" && got != t.Checksum {
		return nil, fmt.Errorf("%w: zstd:chunked table of contents is %s, wanted %s", ErrMismatch, got, t.Checksum)
	}
	json := make([]byte, t.Inflated)
	if err := unzstdExact(json, b); err != nil {
		return nil, fmt.Errorf("%w: zstd:chunked table of contents: %w", ErrInvalid, err)
	}
	if got := DigestOf(json); t.JSON != "" && got != t.JSON {
		return nil, fmt.Errorf("%w: zstd:chunked table of contents is %s, wanted %s", ErrMismatch, got, t.JSON)
	}
	return parseTOC(json, FormatZstdChunked, "zstd:chunked TOC", t.At.Start-8, size)
}
