package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// leaky is a test package whose tests pass and leave something behind.
const leaky = `package leaky

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

func TestProcess(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(os.Getenv("LEAKED_PID"), []byte(strconv(cmd.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
}

func strconv(n int) (s string) {
	for ; n > 0; n /= 10 {
		s = string(rune('0'+n%10)) + s
	}
	return s
}

func TestFile(t *testing.T) {
	if err := os.WriteFile(os.TempDir()+"/leaked-file", nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMount(t *testing.T) {
	dir := os.TempDir() + "/leaked-mount"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("leaked", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
}

func TestNothing(t *testing.T) {}
`

// TestGateCatchesLeaks runs the gate over tests that all pass: with a leak it fails and names it, without it passes.
func TestGateCatchesLeaks(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module leaky\n\ngo 1.26\n", "leaky_test.go": leaky} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	gate := filepath.Join(dir, "gate")
	if out, err := exec.Command("go", "build", "-o", gate, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pid := filepath.Join(dir, "pid")
	for run, leaks := range map[string][]string{
		"TestNothing":                    nil,
		"TestFile|TestMount|TestProcess": {"leaked-file", "leaked-mount", "sleep 600"},
	} {
		cmd := exec.Command(gate, "-run", "^("+run+")$", ".")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "LEAKED_PID="+pid, within+"=1")
		out, err := cmd.CombinedOutput()
		text := string(out)
		if b, err := os.ReadFile(pid); err == nil {
			exec.Command("kill", "-9", string(b)).Run() //nolint:errcheck // it may have ended
		}
		if leaks == nil && (err != nil || !strings.HasSuffix(text, "1 passed, 0 failed\n")) {
			t.Errorf("%s: %v: %s", run, err, text)
		}
		for _, l := range leaks {
			if err == nil || !strings.Contains(text, l) {
				t.Errorf("%s left %s and the gate says: %v: %s", run, l, err, text)
			}
		}
		if m, _ := os.ReadFile("/proc/self/mounts"); strings.Contains(string(m), "leaked-mount") {
			t.Error("the gate did not clear up the mount")
		}
	}
}
