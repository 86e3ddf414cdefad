package registry_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/muster-hpc/muster/tests/registry"
)

// newLayout writes a random image, tagged "one", into a layout.
func newLayout(t *testing.T) (dir string, img v1.Image) {
	t.Helper()
	img, err := random.Image(300_000, 3)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "one"})); err != nil {
		t.Fatal(err)
	}
	return dir, img
}

// firstLayer is the path and bytes of an image's first layer in repository test.
func firstLayer(t *testing.T, img v1.Image) (path string, body []byte) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	d, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := layers[0].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	body, err = io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return "/v2/test/blobs/" + d.String(), body
}

// get asks without following redirects.
func get(t *testing.T, url string, header ...string) (*http.Response, []byte, error) {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	resp, err := tr.RoundTrip(r)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

func TestServersTakeAndGiveImages(t *testing.T) {
	starts := map[string]func() (*registry.Server, error){
		"embedded": func() (*registry.Server, error) {
			return registry.Start(t.TempDir(), registry.Options{Referrers: true})
		},
		"debian": func() (*registry.Server, error) { return registry.StartDebian(t.TempDir()) },
	}
	for kind, start := range starts {
		t.Run(kind, func(t *testing.T) {
			s, err := start()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			dir, img := newLayout(t)
			ctx := context.Background()
			if _, err := registry.Push(ctx, s.Addr+"/test:v1", dir, ""); err != nil {
				t.Fatal(err)
			}
			if tags, err := registry.PushAll(ctx, s.Addr+"/a/b", dir); err != nil || len(tags) != 1 {
				t.Fatal(tags, err)
			}
			ref, err := name.ParseReference(s.Addr+"/a/b:one", name.Insecure)
			if err != nil {
				t.Fatal(err)
			}
			back, err := remote.Image(ref)
			if err != nil {
				t.Fatal(err)
			}
			layers, err := back.Layers()
			if err != nil || len(layers) != 3 {
				t.Fatal(layers, err)
			}
			for _, l := range layers {
				rc, err := l.Compressed() // verifies its digest
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					t.Error(err)
				}
				rc.Close()
			}
			path, body := firstLayer(t, img)
			resp, b, err := get(t, "http://"+s.Addr+path, "Range", "bytes=1000-1999")
			if err != nil || resp.StatusCode != http.StatusPartialContent || string(b) != string(body[1000:2000]) {
				t.Errorf("range: %v %v, %d bytes", resp.Status, err, len(b))
			}
			if got, want := resp.Header.Get("Content-Range"), fmt.Sprintf("bytes 1000-1999/%d", len(body)); got != want {
				t.Errorf("Content-Range %q, want %q", got, want)
			}
			list, err := remote.List(ref.Context())
			if err != nil || len(list) != 1 || list[0] != "one" {
				t.Error(list, err)
			}
		})
	}
}

func TestEmbeddedSurvivesRestart(t *testing.T) {
	dir, img := newLayout(t)
	state := t.TempDir()
	for i := range 2 {
		s, err := registry.Start(state, registry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if _, err := registry.Push(context.Background(), s.Addr+"/test:v1", dir, "one"); err != nil {
				t.Fatal(err)
			}
		}
		ref, _ := name.ParseReference(s.Addr+"/test:v1", name.Insecure)
		back, err := remote.Image(ref)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := back.Digest()
		b, _ := img.Digest()
		if a != b {
			t.Errorf("%s, want %s", a, b)
		}
		s.Close()
	}
}

