package mountd_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// nobody is a user without any rights.
const nobody = 65534

// asUser is the variable by which this program, started as another user, knows what to mount and where.
const asUser = "MUSTER_TEST_MOUNT_AS_USER"

type errand struct {
	Dir   string
	Order order
}

// runErrand mounts, prints the hash of the file, and unmounts: what the program does when it is started as another user.
func runErrand(arg string) error {
	var e errand
	if err := json.Unmarshal([]byte(arg), &e); err != nil {
		return err
	}
	req, err := json.Marshal(e.Order)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	m, err := mountd.Start(ctx, mountd.Options{Dir: e.Dir, Request: req, Log: os.Stderr})
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(m.Dir, "data"))
	if err == nil {
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		fmt.Printf("%x", h.Sum(nil))
	}
	busy, unmountErr := mountd.Unmount(ctx, m.Dir)
	if err != nil || unmountErr != nil || busy {
		return fmt.Errorf("read: %v; unmount: busy %v, %v", err, busy, unmountErr)
	}
	return nil
}

// A user without rights mounts by fusermount3, and nothing is left afterwards.
func TestMountAsUser(t *testing.T) {
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Fatal("this test needs fusermount3 (package fuse3)")
	}
	st, err := os.Stat("/dev/fuse")
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm()&0o006 != 0o006 { // as it is on most hosts
		if err := os.Chmod("/dev/fuse", 0o666); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod("/dev/fuse", st.Mode().Perm())
	}
	images, sum := picture(t, 2<<20, 0)
	home, err := os.MkdirTemp("", "Test") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(home)
	if out, err := exec.Command("cp", "-r", images, filepath.Join(home, "image")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	prog := filepath.Join(home, "prog")
	if out, err := exec.Command("cp", self, prog).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := filepath.Join(home, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("chown", "-R", fmt.Sprint(nobody), home).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	arg, err := json.Marshal(errand{Dir: dir, Order: order{Dir: filepath.Join(home, "image"), Private: true}})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(prog)
	cmd.Dir = home
	cmd.Env = []string{asUser + "=" + string(arg), "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if want := fmt.Sprintf("%x", sum); err != nil || string(out) != want {
		t.Errorf("%q, %v", out, err)
	}
	gone(t, dir, soon)
}
