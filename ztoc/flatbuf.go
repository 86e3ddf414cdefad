package ztoc

import (
	"encoding/binary"
	"fmt"
)

// A flatReader reads a hostile flatbuffer: every offset is checked, nothing panics. The first fault
// sticks; after it everything reads as zero or empty.
//
// Only what SOCI's two schemas use is here: tables, strings, vectors of bytes and of offsets,
// scalars. The format is that of https://flatbuffers.dev/internals.
type flatReader struct {
	b    []byte
	err  error
	read int // bytes of strings and vectors so far
}

// spend counts the bytes of strings and vectors that are read. In a buffer that was written honestly
// none is read twice; many offsets to one large string would make a small file cost hours.
func (r *flatReader) spend(n, at int) {
	if r.read += n; r.read > len(r.b) {
		r.fail("more strings than bytes", at)
	}
}

func (r *flatReader) fail(what string, at int) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: flatbuffer: %s at %d of %d", ErrInvalid, what, at, len(r.b))
	}
}

// bytes is the n bytes at the given place, nil if they are not all there.
func (r *flatReader) bytes(at, n int) []byte {
	if r.err != nil || at < 0 || n < 0 || at > len(r.b) || n > len(r.b)-at {
		r.fail("offset out of bounds", at)
		return nil
	}
	return r.b[at : at+n]
}

func (r *flatReader) u16(at int) int {
	if b := r.bytes(at, 2); b != nil {
		return int(binary.LittleEndian.Uint16(b))
	}
	return 0
}

func (r *flatReader) u32(at int) uint32 {
	if b := r.bytes(at, 4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// A flatTable is a table: where it is, and its virtual table, which says where its fields are.
type flatTable struct {
	r              *flatReader
	at             int
	vtable, fields int
}

func (r *flatReader) root() flatTable { return r.table(int(r.u32(0))) }

func (r *flatReader) table(at int) flatTable {
	v := at - int(int32(r.u32(at)))
	size := r.u16(v)
	if r.err == nil && (size < 4 || size%2 != 0 || r.bytes(v, size) == nil) {
		r.fail("virtual table", v)
	}
	if r.err != nil {
		return flatTable{r: r}
	}
	return flatTable{r: r, at: at, vtable: v, fields: (size - 4) / 2}
}

// field is where field i is, 0 when it is not written.
func (t flatTable) field(i int) int {
	if i >= t.fields || t.r.err != nil {
		return 0
	}
	off := t.r.u16(t.vtable + 4 + 2*i)
	if off == 0 {
		return 0
	}
	return t.at + off
}

func (t flatTable) int64(i int) int64 {
	at := t.field(i)
	if at == 0 {
		return 0
	}
	if b := t.r.bytes(at, 8); b != nil {
		return int64(binary.LittleEndian.Uint64(b))
	}
	return 0
}

func (t flatTable) uint32(i int) uint32 {
	if at := t.field(i); at != 0 {
		return t.r.u32(at)
	}
	return 0
}

func (t flatTable) int8(i int, absent int8) int8 {
	at := t.field(i)
	if at == 0 {
		return absent
	}
	if b := t.r.bytes(at, 1); b != nil {
		return int8(b[0])
	}
	return 0
}

// follow is what the offset in field i points to, 0 when the field is not written.
func (t flatTable) follow(i int) int {
	at := t.field(i)
	if at == 0 {
		return 0
	}
	return at + int(t.r.u32(at))
}

func (t flatTable) table(i int) (flatTable, bool) {
	at := t.follow(i)
	if at == 0 {
		return flatTable{r: t.r}, false
	}
	return t.r.table(at), true
}

// vector is where the elements of the vector in field i start and how many there are, size bytes each.
func (t flatTable) vector(i, size int) (at, n int) {
	at = t.follow(i)
	if at == 0 {
		return 0, 0
	}
	n = int(t.r.u32(at))
	if n > len(t.r.b)/size || t.r.bytes(at+4, n*size) == nil {
		t.r.fail("vector", at)
		return 0, 0
	}
	if t.r.spend(n*size, at); t.r.err != nil {
		return 0, 0
	}
	return at + 4, n
}

func (t flatTable) byteVector(i int) []byte {
	at, n := t.vector(i, 1)
	if n == 0 {
		return nil
	}
	return t.r.bytes(at, n)
}

func (t flatTable) string(i int) string { return string(t.byteVector(i)) }

// element is what offset i of the vector of offsets at the given place points to.
func (r *flatReader) element(vector, i int) int {
	at := vector + 4*i
	return at + int(r.u32(at))
}

func (r *flatReader) stringAt(at int) []byte {
	n := int(r.u32(at))
	b := r.bytes(at+4, n)
	r.spend(len(b), at)
	return b
}
