package store

import (
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// Claim announces to other processes that this one fetches r. If one of them has announced some of r
// already, nothing is announced and by is the first such range. Claims are advice and bind nobody. They are
// locks on ranges of the file, so the kernel ends those of a killed process. All handles in a process are
// one claimant.
func (b *Blob) Claim(r ztoc.Range) (by ztoc.Range, ok bool) {
	r = b.clip(r)
	if r.Empty() || !b.enter() {
		return ztoc.Range{}, true
	}
	defer b.exit()
	fd := b.file.f.Fd()
	for range 10 {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: r.Start, Len: r.Len()}
		err := unix.FcntlFlock(fd, unix.F_OFD_SETLK, &lk)
		if err == unix.EINTR {
			continue
		}
		if err != unix.EAGAIN && err != unix.EACCES {
			return ztoc.Range{}, true // done, or such locks do not work here
		}
		lk = unix.Flock_t{Type: unix.F_WRLCK, Start: r.Start, Len: r.Len()}
		if unix.FcntlFlock(fd, unix.F_OFD_GETLK, &lk) != nil {
			return ztoc.Range{}, true
		}
		if lk.Type != unix.F_UNLCK { // else it was released in between
			return ztoc.Range{Start: lk.Start, End: lk.Start + lk.Len}, false
		}
	}
	return ztoc.Range{}, true
}

// Release ends a claim on r.
func (b *Blob) Release(r ztoc.Range) {
	r = b.clip(r)
	if r.Empty() || !b.enter() {
		return
	}
	defer b.exit()
	lk := unix.Flock_t{Type: unix.F_UNLCK, Start: r.Start, Len: r.Len()}
	unix.FcntlFlock(b.file.f.Fd(), unix.F_OFD_SETLK, &lk) //nolint:errcheck // at worst others wait a little longer
}

// WillNeed starts to read r into the page cache.
func (b *Blob) WillNeed(r ztoc.Range) {
	r = b.clip(r)
	if r.Empty() || !b.enter() {
		return
	}
	defer b.exit()
	unix.Fadvise(int(b.file.f.Fd()), r.Start, r.Len(), unix.FADV_WILLNEED) //nolint:errcheck // a hint
}
