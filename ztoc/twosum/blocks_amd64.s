#include "textflag.h"

// flip turns the bytes of each word round.
DATA flip<>+0(SB)/8, $0x0405060700010203
DATA flip<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL flip<>(SB), RODATA|NOPTR, $16

// One sum has its state in X1 (A B E F, A highest) and X2 (C D G H), and sixteen words of its schedule in X3
// to X6; the other in X7, X8 and X9 to X12. X0 is what the rounds take, X13 is free, X14 flip, AX the
// constants.

// ROUNDS does four rounds of a sum with the words m.
#define ROUNDS(at, m, abef, cdgh) \
	MOVOU       at(AX), X0; \
	PADDL       m, X0; \
	SHA256RNDS2 X0, abef, cdgh; \
	PSHUFD      $0x0e, X0, X0; \
	SHA256RNDS2 X0, cdgh, abef

// NEXT makes next the four words of the schedule that follow m; before are those before m.
#define NEXT(m, before, next) \
	MOVO       m, X13; \
	PALIGNR    $4, before, X13; \
	PADDL      X13, next; \
	SHA256MSG2 m, next

// LOAD makes m four words of the data.
#define LOAD(at, data, m) \
	MOVOU  at(data), m; \
	PSHUFB X14, m

// func blocksSHANI(a, b *[8]uint32, p, q *byte, n int, k *[64]uint32)
TEXT ·blocksSHANI(SB), NOSPLIT, $64-48
	MOVQ  a+0(FP), R8
	MOVQ  b+8(FP), R9
	MOVQ  p+16(FP), SI
	MOVQ  q+24(FP), DI
	MOVQ  n+32(FP), CX
	MOVQ  k+40(FP), AX
	MOVOU flip<>(SB), X14
	MOVOU (R8), X1
	MOVOU 16(R8), X2
	MOVOU (R9), X7
	MOVOU 16(R9), X8

	PCALIGN $32
loop:
	MOVOU X1, x1-64(SP)
	MOVOU X2, x2-48(SP)
	MOVOU X7, x7-32(SP)
	MOVOU X8, x8-16(SP)

	LOAD(0, SI, X3)
	LOAD(0, DI, X9)
	ROUNDS(0, X3, X1, X2)
	ROUNDS(0, X9, X7, X8)
	LOAD(16, SI, X4)
	LOAD(16, DI, X10)
	ROUNDS(16, X4, X1, X2)
	ROUNDS(16, X10, X7, X8)
	SHA256MSG1 X4, X3
	SHA256MSG1 X10, X9
	LOAD(32, SI, X5)
	LOAD(32, DI, X11)
	ROUNDS(32, X5, X1, X2)
	ROUNDS(32, X11, X7, X8)
	SHA256MSG1 X5, X4
	SHA256MSG1 X11, X10
	LOAD(48, SI, X6)
	LOAD(48, DI, X12)
	ROUNDS(48, X6, X1, X2)
	ROUNDS(48, X12, X7, X8)
	NEXT(X6, X5, X3)
	NEXT(X12, X11, X9)
	SHA256MSG1 X6, X5
	SHA256MSG1 X12, X11
	ROUNDS(64, X3, X1, X2)
	ROUNDS(64, X9, X7, X8)
	NEXT(X3, X6, X4)
	NEXT(X9, X12, X10)
	SHA256MSG1 X3, X6
	SHA256MSG1 X9, X12
	ROUNDS(80, X4, X1, X2)
	ROUNDS(80, X10, X7, X8)
	NEXT(X4, X3, X5)
	NEXT(X10, X9, X11)
	SHA256MSG1 X4, X3
	SHA256MSG1 X10, X9
	ROUNDS(96, X5, X1, X2)
	ROUNDS(96, X11, X7, X8)
	NEXT(X5, X4, X6)
	NEXT(X11, X10, X12)
	SHA256MSG1 X5, X4
	SHA256MSG1 X11, X10
	ROUNDS(112, X6, X1, X2)
	ROUNDS(112, X12, X7, X8)
	NEXT(X6, X5, X3)
	NEXT(X12, X11, X9)
	SHA256MSG1 X6, X5
	SHA256MSG1 X12, X11
	ROUNDS(128, X3, X1, X2)
	ROUNDS(128, X9, X7, X8)
	NEXT(X3, X6, X4)
	NEXT(X9, X12, X10)
	SHA256MSG1 X3, X6
	SHA256MSG1 X9, X12
	ROUNDS(144, X4, X1, X2)
	ROUNDS(144, X10, X7, X8)
	NEXT(X4, X3, X5)
	NEXT(X10, X9, X11)
	SHA256MSG1 X4, X3
	SHA256MSG1 X10, X9
	ROUNDS(160, X5, X1, X2)
	ROUNDS(160, X11, X7, X8)
	NEXT(X5, X4, X6)
	NEXT(X11, X10, X12)
	SHA256MSG1 X5, X4
	SHA256MSG1 X11, X10
	ROUNDS(176, X6, X1, X2)
	ROUNDS(176, X12, X7, X8)
	NEXT(X6, X5, X3)
	NEXT(X12, X11, X9)
	SHA256MSG1 X6, X5
	SHA256MSG1 X12, X11
	ROUNDS(192, X3, X1, X2)
	ROUNDS(192, X9, X7, X8)
	NEXT(X3, X6, X4)
	NEXT(X9, X12, X10)
	SHA256MSG1 X3, X6
	SHA256MSG1 X9, X12
	ROUNDS(208, X4, X1, X2)
	ROUNDS(208, X10, X7, X8)
	NEXT(X4, X3, X5)
	NEXT(X10, X9, X11)
	ROUNDS(224, X5, X1, X2)
	ROUNDS(224, X11, X7, X8)
	NEXT(X5, X4, X6)
	NEXT(X11, X10, X12)
	ROUNDS(240, X6, X1, X2)
	ROUNDS(240, X12, X7, X8)

	MOVOU x1-64(SP), X13
	PADDL X13, X1
	MOVOU x2-48(SP), X13
	PADDL X13, X2
	MOVOU x7-32(SP), X13
	PADDL X13, X7
	MOVOU x8-16(SP), X13
	PADDL X13, X8
	ADDQ  $64, SI
	ADDQ  $64, DI
	SUBQ  $1, CX
	JNE   loop

	MOVOU X1, (R8)
	MOVOU X2, 16(R8)
	MOVOU X7, (R9)
	MOVOU X8, 16(R9)
	RET

// func shaBit() bool
TEXT ·shaBit(SB), NOSPLIT, $0-1
	MOVB $0, ret+0(FP)
	XORL AX, AX
	CPUID
	CMPL AX, $7
	JCS  none
	MOVL $7, AX
	XORL CX, CX
	CPUID
	SHRL $29, BX
	ANDL $1, BX
	MOVB BX, ret+0(FP)

none:
	RET
