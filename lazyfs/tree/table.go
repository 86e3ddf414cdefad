package tree

import (
	"errors"

	"github.com/muster-hpc/muster/ztoc"
)

// A Row is an inode of a table. The root is row 0, rows are dense, and the kernel's node ID is row + 1.
type Row uint32

// Root is the root directory of every table.
const Root Row = 0

// Node is the FUSE node ID of r.
func (r Row) Node() uint64 { return uint64(r) + 1 }

// Errors that callers decide on.
var (
	// ErrVersion says that a table was written by a version of muster that this one cannot read.
	ErrVersion = errors.New("table has another version")
	// ErrCorrupt says that a table is not what Build wrote: cut, rotten or hostile.
	ErrCorrupt = errors.New("table is corrupt")
	// ErrNotDir says that a path goes through something that is not a directory.
	ErrNotDir = errors.New("not a directory")
	// ErrNotExist says that a path names nothing.
	ErrNotExist = errors.New("no such file or directory")
	// ErrLoop says that a path goes through too many symbolic links.
	ErrLoop = errors.New("too many levels of symbolic links")
	// ErrNoData says that there is no data, or no hole, behind an offset (ENXIO).
	ErrNoData = errors.New("no data behind this offset")
)

// A LayerRef is a layer as the table names it: enough to open exactly the spans it was built from.
type LayerRef struct {
	Blob ztoc.BlobRef // the blob to fetch: the registry's own or a derived one
	Ztoc string       // key of its ztoc in the store, as the caller of Build gave it
	Size int64        // inflated bytes; no extent ends behind it. 0 when the caller did not say
}

// Attr is what stat tells of an inode, under some presentation.
type Attr struct {
	Mode   uint32 // with type bits, as st_mode
	Nlink  uint32
	UID    uint32
	GID    uint32
	Rdev   uint32 // in the kernel's 32-bit encoding (new_encode_dev), as FUSE carries it
	Size   int64  // bytes
	Blocks int64  // of 512 bytes
	Mtime  int64  // seconds since 1970; atime and ctime are the same
	Nsec   uint32 // 0 to 999,999,999
}

// A Dirent is one name in a directory.
type Dirent struct {
	Name []byte // bytes of the table: read only, valid as long as it is mapped
	Row  Row
	Mode uint32 // type bits only (S_IFMT), under the given presentation
}

// An Extent is a run of a file from the asked offset on: data of a layer, or a hole.
type Extent struct {
	Layer  int   // index into Layers; -1 for a hole, which reads as zeros
	Offset int64 // in the inflated layer
	Len    int64 // bytes from the asked offset to the end of the run; 0 at and behind the end of the file
}

// Totals counts what a table holds, for statfs and for reports.
type Totals struct {
	Inodes  int64
	Devices int64 // character and block devices, which a user's presentation shows as empty files
	Dirents int64 // names, without . and ..
	Bytes   int64 // sum of the sizes of regular files, each inode once
	Blocks  int64 // of 512 bytes, as Attr counts them
}
