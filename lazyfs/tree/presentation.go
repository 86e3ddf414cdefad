package tree

// mode is how p shows a mode.
func (p Presentation) mode(m uint32) uint32 {
	if !p.User {
		return m
	}
	if k := m & modeType; k == modeChar || k == modeBlock {
		return modeReg | m&modePerm
	}
	return m
}

// apply is how p shows what the image has.
func (p Presentation) apply(a Attr) Attr {
	if !p.User {
		return a
	}
	a.Mode = p.mode(a.Mode)
	a.UID, a.GID, a.Rdev = p.UID, p.GID, 0
	return a
}

// xattrs is how many of an inode's n xattrs p shows.
func (p Presentation) xattrs(n int) int {
	if p.User {
		return 0
	}
	return n
}
