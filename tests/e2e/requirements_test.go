package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestRequirementsHaveTests: docs/failure-modes.md names tests that exist, for each requirement of this stage.
func TestRequirementsHaveTests(t *testing.T) {
	const root = "../.."
	b, err := os.ReadFile(root + "/docs/failure-modes.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]bool{}
	name := regexp.MustCompile(`\bTest[A-Za-z0-9]+`)
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "F") {
			continue
		}
		row := strings.TrimSpace(cells[1])
		rows[row] = true
		found := 0
		for part := range strings.SplitSeq(cells[3], ";") {
			fields := strings.SplitN(part, "`", 3)
			if len(fields) != 3 {
				t.Errorf("%s: no package in %q", row, part)
				continue
			}
			dir, tests := fields[1], name.FindAllString(fields[2], -1)
			text := sources(t, filepath.Join(root, dir))
			for _, f := range tests {
				found++
				if !strings.Contains(text, "func "+f+"(t *testing.T)") {
					t.Errorf("%s: %s has no %s", row, dir, f)
				}
			}
		}
		if found == 0 {
			t.Errorf("%s has no test", row)
		}
	}
	for _, f := range strings.Fields("F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 F11 F12 F13 F14 F15 F16 F17 F18 F19 F20 F22 F23 F24 F25 F26 F29 F30 F31 F32 F33 F34") {
		if !rows[f] {
			t.Errorf("docs/failure-modes.md has no row for %s", f)
		}
	}
}

// sources is the text of a package's tests.
func sources(t testing.TB, dir string) string {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "*_test.go"))
	var all strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	return all.String()
}
