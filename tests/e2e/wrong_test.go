package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/tests/registry"
)

// TestWrongInput: each mistake has its exit code and one clear message that names what is wrong, and leaves nothing.
func TestWrongInput(t *testing.T) {
	t.Parallel()
	h := newHost(t, 0)
	good := image(t, "docker")
	server := good[:strings.Index(good, "/")]
	locked := front(t)
	if _, err := locked.RequireTokens(registry.TokenOptions{User: "somebody", Password: "secret"}); err != nil {
		t.Fatal(err)
	}
	dead := nobodyListens(t)
	dir := h.newDir()
	full := h.newDir()
	write(t, full+"/file", "x")
	mounted := h.mount(good)
	file := filepath.Join(h.newDir(), "file")
	write(t, file, "x")
	unknownKey := filepath.Join(h.newDir(), "config.yaml")
	write(t, unknownKey, "store:\n  dri: /x\n")
	noYAML := filepath.Join(h.newDir(), "config.yaml")
	write(t, noYAML, "store: [\n")
	digest := strings.Repeat("0123456789abcdef", 4)
	tests := []struct {
		name  string
		code  int
		words []string
		args  []string
	}{
		{"no command", 2, []string{"unknown command"}, []string{"nonsense"}},
		{"no flag", 2, []string{"--nonsense"}, []string{"mount", "--nonsense", good, dir}},
		{"no image", 2, []string{"usage"}, []string{"mount"}},
		{"no directory", 2, []string{"usage"}, []string{"mount", good}},
		{"a bad reference", 2, []string{"UPPER"}, []string{"mount", server + "/UPPER:x", dir}},
		{"a bad digest", 2, []string{"sha256:12"}, []string{"mount", server + "/docker@sha256:12", dir}},
		{"an unknown image", 3, []string{server, "no-such-image"}, []string{"mount", server + "/no-such-image:1", dir}},
		{"an unknown tag", 3, []string{"docker:nope"}, []string{"mount", server + "/docker:nope", dir}},
		{"an unknown digest", 3, []string{digest[:12]}, []string{"mount", server + "/docker@sha256:" + digest, dir}},
		{"no such platform", 3, []string{"linux/s390x", "amd64"}, []string{"mount", "--platform", "linux/s390x", image(t, "multi-arch"), dir}},
		{"only another platform", 3, []string{"arm64"}, []string{"mount", image(t, "arm64-only"), dir}},
		{"a bad platform", 2, []string{"no/such/thing/at/all"}, []string{"mount", "--platform", "no/such/thing/at/all", good, dir}},
		{"no credentials", 4, []string{locked.Addr, "docker login"}, []string{"mount", through(locked, good), dir}},
		{"nobody listens", 5, []string{dead}, []string{"mount", "--origin-resolve-patience", "1s", dead + "/docker:latest", dir}},
		{"no such host", 5, []string{"no-such-host.invalid"}, []string{"mount", "--origin-resolve-patience", "1s", "no-such-host.invalid/x:1", dir}},
		{"no such layout", 3, []string{"/no/such/layout"}, []string{"mount", "oci:/no/such/layout", dir}},
		{"no parent directory", 1, []string{"/no/such/dir"}, []string{"mount", good, "/no/such/dir/here"}},
		{"not a directory", 1, []string{file}, []string{"mount", good, file}},
		{"mounted already", 2, []string{mounted, "mounted", "umount"}, []string{"mount", good, mounted}},
		{"not mounted", 1, []string{dir}, []string{"umount", dir}},
		{"an unknown key", 2, []string{"store.dri", "store.dir"}, []string{"mount", "--config", unknownKey, good, dir}},
		{"no configuration", 2, []string{noYAML}, []string{"mount", "--config", noYAML, good, dir}},
		{"no such configuration", 2, []string{"/no/such/config"}, []string{"mount", "--config", "/no/such/config", good, dir}},
		{"a bad size", 2, []string{"much"}, []string{"mount", "--store-quota", "much", good, dir}},
		{"a bad duration", 2, []string{"long"}, []string{"mount", "--origin-patience", "long", good, dir}},
		{"a bad level", 2, []string{"loud"}, []string{"mount", "--log-level", "loud", good, dir}},
		{"nothing to remove", 3, []string{"no-such-image"}, []string{"cache", "rm", "no-such-image"}},
		{"an empty store", 1, []string{file}, []string{"mount", "--store-dir", file, good, dir}},
		{"a network file system", 9, []string{mounted, "not a local file system"}, []string{"mount", "--store-dir", mounted, good, dir}},

		{"run: no image", 125, []string{"usage"}, []string{"run"}},
		{"run: an unknown image", 125, []string{"no-such-image"}, []string{"run", server + "/no-such-image:1"}},
		{"run: no credentials", 125, []string{locked.Addr}, []string{"run", through(locked, good)}},
		{"run: a bad bind", 125, []string{"a:b:c:d"}, []string{"run", "--bind", "a:b:c:d", good}},
		{"run: no such source", 125, []string{"/no/such/source"}, []string{"run", "--bind", "/no/such/source:/mnt", good}},
		{"run: a bad directory", 125, []string{"relative"}, []string{"run", "--workdir", "relative", good}},
		{"run: no such directory", 125, []string{"/bin/say"}, []string{"run", "--workdir", "/bin/say", good}},
		{"run: a bad runtime", 125, []string{"nonsense", "runc"}, []string{"run", "--runtime", "nonsense", good}},
		{"run: no terminal", 125, []string{"terminal"}, []string{"run", "--tty", good}},
		{"run: a bad variable", 125, []string{"=x"}, []string{"run", "--env", "=x", good}},
		{"ztoc: no such file", 1, []string{"/no/such/file"}, []string{"ztoc", "show", "/no/such/file"}},
		{"index: an unknown image", 3, []string{"no-such-image"}, []string{"index", "list", server + "/no-such-image:1"}},
		{"preflight: an unknown image", 3, []string{"no-such-image"}, []string{"preflight", server + "/no-such-image:1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := h.muster(tt.args...)
			if r.code != tt.code {
				t.Errorf("exit code %d, want %d: %s%s", r.code, tt.code, r.stdout, r.stderr)
			}
			plainMessage(t, r.stderr, append(tt.words, "muster: ")...)
			if r.stdout != "" {
				t.Errorf("on standard output: %s", r.stdout)
			}
			if isMounted(dir) {
				t.Error("it is mounted all the same")
				h.must("umount", dir)
			}
		})
	}
	if b, err := os.ReadFile(full + "/file"); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	h.must("umount", mounted)
	h.clean("mistakes")
}

