package images

import (
	"bytes"
	"encoding/binary"
)

// program is a static executable for linux/amd64 of a few hundred bytes that asks for root:
// it calls setuid(0), prints "uid 0\n" and exits 0 if that makes its effective user root, and prints
// "not root\n" and exits 1 otherwise. So it tells whether a setuid bit or a file capability counted.
func program(name string) Entry {
	return File(name, string(rootProbe())).With(0o755, 0, 0)
}

// rootProbe assembles the program.
func rootProbe() []byte {
	const base, headers = 0x400000, 64 + 56
	yes, no := "uid 0\n", "not root\n"
	var code bytes.Buffer
	emit := func(b ...byte) { code.Write(b) }
	imm := func(n uint32) { emit(binary.LittleEndian.AppendUint32(nil, n)...) }
	mov := func(reg byte, n uint32) { emit(0xb8 + reg); imm(n) } // eax 0, edx 2, esi 6, edi 7
	syscall := func(n uint32) { mov(0, n); emit(0x0f, 0x05) }
	// Each ending is: write(1, text, len); exit(status).
	const ending = 5*4 + 2 + 5*2 + 2
	const text = headers + 5 + 7 + 7 + 2 + 2 + 2*ending
	end := func(at uint32, s string, status uint32) {
		mov(7, 1)
		mov(6, base+at)
		mov(2, uint32(len(s)))
		syscall(1)
		mov(7, status)
		syscall(60)
	}
	mov(7, 0)
	syscall(105)       // setuid(0)
	syscall(107)       // geteuid()
	emit(0x85, 0xc0)   // test eax, eax
	emit(0x75, ending) // jnz past the first ending
	end(text, yes, 0)
	end(text+uint32(len(yes)), no, 1)
	code.WriteString(yes + no)

	var b bytes.Buffer
	w := func(v any) { binary.Write(&b, binary.LittleEndian, v) } // a bytes.Buffer does not fail
	b.WriteString("\x7fELF\x02\x01\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	w([]uint16{2, 62})                   // executable, x86-64
	w(uint32(1))                         // version
	w([]uint64{base + headers, 64, 0})   // entry, program headers, sections
	w(uint32(0))                         // flags
	w([]uint16{64, 56, 1, 0, 0, 0})      // sizes and counts
	w([]uint32{1, 5})                    // load, read and execute
	size := uint64(headers + code.Len()) // one segment, headers and all
	w([]uint64{0, base, base, size, size, 0x1000})
	b.Write(code.Bytes())
	return b.Bytes()
}
