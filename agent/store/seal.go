package store

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A small file is not hashed by whoever reads it, and not synced to disk by whoever writes it. What power
// loss may have done to it is told by its seal: an extended attribute with the file's size, the checksum of
// its content, and the boot in which it was last known to be good. The attribute is metadata, which file
// systems keep in order; the content may be missing from any point on, or be zeros.
//
//	byte 0   1
//	byte 1   first 16 bytes of the SHA-256 of the boot ID
//	byte 17  size, little endian
//	byte 25  CRC-32C of the content, little endian
const (
	sealAttr = "user.muster.seal"
	sealLen  = 29
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// newSum is the checksum of a seal.
func newSum() hash.Hash32 { return crc32.New(castagnoli) }

func seal(boot string, size int64, sum uint32) []byte {
	h := sha256.Sum256([]byte(boot))
	b := append([]byte{1}, h[:16]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(size))
	return binary.LittleEndian.AppendUint32(b, sum)
}

// setSeal seals f. Where there are no extended attributes a file has no seal.
func setSeal(f *os.File, b []byte) {
	unix.Fsetxattr(int(f.Fd()), sealAttr, b, 0) //nolint:errcheck // see above
}

// errTorn says that a file is not what was written.
var errTorn = errors.New("damaged by a crash")

// sealedNow says whether f has a seal of this boot, and its size.
func (s *Store) sealedNow(f *os.File) (bool, error) {
	var b [sealLen + 1]byte
	n, err := unix.Fgetxattr(int(f.Fd()), sealAttr, b[:])
	if err != nil || n != sealLen || b[0] != 1 {
		return false, nil //nolint:nilerr // it has none
	}
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	return string(b[:17]) == string(seal(s.boot, 0, 0)[:17]) && st.Size() == int64(binary.LittleEndian.Uint64(b[17:])), nil
}

// checkSeal says whether f is what was written. In the boot in which it was written it is: then its size is
// all that is looked at. Otherwise all of it is read, once, and sealed for this boot.
func (s *Store) checkSeal(f *os.File) error {
	var b [sealLen + 1]byte
	n, err := unix.Fgetxattr(int(f.Fd()), sealAttr, b[:])
	if err != nil || n != sealLen || b[0] != 1 {
		return nil // written without, or by a later version
	}
	size := int64(binary.LittleEndian.Uint64(b[17:]))
	sum := binary.LittleEndian.Uint32(b[25:])
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != size {
		return errTorn
	}
	now := seal(s.boot, size, sum)
	if string(now) == string(b[:n]) {
		return nil
	}
	h := newSum()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return err
	}
	if h.Sum32() != sum {
		return errTorn
	}
	setSeal(f, now)
	return nil
}
