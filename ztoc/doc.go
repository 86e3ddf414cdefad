// Package ztoc holds the words everybody in muster says (Digest, Range, Piece, Span, Entry) and the
// table of contents of a layer: where the layer can be restarted, what proves its bytes, and what files
// it has. It knows no network and no disk.
//
// # How a table comes to be
//
// Build reads a layer once, from any reader:
//
//  1. The first bytes tell gzip, zstd or plain tar.
//  2. One goroutine reads ahead. The caller's goroutine inflates what it reads, alone or with several
//     cores (BuildOptions.Cores): for gzip as package inflate tells, for zstd frame by frame.
//  3. It notes a checkpoint at the first deflate block end (zstd: frame end; tar: anywhere) after SpanSize
//     inflated bytes. What lies between two checkpoints is a span.
//  4. It reads the tar headers in what comes out, where it lies, and packs the entries; content is skipped.
//  5. Another goroutine sums up the whole blob and each span's compressed bytes, both at once (package twosum),
//     finds out by inflating a span's first 32 KiB which bytes of the 32 KiB before it are referred to, and
//     keeps only those, compressed. A third sums up the inflated layer if its diff ID is wanted.
//  6. At the end the blob's digest and the diff ID are compared with what was wanted. Only then is
//     there a table.
//
// All of this runs at once with bounded buffers: memory does not grow with the layer but for the table
// itself, about 2 KiB for each span and 10 bytes for each file.
//
// Layers that have restart points too far apart for that (a deflate block or zstd frame beyond MaxBlock;
// containerd and buildkit write zstd in one frame) are read to the end just the same, so that their
// sums are known, and then ErrNoRestart is returned. Derive makes a blob that has restart points from
// them.
//
// # Kinds of layer
//
//	layer          Format             table from           digests cover          restart unit        before a mount      what is shared
//	gzip           FormatGzip         Build                compressed span        deflate block       header, spans,      registry's blob
//	                                                                                                  entries
//	gzip + SOCI    FormatGzip         DecodeSOCI           compressed span        deflate block       the whole ztoc      registry's blob
//	tar (+ SOCI)   FormatTar          Build, DecodeSOCI    span                   any byte            header, spans,      registry's blob
//	                                                                                                  entries
//	zstd, frames   FormatZstd         Build                compressed span        zstd frame          header, spans,      registry's blob
//	  ≤ MaxBlock                                                                                      entries
//	zstd, large    FormatZstd         Derive               compressed span        frame of 1 MiB      header, spans,      derived blob
//	  frames                                                                                          entries
//	gzip, giant    FormatZstd         Derive               compressed span        frame of 1 MiB      header, spans,      derived blob
//	  block                                                                                           entries
//	eStargz        FormatEStargz      ParseEStargz         inflated chunk         gzip member         footer, TOC         registry's blob
//	zstd:chunked   FormatZstdChunked  ParseZstdChunked     inflated chunk         zstd frame          TOC (and footer)    registry's blob
//
// TestKindsOfLayer has one case for each row. "Before a mount" of a table in packed form is what
// PackedPrefix says: windows, by far the larger part, are needed by Inflate only.
//
// Where a layer brings its own table (the last two rows) the tar archive in it is never looked at. The
// inflated coordinates are then virtual: the chunks of all files one behind the other in blob order.
//
// # Forms
//
// In memory a Ztoc is a slice of rows, a slice of packed windows and the packed entries. Pack writes
// just these behind a header (pack.go has the layout), so that Unpack of a mapped file allocates next to
// nothing. EncodeSOCI writes the form that SOCI reads and DecodeSOCI reads what SOCI wrote, strictly:
// what decodes encodes to the same bytes. SOCI's form has raw windows (32 KiB for each span), no digest
// of the layer, and no place for the maps of sparse files, so layers with such files are refused there.
//
// # What is not promised
//
// A digest proves bytes, not the index: a table that lies about windows, offsets or names gives wrong
// files without an error, unless inflating fails over it. Who may be believed is decided elsewhere. The
// order of spans in the blob is their order in the layer; they need not be adjacent (skippable zstd
// frames lie between). Trailing bytes of a blob behind the compressed data belong to the last gzip span
// and to no zstd span. LIBARCHIVE.xattr records are kept as records and are not taken for extended
// attributes, as no container tool does. Derived blobs are the same bytes only for the same version of
// the zstd encoder.
package ztoc
