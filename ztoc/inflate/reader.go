package inflate

import (
	"hash/crc32"
	"io"
)

const (
	inSize  = 128 << 10 // input buffer, bytes
	outSize = 256 << 10 // output buffer with the window before it, bytes: both fit in a core's cache
)

// shortRead is how much is read where a block's header is expected between stored blocks, bytes.
const shortRead = 512

// A Checkpoint is a place in a gzip file where inflating can be taken up again, given the window:
// the end of a deflate block that is not the last of its member, or the start of a member's data.
type Checkpoint struct {
	In   int64 // offset in the file of the first byte of which no bit was read
	Out  int64 // offset in the inflated data
	Bits uint8 // 0 to 7: so many bits of byte In-1, its highest, are still to be read
}

// Options say what a Reader does besides inflating.
type Options struct {
	// Interval asks for a checkpoint at the first place at least this many inflated bytes after the
	// last one. 0: none at all.
	Interval int64

	// OnCheckpoint is called for every checkpoint in order, from within Read or WriteTo, before the
	// data after it is handed out but not always after the data before it was. The first one is the
	// start of the first member's data. window is what the data that follows may refer to: the last
	// up to 32 KiB before c.Out, none at a member's start; it is valid during the call. An error
	// ends reading with that error.
	OnCheckpoint func(c Checkpoint, window []byte) error

	// Cores is how many cores may inflate at once, 0 meaning 1. With more, and a file of some MiB, data
	// and checkpoints are the same; up to Cores+3 chunks of 2 MiB of input are read ahead and a few times as much is
	// held, and Close must be called unless the Reader is read to its end.
	Cores int
}

// A Reader inflates a gzip file of one or more members. Checksum and length of each are checked;
// zeros after the last one are ignored. It is for one goroutine at a time.
type Reader struct {
	d   decoder // d.in is the valid part of buf
	buf [inSize]byte
	out [outSize + maxMatch + slack]byte

	chunk int64 // of a crew, bytes; 0: chunkSize. Tests have it smaller
	state
}

// state is what a Reader starts anew with.
type state struct {
	r    io.Reader
	o    Options
	base int64 // offset in the file of d.in[0]
	zero int64 // offset in the inflated data of d.out[0]
	eof  bool  // r has ended
	err  error

	late   error // came with the last input, for the next read
	phase  phase
	stored bool   // the last input was read to where it belongs
	rp     int    // next byte of d.out to hand out
	sp     int    // next byte of d.out to sum
	start  int64  // offset in the inflated data of the current member
	crc    uint32 // of the current member up to sp
	due    int64  // inflated offset from which on a checkpoint is due
	place  int64  // inflated offset of the last place where a checkpoint was possible
	block  int64  // see MaxBlock
	hiring bool   // a crew should go on from here
	hireAt int64  // not before this offset in the file
	shift  *shift // not nil while a crew is at work
}

// A phase is what part of the file comes next.
type phase uint8

const (
	atHeader phase = iota
	inData
	atTrailer
	atNext  // another header, zeros or the end
	inZeros // to the end
)

// NewReader makes a Reader of the gzip file that r reads. It reads ahead and holds less than 1 MiB.
func NewReader(r io.Reader, o Options) *Reader {
	z := new(Reader)
	z.Reset(r, o)
	return z
}

// Reset makes z as NewReader would, but in the same memory.
func (z *Reader) Reset(r io.Reader, o Options) {
	z.Close()
	z.d.restart(z.out[:], outSize)
	z.state = state{r: r, o: o}
}

// Read inflates into p. After the last member it returns io.EOF; a malformed file, or one that ends
// early, is an *Error, after all data before the fault was returned. It does not read more input
// while there is data to return.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for z.rp == z.d.wp {
		if z.err != nil {
			return 0, z.err
		}
		z.more(false)
	}
	n := copy(p, z.d.out[z.rp:z.d.wp])
	z.rp += n
	return n, nil
}

// Next returns the next inflated data, some KiB to some MiB of it, from the internal buffer: it is valid until
// the next call of any method. Errors are as Read's, and come without data.
func (z *Reader) Next() ([]byte, error) {
	for z.rp == z.d.wp {
		if z.err != nil {
			return nil, z.err
		}
		z.more(true)
	}
	b := z.d.out[z.rp:z.d.wp]
	z.rp = z.d.wp
	return b, nil
}

// WriteTo inflates all the rest to w, in large writes from the internal buffer. The error is nil at
// the end of the file, and otherwise as Read's, or w's.
func (z *Reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		b, err := z.Next()
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(b)
		total += int64(n)
		z.rp -= len(b) - n
		if err == nil && n < len(b) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return total, err
		}
	}
}

// MaxBlock is the largest number of inflated bytes between two neighbouring places where a
// checkpoint was possible, so far. What follows the last one counts as well.
func (z *Reader) MaxBlock() int64 { return max(z.block, z.zero+int64(z.d.wp)-z.place) }

// InputOffset is the offset in the file of the first byte of which no bit was used yet.
func (z *Reader) InputOffset() int64 { return z.base + int64(z.d.consumed()) }

