package images

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// GzipGiant compresses the whole archive into one deflate block with the fixed codes: a valid gzip
// file without any place to restart. Encoders in use end a block after some ten thousand symbols;
// nothing in RFC 1951 makes them.
func GzipGiant(archive []byte) []byte {
	var w bitWriter
	w.write(1, 1) // the last block
	w.write(1, 2) // fixed codes
	// Matches of at least four bytes, found by a table of where four bytes were seen last.
	const hashBits, maxMatch, maxDistance = 15, 258, 32768
	var last [1 << hashBits]int32
	for i := range last {
		last[i] = -maxDistance - 1
	}
	hash := func(i int) uint32 { return binary.LittleEndian.Uint32(archive[i:]) * 2654435761 >> (32 - hashBits) }
	for i := 0; i < len(archive); {
		if i+4 > len(archive) {
			w.literal(int(archive[i]))
			i++
			continue
		}
		h := hash(i)
		from := int(last[h])
		last[h] = int32(i)
		n := 0
		if i-from <= maxDistance {
			for n < maxMatch && i+n < len(archive) && archive[from+n] == archive[i+n] {
				n++
			}
		}
		if n < 4 {
			w.literal(int(archive[i]))
			i++
			continue
		}
		w.match(n, i-from)
		// Some positions inside the match, so that long runs stay fast to find.
		for end, k := i+n, i+1; k < end && k+4 <= len(archive); k += 3 {
			last[hash(k)] = int32(k)
		}
		i += n
	}
	w.literal(256)
	return gzipMember(plainHeader, w.bytes(), archive)
}

// A bitWriter packs bits as deflate does: the first in the lowest place.
type bitWriter struct {
	out bytes.Buffer
	acc uint64
	n   uint
}

// write appends the low n bits of v, lowest first.
func (w *bitWriter) write(v uint64, n uint) {
	w.acc |= v << w.n
	w.n += n
	for w.n >= 8 {
		w.out.WriteByte(byte(w.acc))
		w.acc >>= 8
		w.n -= 8
	}
}

// code appends a Huffman code of n bits, highest bit first.
func (w *bitWriter) code(v uint64, n uint) {
	w.write(bits.Reverse64(v)>>(64-n), n)
}

// literal appends symbol s of the fixed literal and length code, RFC 1951 section 3.2.6.
func (w *bitWriter) literal(s int) {
	switch {
	case s < 144:
		w.code(uint64(0x30+s), 8)
	case s < 256:
		w.code(uint64(0x190+s-144), 9)
	case s < 280:
		w.code(uint64(s-256), 7)
	default:
		w.code(uint64(0xc0+s-280), 8)
	}
}

// match appends a copy of length bytes (3 to 258) from distance back (1 to 32768).
func (w *bitWriter) match(length, distance int) {
	symbol, extra, n := slot(length-3, 4)
	if length == 258 {
		symbol, extra, n = 28, 0, 0 // its own symbol, out of line
	}
	w.literal(257 + symbol)
	w.write(extra, n)
	symbol, extra, n = slot(distance-1, 2)
	w.code(uint64(symbol), 5)
	w.write(extra, n)
}

// slot splits v as deflate's length and distance symbols do: the first 2·per values have symbols of
// their own, then each power of two has per symbols, with extra bits for the rest.
func slot(v, per int) (symbol int, extra uint64, n uint) {
	if v < 2*per {
		return v, 0, 0
	}
	log := bits.Len(uint(per)) - 1
	n = uint(bits.Len(uint(v)) - 1 - log)
	return int(n)*per + v>>n, uint64(v & (1<<n - 1)), n
}

func (w *bitWriter) bytes() []byte {
	if w.n > 0 {
		w.write(0, 8-w.n)
	}
	return w.out.Bytes()
}
