// The body of fastBMI2 and fastWideBMI2, which define OUTPUT, the output's field in decoder, SCALE and
// UNSCALE, from elements of it to bytes and back, LITERAL, which writes an entry's literals, and ATONCE, how many
// bytes are copied for any match, of which MORE copies those behind the first 32.
//
// Registers:
//
//	AX entry of the next literal or length   BX bit buffer   CX bits in it (low byte; the rest is rubbish)
//	SI input   DI output   R8 literal table   R9 distance table   R10, R11 limits of SI, DI   R15 lowest match
//	DX, R12, R13, R14 free   X2, X3 BX, CX before the length or whatever it is

// REFILL loads bytes so that 56 to 63 bits count and all 64 are right.
#define REFILL \
	MOVQ    (SI), DX; \
	SHLXQ   CX, DX, DX; \
	ORQ     DX, BX; \
	MOVBLZX CX, DX; \
	SHRL    $3, DX; \
	XORL    $7, DX; \
	ADDQ    DX, SI; \
	ORL     $56, CX

// LENGTH drops a length and leaves it in R12.
#define LENGTH \
	BZHIQ AX, BX, R12; \
	SHRXQ AX, BX, BX; \
	SUBL  AX, CX; \
	MOVL  AX, R13; \
	SHRL  $8, R13; \
	SHRXQ R13, R12, R12; \
	SHRL  $16, AX; \
	ADDL  AX, R12

	MOVQ d+0(FP), DX
	MOVQ c+8(FP), R8
	LEAQ codes_dist(R8), R9
	MOVQ decoder_bb(DX), BX
	MOVQ decoder_nb(DX), CX
	MOVQ decoder_in(DX), SI
	MOVQ inEnd+16(FP), R10
	ADDQ SI, R10
	ADDQ decoder_pos(DX), SI
	MOVQ OUTPUT(DX), DI
	MOVQ outEnd+24(FP), R11
	SCALE(R11)
	ADDQ DI, R11
	MOVQ decoder_lo(DX), R15
	SCALE(R15)
	ADDQ DI, R15
	MOVQ decoder_wp(DX), AX
	SCALE(AX)
	ADDQ AX, DI

	REFILL
	MOVL BX, AX
	ANDL $const_litMask, AX
	MOVL (R8)(AX*4), AX
	JMP  first

	PCALIGN $32
loop:
	CMPQ SI, R10
	JHI  limit
	CMPQ DI, R11
	JCC  limit
	REFILL

first:
	CMPL AX, $const_isLiteral
	JCS  length
	LITERAL
	CMPL AX, $const_isLiteral
	JCS  later
	LITERAL
	CMPL AX, $const_isLiteral
	JCS  later
	LITERAL
	JMP  loop

later:
	REFILL

length:
	MOVQ  BX, X2              // for the case that something is wrong
	MOVQ  CX, X3
	TESTL $const_isOther, AX
	JNE   other
	LENGTH

distance:
	MOVL  BX, DX
	ANDL  $const_distMask, DX
	MOVL  (R9)(DX*4), DX
	TESTL $const_isOther, DX
	JNE   otherDistance

haveDistance:
	BZHIQ DX, BX, R13
	SHRXQ DX, BX, BX
	SUBL  DX, CX
	MOVL  BX, AX
	ANDL  $const_litMask, AX
	MOVL  (R8)(AX*4), AX
	MOVL  DX, R14
	SHRL  $8, R14
	SHRXQ R14, R13, R13
	SHRL  $16, DX
	ADDL  DX, R13
	SCALE(R12)                // now length and
	SCALE(R13)                // distance in bytes
	MOVQ  DI, DX
	SUBQ  R13, DX
	CMPQ  DX, R15
	JCS   bad
	MOVOU (DX), X0
	CMPL  R13, $16
	JCS   near
	MOVOU X0, (DI)
	MOVOU 16(DX), X1
	MOVOU X1, 16(DI)
	MORE
	CMPL  R12, $ATONCE
	JHI   long
	ADDQ  R12, DI
	JMP   loop

	// A match of more than ATONCE bytes from at least 16 bytes back.
long:
	ADDQ R12, DI
	NEGQ R12

long16:
	ADDQ  $16, R12
	JGE   loop
	ADDQ  $16, DX
	MOVOU (DX), X0
	MOVOU X0, (DI)(R12*1)
	JMP   long16

	// A match from less than 16 bytes back: a pattern.
near:
	LEAQ   ·repeats(SB), DX
	MOVQ   R13, R14
	SHLQ   $4, R14
	MOVOU  (DX)(R14*1), X1
	PSHUFB X1, X0
	MOVOU  X0, (DI)
	LEAQ   ·steps(SB), DX
	MOVQ   (DX)(R13*8), R13
	ADDQ   R12, DI
	NEGQ   R12

nearStep:
	ADDQ  R13, R12
	JGE   loop
	MOVOU X0, (DI)(R12*1)
	JMP   nearStep

other:
	// AX is the end of the block, a second-level table or nothing. There are at least 56 bits.
	BTL   $13, AX
	JCC   final
	SHRXQ AX, BX, BX
	SUBL  AX, CX
	MOVL  AX, DX
	SHRL  $8, DX
	ANDL  $15, DX
	BZHIQ DX, BX, DX
	SHRL  $16, AX
	ADDQ  AX, DX
	MOVL  (R8)(DX*4), AX
	CMPL  AX, $const_isLiteral
	JCS   otherLength
	LITERAL
	JMP   loop

otherLength:
	TESTL $const_isOther, AX
	JNE   final
	LENGTH
	JMP   distance

final:
	BTL   $14, AX
	JCC   bad
	SHRXQ AX, BX, BX
	SUBL  AX, CX
	MOVQ  $const_fastEnd, AX
	JMP   done

otherDistance:
	BTL   $13, DX
	JCC   bad
	SHRXQ DX, BX, BX
	SUBL  DX, CX
	MOVL  DX, R13
	SHRL  $8, R13
	ANDL  $15, R13
	BZHIQ R13, BX, R13
	SHRL  $16, DX
	ADDQ  R13, DX
	MOVL  (R9)(DX*4), DX
	TESTL $const_isOther, DX
	JEQ   haveDistance

	// Something is wrong: leave the symbol to the careful loop, which says what.
bad:
	MOVQ X2, BX
	MOVQ X3, CX

limit:
	MOVQ $const_fastStop, AX

done:
	MOVQ    AX, ret+32(FP)
	MOVQ    d+0(FP), DX
	BZHIQ   CX, BX, BX
	MOVBLZX CX, CX
	MOVQ    BX, decoder_bb(DX)
	MOVQ    CX, decoder_nb(DX)
	SUBQ    decoder_in(DX), SI
	MOVQ    SI, decoder_pos(DX)
	SUBQ    OUTPUT(DX), DI
	UNSCALE(DI)
	MOVQ    DI, decoder_wp(DX)
	RET
