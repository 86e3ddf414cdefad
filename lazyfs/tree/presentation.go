package tree

import "bytes"

// Presentation is how a table's ids, modes and xattrs look to a reader.
//
// For a user it is what `umoci unpack --rootless` leaves in a directory of that user:
//
//   - everything is owned by the user; modes are the image's, with setuid, setgid and sticky bits;
//   - devices, which a user cannot make, are empty regular files with the mode of the device; FIFOs stay;
//   - of the xattrs those that a user may set: system.*, and user.* where the mode lets the owner write, as the
//     mode is set first; not security.* and trusted.*;
//   - an owner other than root is kept in the xattr user.rootlesscontainers of such files and directories, as
//     the tools that follow that convention read it (a protocol buffer of two numbers, all ones for root).
type Presentation struct {
	// User false gives what the image has, for root's runtimes.
	User bool `json:"user,omitempty"`
	// UID and GID own everything when User is set.
	UID uint32 `json:"uid,omitempty"`
	GID uint32 `json:"gid,omitempty"`
}

// mode is how p shows a mode.
func (p Presentation) mode(m uint32) uint32 {
	if k := m & modeType; p.User && (k == modeChar || k == modeBlock) {
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

var (
	ownerXattr   = []byte("user.rootlesscontainers")
	userPrefix   = []byte("user.")
	systemPrefix = []byte("system.")
)

const ownerWrites = 0o200

// shows reports whether p shows the xattr of this name that an image's inode r has.
func (t *Table) shows(r Row, name []byte, p Presentation) bool {
	switch {
	case !p.User, bytes.HasPrefix(name, systemPrefix):
		return true
	case bytes.HasPrefix(name, userPrefix):
		return le.Uint32(t.row(r)[rowMode:])&ownerWrites != 0 && !bytes.Equal(name, ownerXattr)
	}
	return false
}

// hasOwner reports whether p shows in an xattr whose inode r really is.
func (t *Table) hasOwner(r Row, p Presentation) bool {
	if !p.User {
		return false
	}
	b := t.row(r)
	if le.Uint32(b[rowUID:]) == 0 && le.Uint32(b[rowGID:]) == 0 || le.Uint16(b[rowFlags:])&flagImplied != 0 {
		return false
	}
	mode := p.mode(le.Uint32(b[rowMode:]))
	return mode&ownerWrites != 0 && (mode&modeType == modeReg || mode&modeType == modeDir)
}

// owner is the value of user.rootlesscontainers: fields 1 and 2 as varints.
func (t *Table) owner(r Row) []byte {
	var v []byte
	for i, at := range []int{rowUID, rowGID} {
		n := le.Uint32(t.row(r)[at:])
		if n == 0 {
			n = 1<<32 - 1
		}
		v = append(v, byte(i+1)<<3)
		for ; n >= 0x80; n >>= 7 {
			v = append(v, byte(n)|0x80)
		}
		v = append(v, byte(n))
	}
	return v
}
