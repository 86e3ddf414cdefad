package origin

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseReference(t *testing.T) {
	const dig = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct{ in, full string }{
		{"debian", "docker.io/library/debian:latest"},
		{"debian:12", "docker.io/library/debian:12"},
		{"docker.io/debian", "docker.io/library/debian:latest"},
		{"index.docker.io/library/debian:x", "docker.io/library/debian:x"},
		{"registry-1.docker.io/library/debian:x", "docker.io/library/debian:x"},
		{"user/name", "docker.io/user/name:latest"},
		{"localhost/name", "localhost/name:latest"},
		{"localhost:5000/name", "localhost:5000/name:latest"},
		{"[::1]:5000/name:t", "[::1]:5000/name:t"},
		{"ghcr.io/a/b/c:t", "ghcr.io/a/b/c:t"},
		{"docker://ghcr.io/a/b:t", "ghcr.io/a/b:t"},
		{"ghcr.io/a/b@" + dig, "ghcr.io/a/b@" + dig},
		{"ghcr.io/a/b:t@" + dig, "ghcr.io/a/b:t@" + dig},
		{"localhost:5000/a@" + dig, "localhost:5000/a@" + dig},
		{"oci:/scratch/x", "oci:/scratch/x"},
		{"oci:/scratch/x/", "oci:/scratch/x"},
		{"oci:/scratch/x:t", "oci:/scratch/x:t"},
		{"oci:/scratch/a:b/c", "oci:/scratch/a:b/c"},
		{"oci:/scratch/x@" + dig, "oci:/scratch/x@" + dig},
		{"oci:/scratch/x:t@" + dig, "oci:/scratch/x:t@" + dig},
		{"oci:rel:t", "oci:" + filepath.Join(wd, "rel") + ":t"},
	}
	for _, tt := range tests {
		ref, err := ParseReference(tt.in)
		if err != nil || ref.String() != tt.full {
			t.Errorf("%s: %s, %v; want %s", tt.in, ref, err, tt.full)
			continue
		}
		if back, err := ParseReference(ref.String()); err != nil || back != ref {
			t.Errorf("%s does not come back: %+v, %v", ref, back, err)
		}
	}
	for in, hint := range map[string]string{
		"":                         "names look like",
		"UPPER/case":               "lower case",
		"a b":                      "names look like",
		"https://ghcr.io/a/b":      "ghcr.io/a/b",
		"http://localhost:5000/a":  "--plain-http",
		"a@sha256:123":             "64 hex",
		"a@sha512:" + dig[7:]:      "sha256",
		"ghcr.io/a:":               "names look like",
		"oci:":                     "oci:/path",
		"oci:/x@sha256:zz":         "64 hex",
		strings.Repeat("x/", 2000): "names look like",
	} {
		_, err := ParseReference(in)
		wantError(t, err, ErrUsage, hint)
	}
}

func FuzzParseReference(f *testing.F) {
	f.Add("ghcr.io/a/b:t@sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
	f.Add("oci:/a:b/c:d")
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := ParseReference(s)
		if err != nil {
			return
		}
		back, err := ParseReference(ref.String())
		if err != nil || back != ref {
			t.Errorf("%q: %+v came back as %+v, %v", s, ref, back, err)
		}
	})
}
