package ztoc

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/muster-hpc/muster/ztoc/inflate"
)

// Inflate proves span i's bytes and inflates them. blob is exactly Span(i).Blob of the layer's blob,
// dst exactly Span(i).Out.Len() bytes; after an error dst may hold anything.
//
// ErrMismatch says that blob is wrong: fetch it again. ErrIndex says that blob is right, as far as
// its digest tells, and that z does not describe it. Formats with digests over inflated bytes cannot
// tell the two apart and say ErrMismatch.
func (z *Ztoc) Inflate(dst []byte, i int, blob []byte) error {
	r := z.row(i)
	if len(dst) != int(r.outLen) || len(blob) != int(r.blobLen) {
		return fmt.Errorf("%w: span %d is %d bytes and inflates to %d, given %d and room for %d",
			ErrInvalid, i, r.blobLen, r.outLen, len(blob), len(dst))
	}
	if z.Format == FormatEStargz || z.Format == FormatZstdChunked {
		return z.inflateChunks(dst, i, &r, blob)
	}
	if sha256.Sum256(blob) != r.digest {
		return fmt.Errorf("%w: span %d", ErrMismatch, i)
	}
	switch z.Format {
	case FormatTar:
		copy(dst, blob)
	case FormatGzip:
		w := windowBuffers.Get().(*[windowSize]byte)
		defer windowBuffers.Put(w)
		if err := z.window(w, &r); err != nil {
			return fmt.Errorf("span %d: %w", i, err)
		}
		if err := inflate.Span(dst, blob, r.bits, w[:]); err != nil {
			return fmt.Errorf("%w: span %d: %w", ErrIndex, i, err)
		}
	case FormatZstd:
		if err := unzstdExact(dst, blob); err != nil {
			return fmt.Errorf("%w: span %d: %w", ErrIndex, i, err)
		}
	}
	return nil
}

// inflateChunks inflates a member or frame and proves each of its chunks.
func (z *Ztoc) inflateChunks(dst []byte, i int, r *row, blob []byte) error {
	last := z.chunk(r.firstChunk + r.numChunks - 1)
	// Usually the member is one chunk and nothing else; then there is no copy.
	member := dst
	if size := int(last.skip) + int(last.len); size != len(dst) {
		member = make([]byte, size)
	}
	if err := inflateMember(z.Format, member, blob); err != nil {
		return fmt.Errorf("%w: span %d: %w", ErrMismatch, i, err)
	}
	rest := dst
	for c := range r.numChunks {
		ch := z.chunk(r.firstChunk + c)
		b := member[ch.skip : ch.skip+ch.len]
		if sha256.Sum256(b) != ch.digest {
			return fmt.Errorf("%w: chunk %d of span %d", ErrMismatch, c, i)
		}
		copy(rest, b)
		rest = rest[len(b):]
	}
	return nil
}

// inflateMember inflates the first len(dst) bytes of a gzip member or of zstd frames.
func inflateMember(f Format, dst, blob []byte) error {
	if f == FormatEStargz {
		n, err := gzipHeader(blob)
		if err != nil {
			return err
		}
		return inflate.Span(dst, blob[n:], 0, nil)
	}
	if unzstdExact(dst, blob) == nil {
		return nil
	}
	return inflateStream(dst, blob) // the header of the next file may follow in the same frame
}

// gzipHeader is the length of the gzip header that b starts with (RFC 1952).
func gzipHeader(b []byte) (int, error) {
	short := fmt.Errorf("%w: gzip header", ErrInvalid)
	if len(b) < 10 || b[0] != 0x1f || b[1] != 0x8b || b[2] != 8 {
		return 0, short
	}
	flags, n := b[3], 10
	if flags&4 != 0 {
		if len(b) < n+2 {
			return 0, short
		}
		n += 2 + int(b[n]) + int(b[n+1])<<8
	}
	for _, f := range []byte{8, 16} { // name, comment: zero-terminated
		if flags&f == 0 {
			continue
		}
		if n > len(b) {
			return 0, short
		}
		end := bytes.IndexByte(b[n:], 0)
		if end < 0 {
			return 0, short
		}
		n += end + 1
	}
	if flags&2 != 0 {
		n += 2
	}
	if n > len(b) {
		return 0, short
	}
	return n, nil
}

// allZero reports whether b is zero bytes only.
func allZero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}
