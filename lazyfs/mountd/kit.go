package mountd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// A kit is everything that a mount is besides its processes. Parent and servers all have it, a keeper may: whoever is
// left can start the others.
type kit struct {
	dev   *os.File // /dev/fuse
	slots *os.File // the memory for requests, shared by all servers, behind it the book and how files were opened
	state *os.File // a standing
	table *os.File // nil when there is none

	// A pipe that nobody writes to. The mount's processes have both ends, keepers the one to read from: it ends when
	// no process of the mount is left.
	alive, life *os.File

	// The program of the mount's processes when a keeper asked, for keepers only: they may be of another version.
	exe *os.File
}

// A standing is what does not change in the life of a mount and is no descriptor. It may hold credentials (Request), and is
// in memory only.
type standing struct {
	Version int               `json:"version"` // standingVersion
	Slots   int               `json:"slots"`   // lazyfs.SlotsVersion of the memory for requests
	Start   message           `json:"start"`
	State   []byte            `json:"state"`
	Init    lazyfs.Init       `json:"init"`
	Conn    lazyfs.Connection `json:"conn"`
}

const standingVersion = 1

// maxStanding bounds a standing, bytes.
const maxStanding = 256 << 10

// memory is a file that is in memory only.
func memory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func newSlots() (*os.File, error) {
	f, err := memory("muster-requests")
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(modesOffset + lazyfs.ModesSize); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// renew gives k a pipe of its own: of the last nobody is left.
func (k *kit) renew() error {
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	closeAll(slices.DeleteFunc([]*os.File{k.alive, k.life}, func(f *os.File) bool { return f == nil }))
	k.alive, k.life = os.NewFile(uintptr(fd[0]), "alive"), os.NewFile(uintptr(fd[1]), "life")
	return nil
}

func (k *kit) keep(s standing) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := memory("muster-mount")
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		_ = f.Close()
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		_ = f.Close()
		return os.NewSyscallError("seal", err)
	}
	k.state = f
	return nil
}

// errVersion says that a mount was made by a program whose memory of it this one does not understand.
var errVersion = errors.New("the mount was made by a muster of another version")

func (k *kit) standing() (s standing, err error) {
	b, err := io.ReadAll(io.NewSectionReader(k.state, 0, maxStanding))
	if err != nil {
		return s, err
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&s); err != nil {
		return s, fmt.Errorf("what is known of the mount: %w", err)
	}
	if s.Version != standingVersion || s.Slots != lazyfs.SlotsVersion {
		return s, fmt.Errorf("%w: %d.%d, this one knows %d.%d", errVersion, s.Version, s.Slots, standingVersion, lazyfs.SlotsVersion)
	}
	return s, nil
}

// pack is k to be sent: names and descriptors. Keepers get exe, the others life.
func (k *kit) pack(keeper bool) (names []string, files []*os.File) {
	add := func(name string, f *os.File) {
		if f != nil {
			names, files = append(names, name), append(files, f)
		}
	}
	add("dev", k.dev)
	add("slots", k.slots)
	add("state", k.state)
	add("table", k.table)
	add("alive", k.alive)
	if keeper {
		add("exe", k.exe)
	} else {
		add("life", k.life)
	}
	return names, files
}

// unpack is the other end of pack. What it does not know it closes.
func unpack(m message, files []*os.File) (*kit, error) {
	k := &kit{}
	at := map[string]**os.File{
		"dev": &k.dev, "slots": &k.slots, "state": &k.state, "table": &k.table, "alive": &k.alive, "life": &k.life, "exe": &k.exe,
	}
	for i, f := range files {
		if i < len(m.Files) && at[m.Files[i]] != nil && *at[m.Files[i]] == nil {
			*at[m.Files[i]] = f
			continue
		}
		_ = f.Close()
	}
	if k.dev == nil || k.slots == nil || k.state == nil || k.alive == nil {
		k.Close()
		return nil, fmt.Errorf("%s message without the mount's descriptors", m.Kind)
	}
	return k, nil
}

func (k *kit) Close() {
	_, files := k.pack(false)
	closeAll(files)
	if k.exe != nil {
		_ = k.exe.Close()
	}
}

// program is this process's program as a descriptor, to be executed.
func program() (*os.File, error) {
	fd, err := unix.Open("/proc/self/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /proc/self/exe", err)
	}
	return os.NewFile(uintptr(fd), "exe"), nil
}

// pathOf is a path by which a child of this process can execute f.
func pathOf(f *os.File) (path string, err error) {
	c, err := f.SyscallConn()
	if err == nil {
		err = c.Control(func(fd uintptr) { path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) })
	}
	return path, err
}

// The book, behind the slots, is JSON, written by whoever replaces a process that died.
type book struct {
	Answered uint64                 `json:"answered"` // requests, when the last death was written down
	Deaths   map[string][]time.Time `json:"deaths"`   // see mourn
}

const (
	bookSize    = 16 << 10
	modesOffset = lazyfs.SlotsSize + bookSize // of lazyfs.Config.Modes
)

func (k *kit) readBook() (b book) {
	buf := make([]byte, bookSize)
	n, _ := k.slots.ReadAt(buf, lazyfs.SlotsSize)
	_ = json.Unmarshal(bytes.TrimRight(buf[:n], "\x00"), &b) // a half-written one is an empty one
	if b.Deaths == nil {
		b.Deaths = map[string][]time.Time{}
	}
	return b
}

func (k *kit) writeBook(b book) error {
	buf, err := json.Marshal(b)
	if err != nil || len(buf) > bookSize {
		return errors.Join(err, fmt.Errorf("book of %d bytes", len(buf)))
	}
	_, err = k.slots.WriteAt(append(buf, make([]byte, bookSize-len(buf))...), lazyfs.SlotsSize)
	return err
}
