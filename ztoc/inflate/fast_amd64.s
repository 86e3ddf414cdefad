#include "go_asm.h"
#include "textflag.h"

#define OUTPUT decoder_out
#define SCALE(r)
#define UNSCALE(r)
#define ATONCE 32
#define MORE

// LITERAL writes the one or two literals of the entry and looks up the next.
#define LITERAL \
	SHRXQ AX, BX, BX; \
	SUBL  AX, CX; \
	MOVL  BX, R14; \
	ANDL  $const_litMask, R14; \
	MOVL  AX, DX; \
	SHRL  $8, DX; \
	MOVW  DX, (DI); \
	SHRL  $30, AX; \
	ADDQ  AX, DI; \
	MOVL  (R8)(R14*4), AX

// func fastBMI2(d *decoder, c *codes, inEnd, outEnd int) int
TEXT ·fastBMI2(SB), NOSPLIT, $0-40
#include "loop_amd64.h"

#undef OUTPUT
#undef SCALE
#undef UNSCALE
#undef ATONCE
#undef MORE
#undef LITERAL
#undef REFILL
#undef LENGTH

#define OUTPUT decoder_wide
#define SCALE(r) ADDQ r, r
#define UNSCALE(r) SHRQ $1, r
#define ATONCE 64
#define MORE \
	MOVOU 32(DX), X0; \
	MOVOU X0, 32(DI); \
	MOVOU 48(DX), X1; \
	MOVOU X1, 48(DI);

// LITERAL is as above, with 16 bits for each literal.
#define LITERAL \
	SHRXQ AX, BX, BX; \
	SUBL  AX, CX; \
	MOVL  BX, R14; \
	ANDL  $const_litMask, R14; \
	MOVL  AX, DX; \
	SHRL  $8, DX; \
	MOVL  DX, X0; \
	PUNPCKLBW X4, X0; \
	MOVL  X0, (DI); \
	SHRL  $30, AX; \
	LEAQ  (DI)(AX*2), DI; \
	MOVL  (R8)(R14*4), AX

// func fastWideBMI2(d *decoder, c *codes, inEnd, outEnd int) int
TEXT ·fastWideBMI2(SB), NOSPLIT, $0-40
	PXOR X4, X4
#include "loop_amd64.h"
