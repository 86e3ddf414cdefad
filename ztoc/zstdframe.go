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
	window   int64
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
		exp, mantissa := b[5]>>3, int64(b[5]&7)
		h.window = int64(1) << (10 + exp)
		h.window += h.window / 8 * mantissa
		h.size++
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
	if single {
		h.window = h.content
	}
	return h, nil
}

// errBigFrame ends reading by frames; the rest has to be read as a stream.
var errBigFrame = errors.New("zstd frame beyond what is inflated at once")

// A frameReader takes zstd frames one at a time from a stream.
type frameReader struct {
	r     *bufio.Reader
	limit int64 // inflated and compressed bytes of a frame

	at    int64  // offset in the blob of the next frame
	frame []byte // the current frame, also after errBigFrame: what has been read of it
	out   []byte // what it inflates to
	blob  Range  // where it is
}

// next reads the next frame, passing over skippable ones. It returns io.EOF behind the last frame and
// errBigFrame when a frame is larger than the limit; then f.frame and f.r are its bytes.
func (f *frameReader) next() error {
	for {
		f.frame = f.frame[:0]
		head, err := f.r.Peek(18)
		if len(head) == 0 && err == io.EOF {
			return io.EOF
		}
		if err != nil && err != io.EOF {
			return err
		}
		if len(head) >= 8 && binary.LittleEndian.Uint32(head)&skippableMask == skippableBits {
			n := 8 + int64(binary.LittleEndian.Uint32(head[4:]))
			if _, err := io.CopyN(io.Discard, f.r, n); err != nil {
				return ended(err)
			}
			f.at += n
			continue
		}
		h, err := parseFrameHeader(head)
		if err != nil {
			return fmt.Errorf("%w at %d", err, f.at)
		}
		if h.dict {
			return fmt.Errorf("%w: zstd frame with a dictionary", ErrUnsupported)
		}
		if h.content > f.limit {
			return errBigFrame
		}
		if err := f.take(h); err != nil {
			return err
		}
		f.blob = Range{f.at, f.at + int64(len(f.frame))}
		if err := f.inflate(h.content); err != nil {
			return err
		}
		f.at = f.blob.End
		return nil
	}
}

// take reads the whole frame into f.frame, its end found by walking the block headers.
func (f *frameReader) take(h frameHeader) error {
	if err := f.read(h.size); err != nil {
		return err
	}
	for last := false; !last; {
		if err := f.read(3); err != nil {
			return err
		}
		b := f.frame[len(f.frame)-3:]
		head := int(b[0]) | int(b[1])<<8 | int(b[2])<<16
		last = head&1 != 0
		size := head >> 3
		switch head >> 1 & 3 {
		case 1: // one byte, repeated size times
			size = 1
		case 3:
			return fmt.Errorf("%w: reserved zstd block type at %d", ErrInvalid, f.at+int64(len(f.frame)))
		}
		if size > zstdMaxBlock {
			return fmt.Errorf("%w: zstd block of %d bytes at %d", ErrInvalid, size, f.at+int64(len(f.frame)))
		}
		if int64(len(f.frame)+size) > f.limit+f.limit/8 {
			return errBigFrame
		}
		if err := f.read(size); err != nil {
			return err
		}
	}
	if h.checksum {
		return f.read(4)
	}
	return nil
}

func (f *frameReader) read(n int) error {
	at := len(f.frame)
	f.frame = append(f.frame, make([]byte, n)...)
	_, err := io.ReadFull(f.r, f.frame[at:])
	return ended(err)
}

// inflate inflates the frame to size bytes, -1: as many as there are, up to the limit.
func (f *frameReader) inflate(size int64) error {
	malformed := func(err error) error {
		return fmt.Errorf("%w: zstd frame at %d: %w", ErrInvalid, f.at, err)
	}
	if size >= 0 {
		f.grow(int(size))
		if err := unzstdExact(f.out, f.frame); err != nil {
			return malformed(err)
		}
		return nil
	}
	for size = min(f.limit+1, 4*int64(len(f.frame))+zstdMaxBlock); ; size = min(f.limit+1, 4*size) {
		f.grow(int(size))
		n, err := readStream(f.out, f.frame)
		switch {
		case err != nil:
			return malformed(err)
		case int64(n) > f.limit:
			return errBigFrame
		case int64(n) < size:
			f.out = f.out[:n]
			return nil
		}
	}
}

func (f *frameReader) grow(n int) {
	if cap(f.out) < n {
		f.out = make([]byte, n)
	}
	f.out = f.out[:n]
}

// ended says that data which must follow does not.
func ended(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