func newProxy(t *testing.T) (*registry.Proxy, string, []byte) {
	t.Helper()
	h, err := registry.NewHandler(t.TempDir(), registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := registry.StartProxy(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	dir, img := newLayout(t)
	if _, err := registry.Push(context.Background(), p.Addr+"/test:v1", dir, ""); err != nil {
		t.Fatal(err)
	}
	p.ResetLog()
	path, body := firstLayer(t, img)
	return p, path, body
}

func TestFaults(t *testing.T) {
	p, path, body := newProxy(t)
	url := "http://" + p.Addr + path
	blob := registry.Match{Kind: registry.Blob}
	rng := []string{"Range", "bytes=100-299"}
	tests := []struct {
		name   string
		do     registry.Action
		status int
		body   string
		broken bool
	}{
		{"answer", registry.Answer(500, "oops"), 500, "oops", false},
		{"html", registry.HTML(), 200, "<", false},
		{"cut", registry.CutAfter(50), 206, string(body[100:150]), true},
		{"cut at once", registry.CutAfter(0), 206, "", true},
		{"reset", registry.Reset(), 0, "", true},
		{"ignore range", registry.IgnoreRange(), 200, string(body), false},
		{"shift", registry.ShiftRange(7), 206, string(body[100:300]), false},
		{"long", registry.LongRange(10), 206, string(body[100:310]), false},
		{"chunked", registry.Chunked(), 206, string(body[100:300]), false},
		{"trickle", registry.Trickle(10_000), 206, string(body[100:300]), false},
		{"none", registry.Delay(0), 206, string(body[100:300]), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p.Clear()
			p.ResetLog()
			p.Inject(blob, 1, tt.do)
			resp, b, err := get(t, url, rng...)
			if (err != nil) != tt.broken {
				t.Fatalf("error %v", err)
			}
			if resp != nil && resp.StatusCode != tt.status {
				t.Errorf("status %d, want %d", resp.StatusCode, tt.status)
			}
			if tt.body == "<" && strings.HasPrefix(string(b), "<") {
				b = []byte("<")
			}
			if string(b) != tt.body {
				t.Errorf("%d bytes, want %d", len(b), len(tt.body))
			}
			// Once only.
			if _, b, err := get(t, url, rng...); err != nil || string(b) != string(body[100:300]) {
				t.Errorf("afterwards: %d bytes, %v", len(b), err)
			}
			log := p.Log(blob)
			if len(log) != 2 || log[0].Fault == "" || log[1].Fault != "" || log[1].Bytes != 200 || log[1].Range != "bytes=100-299" {
				t.Errorf("log %+v", log)
			}
		})
	}
	p.Clear()
	p.Inject(blob, 0, registry.FlipAt(5))
	_, b, err := get(t, url, rng...)
	if err != nil || b[5] == body[105] || b[4] != body[104] || b[6] != body[106] {
		t.Error("no flip", err)
	}
}

func TestDownAndUp(t *testing.T) {
	p, path, body := newProxy(t)
	if err := p.Down(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := get(t, "http://"+p.Addr+path); err == nil {
		t.Error("an answer while down")
	}
	if err := p.Up(); err != nil {
		t.Fatal(err)
	}
	if _, b, err := get(t, "http://"+p.Addr+path); err != nil || len(b) != len(body) {
		t.Error(err)
	}
}

func TestRateIsShared(t *testing.T) {
	p, path, body := newProxy(t)
	p.SetRate(int64(len(body)) * 4)
	begun := time.Now()
	done := make(chan int)
	for range 2 {
		go func() {
			_, b, _ := get(t, "http://"+p.Addr+path)
			done <- len(b)
		}()
	}
	for range 2 {
		if n := <-done; n != len(body) {
			t.Errorf("%d bytes", n)
		}
	}
	// Two bodies at four a second take half a second; a timer may be late but not early.
	if d := time.Since(begun); d < 450*time.Millisecond {
		t.Errorf("%s for half a second's bytes", d)
	}
	if n := p.Bytes(registry.Match{Kind: registry.Blob}); n != 2*int64(len(body)) {
		t.Errorf("%d bytes in the log", n)
	}
}

func TestTokensAndSignedURLs(t *testing.T) {
	p, path, body := newProxy(t)
	tok, err := p.RequireTokens(registry.TokenOptions{User: "u", Password: "p"})
	if err != nil {
		t.Fatal(err)
	}
	store, err := p.RedirectBlobs(registry.RedirectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	resp, _, err := get(t, "http://"+p.Addr+path)
	if err != nil || resp.StatusCode != 401 || !strings.Contains(resp.Header.Get("Www-Authenticate"), tok.Addr()) {
		t.Fatal(resp, err)
	}
	if resp, _, _ = get(t, "http://"+tok.Addr()+"/token"); resp.StatusCode != 401 {
		t.Error("a token for nobody", resp.Status)
	}
	resp, b, err := get(t, "http://"+tok.Addr()+"/token", "Authorization", "Basic dTpw")
	if err != nil || resp.StatusCode != 200 || tok.Issued() != 1 {
		t.Fatal(resp, err)
	}
	bearer := "Bearer " + strings.Split(strings.Split(string(b), `"token":"`)[1], `"`)[0]
	resp, _, err = get(t, "http://"+p.Addr+path, "Authorization", bearer)
	if err != nil || resp.StatusCode != 307 {
		t.Fatal(resp, err)
	}
	to := resp.Header.Get("Location")
	if _, b, err := get(t, to); err != nil || len(b) != len(body) {
		t.Error("storage", err)
	}
	if resp, _, _ := get(t, to, "Authorization", bearer); resp.StatusCode != 400 {
		t.Error("credentials taken by the storage", resp.Status)
	}
	store.Expire()
	if resp, _, _ := get(t, to); resp.StatusCode != 403 {
		t.Error("an expired signature", resp.Status)
	}
	tok.Revoke()
	if resp, _, _ = get(t, "http://"+p.Addr+path, "Authorization", bearer); resp.StatusCode != 401 {
		t.Error("a revoked token", resp.Status)
	}
	if n := p.Count(registry.Match{Kind: registry.Storage}); n != 3 {
		t.Errorf("%d requests to the storage in the log", n)
	}
}
