package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func parse(t *testing.T, args ...string) (Config, error) {
	t.Helper()
	a := &app{}
	root := &cobra.Command{Use: "muster"}
	a.flags(root)
	if err := root.ParseFlags(args); err != nil {
		return Config{}, err
	}
	file, _ := root.Flags().GetString("config")
	return load(file, root.Flags())
}

func TestSampleIsTheDefaults(t *testing.T) {
	got, err := parse(t, "--config", "../../configs/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := defaults()
	for _, s := range settings(&got) { // empty or nil is the same
		if list, ok := s.value.Addr().Interface().(*[]string); ok && len(*list) == 0 {
			*list = nil
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("configs/agent.yaml gives\n%+v, want the defaults\n%+v", got, want)
	}
	// A sample that does not show a key does not teach it.
	b, err := os.ReadFile("../../configs/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range settings(&want) {
		leaf := s.key[strings.LastIndex(s.key, ".")+1:]
		if !strings.Contains(string(b), leaf+":") {
			t.Errorf("configs/agent.yaml does not have %s", s.key)
		}
		if s.help == "" {
			t.Errorf("%s has no help", s.key)
		}
	}
}

func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	write(t, file, "store:\n  quota: 10GiB\n  dir: /file\norigin:\n  patience: 5s\n  plain-http: [a, b]\ncores: 3\n")
	t.Setenv("MUSTER_STORE_DIR", "/variable")
	t.Setenv("MUSTER_ORIGIN_PATIENCE", "7s")
	c, err := parse(t, "--config", file, "--origin-patience", "9s", "--index-span-size", "2MiB", "--index-use=false")
	if err != nil {
		t.Fatal(err)
	}
	if c.Store.Quota != 10<<30 || c.Store.Dir != "/variable" || c.Origin.Patience != 9*time.Second ||
		c.Index.SpanSize != 2<<20 || c.Index.Use || c.Cores != 3 || len(c.Origin.PlainHTTP) != 2 {
		t.Errorf("got %+v", c)
	}
}

func TestUnknownKey(t *testing.T) {
	for text, want := range map[string][]string{
		"store:\n  quotta: 1\n": {"store.quotta", "store.quota"},
		"quota: 1\n":            {`"quota"`, "store.quota"},
		"corse: 1\n":            {"corse", "cores"},
	} {
		file := filepath.Join(t.TempDir(), "agent.yaml")
		write(t, file, text)
		_, err := parse(t, "--config", file)
		if exitCode(err) != exitUsage {
			t.Fatalf("%q: error %v has code %d", text, err, exitCode(err))
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q: error %q does not name %s", text, err, w)
			}
		}
	}
}

func TestWrongValues(t *testing.T) {
	for _, args := range [][]string{
		{"--log-level", "loud"},
		{"--log-format", "xml"},
		{"--cores", "-1"},
		{"--index-span-size", "1"},
		{"--config", "/does/not/exist"},
	} {
		if _, err := parse(t, args...); exitCode(err) != exitUsage {
			t.Errorf("%v: %v", args, err)
		}
	}
	t.Setenv("MUSTER_STORE_QUOTA", "many")
	if _, err := parse(t); exitCode(err) != exitUsage {
		t.Errorf("a quota of many: %v", err)
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "4096": 4096, "20GiB": 20 << 30, "1.5GB": 15e8, " 3 K ": 3 << 10, "7B": 7, "2TiB": 2 << 40,
	} {
		var s Size
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%q: %d, %v", text, s, err)
		}
		var again Size
		if err := again.Set(s.String()); err != nil || again != s {
			t.Errorf("%q: written as %q, read as %d, %v", text, s, again, err)
		}
	}
	for _, text := range []string{"", "-1", "x", "GiB", "1e30GiB", "NaN", "Inf"} {
		var s Size
		if err := s.Set(text); err == nil {
			t.Errorf("%q is read as %d", text, s)
		}
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