// more decodes until the output buffer is full or, unless wait, until there is data to hand out and
// going on would take a read. Everything before was handed out.
func (z *Reader) more(wait bool) {
	d := &z.d
	if z.hiring {
		z.hire()
	}
	if z.shift != nil {
		z.pump()
		return
	}
	if d.wp >= d.end {
		z.slide()
	}
	for z.err == nil && d.wp < d.end && !z.hiring {
		if z.phase != inData {
			if !wait && z.rp < d.wp {
				break
			}
			z.outside()
			continue
		}
		switch d.run() {
		case needInput:
			switch {
			case z.eof:
				z.fail(Truncated)
			case !wait && z.rp < d.wp:
				z.sum()
				return
			default:
				z.fill()
			}
		case blockEnd:
			z.arrive()
		case lastEnd:
			d.align()
			z.phase = atTrailer
		case isBad:
			z.fail(d.cause)
		case isFull:
		}
	}
	z.sum()
}

// outside does what is to be done between the deflate data of members.
func (z *Reader) outside() {
	switch z.phase {
	case atHeader:
		at := z.InputOffset()
		if c := readMember(z.next); c != "" {
			if c != Truncated {
				z.end(&Error{Offset: at, Err: c})
			}
			z.fail(c) // unless reading failed
			return
		}
		d := &z.d
		d.reset()
		z.phase = inData
		z.crc, z.sp, d.lo = 0, d.wp, d.wp
		z.start = z.zero + int64(d.wp)
		z.arrive()
	case atTrailer:
		z.sum()
		z.trailer()
	case atNext:
		c, ok := z.peek()
		switch {
		case !ok:
			z.end(io.EOF)
		case c != 0:
			z.phase = atHeader
		default:
			z.phase = inZeros
		}
	case inZeros:
		for {
			c, ok := z.peek()
			if !ok {
				z.end(io.EOF)
				return
			}
			if c != 0 {
				z.fail(Trailing)
				return
			}
			z.d.pos++
		}
	}
}

// arrive is called where inflating can be taken up again.
func (z *Reader) arrive() {
	in := z.InputOffset()
	z.restart(Checkpoint{In: in, Out: z.zero + int64(z.d.wp), Bits: uint8(z.d.nb & 7)})
	z.hiring = z.o.Cores > 1 && littleEndian && in >= z.hireAt
}

// restart notes that inflating can be taken up again at c, the end of d.out.
func (z *Reader) restart(c Checkpoint) {
	d := &z.d
	z.block = max(z.block, c.Out-z.place)
	z.place = c.Out
	if z.o.Interval <= 0 || z.o.OnCheckpoint == nil || c.Out < z.due {
		return
	}
	z.due = c.Out + z.o.Interval
	d.fetchWindow()
	if err := z.o.OnCheckpoint(c, d.out[max(d.lo, d.wp-windowSize):d.wp]); err != nil {
		z.err = err
	}
}

// sum takes the data since the last time into the member's checksum.
func (z *Reader) sum() {
	z.crc = crc32.Update(z.crc, crc32.IEEETable, z.d.out[z.sp:z.d.wp])
	z.sp = z.d.wp
}

// fail ends reading because the file is malformed at the current position.
func (z *Reader) fail(c Cause) { z.end(&Error{Offset: z.InputOffset(), Err: c}) }

func (z *Reader) end(err error) {
	if z.err == nil {
		z.err = err
	}
}

// fill reads more input behind what is left of it.
func (z *Reader) fill() {
	d := &z.d
	d.unread() // they might have to be given back later, when they no longer are in the buffer
	n := copy(z.buf[:], d.in[d.pos:])
	z.base += int64(d.pos)
	d.pos, d.in = 0, z.buf[:n]
	size := inSize
	switch {
	case n == 0 && d.stage == inStored && d.left >= shortRead:
		// Stored data need not pass through the input buffer.
		m := z.read(d.out[d.wp:min(d.end, d.wp+d.left)])
		z.base += int64(m)
		d.wp += m
		d.left -= m
		z.stored = true
		z.sum() // while it is near
		return
	case z.stored && d.stage != inCodes:
		size = max(shortRead, n+1) // what follows may well be stored as well
	}
	z.stored = false
	d.in = z.buf[:n+z.read(z.buf[n:size])]
}

// read reads from below at least one byte, unless that has ended or failed: then z.eof or z.err is set.
func (z *Reader) read(p []byte) int {
	err := z.late
	for i := 0; err == nil; i++ {
		if i == 100 {
			err = io.ErrNoProgress
			break
		}
		var n int
		n, err = z.r.Read(p)
		if n > 0 {
			z.late = err
			return n
		}
	}
	if err == io.EOF {
		z.eof = true
	} else {
		z.end(&Error{Offset: z.base + int64(len(z.d.in)), Err: err})
	}
	return 0
}

// slide makes room in the output buffer: it moves the window to its start. In stored data it leaves
// that to be done once the window is needed, if it ever is.
func (z *Reader) slide() {
	d := &z.d
	shift := d.wp - windowSize
	d.wp -= shift
	d.lo = max(0, d.lo-shift)
	z.rp -= shift
	z.sp -= shift
	z.zero += int64(shift)
	d.away = shift
	d.end = outSize / 2
	if d.stage != inStored {
		d.end = outSize
		d.fetchWindow()
	}
}
