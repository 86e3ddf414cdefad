package fetch

import (
	"fmt"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

const (
	rejectLimit  = 3                // wrong answers for one range after which it is given up
	rejectForget = 30 * time.Second // after which a given-up range is tried again
)

// A reject is a range that came wrong. Guarded by Chain.mu.
type reject struct {
	count int
	fresh bool // some of it has come from the origin since the last Reject
	last  time.Time
}

// Reject drops r of the blob because it did not match its digest; the next read fetches it again, from
// elsewhere if the origin has an elsewhere. After the third wrong answer for the same range it returns an
// error to give up with: ErrWrong, with cause.
//
// Several readers may have been given the same wrong bytes. Only the first of their calls counts.
func (c *Chain) Reject(ref ztoc.BlobRef, r ztoc.Range, cause error) error {
	b, err := c.blob(ref, r)
	if err != nil {
		return err
	}
	if o, ok := c.o.Origin.(Rejecter); ok {
		o.Reject(ref.Digest, r, cause) // before they are dropped: an agent looks at them in the store
	}
	if st := b.kept.get(); st != nil {
		st.Drop(r)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Rejected++
	for _, f := range b.flights {
		if f.base < r.End && r.Start < f.pos { // it may be storing them right now
			f.rejected = append(f.rejected, r)
		}
	}
	if b.rejects == nil {
		b.rejects = map[ztoc.Range]*reject{}
	}
	j := b.rejects[r]
	if j == nil || j.count >= rejectLimit && time.Since(j.last) > rejectForget {
		if len(b.rejects) >= 4096 { // a blob that is wrong everywhere
			b.rejects = map[ztoc.Range]*reject{}
		}
		j = &reject{fresh: true}
		b.rejects[r] = j
	}
	j.last = time.Now()
	if j.fresh {
		j.count++
		j.fresh = false
	}
	if j.count >= rejectLimit {
		return fmt.Errorf("%w: blob %s %v, %d times: %w", ErrWrong, ref.Digest, r, j.count, cause)
	}
	return nil
}

// refetched notes that r has come from the origin.
func (b *blob) refetched(r ztoc.Range) {
	for k, j := range b.rejects {
		if k.Start < r.End && r.Start < k.End {
			j.fresh = true
		}
	}
}
