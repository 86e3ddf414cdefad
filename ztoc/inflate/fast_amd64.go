package inflate

import "golang.org/x/sys/cpu"

// useBMI2 chooses the assembly loop: it takes BMI2's shifts and SSSE3's byte shuffle.
var useBMI2 = cpu.X86.HasBMI2 && cpu.X86.HasSSSE3

// fast decodes symbols of the block while d.pos is at most inEnd and d.wp below outEnd, with at least
// fastIn bytes of input from inEnd on and maxMatch+slack elements of output from outEnd on.
func (d *decoder) fast(inEnd, outEnd int) int {
	switch bmi2 := useBMI2 && !d.plain; {
	case bmi2 && d.wide != nil:
		return fastWideBMI2(d, d.codes, inEnd, outEnd)
	case bmi2:
		return fastBMI2(d, d.codes, inEnd, outEnd)
	case d.wide != nil:
		return fastGo(d, d.wide, inEnd, outEnd)
	}
	return fastGo(d, d.out, inEnd, outEnd)
}

// repeats are shuffles that repeat the first n bytes of 16, n from 1 on, and steps how many of those
// 16 are whole repeats.
var (
	repeats [16][16]byte
	steps   [16]uint64
)

func init() {
	for n := 1; n < 16; n++ {
		for i := range 16 {
			repeats[n][i] = byte(i % n)
		}
		steps[n] = uint64(16 - 16%n)
	}
}

//go:noescape
func fastBMI2(d *decoder, c *codes, inEnd, outEnd int) int

//go:noescape
func fastWideBMI2(d *decoder, c *codes, inEnd, outEnd int) int
