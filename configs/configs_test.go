package configs_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The units are files that systemd reads: sections, keys, and what the agent relies on.
func TestUnits(t *testing.T) {
	units, err := filepath.Glob("systemd/*")
	if err != nil || len(units) != 3 {
		t.Fatal(units, err)
	}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		for n, line := range strings.Split(string(b), "\n") {
			key, _, isKey := strings.Cut(line, "=")
			switch {
			case line == "", strings.HasPrefix(line, "#"), strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]"):
			case isKey && key != "" && !strings.ContainsAny(key, " \t"):
			default:
				t.Errorf("%s:%d: %q", u, n+1, line)
			}
		}
		want := []string{"[Slice]", "CPUWeight="}
		switch filepath.Base(u) {
		case "muster-mount@.service":
			want = []string{"ExecStop=/usr/bin/muster umount ", "ExecReload=/usr/bin/muster upgrade-mounts ", "KillMode=process", "Slice=muster.slice"}
		case "muster-agent.service":
			// The agent tells when it is ready, and mounts survive it.
			want = []string{"Type=notify", "ExecStart=/usr/bin/muster agent\n", "KillMode=process", "Slice=muster.slice", "RuntimeDirectoryPreserve=yes"}
		}
		for _, w := range want {
			if !strings.Contains(string(b), w) {
				t.Errorf("%s lacks %q", u, w)
			}
		}
	}
}
