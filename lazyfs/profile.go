package lazyfs

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/muster-hpc/muster/ztoc"
)

// A Profile is what the programs of an image touched first: ranges of inflated layers, in the order in which they
// were wanted. It does not depend on spans, so it outlives a change of index.
type Profile struct {
	Ranges []ProfileRange
}

// A ProfileRange is bytes [Start, End) of inflated layer Layer, an index into the image's layers.
type ProfileRange struct {
	Layer      int
	Start, End int64
}

// Bounds of a profile. Beyond them recording and merging drop what comes last.
const (
	MaxProfileRanges = 16 << 10
	MaxProfileBytes  = 512 << 20

	profilePage = 4 << 10   // recording is that precise
	profileGap  = 32 << 10  // holes up to this are closed: reading them costs less than a range
	maxLayers   = 1 << 16   // as in the table
	maxInflated = 1 << 56   // bytes of a layer
	maxEncoded  = 1<<20 | 1 // 16k ranges take about 400 KiB
)

// ErrProfile says that bytes are not an encoded profile.
var ErrProfile = errors.New("not a profile")

const profileHeader = "muster profile 1\n"

// Bytes is how many bytes the ranges of p have.
func (p Profile) Bytes() (n int64) {
	for _, r := range p.Ranges {
		n += r.End - r.Start
	}
	return n
}

// Encode writes p as text: a header line with the version, then "layer start end" for each range, decimal.
func (p Profile) Encode() []byte {
	b := []byte(profileHeader)
	for _, r := range p.Ranges {
		b = strconv.AppendInt(b, int64(r.Layer), 10)
		b = strconv.AppendInt(append(b, ' '), r.Start, 10)
		b = strconv.AppendInt(append(b, ' '), r.End, 10)
		b = append(b, '\n')
	}
	return b
}

// DecodeProfile reads what Encode wrote, and nothing else: whatever it accepts encodes to the same bytes.
func DecodeProfile(b []byte) (Profile, error) {
	if len(b) > maxEncoded {
		return Profile{}, fmt.Errorf("%w: %d bytes", ErrProfile, len(b))
	}
	rest, ok := bytes.CutPrefix(b, []byte(profileHeader))
	if !ok {
		return Profile{}, fmt.Errorf("%w: begins with %.20q", ErrProfile, b)
	}
	var p Profile
	var total int64
	for len(rest) > 0 {
		line, tail, ok := bytes.Cut(rest, []byte("\n"))
		if !ok {
			return Profile{}, fmt.Errorf("%w: cut", ErrProfile)
		}
		rest = tail
		var n [3]int64
		fields := bytes.Split(line, []byte(" "))
		if len(fields) != len(n) {
			return Profile{}, fmt.Errorf("%w: line %.60q", ErrProfile, line)
		}
		for i, f := range fields {
			v, err := strconv.ParseInt(string(f), 10, 64)
			if err != nil || strconv.FormatInt(v, 10) != string(f) || v < 0 || v > maxInflated {
				return Profile{}, fmt.Errorf("%w: line %.60q", ErrProfile, line)
			}
			n[i] = v
		}
		if n[0] >= maxLayers || n[1] >= n[2] {
			return Profile{}, fmt.Errorf("%w: line %.60q", ErrProfile, line)
		}
		total += n[2] - n[1]
		if len(p.Ranges) == MaxProfileRanges || total > MaxProfileBytes {
			return Profile{}, fmt.Errorf("%w: larger than a profile may be", ErrProfile)
		}
		p.Ranges = append(p.Ranges, ProfileRange{int(n[0]), n[1], n[2]})
	}
	return p, nil
}

// Merge is the union of p and others: p's ranges in p's order, then what the others have beyond it, in theirs.
func (p Profile) Merge(others ...Profile) Profile {
	var m coverage
	for _, o := range append([]Profile{p}, others...) {
		for _, r := range o.Ranges {
			if r.Layer >= 0 && r.Layer < maxLayers && r.Start >= 0 && r.Start < r.End {
				m.add(r.Layer, r.Start, r.End)
			}
		}
	}
	return Profile{Ranges: m.ranges}
}

// without is p with the pages of x cut out.
func (p Profile) without(x stretch) (out Profile) {
	lo, hi := x.off&^(profilePage-1), (x.off+x.n+profilePage-1)&^(profilePage-1)
	for _, r := range p.Ranges {
		if r.Layer != x.layer || r.End <= lo || r.Start >= hi {
			out.Ranges = append(out.Ranges, r)
			continue
		}
		if r.Start < lo {
			out.Ranges = append(out.Ranges, ProfileRange{r.Layer, r.Start, lo})
		}
		if r.End > hi {
			out.Ranges = append(out.Ranges, ProfileRange{r.Layer, hi, r.End})
		}
	}
	return out
}

// coverage collects ranges in order, each byte once, within the bounds of a profile.
type coverage struct {
	ranges []ProfileRange
	bytes  int64
	full   bool
	layers map[int][]ztoc.Range // sorted, apart from each other
}

// add appends what of [start, end) is not there yet.
func (c *coverage) add(layer int, start, end int64) {
	if c.layers == nil {
		c.layers = map[int][]ztoc.Range{}
	}
	have := c.layers[layer]
	i, _ := slices.BinarySearchFunc(have, start, func(r ztoc.Range, at int64) int {
		if r.End < at {
			return -1
		}
		return 1
	})
	// have[i] is the first that ends at or behind start. Append the gaps, then join all that is touched.
	at, j := start, i
	for ; j < len(have) && have[j].Start <= end; j++ {
		if at < have[j].Start {
			if !c.append(layer, at, have[j].Start) {
				return
			}
		}
		at = max(at, have[j].End)
	}
	if at < end && !c.append(layer, at, end) {
		return
	}
	joined := ztoc.Range{Start: start, End: end}
	if j > i {
		joined.Start = min(start, have[i].Start)
		joined.End = max(end, have[j-1].End)
	}
	c.layers[layer] = slices.Replace(have, i, j, joined)
}

// append appends a range none of which is there, or makes the last one longer; false when there is no room.
func (c *coverage) append(layer int, start, end int64) bool {
	if n := len(c.ranges); n > 0 {
		if l := &c.ranges[n-1]; l.Layer == layer && l.End == start && c.bytes+end-start <= MaxProfileBytes {
			l.End = end
			c.bytes += end - start
			return true
		}
	}
	if len(c.ranges) == MaxProfileRanges || c.bytes+end-start > MaxProfileBytes {
		c.full = true
		return false
	}
	c.ranges = append(c.ranges, ProfileRange{layer, start, end})
	c.bytes += end - start
	return true
}

// last is the range appended last.
func (c *coverage) last() (ProfileRange, bool) {
	if len(c.ranges) == 0 {
		return ProfileRange{}, false
	}
	return c.ranges[len(c.ranges)-1], true
}
