//go:build !amd64

package inflate

// resolve32 is resolveGo for a multiple of 32 elements.
func (r *resolution) resolve32(dst []byte, wide []uint16) { r.resolveGo(dst, wide) }
