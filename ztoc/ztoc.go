package ztoc

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Digest names content by its hash, as OCI writes it: "sha256:" and 64 hex digits in lower case.
// The zero Digest names nothing.
type Digest string

// ErrDigest says that a string is not a digest muster accepts.
var ErrDigest = errors.New("not a sha256 digest")

// ParseDigest checks that s is a sha256 digest in OCI's form. Other algorithms are refused: no
// registry in use serves them, and every length in muster's formats is that of SHA-256.
func ParseDigest(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != 2*sha256.Size || strings.ToLower(h) != h {
		return "", fmt.Errorf("%w: %.80q", ErrDigest, s)
	}
	if _, err := hex.DecodeString(h); err != nil {
		return "", fmt.Errorf("%w: %.80q", ErrDigest, s)
	}
	return Digest(s), nil
}

// DigestOf is the digest of b.
func DigestOf(b []byte) Digest { return DigestFromSum(sha256.Sum256(b)) }

// DigestFromSum writes a raw SHA-256 sum as a Digest.
func DigestFromSum(sum [sha256.Size]byte) Digest {
	return Digest("sha256:" + hex.EncodeToString(sum[:]))
}

// Hex is the digest without its algorithm: 64 hex digits, safe as a file name once parsed.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), "sha256:") }

// A Range is the bytes [Start, End) of a blob: what is stored and transferred. It needs no ztoc.
type Range struct{ Start, End int64 }

// Len is the number of bytes in r.
func (r Range) Len() int64 { return r.End - r.Start }

// Empty reports whether r holds no byte.
func (r Range) Empty() bool { return r.End <= r.Start }

// Contains reports whether every byte of o is in r.
func (r Range) Contains(o Range) bool { return o.Empty() || (r.Start <= o.Start && o.End <= r.End) }

// Intersect is what r and o share; it may be empty.
func (r Range) Intersect(o Range) Range {
	return Range{max(r.Start, o.Start), max(max(r.Start, o.Start), min(r.End, o.End))}
}

func (r Range) String() string { return fmt.Sprintf("[%d, %d)", r.Start, r.End) }

// PieceSize is the grid on which plans deal out a blob and swarms exchange it. Who passes a piece on has all of it first, so a large one makes
// every hop slow; docs/trees.md has the arithmetic.
const PieceSize = 256 << 10

// A Piece is range [n·PieceSize, (n+1)·PieceSize) of a blob, the last one cut at the blob's end.
type Piece int64

// Range is the bytes of p in a blob of size bytes.
func (p Piece) Range(size int64) Range {
	return Range{int64(p) * PieceSize, min((int64(p)+1)*PieceSize, size)}
}

// An EntryType is what kind of file an entry makes, in the words SOCI's ztoc uses.
type EntryType uint8

// The kinds of entry.
const (
	TypeReg EntryType = iota
	TypeDir
	TypeSymlink
	TypeHardlink
	TypeChar
	TypeBlock
	TypeFifo
)

// An Entry is one member of a layer's tar archive: its header, and where its content lies in the
// inflated layer. Names are as the archive has them: not cleaned, not trusted, not always UTF-8.
type Entry struct {
	Name     string
	Type     EntryType
	Linkname string // target of a symlink, or name of an earlier entry for a hard link
	Offset   int64  // of the first content byte in the inflated layer
	Size     int64  // of the file as a reader sees it, bytes
	Mode     int64  // permission bits with setuid, setgid and sticky, as in the tar header
	UID, GID int
	Uname    string
	Gname    string
	ModTime  time.Time // nanoseconds as far as the archive has them
	Devmajor int64
	Devminor int64
	PAX      []Record // raw PAX records sorted by key; xattrs are those with prefix "SCHILY.xattr."
	Sparse   []Extent // data of a sparse file in file order, the rest being holes; nil if not sparse
}

// A Record is one PAX record.
type Record struct{ Key, Value string }

// XattrPrefix marks the PAX records that are extended attributes.
const XattrPrefix = "SCHILY.xattr."

// An Extent is a run of a sparse file that has data: Len bytes at FileOff of the file, found at
// Offset of the inflated layer.
type Extent struct{ FileOff, Offset, Len int64 }

// A Format is how a layer's blob is put together, and so where it can be restarted.
type Format uint8

// The formats of blobs.
const (
	FormatTar         Format = iota + 1 // not compressed: any byte is a restart point
	FormatGzip                          // deflate with checkpoints at block boundaries
	FormatZstd                          // independent zstd frames
	FormatEStargz                       // one gzip member per chunk, digests over inflated chunks
	FormatZstdChunked                   // one zstd frame per chunk, digests over inflated chunks
)

var formatNames = [...]string{"", "tar", "gzip", "zstd", "estargz", "zstd:chunked"}

func (f Format) String() string {
	if int(f) < len(formatNames) && f != 0 {
		return formatNames[f]
	}
	return fmt.Sprintf("format %d", uint8(f))
}

// Chunked reports whether layers of the format bring a table of their own, in chunks: what they inflate to then is something else
// than their tar archive.
func (f Format) Chunked() bool { return f == FormatEStargz || f == FormatZstdChunked }

// A Span is the unit of verification and inflating: Blob is what to fetch, Out is where its content
// lies in the inflated layer. Spans are contiguous in Out; neighbours may share one byte of Blob.
type Span struct {
	Index int
	Blob  Range
	Out   Range
}

// A BlobRef is a blob with its size: what is needed to fetch ranges of it.
type BlobRef struct {
	Digest Digest
	Size   int64
}

// Priority orders fetches: a reader waits for Demand, only a plan wants Prefetch.
type Priority uint8

// The two priorities.
const (
	Demand Priority = iota
	Prefetch
)
