package lazyfs

import (
	"fmt"
	"syscall"
	"testing"
)

func TestFatalSignals(t *testing.T) {
	bit := func(s ...syscall.Signal) (m uint64) {
		for _, x := range s {
			m |= 1 << (x - 1)
		}
		return m
	}
	for _, x := range []struct {
		name                                      string
		pending, shared, blocked, ignored, caught uint64
		want                                      bool
	}{
		{name: "nothing"},
		{name: "killed", pending: bit(syscall.SIGKILL), want: true},
		{name: "the process is killed", shared: bit(syscall.SIGKILL), caught: bit(syscall.SIGTERM), want: true},
		{name: "a handled signal", shared: bit(syscall.SIGUSR1), caught: bit(syscall.SIGUSR1)},
		{name: "an ignored signal", shared: bit(syscall.SIGHUP), ignored: bit(syscall.SIGHUP)},
		{name: "a blocked signal", pending: bit(syscall.SIGTERM), blocked: bit(syscall.SIGTERM)},
		{name: "an unhandled signal", shared: bit(syscall.SIGQUIT), want: true},
		{name: "one whose default is nothing", shared: bit(syscall.SIGCHLD, syscall.SIGWINCH, syscall.SIGURG, syscall.SIGCONT)},
		{name: "the runtime's own", pending: bit(syscall.SIGURG), caught: bit(syscall.SIGURG)},
	} {
		status := fmt.Sprintf("Name:\tx\nThreads:\t1\nSigQ:\t0/1\nSigPnd:\t%016x\nShdPnd:\t%016x\nSigBlk:\t%016x\nSigIgn:\t%016x\nSigCgt:\t%016x\nCapInh:\t0\n",
			x.pending, x.shared, x.blocked, x.ignored, x.caught)
		if got := fatal([]byte(status)); got != x.want {
			t.Errorf("%s: %v", x.name, got)
		}
	}
	if dying(uint32(syscall.Getpid())) {
		t.Error("this process is not dying")
	}
	if !dying(0) || !dying(1<<31-1) {
		t.Error("a process that cannot be seen must count as dying")
	}
}

func TestMountinfo(t *testing.T) {
	c, dir, ok := parseMountinfo(`36 35 0:53 / /mnt/a\040b ro,nosuid shared:1 - fuse.muster muster\043some/image:latest ro,user_id=0` + "\n")
	if want := (Connection{0, 53, "muster#some/image:latest"}); !ok || c != want || dir != "/mnt/a b" {
		t.Errorf("%+v, %q, %v", c, dir, ok)
	}
	for _, line := range []string{"", "36 35 0:53 / /mnt rw - ext4 /dev/sda rw", "x - fuse.muster y", "36 35 x / /mnt ro - fuse.muster m ro"} {
		if _, _, ok := parseMountinfo(line); ok {
			t.Errorf("%q", line)
		}
	}
}

func TestBufferClasses(t *testing.T) {
	for n := 1; n < 40<<20; n = n*5/4 + 1 {
		c := class(n)
		if c < n || c > n+max(n/7, bufferGrain) || class(c) != c || c%4096 != 0 {
			t.Errorf("%d bytes get %d", n, c)
		}
	}
	p := newPool(1 << 20)
	a, err := p.get(100)
	if err != nil {
		t.Fatal(err)
	}
	big, err := p.get(3 << 20)
	if err != nil {
		t.Fatal(err)
	}
	a[99], big[3<<20-1] = 1, 1
	p.put(big) // more than is kept
	p.put(a)
	if p.bytes() != 0 {
		t.Errorf("%d bytes held", p.bytes())
	}
	if a, err = p.get(100_000); err != nil {
		t.Fatal(err)
	}
	p.put(a)
	if p.bytes() != 2*bufferGrain {
		t.Errorf("%d bytes held", p.bytes())
	}
	p.trim()
	if p.bytes() != 0 {
		t.Errorf("%d bytes held", p.bytes())
	}
}
