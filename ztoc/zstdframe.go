package ztoc

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The zstd frame format (RFC 8878, section 3.1) as far as it takes to find where frames end.

const (
	zstdMagic     = 0xFD2FB528
	skippableMask = 0xFFFFFFF0
	skippableBits = 0x184D2A50
	zstdMaxBlock  = 128 << 10
)

// frameHeader is what the start of a frame says.
type frameHeader struct {
	size     int   // of the header, magic included
	content  int64 // inflated size, -1 when it is not said
	checksum bool
	dict     bool
}

// parseFrameHeader reads a frame's header from b, at least 18 bytes unless the frame is shorter.
func parseFrameHeader(b []byte) (h frameHeader, err error) {
	short := fmt.Errorf("%w: zstd frame header", ErrInvalid)
	if len(b) < 6 || binary.LittleEndian.Uint32(b) != zstdMagic {
		return h, short
	}
	d := b[4]
	single := d&(1<<5) != 0
	if d&(1<<3) != 0 {
		return h, fmt.Errorf("%w: reserved bit of a zstd frame", ErrInvalid)
	}
	h.checksum = d&(1<<2) != 0
	h.size = 5
	if !single {
		h.size++ // the window's
	}
	dict := [4]int{0, 1, 2, 4}[d&3]
	if h.size+dict > len(b) {
		return h, short
	}
	for _, c := range b[h.size : h.size+dict] {
		h.dict = h.dict || c != 0
	}
	h.size += dict
	content := [4]int{0, 2, 4, 8}[d>>6]
	if single && content == 0 {
		content = 1
	}
	if h.size+content > len(b) {
		return h, short
	}
	var buf [8]byte
	copy(buf[:], b[h.size:h.size+content])
	h.size += content
	h.content = int64(binary.LittleEndian.Uint64(buf[:]))
	switch content {
	case 0:
		h.content = -1
	case 2:
		h.content += 256
	}
	if h.content < -1 {
		return h, fmt.Errorf("%w: zstd frame of %d bytes", ErrInvalid, uint64(h.content))
	}
	return h, nil
}

// errBigFrame ends reading by frames; the rest has to be read as a stream.
var errBigFrame = errors.New("zstd frame beyond what is inflated at once")

// A zstdFrame is a frame that was read whole.
type zstdFrame struct {
	blob    Range
	content int64 // inflated size as the header says, -1 if it does not
	bound   int64 // more it cannot inflate to
	at      int   // where it is in its batch's data
	out     Range // what it inflates to in the batch's out
	err     error
}

// data is the frame.
func (f *zstdFrame) data(b *batch) []byte { return b.data[f.at : f.at+int(f.blob.Len())] }

// A frameReader takes zstd frames one at a time from a stream.
type frameReader struct {
	r     *bufio.Reader
	limit int64 // inflated and compressed bytes of a frame

	at    int64  // offset in the blob of the next frame
	frame []byte // the current frame, also after errBigFrame: what has been read of it
	last  zstdFrame
	again bool // the next frame is the current one
}

// next reads the next frame, passing over skippable ones. It returns io.EOF behind the last frame and
// errBigFrame when a frame is larger than the limit; then f.frame and f.r are its bytes. A frame that does not
// say its size may turn out to be larger later.
func (f *frameReader) next() (zstdFrame, error) {
	if f.again {
		f.again = false
		return f.last, nil
	}
	for {
		f.frame = f.frame[:0]
		head, err := f.r.Peek(18)
		if len(head) == 0 && err == io.EOF {
			return zstdFrame{}, io.EOF
		}
		if err != nil && err != io.EOF {
			return zstdFrame{}, err
		}
		if len(head) >= 8 && binary.LittleEndian.Uint32(head)&skippableMask == skippableBits {
			n := 8 + int64(binary.LittleEndian.Uint32(head[4:]))
			if _, err := io.CopyN(io.Discard, f.r, n); err != nil {
				return zstdFrame{}, ended(err)
			}
			f.at += n
			continue
		}
		h, err := parseFrameHeader(head)
		if err != nil {
			return zstdFrame{}, fmt.Errorf("%w at %d", err, f.at)
		}
		if h.dict {
			return zstdFrame{}, fmt.Errorf("%w: zstd frame with a dictionary", ErrUnsupported)
		}
		if h.content > f.limit {
			return zstdFrame{}, errBigFrame
		}
		bound, err := f.take(h)
		if err != nil {
			return zstdFrame{}, err
		}
		blob := Range{f.at, f.at + int64(len(f.frame))}
		if h.content > bound {
			return zstdFrame{}, fmt.Errorf("%w: zstd frame at %d: %d bytes in blocks of at most %d", ErrInvalid, f.at, h.content, bound)
		}
		if h.content >= 0 {
			bound = h.content
		}
		f.at = blob.End
		f.last = zstdFrame{blob: blob, content: h.content, bound: bound}
		return f.last, nil
	}
}

// take reads the whole frame into f.frame, its end found by walking the block headers, and says what its
// blocks inflate to at most.
func (f *frameReader) take(h frameHeader) (bound int64, err error) {
	if err := f.read(h.size); err != nil {
		return 0, err
	}
	for last := false; !last; {
		if err := f.read(3); err != nil {
			return 0, err
		}
		b := f.frame[len(f.frame)-3:]
		head := int(b[0]) | int(b[1])<<8 | int(b[2])<<16
		last = head&1 != 0
		size := head >> 3
		inflated := size
		switch head >> 1 & 3 {
		case 1: // one byte, repeated size times
			size = 1
		case 2:
			inflated = zstdMaxBlock
		case 3:
			return 0, fmt.Errorf("%w: reserved zstd block type at %d", ErrInvalid, f.at+int64(len(f.frame)))
		}
		if max(size, inflated) > zstdMaxBlock {
			return 0, fmt.Errorf("%w: zstd block of %d bytes at %d", ErrInvalid, max(size, inflated), f.at+int64(len(f.frame)))
		}
		bound += int64(inflated)
		if int64(len(f.frame)+size) > f.limit+f.limit/8 {
			return 0, errBigFrame
		}
		if err := f.read(size); err != nil {
			return 0, err
		}
	}
	if h.checksum {
		return bound, f.read(4)
	}
	return bound, nil
}

func (f *frameReader) read(n int) error {
	at := len(f.frame)
	f.frame = append(f.frame, make([]byte, n)...)
	_, err := io.ReadFull(f.r, f.frame[at:])
	return ended(err)
}

// ended says that data which must follow does not.
func ended(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
