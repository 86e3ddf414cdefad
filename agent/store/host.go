package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A hostID says which kernel, and which host, a process runs on.
//
// What processes of a store share is memory and locks of one kernel, and /proc's boot ID names exactly
// that: it is one for all containers of a host, however their machine-id files look, and differs between
// hosts that were cloned from one image. But it changes with each boot, so machine ID and node name say
// whether a claim left by another kernel is this host's own from before.
type hostID struct {
	Boot    string `json:"boot"`
	Machine string `json:"machine"`
	Node    string `json:"node"`
}

func thisHost() (hostID, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return hostID{}, err
	}
	id := hostID{Boot: strings.TrimSpace(string(b))}
	for _, name := range []string{"/etc/machine-id", "/var/lib/dbus/machine-id"} {
		if b, err := os.ReadFile(name); err == nil {
			id.Machine = strings.TrimSpace(string(b))
			break
		}
	}
	id.Node, err = os.Hostname()
	return id, err
}

// claim makes the store this host's, or gives ErrHost if it is another's. Every open store holds a shared
// flock on the claim.
//
//   - Same boot ID: same kernel, nothing to do.
//   - Another one, but machine ID and node name are ours: we have been booted since.
//   - Another host's claim on a local file system: the disk was moved or the host installed anew
//     (diskless nodes get a new machine ID at each boot). Nobody can be at work on it, which
//     the flock confirms, and the claim becomes ours.
//   - Another host's claim on a file system that may reach further (AllowNetwork): flocks prove
//     nothing there, so it is refused.
func (s *Store) claim(me *hostID) error {
	if me == nil {
		id, err := thisHost()
		if err != nil {
			return fmt.Errorf("cannot tell which host this is: %w", err)
		}
		me = &id
	}
	s.boot = me.Boot
	// One process at a time looks and writes.
	if err := s.lock.lock(); err != nil {
		return err
	}
	defer s.lock.unlock()
	name := s.path("host")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	var was hostID
	b, err := os.ReadFile(name)
	if err == nil && len(b) > 0 {
		// What cannot be read (power was lost) says nothing about anybody.
		json.Unmarshal(b, &was) //nolint:errcheck // see above
	}
	switch {
	case was == *me:
	case was.Boot == "" || was.Boot == me.Boot || was.Machine == me.Machine && was.Node == me.Node:
		err = writeClaim(f, *me)
	case s.fs.Network || tryFlock(f, unix.LOCK_EX) != nil:
		err = fmt.Errorf("%w: %s (machine %s) has claimed it and this is %s (machine %s): give each host a directory of its own; if %s is gone for good, remove %s",
			ErrHost, was.Node, was.Machine, me.Node, me.Machine, was.Node, name)
	default:
		err = writeClaim(f, *me)
	}
	if err == nil {
		err = tryFlock(f, unix.LOCK_SH)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.Close()
		return err
	}
	s.host = f
	return nil
}

func writeClaim(f *os.File, id hostID) error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.WriteAt(append(b, '\n'), 0)
	return err
}
