package images

import (
	"fmt"
	"strconv"
)

// A rawHeader is a tar header written field by field, for what archive/tar does not write: every
// dialect's own way, and things that no tool should have written.
type rawHeader struct {
	name, link, prefix string
	mode, uid, gid     int64
	size, mtime        int64
	typ                byte
	format             rawFormat
	major, minor       int64
	sparse             []sparseRun // GNU's old way: first four in the header
	realSize           int64       // with sparse
}

type rawFormat int

const (
	formatUSTAR rawFormat = iota
	formatGNU
	formatV7
)

// A sparseRun is length bytes of data at offset off of a sparse file.
type sparseRun struct{ off, length int64 }

// block writes the header. Numbers that do not fit in octal are written in GNU's base 256.
func (h rawHeader) block() []byte {
	b := make([]byte, 512)
	copy(b[0:100], h.name)
	number(b[100:108], h.mode)
	number(b[108:116], h.uid)
	number(b[116:124], h.gid)
	number(b[124:136], h.size)
	number(b[136:148], h.mtime)
	b[156] = h.typ
	copy(b[157:257], h.link)
	switch h.format {
	case formatUSTAR:
		copy(b[257:], "ustar\x0000")
	case formatGNU:
		copy(b[257:], "ustar  \x00")
	}
	if h.format != formatV7 {
		copy(b[265:297], "root")
		copy(b[297:329], "root")
		number(b[329:337], h.major)
		number(b[337:345], h.minor)
	}
	if h.format == formatUSTAR {
		copy(b[345:500], h.prefix)
	}
	if h.typ == 'S' {
		for i, r := range h.sparse[:min(4, len(h.sparse))] {
			number(b[386+24*i:398+24*i], r.off)
			number(b[398+24*i:410+24*i], r.length)
		}
		if len(h.sparse) > 4 {
			b[482] = 1
		}
		number(b[483:495], h.realSize)
	}
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// number writes n as octal ended by a NUL, or in base 256 when it is negative or too long.
func number(b []byte, n int64) {
	s := strconv.FormatInt(n, 8)
	if n >= 0 && len(s) < len(b) {
		copy(b, fmt.Sprintf("%0*s\x00", len(b)-1, s))
		return
	}
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = byte(n)
		n >>= 8
	}
	b[0] |= 0x80
}

// pad fills b up to a whole block.
func pad(b []byte) []byte { return append(b, make([]byte, (512-len(b)%512)%512)...) }

// rawEntry is a header and a body as they are.
func rawEntry(h rawHeader, body string) Entry {
	h.size = int64(len(body))
	return Entry{Raw: append(h.block(), pad([]byte(body))...)}
}

// gnuLong is an entry whose name and link name, when long, come in GNU's own records before it.
func gnuLong(h rawHeader, body string) Entry {
	var raw []byte
	record := func(typ byte, value string) {
		r := rawEntry(rawHeader{name: "././@LongLink", typ: typ, format: formatGNU}, value+"\x00")
		raw = append(raw, r.Raw...)
	}
	if len(h.link) > 100 {
		record('K', h.link)
		h.link = h.link[:100]
	}
	if len(h.name) > 100 {
		record('L', h.name)
		h.name = h.name[:100]
	}
	h.format = formatGNU
	return Entry{Raw: append(raw, rawEntry(h, body).Raw...)}
}

// paxEntry is an entry behind a PAX header with records, in the order given and repeated if so given.
func paxEntry(records [][2]string, h rawHeader, body string) Entry {
	raw := paxHeader('x', records)
	return Entry{Raw: append(raw, rawEntry(h, body).Raw...)}
}

// paxHeader is an extended header of type 'x' (for the next entry) or 'g' (for all that follow).
func paxHeader(typ byte, records [][2]string) []byte {
	var body string
	for _, r := range records {
		// A record's length counts its own digits.
		n := len(r[0]) + len(r[1]) + 3
		for size := n + 1; ; size++ {
			if s := strconv.Itoa(size); len(s)+n == size {
				body += s + " " + r[0] + "=" + r[1] + "\n"
				break
			}
		}
	}
	return rawEntry(rawHeader{name: "PaxHeaders.0/x", typ: typ, mode: 0o644}, body).Raw
}

// The sparse dialects. Each is a file of size bytes whose runs hold content, one after another.

// sparseOldGNU is type 'S' with the map in the header and in blocks behind it.
func sparseOldGNU(name string, size int64, runs []sparseRun, content string) Entry {
	h := rawHeader{name: name, typ: 'S', mode: 0o644, mtime: Epoch.Unix(), format: formatGNU, sparse: runs, realSize: size, size: int64(len(content))}
	raw := h.block()
	for rest := runs[min(4, len(runs)):]; len(rest) > 0; {
		n := min(21, len(rest))
		b := make([]byte, 512)
		for i, r := range rest[:n] {
			number(b[24*i:24*i+12], r.off)
			number(b[24*i+12:24*i+24], r.length)
		}
		if rest = rest[n:]; len(rest) > 0 {
			b[504] = 1
		}
		raw = append(raw, b...)
	}
	return Entry{Raw: append(raw, pad([]byte(content))...)}
}

// sparsePAX00 has the map in repeated PAX records.
func sparsePAX00(name string, size int64, runs []sparseRun, content string) Entry {
	records := [][2]string{{"GNU.sparse.size", itoa(size)}, {"GNU.sparse.numblocks", itoa(int64(len(runs)))}}
	for _, r := range runs {
		records = append(records, [2]string{"GNU.sparse.offset", itoa(r.off)}, [2]string{"GNU.sparse.numbytes", itoa(r.length)})
	}
	return paxEntry(records, rawHeader{name: name, typ: '0', mode: 0o644, mtime: Epoch.Unix()}, content)
}

// sparsePAX01 has the map in one PAX record, and the file's name in another.
func sparsePAX01(name string, size int64, runs []sparseRun, content string) Entry {
	var m string
	for i, r := range runs {
		if i > 0 {
			m += ","
		}
		m += itoa(r.off) + "," + itoa(r.length)
	}
	return paxEntry([][2]string{
		{"GNU.sparse.size", itoa(size)},
		{"GNU.sparse.numblocks", itoa(int64(len(runs)))},
		{"GNU.sparse.map", m},
		{"GNU.sparse.name", name},
	}, rawHeader{name: "GNUSparseFile.0/x", typ: '0', mode: 0o644, mtime: Epoch.Unix()}, content)
}

// sparsePAX10 has the map before the content.
func sparsePAX10(name string, size int64, runs []sparseRun, content string) Entry {
	m := itoa(int64(len(runs))) + "\n"
	for _, r := range runs {
		m += itoa(r.off) + "\n" + itoa(r.length) + "\n"
	}
	return paxEntry([][2]string{
		{"GNU.sparse.major", "1"},
		{"GNU.sparse.minor", "0"},
		{"GNU.sparse.name", name},
		{"GNU.sparse.realsize", itoa(size)},
	}, rawHeader{name: "GNUSparseFile.0/x", typ: '0', mode: 0o644, mtime: Epoch.Unix()}, string(pad([]byte(m)))+content)
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
