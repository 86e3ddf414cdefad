package store

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// FS is what was found out about a file system.
type FS struct {
	Type    string // as the kernel calls it in mountinfo, such as "ext4"
	Memory  bool   // its files take memory: tmpfs, ramfs
	Network bool   // other hosts may see its files, or nobody knows: network, cluster, FUSE and unknown file systems
	Holes   bool   // a sparse file takes only what was written
	Punch   bool   // holes can be punched into files in use
}

// localTypes are the file systems that belong to one kernel. What is not listed is treated like a network
// file system: a store on one wrongly taken as local gives wrong bytes, refetched for ever, on two hosts.
var localTypes = map[string]bool{
	"ext2": true, "ext3": true, "ext4": true, "xfs": true, "btrfs": true, "f2fs": true, "zfs": true, "jfs": true,
	"reiserfs": true, "nilfs2": true, "bcachefs": true, "overlay": true, "aufs": true, "tmpfs": true, "ramfs": true,
	"rootfs": true, "vfat": true, "exfat": true, "ntfs3": true, "hfsplus": true, "ecryptfs": true, "ufs": true,
}

// probeType finds the type of the file system that dir is on.
func probeType(dir string) (FS, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return FS{}, fmt.Errorf("%s: %w", dir, err)
	}
	typ, err := mountType(dir, st.Dev)
	if err != nil {
		return FS{}, err
	}
	return FS{Type: typ, Memory: typ == "tmpfs" || typ == "ramfs", Network: !localTypes[typ]}, nil
}

// mountType finds the type in /proc/self/mountinfo, which names what statfs only numbers (all FUSE file
// systems have one number): the entry with dir's device number; where one file system has several (btrfs gives
// its subvolumes numbers that are in no entry), the longest mount point that dir is below.
func mountType(dir string, dev uint64) (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	want := fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
	real, err := realPath(dir)
	if err != nil {
		return "", err
	}
	var byPath, byDev string
	longest := -1
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		// 36 35 98:0 /root /mount/point options optional... - type source superoptions
		left, right, ok := strings.Cut(sc.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 1 {
			continue
		}
		if l[2] == want {
			byDev = r[0]
		}
		if mp := unescapeMount(l[4]); below(real, mp) && len(mp) >= longest { // later mounts hide earlier ones
			longest, byPath = len(mp), r[0]
		}
	}
	if err := sc.Err(); err != nil {
		return "", err
	}
	if byDev != "" {
		return byDev, nil
	}
	if byPath != "" {
		return byPath, nil
	}
	return "", fmt.Errorf("%s is on no mount that /proc/self/mountinfo lists", dir)
}

// realPath is dir without symbolic links, as mountinfo has it.
func realPath(dir string) (string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

func below(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// probeHoles tries whether sparse files and hole punching work.
func (s *Store) probeHoles() (holes, punch bool) {
	t, err := s.newTemp()
	if err != nil {
		return true, true // nothing can be written at all; it will show
	}
	defer t.discard()
	const size = 1 << 20
	fd := int(t.f.Fd())
	var st unix.Stat_t
	if t.f.Truncate(size) != nil || unix.Fstat(fd, &st) != nil {
		return true, true
	}
	holes = st.Blocks*512 < size
	if _, err := t.f.WriteAt(make([]byte, 64<<10), 0); err != nil {
		return holes, true
	}
	return holes, punchHole(fd, 0, 64<<10) == nil
}

// punchHole gives the blocks of [off, off+n) back; they read as zeros.
func punchHole(fd int, off, n int64) error {
	for {
		err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if err != unix.EINTR {
			return err
		}
	}
}

// DefaultQuota is the quota of a store in dir that was given none, in bytes: half of what is free or taken by
// the store already, at most 200 GB; where files take memory a quarter of that, at most an eighth of
// the host's memory.
func DefaultQuota(dir string, f FS, used int64) int64 {
	const most, least = 200 << 30, 64 << 20
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return least
	}
	room := int64(st.Bavail)*st.Bsize + used
	if !f.Memory {
		return max(least, min(most, room/2))
	}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		room = min(room, int64(si.Totalram)*int64(si.Unit)/2)
	}
	return max(least, room/4)
}
