package agent_test

import (
	"os/exec"
	"strings"
	"testing"
)

// command runs a program that prints "value  key" lines.
func command(t *testing.T, name string, args ...string) (map[string]string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).Output()
	m := map[string]string{}
	for line := range strings.Lines(string(out)) {
		value, key, _ := strings.Cut(strings.TrimSpace(line), "  ")
		m[key] = value
	}
	return m, err
}
