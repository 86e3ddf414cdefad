package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs/mountd"
	"github.com/muster-hpc/muster/tests/bench/report"
)

// longestPause is the target, seconds.
const longestPause = 0.3

// pauses measures how long requests wait when processes of the mount are replaced, while somebody reads.
func (b *bench) pauses(ctx context.Context) error {
	dir, umount, err := b.mount(ctx)
	if err != nil {
		return err
	}
	stop, read := make(chan struct{}), make(chan error, 1)
	go func() { read <- readOn(dir, stop) }()
	keeper, _, err := b.helper("as-keeper", dir)
	if err != nil {
		return err
	}
	for _, x := range []struct {
		name string
		hurt func() error
	}{
		{"server killed", func() error { return kill(dir, "server") }},
		{"parent killed", func() error { return kill(dir, "parent") }},
		{"both killed, with a keeper", func() error { return kill(dir, "parent", "server") }},
		{"upgrade", func() error { return b.call(ctx, "upgrade-mounts", dir) }},
	} {
		var pauses []float64
		for range b.kills {
			time.Sleep(time.Duration(200+rand.IntN(200)) * time.Millisecond)
			p, err := pause(dir, x.hurt)
			if err != nil {
				return fmt.Errorf("%s: %w", x.name, err)
			}
			pauses = append(pauses, p.Seconds())
		}
		b.rows = append(b.rows, report.AtMost(x.name+": pause, median", report.Median(pauses), "s", longestPause))
	}
	close(stop)
	if err := errors.Join(<-read, keeper.end()); err != nil {
		return err
	}
	return umount()
}

// pause is the longest that a request waited from just before hurt is called until half a second after it has returned.
func pause(dir string, hurt func() error) (longest time.Duration, err error) {
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			began := time.Now()
			if err := unix.Statfs(dir, new(unix.Statfs_t)); err != nil {
				done <- err
				return
			}
			longest = max(longest, time.Since(began))
			select {
			case <-stop:
				done <- nil
				return
			case <-time.After(500 * time.Microsecond):
			}
		}
	}()
	time.Sleep(5 * time.Millisecond)
	err = hurt()
	time.Sleep(500 * time.Millisecond)
	close(stop)
	return longest, errors.Join(err, <-done)
}

// readOn reads files of the mount past the page cache until stop is closed.
func readOn(dir string, stop <-chan struct{}) error {
	buf := make([]byte, 1<<20)
	for i := 0; ; i++ {
		f, err := os.Open(fmt.Sprintf("%s/data/%d", dir, i%files))
		if err != nil {
			return err
		}
		for at := int64(0); at < fileSize; at += int64(len(buf)) {
			select {
			case <-stop:
				return f.Close()
			default:
			}
			if _, err := f.ReadAt(buf, at); err != nil {
				return errors.Join(err, f.Close())
			}
			time.Sleep(5 * time.Millisecond)
		}
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		if err := f.Close(); err != nil {
			return err
		}
	}
}

// kill kills the mount's processes of these roles, at once.
func kill(dir string, roles ...string) error {
	var pids []int
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range all {
		b, _ := os.ReadFile(name)
		for _, r := range roles {
			if strings.HasSuffix(string(b), "\x00"+r+"\x00"+dir+"\x00") {
				pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
				pids = append(pids, pid)
			}
		}
	}
	if len(pids) != len(roles) {
		return fmt.Errorf("found %d processes to kill, not %v", len(pids), roles)
	}
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // stopped first, so that none starts another
		for _, pid := range pids {
			if err := unix.Kill(pid, sig); err != nil {
				return err
			}
		}
	}
	return nil
}

// keep is the keeper, in a process of its own.
func keep(args []string) error {
	k := mountd.NewKeeper(nil, nil)
	defer k.Close()
	if err := k.Keep(context.Background(), args[0]); err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode("kept"); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
