package images

import (
	"bytes"
	"encoding/binary"

	"github.com/klauspost/compress/zstd"
)

// zstdFrame compresses data to one frame. One goroutine, so that the bytes do not depend on the
// machine.
func zstdFrame(data []byte, options ...zstd.EOption) []byte {
	e, err := zstd.NewWriter(nil, append([]zstd.EOption{zstd.WithEncoderConcurrency(1)}, options...)...)
	if err != nil {
		panic(err) // options here are constants
	}
	defer e.Close()
	return e.EncodeAll(data, nil)
}

// ZstdSingle compresses to one frame whose header says how much it inflates to.
func ZstdSingle(archive []byte) []byte { return zstdFrame(archive) }

// ZstdStream compresses to one frame whose header does not say so, as whoever compresses a stream
// does: docker, buildkit and zstd in a pipe.
func ZstdStream(archive []byte) []byte {
	var out bytes.Buffer
	e, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err) // options here are constants
	}
	for _, p := range cut(archive, []int{1 << 20}, []int{0}) {
		e.Write(p.data) // a bytes.Buffer does not fail
	}
	e.Close()
	return out.Bytes()
}

// ZstdFrames compresses to frames of at most 1 MiB, with and without checksum, a skippable frame and
// an empty one among them.
func ZstdFrames(archive []byte) []byte {
	var out []byte
	for i, p := range cut(archive, []int{1 << 20, 1<<20 - 1, 300_000, 1}, []int{0}) {
		out = append(out, zstdFrame(p.data, zstd.WithEncoderCRC(i%2 == 0))...)
		switch i {
		case 1:
			out = append(out, skippable(3, []byte("not part of the archive"))...)
		case 2:
			out = append(out, zstdFrame(nil, zstd.WithZeroFrames(true))...)
		}
	}
	return out
}

// skippable is zstd's skippable frame number n (0 to 15) around data.
func skippable(n byte, data []byte) []byte {
	b := binary.LittleEndian.AppendUint32([]byte{0x50 + n, 0x2a, 0x4d, 0x18}, uint32(len(data)))
	return append(b, data...)
}
