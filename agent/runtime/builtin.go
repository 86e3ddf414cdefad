package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageCapabilities are what the stage needs in a user namespace: it mounts, changes its root, makes
// directories in places of the user's own that have no write bit, and sends signals.
var stageCapabilities = []uintptr{
	unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_SETPCAP, unix.CAP_KILL, unix.CAP_FOWNER,
}

// An order is what the builtin runtime gets on descriptor 3; what it writes there is why it failed.
type order struct {
	Path     string
	Args     []string
	Env      []string
	Dir      string
	UID, GID int
	Groups   []int
	User     bool
}

// startBuiltin changes the stage's own root, which also lets go of every mount of the host, and then
// starts this program once more to become the command.
func (s *stage) startBuiltin(_ string, p process) (r running, err error) {
	if err := s.pivot(); err != nil {
		return r, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return r, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "order"), os.NewFile(uintptr(fds[1]), "order")
	defer ours.Close()
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{execName}, Env: []string{}, ExtraFiles: []*os.File{theirs}}
	r, err = s.spawn(cmd)
	_ = theirs.Close()
	if err != nil {
		return r, err
	}
	o := order{p.path, p.args, p.env, p.dir, p.uid, p.gid, p.groups, s.user}
	if err := json.NewEncoder(ours).Encode(o); err != nil {
		r.drop()
		return r, err
	}
	// The descriptor closes by itself when the command is executed.
	var f failure
	if json.NewDecoder(ours).Decode(&f) == nil {
		r.drop()
		return r, f.asError()
	}
	return r, nil
}

// pivot makes the assembled root the root of the stage's mount namespace.
func (s *stage) pivot() error {
	// pivot_root wants a mount point; its target for the old root must be beneath the new one.
	if err := unix.Chdir(s.root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	// The old root now lies over the new one, at the same place.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	s.root = "/"
	return os.Chdir("/")
}

// execMain is the builtin runtime: it becomes the command.
func execMain() int {
	runtime.LockOSThread() // capabilities belong to the thread, and the thread that executes keeps them
	unix.CloseOnExec(3)
	wire := os.NewFile(3, "order")
	var o order
	err := json.NewDecoder(wire).Decode(&o)
	if err == nil {
		err = o.execute()
	}
	_ = json.NewEncoder(wire).Encode(asFailure(err))
	return 1
}

func (o *order) execute() error {
	if err := dropPrivileges(o); err != nil {
		return err
	}
	if err := unix.Chdir(o.Dir); err != nil {
		return fmt.Errorf("working directory: %w", &os.PathError{Op: "chdir", Path: o.Dir, Err: err})
	}
	err := syscall.Exec(o.Path, o.Args, o.Env)
	text := fmt.Sprintf("%s cannot be executed: %v", filepath.Clean(o.Path), err)
	if errors.Is(err, unix.ENOENT) {
		return &CommandError{127, text + " (is its interpreter in the image?)"}
	}
	return &CommandError{126, text}
}

// dropPrivileges leaves a user nothing, and root docker's default capabilities.
func dropPrivileges(o *order) error {
	if o.User {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return os.NewSyscallError("no_new_privs", err)
		}
		return nil // executed as not-root without ambient capabilities: none are left
	}
	keep := map[int]bool{}
	for _, c := range containerCapabilities {
		keep[c] = true
	}
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if keep[c] {
			continue
		}
		// EINVAL: the kernel does not know this one, so nobody has it.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return os.NewSyscallError("dropping capabilities", err)
		}
	}
	if err := unix.Setgroups(o.Groups); err != nil {
		return os.NewSyscallError("setgroups", err)
	}
	if err := unix.Setresgid(o.GID, o.GID, o.GID); err != nil {
		return os.NewSyscallError("setgid", err)
	}
	if err := unix.Setresuid(o.UID, o.UID, o.UID); err != nil {
		return os.NewSyscallError("setuid", err)
	}
	return nil
}
