package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A process is a Command with everything looked up in the image.
type process struct {
	path     string // of the program, in the image
	args     []string
	env      []string // no name twice
	dir      string
	uid, gid int
	groups   []int
}

// DefaultPath is docker's, for images that say none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// maxDatabase bounds what is read of an image's passwd and group.
const maxDatabase = 4 << 20

// resolve looks up user, home, working directory and program, and then closes the root for writing if
// it has to be read-only.
func (s *stage) resolve(c Command) (p process, err error) {
	if len(c.Args) == 0 || c.Args[0] == "" {
		return p, &CommandError{127, "the image names no command and none was given"}
	}
	p.args = c.Args
	home, err := s.identity(c.User, &p)
	if err != nil {
		return p, err
	}
	p.env = environment(c.Env, home)
	p.dir = filepath.Clean("/" + c.Dir)
	d, err := beneath(s.root, p.dir, missingDir)
	if err != nil {
		return p, fmt.Errorf("working directory: %w", err)
	}
	_ = d.Close()
	if err := s.seal(); err != nil {
		return p, err
	}
	p.path, err = s.find(p.args[0], p.dir, lookupEnv(p.env, "PATH"))
	return p, err
}

// environment lets later entries win over earlier ones and adds what every program expects.
func environment(given []string, home string) (env []string) {
	at := map[string]int{}
	for _, kv := range slices.Concat([]string{"PATH=" + DefaultPath, "HOME=" + home}, given) {
		name, _, ok := strings.Cut(kv, "=")
		if !ok || name == "" {
			continue
		}
		if i, ok := at[name]; ok {
			env[i] = kv
			continue
		}
		at[name] = len(env)
		env = append(env, kv)
	}
	return env
}

func lookupEnv(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// find is the program that name means in the image: docker's rules and exit codes.
func (s *stage) find(name, dir, path string) (string, error) {
	var candidates []string
	if strings.Contains(name, "/") {
		candidates = []string{name}
	} else {
		for d := range strings.SplitSeq(path, ":") {
			candidates = append(candidates, filepath.Join(d, name))
		}
	}
	denied := ""
	for _, c := range candidates {
		if !filepath.IsAbs(c) {
			c = filepath.Join(dir, c)
		}
		f, err := beneath(s.root, c, missingFails)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EACCES) {
			denied = c
			continue
		}
		if err != nil {
			return "", err
		}
		st, err := f.Stat()
		_ = f.Close()
		if err != nil {
			return "", err
		}
		if st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return c, nil
		}
		denied = c
	}
	if denied != "" {
		return "", &CommandError{126, fmt.Sprintf("%s cannot be executed: it is no file, or its mode does not allow it", denied)}
	}
	if strings.Contains(name, "/") {
		return "", &CommandError{127, fmt.Sprintf("%s is not in the image", name)}
	}
	return "", &CommandError{127, fmt.Sprintf("%s is not in the image's PATH (%s)", name, path)}
}

// identity sets who p runs as, and returns the home directory.
func (s *stage) identity(who string, p *process) (home string, err error) {
	if s.user {
		return s.callerIdentity(who, p)
	}
	if who == "" || who == "0" || who == "root" {
		return "/root", nil // the same in every image: nothing to read, nothing to fetch
	}
	name, group, hasGroup := strings.Cut(who, ":")
	passwd, err := readBeneath(s.root, "/etc/passwd", maxDatabase)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	home = "/"
	found := false
	for f := range fields(passwd, 7) {
		if f[0] != name && f[2] != name {
			continue
		}
		uid, err1 := strconv.Atoi(f[2])
		gid, err2 := strconv.Atoi(f[3])
		if err1 == nil && err2 == nil {
			p.uid, p.gid, home, found = uid, gid, f[5], true
			name = f[0]
			break
		}
	}
	if !found {
		if p.uid, err = number(name); err != nil {
			return "", fmt.Errorf("user %q is not in the image's /etc/passwd", name)
		}
	}
	if !hasGroup && !found {
		return home, nil
	}
	groups, err := readBeneath(s.root, "/etc/group", maxDatabase)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	matched := false
	for f := range fields(groups, 4) {
		gid, err := strconv.Atoi(f[2])
		if err != nil {
			continue
		}
		if hasGroup && (f[0] == group || f[2] == group) && !matched {
			p.gid, matched = gid, true
		}
		if !hasGroup && slices.Contains(strings.Split(f[3], ","), name) {
			p.groups = append(p.groups, gid)
		}
	}
	if hasGroup && !matched {
		if p.gid, err = number(group); err != nil {
			return "", fmt.Errorf("group %q is not in the image's /etc/group", group)
		}
	}
	return home, nil
}

// number reads a numeric id, which needs no entry in the image.
func number(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err
}

// fields gives the lines of a colon-separated database that have at least n fields.
func fields(db []byte, n int) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		for line := range bytes.Lines(db) {
			f := strings.Split(strings.TrimRight(string(line), "\r\n"), ":")
			if len(f) >= n && !strings.HasPrefix(f[0], "#") && !yield(f) {
				return
			}
		}
	}
}

// callerIdentity is the caller's own; the image is told his name, since many programs fail for a user
// who has none.
func (s *stage) callerIdentity(who string, p *process) (home string, err error) {
	p.uid, p.gid = s.uid, s.gid
	name := callerName(s.uid)
	u, g, _ := strings.Cut(who, ":")
	if (u != "" && u != strconv.Itoa(s.uid) && u != name) || (g != "" && g != strconv.Itoa(s.gid)) {
		return "", fmt.Errorf("%w: --user %s: without root a command runs as its caller (%s) only", ErrUnsupported, who, name)
	}
	home = "/"
	if h := os.Getenv("HOME"); filepath.IsAbs(h) && h != "/" {
		if f, err := beneath(s.root, h, missingFails); err == nil {
			_ = f.Close()
			home = h
		}
	}
	passwd, err := readBeneath(s.root, "/etc/passwd", maxDatabase)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	id := strconv.Itoa(s.uid)
	for f := range fields(passwd, 7) {
		if f[2] == id {
			return home, nil
		}
	}
	if err := s.appendLine("/etc/passwd", passwd, fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh", name, s.uid, s.gid, home)); err != nil {
		return home, nil // a root that cannot be written: the command has to do without a name
	}
	group, err := readBeneath(s.root, "/etc/group", maxDatabase)
	if err == nil {
		for f := range fields(group, 3) {
			if f[2] == strconv.Itoa(s.gid) {
				return home, nil
			}
		}
		_ = s.appendLine("/etc/group", group, fmt.Sprintf("%s:x:%d:", name, s.gid))
	}
	return home, nil
}

// appendLine adds a line to a file of the image, in the writable layer.
func (s *stage) appendLine(path string, old []byte, line string) error {
	at, err := beneath(s.root, path, missingFile)
	if err != nil {
		return err
	}
	defer at.Close()
	f, err := os.OpenFile(proc(at), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if len(old) > 0 && old[len(old)-1] != '\n' {
		line = "\n" + line
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}

func callerName(uid int) string {
	name := os.Getenv("USER")
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		name = u.Username
	}
	if name == "" || strings.ContainsAny(name, ":\n/ ") {
		return "user"
	}
	return name
}
