package tree

import (
	"encoding/binary"
	"hash/crc32"
)

// The table file, little endian throughout:
//
//	header    headerSize bytes, see below
//	layers    layerSize each: what extents count on
//	rows      rowSize each: inodes, row 0 the root
//	dirents   direntSize each: the names of a directory lie together, in readdir order
//	sorted    sortedSize each: the same directory again, by (hash of name, name), for look-up
//	extents   extentSize each: the data of files that are not one run, by offset in the file
//	xattrs    xattrSize each: the xattrs of an inode lie together, by name
//	pool      bytes that the others point into: names, targets, xattr names and values, keys, meta
//
// Sections follow each other in this order, each at a multiple of 8, padded with zeros.
//
// Header:
//
//	 0  magic [8]byte
//	 8  version uint32
//	12  CRC-32C of the header with this field zero
//	16  size of the file, uint64
//	24  meta: offset in the pool uint32, length uint32
//	32  totals: bytes int64, blocks int64
//	48  sections, in the order above: offset uint64, size in bytes uint64, CRC-32C uint32, zero uint32
const (
	magic   = "\x89muster\n"
	version = 1

	numSections  = 7
	sectionSize  = 24
	headVersion  = 8
	headSum      = 12
	headSize     = 16
	headMeta     = 24
	headBytes    = 32
	headBlocks   = 40
	headSections = 48
	headerSize   = headSections + numSections*sectionSize // 216

	secLayers  = 0
	secRows    = 1
	secDirents = 2
	secSorted  = 3
	secExtents = 4
	secXattrs  = 5
	secPool    = 6
)

// Layer: digest and ztoc key in the pool (offset, length), blob size, inflated size.
const (
	layerDigest   = 0  // uint32, uint32
	layerZtoc     = 8  // uint32, uint32
	layerBlobSize = 16 // int64
	layerInflated = 24 // int64
	layerSize     = 32
)

// Row.
const (
	rowMode   = 0  // uint32, type bits and permissions
	rowNlink  = 4  // uint32
	rowUID    = 8  // uint32
	rowGID    = 12 // uint32
	rowLength = 16 // int64, st_size
	rowBlocks = 24 // int64, of 512 bytes
	rowMtime  = 32 // int64, seconds
	rowNsec   = 40 // uint32
	rowRdev   = 44 // uint32; for a regular file whose data is one run the layer of that run
	rowParent = 48 // uint32, row of the directory that has the first name of this inode
	rowName   = 52 // uint32, dirent of that first name; 0 and meaningless for the root
	rowXattr  = 56 // uint32, first xattr
	rowXattrs = 60 // uint32, number of xattrs
	rowData   = 64 // uint64: directory: first dirent; symlink: offset of the target in the pool;
	//                       regular: offset in the inflated layer when one run, else first extent
	rowCount = 72 // uint32: directory: number of dirents; symlink: length of the target;
	//                       regular: number of extents, oneRun when the data is one run without holes
	rowDepth = 76 // uint16, 0 for the root
	rowFlags = 78 // uint16
	rowSize  = 80

	flagImplied = 1 // no layer has an entry for this directory

	oneRun = 1<<32 - 1
)

// Dirent.
const (
	direntName = 0 // uint32, offset in the pool
	direntRow  = 4 // uint32
	direntLen  = 8 // uint32, length of the name
	direntSize = 12
)

// Sorted: hash of the name, and the position in its directory.
const (
	sortedHash = 0 // uint32
	sortedPos  = 4 // uint32
	sortedSize = 8
)

// Extent.
const (
	extentFile   = 0  // int64, offset in the file
	extentOffset = 8  // int64, offset in the inflated layer
	extentLen    = 16 // int64, never zero
	extentLayer  = 24 // uint32
	extentSize   = 32 // with four zero bytes
)

// Xattr.
const (
	xattrName    = 0 // uint32, offset in the pool
	xattrNameLen = 4
	xattrValue   = 8
	xattrLen     = 12
	xattrSize    = 16
)

// Limits that Build keeps and Open insists on.
const (
	maxName     = 255      // bytes of one name, as Linux has it
	maxTarget   = 4095     // bytes of a symlink's target
	maxXattr    = 64 << 10 // bytes of one xattr value, as Linux has it
	maxXattrs   = 255      // of one inode: their names fit the 64 KiB of listxattr
	maxPath     = 4095     // bytes of a path within the image, as many as fit into PATH_MAX
	maxDepth    = 2048     // elements of a path
	maxLayers   = 1 << 16
	maxRef      = 1024 // bytes of a layer's digest, of its ztoc's key
	maxRows     = 1<<32 - 2
	maxMeta     = 64 << 10
	maxSize     = 1 << 62
	maxLinks    = 40 // symbolic links followed in one path, as Linux has it
	blockUnit   = 512
	dirBytes    = 4096
	clusterSize = 4096
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// hash is FNV-1a: names are short, and the order it gives only has to be the same everywhere.
func hash[T []byte | string](name T) uint32 {
	h := uint32(2166136261)
	for i := 0; i < len(name); i++ {
		h = (h ^ uint32(name[i])) * 16777619
	}
	return h
}

// The type bits of a mode, as Linux has them.
const (
	modeType   = 0o170000
	modeSocket = 0o140000
	modeLink   = 0o120000
	modeReg    = 0o100000
	modeBlock  = 0o060000
	modeDir    = 0o040000
	modeChar   = 0o020000
	modeFifo   = 0o010000
	modePerm   = 0o007777
)