func write(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestWrongStores: a store that cannot be written, belongs to another, or is memory.
func TestWrongStores(t *testing.T) {
	ref := image(t, "docker")
	user := newHost(t, somebody)
	dir := user.newDir()
	shut := user.newDir()
	if err := os.Chmod(shut, 0o500); err != nil {
		t.Fatal(err)
	}
	others := newHost(t, 0).newDir()
	open := user.newDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, store := range map[string]string{"read-only": shut, "in a read-only directory": shut + "/store", "another's": others, "open to all": open} {
		t.Run(name, func(t *testing.T) {
			r := user.muster("mount", "--store-dir", store, ref, dir)
			if r.code == 0 || r.code > 9 {
				t.Errorf("exit code %d", r.code)
			}
			plainMessage(t, r.stderr, "muster: ", store)
			user.clean("a refused store")
		})
	}
	t.Run("memory", func(t *testing.T) {
		h := newHost(t, 0)
		at := h.newDir()
		if err := unix.Mount("memory", at, "tmpfs", 0, "size=64m"); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(at, unix.MNT_DETACH) //nolint:errcheck // the host's clean-up tells
		h.store = at + "/store"
		h.must("run", ref)
		h.must("cache", "ls")
	})
}

// TestNoFUSE: without the right to open /dev/fuse a user is told so; muster run says it too.
func TestNoFUSE(t *testing.T) {
	h := newHost(t, somebody)
	ref := image(t, "docker")
	dir := h.newDir()
	// In a mount namespace of the test's own, so that nobody else is bothered.
	closed := func(args ...string) result {
		t.Helper()
		cmd := h.command(args...)
		sh := exec.Command("unshare", "--mount", "sh", "-c", `
			touch "$0" && mount --bind "$0" /dev/fuse && chmod 600 /dev/fuse && exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"`,
			filepath.Join(h.dir, "no-fuse"), binary)
		sh.Args = append(sh.Args, cmd.Args[1:]...)
		sh.Env, sh.Dir = cmd.Env, "/"
		return h.finish(sh)
	}
	r := closed("mount", ref, dir)
	if r.code != 9 {
		t.Errorf("mount: exit code %d", r.code)
	}
	plainMessage(t, r.stderr, "/dev/fuse")
	r = closed("run", ref)
	if r.code != 125 {
		t.Errorf("run: exit code %d", r.code)
	}
	plainMessage(t, r.stderr, "/dev/fuse")
	os.Remove(filepath.Join(h.dir, "no-fuse"))
	h.clean("a host without FUSE")
}
