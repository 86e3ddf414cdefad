// Package twosum adds to two SHA-256 sums at once.
//
// A core with the SHA instructions waits for each of them: the next round takes what the last one gave. With
// the rounds of two sums in turns it waits for neither, and both take little more time than one alone. A
// layer's digest and those of its spans are such a pair.
//
//  1. Write has crypto/sha256 take the bytes up to the next whole block of either sum, and takes the two
//     states out of it in their marshalled form.
//  2. The kernel (blocks, in assembly) does as many blocks of both as there are.
//  3. The states go back, and crypto/sha256 takes the rest. On other machines it takes everything.
//
// The kernel is tried once when the program starts and not used if it does not agree with crypto/sha256.
package twosum

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"hash"
)

// Write adds p to a and q to b. Both are from sha256.New, and not the same.
func Write(a, b hash.Hash, p, q []byte) {
	if min(len(p), len(q)) >= worthwhile && usable {
		p, q = both(a, b, p, q)
	}
	a.Write(p)
	b.Write(q)
}

// worthwhile is how many bytes of both take longer than moving the states, about.
const worthwhile = 1 << 10

// A state is a marshalled sum: magic, eight words, a block that is not whole yet, bytes so far.
type state struct{ b []byte }

const (
	block     = 64
	magic     = "sha\x03"
	wordsAt   = len(magic)
	lengthAt  = wordsAt + 8*4 + block
	stateSize = lengthAt + 8
)

// aligned has h take bytes of p up to the end of a block. It returns the state there and the rest of p.
func aligned(h hash.Hash, p []byte) (state, []byte) {
	s := read(h)
	if n := int(-s.length() & (block - 1)); n > 0 {
		h.Write(p[:n])
		return read(h), p[n:]
	}
	return s, p
}

func read(h hash.Hash) state {
	b, err := h.(encoding.BinaryAppender).AppendBinary(make([]byte, 0, stateSize))
	if err != nil || len(b) != stateSize || string(b[:len(magic)]) != magic {
		panic("twosum: not a SHA-256 of crypto/sha256") // usable would be false
	}
	return state{b}
}

func (s state) length() int64 { return int64(binary.BigEndian.Uint64(s.b[lengthAt:])) }

// order is where the words A to H stand for the instructions: F E B A, H G D C.
var order = [8]int{3, 2, 7, 6, 1, 0, 5, 4}

func (s state) words() (w [8]uint32) {
	for i, to := range order {
		w[to] = binary.BigEndian.Uint32(s.b[wordsAt+4*i:])
	}
	return w
}

// write makes h what s would be with these words and n more bytes.
func (s state) write(h hash.Hash, w *[8]uint32, n int) {
	for i, from := range order {
		binary.BigEndian.PutUint32(s.b[wordsAt+4*i:], w[from])
	}
	binary.BigEndian.PutUint64(s.b[lengthAt:], uint64(s.length()+int64(n)))
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(s.b); err != nil {
		panic("twosum: " + err.Error())
	}
}

// both does all whole blocks of both and returns what is left, less than a block of one of them.
func both(a, b hash.Hash, p, q []byte) (restP, restQ []byte) {
	sa, p := aligned(a, p)
	sb, q := aligned(b, q)
	n := min(len(p), len(q)) / block
	wa, wb := sa.words(), sb.words()
	blocks(&wa, &wb, p, q, n)
	sa.write(a, &wa, n*block)
	sb.write(b, &wb, n*block)
	return p[n*block:], q[n*block:]
}

// usable says that the machine has what the kernel takes, and that it works.
var usable = hasSHA() && agrees()

// agrees tries the kernel.
func agrees() (ok bool) {
	defer func() {
		if recover() != nil { // the state is marshalled in another form
			ok = false
		}
	}()
	p := make([]byte, 5*block)
	for i := range p {
		p[i] = byte(i * i)
	}
	q := p[1:]
	a, b := sha256.New(), sha256.New()
	b.Write(p[:7])
	p1, q1 := both(a, b, p, q)
	a.Write(p1)
	b.Write(q1)
	return [32]byte(a.Sum(nil)) == sha256.Sum256(p) && [32]byte(b.Sum(nil)) == sha256.Sum256(append(p[:7:7], q...))
}
