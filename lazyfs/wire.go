package lazyfs

import (
	"encoding/binary"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// The operations of the protocol, as include/uapi/linux/fuse.h numbers them. The structs that go with
// them are go-fuse's; the numbers are not exported there.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opReadlink    = 5
	opSymlink     = 6
	opMknod       = 8
	opMkdir       = 9
	opUnlink      = 10
	opRmdir       = 11
	opRename      = 12
	opLink        = 13
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opSetxattr    = 21
	opGetxattr    = 22
	opListxattr   = 23
	opRemovexattr = 24
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opFsyncdir    = 30
	opAccess      = 34
	opCreate      = 35
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
	opFallocate   = 43
	opReaddirplus = 44
	opRename2     = 45
	opLseek       = 46
	opTmpfile     = 51
)

// Sizes of what goes over the wire, bytes.
const (
	inHeaderSize   = int(unsafe.Sizeof(fuse.InHeader{}))  // 40
	outHeaderSize  = int(unsafe.Sizeof(fuse.OutHeader{})) // 16
	entryOutSize   = int(unsafe.Sizeof(fuse.EntryOut{}))  // 128
	direntSize     = 24                                   // struct fuse_dirent without its name
	initOutSize    = int(unsafe.Sizeof(fuse.InitOut{}))   // 64
	minReadBuffer  = 8192                                 // FUSE_MIN_READ_BUFFER
	resentUnique   = 1 << 63                              // FUSE_UNIQUE_RESEND: the kernel sends it again
	forever        = 10 * 365 * 24 * 3600                 // seconds a kernel may keep what we said: an image never changes
	protocolMajor  = 7
	protocolMinor  = 41 // the newest we speak
	oldestProtocol = 26 // Linux 4.9; RHEL 8's 4.18 speaks 7.27 or later
)

// as reads the fixed part of a request; nil when the request is too short for it.
func as[T any](req []byte) *T {
	var t T
	if uintptr(len(req)) < unsafe.Sizeof(t) {
		return nil
	}
	return (*T)(unsafe.Pointer(unsafe.SliceData(req)))
}

// bytesOf is v as it goes over the wire.
func bytesOf[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// cstring is the bytes of b before its first NUL, or all of them.
func cstring(b []byte) []byte {
	for i, c := range b {
		if c == 0 {
			return b[:i]
		}
	}
	return b
}

// appendDirent appends one struct fuse_dirent: its inode, the offset that continues behind it, its
// type and name, padded to 8 bytes.
func appendDirent(b []byte, ino, off uint64, mode uint32, name []byte) []byte {
	le := binary.NativeEndian
	b = le.AppendUint64(b, ino)
	b = le.AppendUint64(b, off)
	b = le.AppendUint32(b, uint32(len(name)))
	b = le.AppendUint32(b, mode>>12)
	b = append(b, name...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}

func direntLen(name []byte) int { return (direntSize + len(name) + 7) &^ 7 }
