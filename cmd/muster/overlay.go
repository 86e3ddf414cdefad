package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// overlayProbeName as os.Args[0] makes this program the one that tries.
const overlayProbeName = "muster-overlay-probe"

// mostOverlayLayers is beyond what any kernel stacks; 500 is usual.
const mostOverlayLayers = 600

// overlayLimit is how many lower directories this kernel's overlayfs stacks, found out by mounting in
// namespaces that end with the attempt; 0 when that is not allowed.
func overlayLimit(ctx context.Context) int {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{overlayProbeName}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		a := cmd.SysProcAttr
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.Output()
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(out)))
	return n
}

// probeOverlay is that program; it returns when this process is another one.
func probeOverlay() {
	if os.Args[0] != overlayProbeName {
		return
	}
	n, err := tryOverlay()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(n)
	os.Exit(0)
}

func tryOverlay() (int, error) {
	const dir = "/tmp"
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, err
	}
	if err := unix.Mount("probe", dir, "tmpfs", 0, ""); err != nil {
		return 0, err
	}
	// Short relative names, as docker has them, so that a page of mount options holds them all.
	if err := os.Chdir(dir); err != nil {
		return 0, err
	}
	names := make([]string, mostOverlayLayers)
	for i := range names {
		names[i] = strconv.FormatInt(int64(i), 36)
		if err := os.Mkdir(names[i], 0o755); err != nil {
			return 0, err
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "on"), 0o755); err != nil {
		return 0, err
	}
	stacks := func(n int) bool {
		if unix.Mount("probe", "on", "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(names[:n], ":")) != nil {
			return false
		}
		_ = unix.Unmount("on", unix.MNT_DETACH)
		return true
	}
	// The first number of layers, from 2 on, that fails; overlay wants two of them without an upper one.
	return sort.Search(mostOverlayLayers-1, func(i int) bool { return !stacks(i + 2) }) + 1, nil
}
