package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every unit that is shipped calls commands that there are, with as many arguments as they take.
func TestUnits(t *testing.T) {
	units, err := filepath.Glob("../../configs/systemd/*.service")
	if err != nil || len(units) == 0 {
		t.Fatal("no units found: ", err)
	}
	for _, name := range units {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		commands := 0
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			if !strings.HasPrefix(key, "Exec") {
				continue
			}
			args := strings.Fields(strings.TrimLeft(value, "-+!@:"))
			if len(args) < 2 || args[0] != "/usr/bin/muster" {
				continue // kill, for instance
			}
			commands++
			a := &app{out: os.Stdout, err: os.Stderr}
			cmd, rest, err := a.command().Find(args[1:])
			if err == nil {
				err = cmd.ParseFlags(rest)
			}
			if err == nil && cmd.Args != nil {
				err = cmd.Args(cmd, cmd.Flags().Args())
			}
			if err != nil || !cmd.Runnable() {
				t.Errorf("%s: %s: %v", filepath.Base(name), line, err)
			}
		}
		if commands == 0 {
			t.Errorf("%s runs nothing of muster", filepath.Base(name))
		}
		if strings.Contains(string(b), "muster mount") && !strings.Contains(string(b), "KillMode=process") {
			t.Errorf("%s: a restart would kill the mount's processes", filepath.Base(name))
		}
	}
}
