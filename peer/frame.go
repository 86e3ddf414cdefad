package peer

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"

	"github.com/muster-hpc/muster/ztoc"
)

// The protocol "muster-range/1". Both ends send frames: a header of 20 bytes, big endian, and length bytes of payload.
//
//	0   kind     1 byte
//	1   flags    1 byte
//	2   zero     2 bytes
//	4   want     4 bytes  number of the Want, chosen by the child; 0: the connection
//	8   offset   8 bytes  of the payload in the blob (data), a code (refused), else 0
//	16  length   4 bytes  of the payload
//
// The child sends hello first, and again before a want that is for something else:
//
//	hello    plan's length (1 byte), plan, rank (4), priority (1), grant's length (2), grant
//	want     digest (32 bytes), ranges
//	drop     ranges
//
// The parent sends:
//
//	data     bytes of the blob from offset on; flag 1: the piece goes on with the next frame of data
//	missing  ranges that it will not bring
//	refused  offset holds a code: none of the want will come (want 0: the connection ends)
//	end      all of the want is answered
//	beat     nothing: the parent lives and has nothing to send
//
// Ranges are a count and then, for each range, the gap to the end of the one before and the length, all as shortest
// possible uvarints. So they are sorted, do not touch (but the first gap may be 0), and have one encoding only.
const (
	kindHello   = 1
	kindWant    = 2
	kindDrop    = 3
	kindData    = 16
	kindMissing = 17
	kindRefused = 18
	kindEnd     = 19
	kindBeat    = 20

	flagMore = 1
)

const (
	headerSize = 20
	// maxMessage bounds the payload of all frames but data: 65,536 ranges at up to 15 bytes each.
	maxMessage = 1 << 20
	// maxOffset bounds positions in a blob, so that no arithmetic here overflows: 1 PiB.
	maxOffset = 1 << 50
)

type header struct {
	kind, flags byte
	want        uint32
	offset      uint64
	length      uint32
}

func (h header) put(b []byte) {
	b[0], b[1], b[2], b[3] = h.kind, h.flags, 0, 0
	binary.BigEndian.PutUint32(b[4:], h.want)
	binary.BigEndian.PutUint64(b[8:], h.offset)
	binary.BigEndian.PutUint32(b[16:], h.length)
}

// parseHeader checks what can be checked without knowing the wants.
func parseHeader(b []byte) (header, error) {
	h := header{
		kind: b[0], flags: b[1], want: binary.BigEndian.Uint32(b[4:]),
		offset: binary.BigEndian.Uint64(b[8:]), length: binary.BigEndian.Uint32(b[16:]),
	}
	limit := uint32(maxMessage)
	ok := b[2] == 0 && b[3] == 0
	switch h.kind {
	case kindData:
		limit = FrameSize
		ok = ok && h.flags&^flagMore == 0 && h.offset <= maxOffset && h.length > 0 && h.want != 0
	case kindRefused:
		ok = ok && h.flags == 0 && h.length == 0
	case kindHello, kindBeat:
		ok = ok && h.flags == 0 && h.offset == 0 && h.want == 0
	case kindWant, kindDrop, kindMissing, kindEnd:
		ok = ok && h.flags == 0 && h.offset == 0 && h.want != 0
	default:
		ok = false
	}
	if !ok || h.length > limit {
		return h, fmt.Errorf("%w: frame %x", ErrProtocol, b[:headerSize])
	}
	return h, nil
}

// frame is a whole frame in new memory, for all that is not on the path of bytes.
func frame(h header, payload []byte) []byte {
	h.length = uint32(len(payload))
	b := make([]byte, headerSize, headerSize+len(payload))
	h.put(b)
	return append(b, payload...)
}

