package ztoc

import (
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
	if z.Format.Chunked() {
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
		return inflate.Member(dst, blob)
	}
	if unzstdExact(dst, blob) == nil {
		return nil
	}
	return inflateStream(dst, blob) // the header of the next file may follow in the same frame
}

// allZero reports whether b is zero bytes only.
func allZero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}
