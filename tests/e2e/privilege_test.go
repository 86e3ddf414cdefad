package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-hpc/muster/tests/images"
)

// rights are the programs of the image escape that would be root if anybody let them.
var rights = []string{"bin/setuid-root", "bin/setgid-root", "bin/cap-setuid", "opt/setuid-link", "opt/setuid-root"}

// TestMountsGiveNoRights: neither root's mount nor his own makes a user root or lets him at devices and at
// root's files.
func TestMountsGiveNoRights(t *testing.T) {
	ref := image(t, "escape")
	visitor := newHost(t, somebody)
	for who, h := range map[string]*host{"root's mount": newHost(t, 0), "his own mount": visitor} {
		t.Run(who, func(t *testing.T) {
			dir := h.mount(ref)
			for _, p := range rights {
				out, err := visitor.sh(filepath.Join(dir, p))
				if err == nil || !strings.Contains(out, "not root") {
					t.Errorf("%s: %q, %v", p, out, err)
				}
			}
			for _, d := range []string{"null", "mem", "loop"} {
				// A rootless unpack has empty files in place of devices.
				for _, how := range []string{"[ -c %s -o -b %s ] && head -c1 %s", ": > %s"} {
					if out, err := visitor.sh(strings.ReplaceAll(how, "%s", filepath.Join(dir, "nodes", d))); err == nil {
						t.Errorf("%s nodes/%s succeeds: %q", how, d, out)
					}
				}
			}
			if h != visitor {
				if out, err := visitor.sh("cat " + dir + "/etc/shadow"); err == nil {
					t.Errorf("a user reads root's file: %q", out)
				}
			}
			b, err := os.ReadFile("/proc/self/mounts")
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); f[1] == dir && (!strings.Contains(f[3], "nosuid") || !strings.Contains(f[3], "nodev") || !strings.HasPrefix(f[3], "ro,")) {
					t.Errorf("mounted %s", line)
				}
			}
		})
	}
	t.Run("another user's", func(t *testing.T) {
		dir := visitor.mount(ref)
		other := newHost(t, 65533)
		if out, err := other.sh("ls " + dir); err == nil {
			t.Errorf("a user sees another's mount: %s", out)
		}
	})
}

// userRuntimes are what starts commands for users here; all but builtin have to be installed for these tests.
func userRuntimes(t testing.TB) []string {
	t.Helper()
	for _, p := range []string{"bwrap", "ch-run", "runc"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%v: tests/setup test installs it", err)
		}
	}
	return []string{"bwrap", "ch-run", "runc", "builtin"}
}

// TestRunGivesNoRights: a command that a user runs in an image stays the user, whatever starts it.
func TestRunGivesNoRights(t *testing.T) {
	escape, python := image(t, "escape"), indexed(t, "debian-python")
	for _, runtime := range userRuntimes(t) {
		t.Run(runtime, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, somebody)
			for _, p := range rights {
				r := h.muster("run", "--runtime", runtime, escape, "/"+p)
				// With runc a user is root of nothing but his own files; the second half shows that.
				if root := r.code == 0; r.code > 1 || root && runtime != "runc" {
					t.Errorf("%s: exit code %d, %q, %s", p, r.code, r.stdout, r.stderr)
				}
			}
			dir := h.newDir()
			r := h.muster("run", "--runtime", runtime, "--bind", dir+":/work", "--bind", "/etc:/host-etc", python, "/bin/sh", "-c", `
				echo mine > /work/file
				cp /bin/sh /work/sh && chmod 6755 /work/sh
				chown 0:0 /work/file 2>/dev/null
				cat /host-etc/shadow >/dev/null 2>&1 && echo READ SHADOW
				head -c1 /dev/mem >/dev/null 2>&1 && echo READ MEM
				mknod /work/mem c 1 1 2>/dev/null && head -c1 /work/mem >/dev/null 2>&1 && echo MADE A NODE
				echo x > /sys/kernel/mm/ksm/run 2>/dev/null && echo WROTE SYS
				mount -t tmpfs none /mnt 2>/dev/null && echo MOUNTED
				exit 0`)
			bad := r.stdout
			if runtime == "runc" {
				bad = strings.ReplaceAll(bad, "MOUNTED\n", "") // root of his own namespace
			}
			if r.code != 0 || bad != "" {
				t.Errorf("exit code %d, %q, %s", r.code, r.stdout, r.stderr)
			}
			for _, f := range []string{"file", "sh"} {
				if out, err := h.sh("stat -c %u " + filepath.Join(dir, f)); err != nil || strings.TrimSpace(out) != "65534" {
					t.Errorf("what a user wrote belongs to %q, %v", out, err)
				}
			}
		})
	}
}

