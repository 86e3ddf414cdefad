package ztoc

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// EStargzDigestAnnotation is where a layer's descriptor has the digest of its table of contents: of
// the JSON, inflated. zstd:chunked in stargz-snapshotter's dialect has it too.
const EStargzDigestAnnotation = "containerd.io/snapshot/stargz/toc.digest"

// The footers of eStargz: an empty gzip member whose extra field says where the table of contents is.
const (
	estargzFooter       = 51
	estargzLegacyFooter = 47 // before the extra field had a subfield
	estargzMagic        = "STARGZ"
)

// EStargzFooter is what of a blob of size bytes to fetch first.
func EStargzFooter(size int64) Range { return Range{max(0, size-estargzFooter), size} }

// EStargzTOC says where the table of contents is, given the bytes of EStargzFooter(size). ErrUnsupported
// says that the layer is none of eStargz.
func EStargzTOC(footer []byte, size int64) (Range, error) {
	for _, n := range []int{estargzFooter, estargzLegacyFooter} {
		if len(footer) < n || int64(n) > size {
			continue
		}
		b := footer[len(footer)-n:]
		if b[0] != 0x1f || b[1] != 0x8b || b[2] != 8 || b[3]&4 == 0 {
			continue
		}
		extra := b[12:]
		if want := int(binary.LittleEndian.Uint16(b[10:])); want <= len(extra) {
			extra = extra[:want]
		}
		if n == estargzFooter {
			if len(extra) != 4+16+len(estargzMagic) || string(extra[:4]) != "SG\x16\x00" {
				continue
			}
			extra = extra[4:]
		}
		if len(extra) != 16+len(estargzMagic) || string(extra[16:]) != estargzMagic {
			continue
		}
		at, err := strconv.ParseUint(string(extra[:16]), 16, 63)
		if err != nil || int64(at) >= size-int64(n) {
			return Range{}, fmt.Errorf("%w: eStargz footer names %.16q", ErrInvalid, extra)
		}
		return Range{int64(at), size - int64(n)}, nil
	}
	return Range{}, fmt.Errorf("%w: no eStargz footer", ErrUnsupported)
}

// ParseEStargz makes the view of an eStargz layer from its own table of contents, which it reads from
// blob, of size bytes, in two reads: the footer, then the table. tocDigest is the annotation
// EStargzDigestAnnotation of the layer's descriptor; without it nothing proves the table, and the
// layer is to be treated as the gzip layer it is as well. Set Blob on the result before use.
//
// ErrUnsupported: not eStargz, or a kind of it that is not known. ErrMismatch: the table is not the one
// the digest names. ErrNoRestart: a chunk is too large.
func ParseEStargz(blob io.ReaderAt, size int64, tocDigest Digest) (*Ztoc, error) {
	if _, err := ParseDigest(string(tocDigest)); err != nil {
		return nil, fmt.Errorf("%w: eStargz without a digest of its table of contents: %w", ErrUnsupported, err)
	}
	footer, err := readRange(blob, EStargzFooter(size))
	if err != nil {
		return nil, err
	}
	at, err := EStargzTOC(footer, size)
	if err != nil {
		return nil, err
	}
	if at.Len() > maxTOC {
		return nil, fmt.Errorf("%w: table of contents of %d bytes", ErrUnsupported, at.Len())
	}
	b, err := readRange(blob, at)
	if err != nil {
		return nil, err
	}
	// The table is the only file of a tar archive of its own.
	tr := tar.NewReader(inflate.NewReader(bytes.NewReader(b), inflate.Options{}))
	hdr, err := tr.Next()
	if err != nil {
		return nil, fmt.Errorf("%w: eStargz table of contents: %w", ErrInvalid, err)
	}
	if hdr.Size > maxTOC || hdr.Name != "stargz.index.json" {
		return nil, fmt.Errorf("%w: %.40q of %d bytes where eStargz' table of contents should be", ErrInvalid, hdr.Name, hdr.Size)
	}
	var json bytes.Buffer
	if _, err := io.Copy(&json, io.LimitReader(tr, maxTOC)); err != nil {
		return nil, fmt.Errorf("%w: eStargz table of contents: %w", ErrInvalid, err)
	}
	if got := DigestOf(json.Bytes()); got != tocDigest {
		return nil, fmt.Errorf("%w: eStargz table of contents is %s, wanted %s", ErrMismatch, got, tocDigest)
	}
	return parseTOC(json.Bytes(), FormatEStargz, "eStargz TOC", at.Start, size)
}
