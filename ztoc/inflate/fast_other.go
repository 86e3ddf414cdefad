//go:build !amd64

package inflate

// fast decodes symbols of the block while d.pos is at most inEnd and d.wp below outEnd, with at least
// fastIn bytes of input from inEnd on and maxMatch+slack elements of output from outEnd on.
func (d *decoder) fast(inEnd, outEnd int) int {
	if d.wide != nil {
		return fastGo(d, d.wide, inEnd, outEnd)
	}
	return fastGo(d, d.out, inEnd, outEnd)
}
