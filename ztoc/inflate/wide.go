package inflate

import (
	"encoding/binary"
	"unsafe"
)

// marker, plus i, stands for byte i of the 32 KiB before a chunk, which are not known yet. Elements
// below it are bytes.
const marker = 1 << 15

// markWindow makes the first 32 Ki elements of wide stand for the unknown window.
func markWindow(wide []uint16) {
	for i := range wide[:windowSize] {
		wide[i] = marker | uint16(i)
	}
}

// marked reports whether there is a marker in wide, whose length is a multiple of 16.
func marked(wide []uint16) bool {
	for i := 0; i+16 <= len(wide); i += 16 {
		p := (*[4]uint64)(unsafe.Pointer(&wide[i]))
		if (p[0]|p[1]|p[2]|p[3])&0x8000800080008000 != 0 {
			return true
		}
	}
	return false
}

// resolution is what every element of 16 bits comes to.
type resolution [1 << 16]byte

// set is for what has this window before it.
func (r *resolution) set(before *window) {
	if r[255] == 0 {
		for i := range 256 {
			r[i] = byte(i)
		}
	}
	copy(r[marker:], before.b[:])
}

// resolve writes to dst the bytes that wide comes to; dst is as long.
func (r *resolution) resolve(dst []byte, wide []uint16) {
	n := len(wide) &^ 31
	r.resolve32(dst[:n], wide[:n])
	r.resolveGo(dst[n:], wide[n:])
}

// resolveGo is resolve in Go. It looks for markers in 32 elements at a time, since a mistaken branch costs
// as much as looking up a dozen.
func (r *resolution) resolveGo(dst []byte, wide []uint16) {
	for len(wide) >= 32 {
		v, to := (*[8]uint64)(unsafe.Pointer(unsafe.SliceData(wide))), (*[32]byte)(dst)
		if (v[0]|v[1]|v[2]|v[3]|v[4]|v[5]|v[6]|v[7])&0x8000800080008000 == 0 {
			for i := 0; i < 8; i += 2 { // four bytes in 16 bits each to four bytes, twice
				a, b := v[i], v[i+1]
				a = (a | a>>8) & 0x0000ffff0000ffff
				b = (b | b>>8) & 0x0000ffff0000ffff
				binary.LittleEndian.PutUint64(to[4*i:], (a|a>>16)&0xffffffff|(b|b>>16)<<32)
			}
		} else {
			for i, a := range v {
				four := (*[4]byte)(to[4*i:])
				four[0] = r[uint16(a)]
				four[1] = r[uint16(a>>16)]
				four[2] = r[uint16(a>>32)]
				four[3] = r[uint16(a>>48)]
			}
		}
		wide, dst = wide[32:], dst[32:]
	}
	for i, v := range wide {
		dst[i] = r[v]
	}
}

// reaches reports whether wide has a marker for a byte before the last n of the window.
func reaches(wide []uint16, n int) bool {
	for _, v := range wide {
		if v >= marker && int(v-marker) < windowSize-n {
			return true
		}
	}
	return false
}
