package inflate

// combine is the CRC-32 of a followed by b, from those of a and of b, which has n bytes: the sum of a,
// as a polynomial, times x to the 8n, plus that of b.
func combine(a, b uint32, n int64) uint32 {
	power := uint32(1) << 31  // 1: in CRC-32 the highest bit belongs to the lowest power
	square := uint32(1) << 23 // x^8
	for ; n > 0; n >>= 1 {
		if n&1 != 0 {
			power = times(power, square)
		}
		square = times(square, square)
	}
	return times(a, power) ^ b
}

// times is a·b modulo CRC-32's polynomial.
func times(a, b uint32) uint32 {
	var p uint32
	for m := uint32(1) << 31; m != 0; m >>= 1 {
		if a&m != 0 {
			p ^= b
		}
		b = b>>1 ^ 0xedb88320&-(b&1)
	}
	return p
}
