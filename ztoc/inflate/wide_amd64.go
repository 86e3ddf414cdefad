package inflate

// resolve32 is resolveGo for a multiple of 32 elements.
func (r *resolution) resolve32(dst []byte, wide []uint16) {
	if len(wide) > 0 {
		resolveSSE2(r, &dst[0], &wide[0], len(wide))
	}
}

//go:noescape
func resolveSSE2(r *resolution, dst *byte, wide *uint16, n int)
