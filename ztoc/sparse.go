package ztoc

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// archive/tar reads sparse files and keeps their maps to itself. A lazy mount needs them, so they are
// read again here, from the PAX records and the raw header bytes. The maps were checked by
// archive/tar already; what is checked here keeps a difference between the two readers from
// becoming an extent outside of its file.

type sparseForm uint8

const (
	notSparse  sparseForm = iota
	sparseGNU             // the old format: in the header block and blocks behind it
	sparsePAX0            // 0.0 and 0.1: in PAX records
	sparsePAX1            // 1.0: text before the data
)

// Keys of GNU's PAX records. archive/tar joins the pairs of 0.0 to the map of 0.1.
const (
	paxSparse      = "GNU.sparse."
	paxSparseMajor = paxSparse + "major"
	paxSparseMinor = paxSparse + "minor"
	paxSparseMap   = paxSparse + "map"
	paxSize        = "size"
)

// sparseKind decides as archive/tar does.
func sparseKind(hdr *tar.Header) sparseForm {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return sparseGNU
	}
	major, minor := hdr.PAXRecords[paxSparseMajor], hdr.PAXRecords[paxSparseMinor]
	switch {
	case major == "0" && (minor == "0" || minor == "1"):
		return sparsePAX0
	case major == "1" && minor == "0":
		return sparsePAX1
	case major == "" && minor == "" && hdr.PAXRecords[paxSparseMap] != "":
		return sparsePAX0
	}
	return notSparse
}

// sparseExtents fills e.Sparse; data is the offset behind all that the tar reader has read.
// physical is the number of data bytes that follow there.
func sparseExtents(e *Entry, form sparseForm, hdr *tar.Header, raw []byte, data int64) (physical int64, err error) {
	head, behind, err := mainHeader(raw)
	if err != nil {
		return 0, err
	}
	if physical, err = tarNumber(head[124:136]); err != nil {
		return 0, err
	}
	if s := hdr.PAXRecords[paxSize]; s != "" {
		if physical, err = strconv.ParseInt(s, 10, 64); err != nil {
			return 0, fmt.Errorf("%w: PAX size %.40q", ErrInvalid, s)
		}
	}
	var runs []int64 // offset, length, …
	switch form {
	case sparseGNU:
		runs, err = gnuRuns(head, behind)
	case sparsePAX0:
		runs, err = numbers(strings.Split(hdr.PAXRecords[paxSparseMap], ","))
	case sparsePAX1:
		runs, err = textRuns(behind)
		physical -= int64(len(behind))
	}
	if err != nil {
		return 0, err
	}
	e.Sparse = make([]Extent, 0, len(runs)/2)
	var end, sum int64
	for i := 0; i+1 < len(runs); i += 2 {
		off, n := runs[i], runs[i+1]
		if off < end || n < 0 || off > e.Size || n > e.Size-off || n > physical-sum {
			return 0, fmt.Errorf("%w: run [%d, +%d) of a sparse file of %d bytes", ErrInvalid, off, n, e.Size)
		}
		if n > 0 {
			e.Sparse = append(e.Sparse, Extent{FileOff: off, Offset: data + sum, Len: n})
		}
		end, sum = off+n, sum+n
	}
	return physical, nil
}

// mainHeader finds the header block of the file itself behind those of extended headers and long
// names. behind is what was read after it.
func mainHeader(raw []byte) (head, behind []byte, err error) {
	for len(raw) >= tarBlock {
		head, raw = raw[:tarBlock], raw[tarBlock:]
		switch head[156] {
		case tar.TypeXHeader, tar.TypeGNULongName, tar.TypeGNULongLink:
			n, err := tarNumber(head[124:136])
			if err != nil || n < 0 || alignBlock(n) > int64(len(raw)) {
				return nil, nil, fmt.Errorf("%w: extended header of %d bytes", ErrInvalid, n)
			}
			raw = raw[alignBlock(n):]
		default:
			return head, raw, nil
		}
	}
	return nil, nil, fmt.Errorf("%w: header of a sparse file", ErrInvalid)
}

// gnuRuns reads the old GNU map: 4 pairs in the header, 21 in each block that follows.
func gnuRuns(head, behind []byte) (runs []int64, err error) {
	table, extended := head[386:386+4*24], head[482] != 0
	for {
		for ; len(table) >= 24 && table[0] != 0; table = table[24:] {
			off, err := tarNumber(table[:12])
			if err != nil {
				return nil, err
			}
			n, err := tarNumber(table[12:24])
			if err != nil {
				return nil, err
			}
			runs = append(runs, off, n)
		}
		if !extended {
			return runs, nil
		}
		if len(behind) < tarBlock {
			return nil, fmt.Errorf("%w: sparse map ends early", ErrInvalid)
		}
		table, extended = behind[:21*24], behind[504] != 0
		behind = behind[tarBlock:]
	}
}

// textRuns reads the map of PAX format 1.0: a count, then pairs, one decimal a line.
func textRuns(b []byte) ([]int64, error) {
	line, rest, ok := bytes.Cut(b, []byte("\n"))
	n, err := strconv.ParseInt(string(line), 10, 64)
	if !ok || err != nil || n < 0 || n > int64(len(rest)) {
		return nil, fmt.Errorf("%w: sparse map of %.40q runs", ErrInvalid, line)
	}
	fields := strings.SplitN(string(rest), "\n", int(2*n)+1)
	if len(fields) < int(2*n) {
		return nil, fmt.Errorf("%w: sparse map ends early", ErrInvalid)
	}
	return numbers(fields[:2*n])
}

func numbers(fields []string) ([]int64, error) {
	if len(fields) == 1 && fields[0] == "" {
		return nil, nil
	}
	ns := make([]int64, len(fields))
	for i, f := range fields {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("%w: sparse map has %.40q", ErrInvalid, f)
		}
		ns[i] = n
	}
	if len(ns)%2 != 0 {
		return nil, fmt.Errorf("%w: sparse map of %d numbers", ErrInvalid, len(ns))
	}
	return ns, nil
}

// tarNumber reads a numeric field of a header: octal text, or GNU's big-endian binary with the top bit set.
func tarNumber(b []byte) (int64, error) {
	if len(b) > 0 && b[0]&0x80 != 0 {
		var n uint64
		for i, c := range b {
			if i == 0 {
				c &= 0x7f
			}
			if n>>55 != 0 {
				return 0, fmt.Errorf("%w: number in a tar header", ErrInvalid)
			}
			n = n<<8 | uint64(c)
		}
		return int64(n), nil
	}
	s := strings.Trim(string(b), " \x00")
	if i := strings.IndexByte(s, 0); i >= 0 {
		s = s[:i]
	}
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 8, 63)
	if err != nil {
		return 0, fmt.Errorf("%w: number %.40q in a tar header", ErrInvalid, s)
	}
	return int64(n), nil
}