// trickyImage leads out of itself wherever a runtime may look: victim is a directory of the host.
func trickyImage(victim string) images.Image {
	up := strings.Repeat("../", 12)
	return images.Image{
		Config: images.RunConfig{
			Env: []string{"PATH=/bin:" + victim + ":.", "LD_PRELOAD=" + victim + "/evil.so", "LD_LIBRARY_PATH=/lib"}, Cmd: []string{"/bin/say"}, WorkingDir: "/up" + victim,
		},
		Layers: []images.Blob{images.Layer(
			images.Dir("."), images.Dir("bin"), images.File("bin/say", string(say())).With(0o755, 0, 0),
			images.File("bin/runc", "#!/bin/say\n").With(0o4755, 0, 0),
			images.Symlink("out", victim), images.Symlink("up", up), images.Symlink("etc", strings.TrimSuffix(up, "/")+victim),
			images.Symlink("proc", victim), images.Symlink("sys", up+victim[1:]), images.Symlink("dev", victim),
			images.Symlink("file", victim+"/secret"),
		)},
	}
}

// TestImagesThatLeadOut: binds, working directories and an image's own links never touch the host.
func TestImagesThatLeadOut(t *testing.T) {
	victim, err := os.MkdirTemp(home, "victim-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(victim, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(victim, "secret"), []byte("secret"), 0o666); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(victim)
	ref := made(t, "tricky", trickyImage(victim))
	closed := newHost(t, 0).newDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(closed, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	untouched := func(t *testing.T, after string) {
		t.Helper()
		names, _ := filepath.Glob(victim + "/*")
		b, err := os.ReadFile(filepath.Join(victim, "secret"))
		if len(names) != 1 || err != nil || string(b) != "secret" {
			t.Errorf("%s touched the host: %v %q", after, names, b)
			for _, n := range names {
				if filepath.Base(n) != "secret" {
					os.RemoveAll(n)
				}
			}
		}
		if _, err := os.Stat("/muster-was-here"); err == nil {
			t.Errorf("%s made a file in the host's root", after)
			os.RemoveAll("/muster-was-here")
		}
	}
	for _, user := range []uint32{0, somebody} {
		h := newHost(t, user)
		runtimes := []string{"runc", "builtin"}
		if user != 0 {
			runtimes = userRuntimes(t)
		}
		src := h.newDir()
		for _, runtime := range runtimes {
			for _, args := range [][]string{
				{ref},
				{"--workdir", "/out", ref, "/bin/say"},
				{"--workdir", "/../../.." + victim, ref, "/bin/say"},
				{"--bind", src + ":/out/new", ref, "/bin/say"},
				{"--bind", src + ":/out", ref, "/bin/say"},
				{"--bind", src + ":/up/muster-was-here", ref, "/bin/say"},
				{"--bind", src + ":/etc/../../../.." + victim + "/new", ref, "/bin/say"},
				{"--bind", src + ":/up" + victim + "/new", ref, "/bin/say"},
				{"--bind", "/etc/passwd:/file", ref, "/bin/say"},
			} {
				r := h.muster(append([]string{"run", "--runtime", runtime}, args...)...)
				// It may work, inside the image, or be refused; it is never root's say for a user.
				if r.code == 0 && user != 0 && runtime != "runc" {
					t.Errorf("%s %v: a user's command is root: %q", runtime, args, r.stdout)
				}
				if r.code > 1 {
					plainMessage(t, r.stderr)
				}
				untouched(t, runtime+" "+strings.Join(args, " "))
			}
		}
		if user == 0 {
			continue
		}
		// Another's closed directory: he cannot name what is in it, and sees nothing in it.
		python := indexed(t, "debian-python")
		for _, runtime := range runtimes {
			r := h.muster("run", "--runtime", runtime, "--bind", closed+"/secret:/mnt/secret", python, "cat", "/mnt/secret")
			if r.code != 125 || strings.Contains(r.stdout, "secret") {
				t.Errorf("%s: binding from a closed directory: exit code %d, %q", runtime, r.code, r.stdout)
			}
			plainMessage(t, r.stderr, closed, "permission denied")
			r = h.muster("run", "--runtime", runtime, "--bind", closed+":/mnt", python, "cat", "/mnt/secret")
			if r.code == 0 || strings.Contains(r.stdout, "secret") {
				t.Errorf("%s: a closed directory is open in the image: exit code %d, %q", runtime, r.code, r.stdout)
			}
		}
	}
}
