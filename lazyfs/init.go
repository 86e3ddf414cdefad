package lazyfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// An Init is the first exchange over a FUSE connection: what the kernel asked and what it was answered,
// byte for byte. The kernel asks once in the life of a mount. Whoever serves the mount after that, also a
// newer program, takes every limit from here and not from what it would have answered itself.
type Init struct {
	Request []byte `json:"request"`
	Reply   []byte `json:"reply"` // with its header
}

// Compat names a set of kernel features to do without, so that what runs on old kernels can be tested
// on new ones. Features are otherwise taken when the kernel offers them; no version is looked at.
type Compat string

// Compat514 does without what the kernels of RHEL 8 and 9 lack: everything in the second word of
// flags (resending, passthrough, …) and requests of more than 128 KiB.
const Compat514 Compat = "5.14"

// CompatVariable is the environment variable that mount processes and tests take a Compat from.
const CompatVariable = "MUSTER_FUSE_COMPAT"

// ParseCompat checks s, the value of a flag or of CompatVariable; empty asks for everything there is.
func ParseCompat(s string) (Compat, error) {
	switch c := Compat(s); c {
	case "", Compat514:
		return c, nil
	}
	return "", fmt.Errorf("%s=%q: only %q is known", CompatVariable, s, Compat514)
}

// mask is what c takes away from the flags that a kernel offers.
func (c Compat) mask(flags uint64) uint64 {
	if c == Compat514 {
		return flags & (1<<30 - 1) &^ fuse.CAP_MAX_PAGES
	}
	return flags
}

// What we take of what the kernel offers.
const wanted uint64 = fuse.CAP_ASYNC_READ |
	fuse.CAP_EXPORT_SUPPORT | // node IDs are rows: "." and ".." of any of them can be looked up at any time
	fuse.CAP_READDIRPLUS | // and never AUTO: a walk that stats is what image trees get
	fuse.CAP_NO_OPEN_SUPPORT | // opening costs no request at all; implies keeping the page cache
	fuse.CAP_NO_OPENDIR_SUPPORT |
	fuse.CAP_PARALLEL_DIROPS |
	fuse.CAP_MAX_PAGES |
	fuse.CAP_CACHE_SYMLINKS |
	fuse.CAP_EXPLICIT_INVAL_DATA | // and never AUTO_INVAL: mtimes do not change
	fuse.CAP_INIT_EXT |
	fuse.CAP_HAS_RESEND |
	fuse.CAP_ALLOW_IDMAP

const (
	maxPages      = 256  // of 4 KiB in one read: 1 MiB
	maxBackground = 4096 // reads ahead that the kernel may have waiting; those beyond would hold back reads of what is at hand
)

// Negotiate reads the kernel's INIT from a fresh connection and answers it. It is the first thing that
// must happen after mounting, and is bounded: the kernel sends INIT with the mount. With passthrough, that is taken too when
// the kernel offers it: from then on opening a file costs a request (see backing.go).
func Negotiate(dev *os.File, compat Compat, passthrough bool) (Init, error) {
	buf := make([]byte, minReadBuffer)
	var n int
	var err error
	for {
		if n, err = syscall.Read(int(dev.Fd()), buf); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		return Init{}, fmt.Errorf("read INIT from the kernel: %w", err)
	}
	in, err := parseInit(buf[:n])
	if err != nil {
		return Init{}, err
	}
	out := fuse.InitOut{
		Major:               protocolMajor,
		Minor:               min(protocolMinor, in.Minor),
		MaxReadAhead:        max(in.MaxReadAhead, 1<<20),
		MaxBackground:       maxBackground,
		CongestionThreshold: maxBackground / 4 * 3,
		MaxWrite:            4096, // nothing is written; this bounds the size of a request
		TimeGran:            1,
	}
	offered := uint64(in.Flags)
	if in.Flags&fuse.CAP_INIT_EXT != 0 {
		offered = in.Flags64()
	}
	want := wanted
	if passthrough {
		want |= fuse.CAP_PASSTHROUGH
		out.MaxStackDepth = 1 // one file system below ours, none below that; an overlay over ours still works
	}
	flags := compat.mask(offered) & want
	out.Flags, out.Flags2 = uint32(flags), uint32(flags>>32)
	if flags&fuse.CAP_MAX_PAGES != 0 {
		out.MaxPages = maxPages
	}
	head := fuse.OutHeader{Length: uint32(outHeaderSize + initOutSize), Unique: in.Unique}
	reply := slices.Concat(bytesOf(&head), bytesOf(&out))
	if _, err := syscall.Write(int(dev.Fd()), reply); err != nil {
		return Init{}, fmt.Errorf("answer the kernel's INIT: %w", err)
	}
	return Init{Request: buf[:n:n], Reply: reply}, nil
}

func parseInit(req []byte) (*fuse.InitIn, error) {
	if len(req) >= inHeaderSize && len(req) < int(initInSize) {
		// Before 7.36 the request ended behind the first word of flags.
		req = append(slices.Clone(req), make([]byte, int(initInSize)-len(req))...)
	}
	in := as[fuse.InitIn](req)
	if in == nil || in.Opcode != opInit {
		return nil, errors.New("the kernel's first request is not INIT")
	}
	if in.Major != protocolMajor || in.Minor < oldestProtocol {
		return nil, fmt.Errorf("the kernel speaks FUSE %d.%d, %d.%d is needed", in.Major, in.Minor, protocolMajor, oldestProtocol)
	}
	return in, nil
}

const initInSize = uintptr(inHeaderSize + 64)

// limits are what an Init agreed on, as far as a server needs it.
type limits struct {
	flags   uint64
	minor   uint32
	request int // bytes that the longest request may have
}

func (i Init) limits() (limits, error) {
	if len(i.Reply) != outHeaderSize+initOutSize {
		return limits{}, fmt.Errorf("stored INIT reply has %d bytes", len(i.Reply))
	}
	out := as[fuse.InitOut](slices.Clone(i.Reply[outHeaderSize:]))
	return limits{
		flags:   out.Flags64(),
		minor:   out.Minor,
		request: max(minReadBuffer, inHeaderSize+40+int(out.MaxWrite)),
	}, nil
}

// passthrough says whether files can be passed through over this connection (agreed), and whether they could be over another
// one that is made now (possible).
func (i Init) passthrough() (agreed, possible bool) {
	in, err := parseInit(i.Request)
	l, lerr := i.limits()
	if err != nil || lerr != nil || in.Flags&fuse.CAP_INIT_EXT == 0 {
		return false, false
	}
	// A Compat that masks passthrough masks all of the second word.
	return l.flags&fuse.CAP_PASSTHROUGH != 0, in.Flags64()&fuse.CAP_PASSTHROUGH != 0 && l.flags>>32 != 0
}

// String tells what was agreed, for logs.
func (i Init) String() string {
	l, err := i.limits()
	if err != nil {
		return err.Error()
	}
	b, _ := json.Marshal(map[string]any{"minor": l.minor, "flags": fmt.Sprintf("%#x", l.flags)})
	return string(b)
}
