package origin

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestParseHosts(t *testing.T) {
	f, err := parseHosts([]byte(`
server = "https://registry-1.docker.io"
ca = "root.pem"

[host."https://zz.first:5000"]
  capabilities = ["pull", "Resolve"]
  ca = ["a.pem", "/abs/b.pem"]
  client = [["c.pem", "k.pem"], ["both.pem"]]
  skip_verify = true
  dial_timeout = "1500ms"
  [host."https://zz.first:5000".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."http://second/prefix"]
[host."third"]
  override_path = true
  client = "c.pem"
[host."https://aa.fourth/v2/project"]
  override_path = true
  future_key = 7
`), "/d")
	if err != nil {
		t.Fatal(err)
	}
	if got := f.server.base.String(); got != "https://registry-1.docker.io/v2" || f.server.ca[0] != "/d/root.pem" || !f.server.push {
		t.Errorf("server %s %+v", got, f.server)
	}
	var bases []string
	for _, h := range f.hosts {
		bases = append(bases, h.base.String())
	}
	if want := []string{"https://zz.first:5000/v2", "http://second/prefix/v2", "https://third", "https://aa.fourth/v2/project"}; !slices.Equal(bases, want) {
		t.Errorf("hosts %q, want %q", bases, want)
	}
	h := f.hosts[0]
	if !h.pull || !h.resolve || h.push || !h.skipVerify || h.dial != 1500*time.Millisecond {
		t.Errorf("%+v", h)
	}
	if !slices.Equal(h.ca, []string{"/d/a.pem", "/abs/b.pem"}) || !slices.Equal(h.clients, [][2]string{{"/d/c.pem", "/d/k.pem"}, {"/d/both.pem", "/d/both.pem"}}) {
		t.Errorf("%+v", h)
	}
	if h.header.Get("X-One") != "1" || len(h.header.Values("X-Two")) != 2 {
		t.Errorf("%+v", h.header)
	}
	if got := f.hosts[2].clients; !slices.Equal(got, [][2]string{{"/d/c.pem", "/d/c.pem"}}) {
		t.Errorf("%+v", got)
	}
}

func TestParseHostsRefuses(t *testing.T) {
	for _, text := range []string{
		`server = 7`,
		`server = "ftp://x"`,
		`server = "https://u:p@x"`,
		`server = "https://x?q=1"`,
		`server = "https://"`,
		`[host."https://x"]` + "\ncapabilities = [\"fly\"]",
		`[host."https://x"]` + "\nca = 5",
		`[host."https://x"]` + "\nca = [5]",
		`[host."https://x"]` + "\nclient = [[\"a\",\"b\",\"c\"]]",
		`[host."https://x"]` + "\ndial_timeout = \"soon\"",
		`[host."https://x"]` + "\n[host.\"https://x\".header]\na = \"b\\r\\nc\"",
		`[host.""]`,
		`[host`,
	} {
		if f, err := parseHosts([]byte(text), "/d"); err == nil {
			t.Errorf("%s: %+v", text, f)
		}
	}
}

func TestCertsDirOrder(t *testing.T) {
	dir := t.TempDir()
	c := &certsDir{dir}
	if _, ok, err := c.lookup("reg:5000"); ok || err != nil {
		t.Error("something in an empty directory", err)
	}
	for _, name := range []string{"_default", "reg:5000", "reg_5000_"} {
		writeFile(t, fmt.Sprintf("server = \"https://from.%s\"", map[string]string{"_default": "default", "reg:5000": "colon", "reg_5000_": "underscore"}[name]), dir, name, "hosts.toml")
		f, ok, err := c.lookup("reg:5000")
		if err != nil || !ok {
			t.Fatal(ok, err)
		}
		t.Log(name, f.server.base.Host)
		if want := map[string]string{"_default": "from.default", "reg:5000": "from.colon", "reg_5000_": "from.underscore"}[name]; f.server.base.Host != want {
			t.Errorf("%s, want %s", f.server.base.Host, want)
		}
	}
	for _, name := range []string{"../reg", "a/b", `a\b`} {
		if f, ok, err := c.lookup(name); err == nil && ok && f.server.base.Host != "from.default" {
			t.Errorf("%s led to %+v", name, f)
		}
	}
	writeFile(t, "server = [", dir, "reg_5000_", "hosts.toml")
	_, _, err := c.lookup("reg:5000")
	wantError(t, err, ErrUsage, "reg_5000_/hosts.toml", "correct the file")

	// docker's form: certificates only.
	writeFile(t, "x", dir, "docker.example", "ca.crt")
	writeFile(t, "x", dir, "docker.example", "me.cert")
	f, ok, err := c.lookup("docker.example")
	if err != nil || !ok || len(f.server.ca) != 1 || len(f.server.clients) != 1 || filepath.Base(f.server.clients[0][1]) != "me.key" {
		t.Errorf("%+v %v", f, err)
	}
	if err := os.Remove(filepath.Join(dir, "docker.example", "me.cert")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.server.tlsConfig(); err == nil {
		t.Error("a CA file without a certificate in it is no error")
	}
}

func FuzzParseHosts(f *testing.F) {
	f.Add([]byte("server = \"https://x\"\n[host.\"https://m\"]\nca = [\"a\"]\nclient = [[\"a\",\"b\"]]\n[host.\"https://m\".header]\na = \"b\"\n"))
	f.Add([]byte("host = {\"http://a\" = {skip_verify = true}, b = {}}"))
	f.Add([]byte("[host]\n\"a\".capabilities = [\"pull\"]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHosts(b, "/d")
		if err != nil {
			return
		}
		for _, c := range h.hosts {
			if c.base.Host == "" || c.base.Scheme != "http" && c.base.Scheme != "https" || c.base.User != nil {
				t.Errorf("%q: %+v", b, c.base)
			}
			for _, file := range c.ca {
				if !filepath.IsAbs(file) {
					t.Errorf("%q: %s", b, file)
				}
			}
		}
	})
}
