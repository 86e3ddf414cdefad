package images

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"hash/crc32"
)

// A gzipHeader is the optional part of a gzip member's header, RFC 1952 section 2.3.
type gzipHeader struct {
	text    bool
	extra   []byte // FEXTRA, when not nil
	name    string // FNAME, when not empty; Latin-1, without NUL
	comment string // FCOMMENT
	crc     bool   // FHCRC: the header's own CRC
	mtime   uint32
	xfl, os byte
}

// bytes writes the header.
func (h gzipHeader) bytes() []byte {
	var flags byte
	set := func(bit byte, on bool) {
		if on {
			flags |= bit
		}
	}
	set(1, h.text)
	set(2, h.crc)
	set(4, h.extra != nil)
	set(8, h.name != "")
	set(16, h.comment != "")
	b := []byte{0x1f, 0x8b, 8, flags}
	b = binary.LittleEndian.AppendUint32(b, h.mtime)
	b = append(b, h.xfl, h.os)
	if h.extra != nil {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(h.extra)))
		b = append(b, h.extra...)
	}
	if h.name != "" {
		b = append(append(b, h.name...), 0)
	}
	if h.comment != "" {
		b = append(append(b, h.comment...), 0)
	}
	if h.crc {
		b = binary.LittleEndian.AppendUint16(b, uint16(crc32.ChecksumIEEE(b)))
	}
	return b
}

// gzipMember wraps raw deflate data, which inflates to content, as one gzip member with header h.
func gzipMember(h gzipHeader, deflated, content []byte) []byte {
	b := append(h.bytes(), deflated...)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(content))
	return binary.LittleEndian.AppendUint32(b, uint32(len(content)))
}

// plainHeader is what docker's encoder writes.
var plainHeader = gzipHeader{os: 255}

// deflate compresses pieces one after another into one raw deflate stream. Each piece has its level
// and, but for the last, ends at a byte boundary with an empty stored block, as a flush does; with
// independent no piece refers to bytes of the one before.
func deflate(pieces []piece, independent bool) []byte {
	var out bytes.Buffer
	var w *flate.Writer
	var level int
	for i, p := range pieces {
		if w == nil || independent || p.level != level {
			w, level = newFlate(&out, p.level), p.level
		}
		w.Write(p.data) // a bytes.Buffer does not fail
		if i == len(pieces)-1 {
			w.Close()
		} else {
			w.Flush()
		}
	}
	return out.Bytes()
}

// A piece is part of what deflate compresses.
type piece struct {
	data  []byte
	level int
}

// newFlate is a raw deflate encoder; levels here are constants, so it cannot fail.
func newFlate(out *bytes.Buffer, level int) *flate.Writer {
	w, err := flate.NewWriter(out, level)
	if err != nil {
		panic(err)
	}
	return w
}

// cut splits data into pieces of the sizes given, again and again, each with the level that stands
// beside its size.
func cut(data []byte, sizes, levels []int) []piece {
	var pieces []piece
	for i := 0; len(data) > 0; i++ {
		n := min(sizes[i%len(sizes)], len(data))
		pieces = append(pieces, piece{data[:n], levels[i%len(levels)]})
		data = data[n:]
	}
	return pieces
}

const defaultLevel = flate.DefaultCompression

// GzipMembers compresses to many members, one of them empty, as bgzip and joined files are.
func GzipMembers(archive []byte) []byte {
	var out []byte
	for i, p := range cut(archive, []int{1_500_000, 700_001, 64 << 10, 3 << 20, 1}, []int{defaultLevel}) {
		out = append(out, gzipMember(plainHeader, deflate([]piece{p}, true), p.data)...)
		if i == 1 {
			out = append(out, Gzip(nil)...)
		}
	}
	return out
}

// GzipPigz compresses to one member of 128 KiB pieces, each flushed to a byte boundary: what pigz
// does with several cores, or with -i when independent.
func GzipPigz(archive []byte, independent bool) []byte {
	pieces := cut(archive, []int{128 << 10}, []int{defaultLevel})
	return gzipMember(gzipHeader{os: 3}, deflate(pieces, independent), archive)
}

// GzipStored writes stored blocks only.
func GzipStored(archive []byte) []byte {
	return gzipMember(plainHeader, deflate([]piece{{archive, flate.NoCompression}}, true), archive)
}

// GzipAlternating mixes stored, fixed, dynamic and literal-only blocks in one stream.
func GzipAlternating(archive []byte) []byte {
	sizes := []int{300_000, 70_001, 1 << 20, 17, 250_000, 65_535, 65_536}
	levels := []int{defaultLevel, flate.NoCompression, flate.BestSpeed, flate.NoCompression, flate.HuffmanOnly, flate.NoCompression, flate.BestCompression, flate.NoCompression}
	return gzipMember(plainHeader, deflate(cut(archive, sizes, levels), true), archive)
}

// GzipExtras is two members whose headers have everything that a header can have.
func GzipExtras(archive []byte) []byte {
	half := len(archive) / 3
	first := gzipHeader{
		text: true, crc: true, extra: []byte("AB\x04\x00data"), name: "layer.tar", comment: "caf\xe9, made by hand",
		mtime: uint32(Epoch.Unix()), xfl: 2, os: 3,
	}
	second := gzipHeader{crc: true, extra: bytes.Repeat([]byte{0x1f, 0x8b, 8, 0}, 65535/4), name: "rest"}
	return append(
		gzipMember(first, deflate([]piece{{archive[:half], defaultLevel}}, true), archive[:half]),
		gzipMember(second, deflate([]piece{{archive[half:], defaultLevel}}, true), archive[half:])...)
}

// GzipZeros is a plain gzip file with zeros behind its end, as tapes and some tools leave them.
func GzipZeros(archive []byte) []byte {
	z := Gzip(archive)
	return append(z, make([]byte, 10240+(512-len(z)%512)%512)...)
}
