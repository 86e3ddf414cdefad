package inflate

import (
	"fmt"
	"io"
)

// An Error says where in the compressed stream decoding stopped, and why.
type Error struct {
	Offset int64 // of the compressed byte that was being read, from the start of the stream or span
	Err    error // a Cause when the stream is malformed, otherwise what the underlying reader returned
}

func (e *Error) Error() string {
	return fmt.Sprintf("inflate: compressed byte %d: %v", e.Offset, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// A Cause is what is wrong with a malformed stream. Errors that carry none come from the reader
// below and say nothing about the bytes.
type Cause string

// What can be wrong with a stream.
const (
	BadMagic     Cause = "not a gzip header"
	BadMethod    Cause = "compression method is not deflate"
	BadFlags     Cause = "reserved gzip header flags are set"
	BadHeaderCRC Cause = "gzip header checksum does not match"
	BadBlockType Cause = "invalid deflate block type"
	BadStored    Cause = "stored block's length and its complement differ"
	BadCounts    Cause = "too many length or distance codes"
	BadRepeat    Cause = "invalid repeat of code lengths"
	BadCodes     Cause = "code lengths make no prefix code"
	NoBlockEnd   Cause = "block has no end code"
	BadSymbol    Cause = "invalid code"
	TooFar       Cause = "distance reaches before the start of the data"
	BadCRC       Cause = "CRC-32 of the inflated data does not match"
	BadLength    Cause = "length of the inflated data does not match"
	Trailing     Cause = "garbage after the last gzip member"
	Truncated    Cause = "unexpected end of the compressed data"
	BadBits      Cause = "bit position outside the data"
)

func (c Cause) Error() string { return string(c) }

// Is makes a truncated stream an io.ErrUnexpectedEOF to those who ask for that.
func (c Cause) Is(target error) bool { return c == Truncated && target == io.ErrUnexpectedEOF }