// readPayload reads n bytes; memory grows as they arrive, so that a header alone costs nothing.
func readPayload(r io.Reader, n uint32) ([]byte, error) {
	var b []byte
	for len(b) < int(n) {
		step := min(int(n)-len(b), max(4<<10, len(b)))
		b = append(b, make([]byte, step)...)
		if _, err := io.ReadFull(r, b[len(b)-step:]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func appendHello(b []byte, h Hello) ([]byte, error) {
	if len(h.Plan) > MaxPlanID || len(h.Grant) > MaxGrant || h.Rank < 0 || h.Rank > 1<<31-1 || h.Priority > ztoc.Prefetch {
		return nil, fmt.Errorf("peer: hello out of bounds: plan of %d bytes, grant of %d, rank %d", len(h.Plan), len(h.Grant), h.Rank)
	}
	b = append(b, byte(len(h.Plan)))
	b = append(b, h.Plan...)
	b = binary.BigEndian.AppendUint32(b, uint32(h.Rank))
	b = append(b, byte(h.Priority))
	b = binary.BigEndian.AppendUint16(b, uint16(len(h.Grant)))
	return append(b, h.Grant...), nil
}

func parseHello(b []byte) (h Hello, err error) {
	bad := func() (Hello, error) { return Hello{}, fmt.Errorf("%w: hello of %d bytes", ErrProtocol, len(b)) }
	if len(b) < 1 || int(b[0]) > MaxPlanID || len(b) < 1+int(b[0])+7 {
		return bad()
	}
	n := 1 + int(b[0])
	rank, priority, grant := binary.BigEndian.Uint32(b[n:]), b[n+4], int(binary.BigEndian.Uint16(b[n+5:]))
	if rank > 1<<31-1 || priority > byte(ztoc.Prefetch) || grant > MaxGrant || len(b) != n+7+grant {
		return bad()
	}
	h = Hello{Plan: string(b[1:n]), Rank: int(rank), Priority: ztoc.Priority(priority)}
	if grant > 0 {
		h.Grant = append([]byte(nil), b[n+7:]...)
	}
	return h, nil
}

func appendDigest(b []byte, d ztoc.Digest) ([]byte, error) {
	if _, err := ztoc.ParseDigest(string(d)); err != nil {
		return nil, err
	}
	return hex.AppendDecode(b, []byte(d.Hex()))
}

func parseDigest(b []byte) (d ztoc.Digest, rest []byte, err error) {
	if len(b) < 32 {
		return "", nil, fmt.Errorf("%w: want of %d bytes", ErrProtocol, len(b))
	}
	return ztoc.DigestFromSum([32]byte(b)), b[32:], nil
}

// appendRanges wants ranges as normal leaves them.
func appendRanges(b []byte, ranges []ztoc.Range) []byte {
	b = binary.AppendUvarint(b, uint64(len(ranges)))
	var at int64
	for _, r := range ranges {
		b = binary.AppendUvarint(b, uint64(r.Start-at))
		b = binary.AppendUvarint(b, uint64(r.Len()))
		at = r.End
	}
	return b
}

func parseRanges(b []byte) ([]ztoc.Range, error) {
	size := len(b)
	bad := func() ([]ztoc.Range, error) { return nil, fmt.Errorf("%w: ranges in %d bytes", ErrProtocol, size) }
	next := func() (uint64, bool) {
		v, n := binary.Uvarint(b)
		if n <= 0 || (n > 1 && b[n-1] == 0) { // the second: not the shortest form
			return 0, false
		}
		b = b[n:]
		return v, true
	}
	count, ok := next()
	if !ok || count == 0 || count > MaxRanges || count > uint64(len(b)/2) { // a range takes two bytes at least
		return bad()
	}
	ranges := make([]ztoc.Range, 0, count)
	var at uint64
	for i := range count {
		gap, ok1 := next()
		length, ok2 := next()
		if !ok1 || !ok2 || length == 0 || (i > 0 && gap == 0) || gap > maxOffset || length > maxOffset || at+gap+length > maxOffset {
			return bad()
		}
		ranges = append(ranges, ztoc.Range{Start: int64(at + gap), End: int64(at + gap + length)})
		at += gap + length
	}
	if len(b) != 0 {
		return bad()
	}
	return ranges, nil
}

// refusal and cause translate between errors and the codes of refused frames.
func refusal(err error) uint64 {
	for code, known := range refusals {
		if known == errorKind(err) {
			return uint64(code)
		}
	}
	return 0
}

func cause(code uint64) error {
	if code < uint64(len(refusals)) {
		return refusals[code]
	}
	return ErrNotHere
}

// refusals in the order of their codes; a code stays what it is.
var refusals = []error{ErrNotHere, ErrDenied, ErrBusy, ErrProtocol, ErrClosed}
