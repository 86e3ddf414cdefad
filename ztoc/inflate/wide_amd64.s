#include "textflag.h"

// FOUR looks up four elements.
#define FOUR(from, to) \
	MOVQ    from(SI), AX; \
	MOVWLZX AX, BX; \
	MOVBLZX (R8)(BX*1), BX; \
	SHRQ    $16, AX; \
	MOVB    BX, to(DI); \
	MOVWLZX AX, BX; \
	MOVBLZX (R8)(BX*1), BX; \
	SHRQ    $16, AX; \
	MOVB    BX, (to+1)(DI); \
	MOVWLZX AX, BX; \
	MOVBLZX (R8)(BX*1), BX; \
	SHRQ    $16, AX; \
	MOVB    BX, (to+2)(DI); \
	MOVBLZX (R8)(AX*1), BX; \
	MOVB    BX, (to+3)(DI)

// func resolveSSE2(r *resolution, dst *byte, wide *uint16, n int)
TEXT ·resolveSSE2(SB), NOSPLIT, $0-32
	MOVQ r+0(FP), R8
	MOVQ dst+8(FP), DI
	MOVQ wide+16(FP), SI
	MOVQ n+24(FP), CX

	PCALIGN $32
loop:
	MOVOU    (SI), X0
	MOVOU    16(SI), X1
	MOVOU    32(SI), X2
	MOVOU    48(SI), X3
	MOVO     X0, X4
	POR      X1, X4
	MOVO     X2, X5
	POR      X3, X5
	POR      X5, X4
	PMOVMSKB X4, AX
	TESTL    $0xaaaa, AX
	JNE      marked
	PACKUSWB X1, X0
	PACKUSWB X3, X2
	MOVOU    X0, (DI)
	MOVOU    X2, 16(DI)

next:
	ADDQ $64, SI
	ADDQ $32, DI
	SUBQ $32, CX
	JNE  loop
	RET

marked:
	FOUR(0, 0)
	FOUR(8, 4)
	FOUR(16, 8)
	FOUR(24, 12)
	FOUR(32, 16)
	FOUR(40, 20)
	FOUR(48, 24)
	FOUR(56, 28)
	JMP next
