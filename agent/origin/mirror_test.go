package origin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// mirrored is a registry "upstream.example" with mirrors in front, all of it on loopback.
func mirrored(t *testing.T, server *world, mirrors ...string) Options {
	t.Helper()
	text := fmt.Sprintf("server = \"http://%s\"\n", server.Addr)
	for _, m := range mirrors {
		text += fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", m)
	}
	o := quick()
	o.CertsDir = t.TempDir()
	writeFile(t, text, o.CertsDir, "upstream.example", "hosts.toml")
	return o
}

func TestMirrorIsTriedFirst(t *testing.T) {
	server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
	o := mirrored(t, server, mirror.Addr)
	o.Credentials = func(_ context.Context, host, _ string) (Credential, error) {
		if host == mirror.Addr {
			t.Error("a mirror that wants nothing is shown credentials")
		}
		return Credential{Username: "u", Password: "hunter2"}, nil
	}
	repo := openRepo(t, newClient(t, o), "upstream.example/test:one")
	if _, err := repo.Resolve(context.Background(), "linux/amd64"); err != nil {
		t.Fatal(err)
	}
	wantRange(t, repo, middle)
	if n := server.Count(registry.Match{}); n != 0 {
		t.Errorf("the registry was asked %d times", n)
	}
	for _, r := range mirror.Log(registry.Match{}) {
		if r.Query != "ns=upstream.example" || r.Auth != "" {
			t.Errorf("%+v", r)
		}
	}

	// What the mirror does not have comes from the registry, and the mirror is not asked again for a while.
	mirror.Inject(registry.Match{Kind: registry.Blob}, 0, registry.Answer(404, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`))
	mirror.ResetLog()
	for range 3 {
		wantRange(t, repo, middle)
	}
	if m, s := mirror.Count(anyBlob), server.Count(anyBlob); m != 1 || s != 3 {
		t.Errorf("%d requests to the mirror, %d to the registry", m, s)
	}
	// Other blobs are another matter.
	readRange(context.Background(), repo, ztoc.DigestOf(layerBytes(2, layerSize/2)), middle)
	if m := mirror.Count(anyBlob); m != 2 {
		t.Errorf("%d requests to the mirror", m)
	}
	// Pushes go to the registry itself.
	pushArtifact(t, repo, Image{Digest: layer().Digest, MediaType: MediaTypeManifest}, 1)
	if n := mirror.Count(registry.Match{Kind: registry.Upload}); n != 0 {
		t.Errorf("%d uploads to the mirror", n)
	}
}

// Wrong bytes of a mirror are asked for elsewhere, those of the registry of the mirror again, and other blobs as ever.
func TestMirrorGivesWrongBytes(t *testing.T) {
	server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
	repo := openRepo(t, newClient(t, mirrored(t, server, mirror.Addr)), "upstream.example/test:one")
	rejecter, ok := repo.(fetch.Rejecter)
	if !ok {
		t.Fatal("a repository with mirrors takes no Reject")
	}
	from := func(m, s int) {
		t.Helper()
		mirror.ResetLog()
		server.ResetLog()
		wantRange(t, repo, middle)
		if a, b := mirror.Count(anyBlob), server.Count(anyBlob); a != m || b != s {
			t.Errorf("%d requests to the mirror, %d to the registry; want %d, %d", a, b, m, s)
		}
	}
	from(1, 0)
	rejecter.Reject(layer().Digest, middle, ztoc.ErrMismatch)
	from(0, 1)
	rejecter.Reject(layer().Digest, middle, ztoc.ErrMismatch)
	from(1, 0)
	mirror.ResetLog()
	readRange(context.Background(), repo, ztoc.DigestOf(layerBytes(2, layerSize/2)), middle)
	if mirror.Count(anyBlob) != 1 {
		t.Error("another blob does not come from the mirror")
	}
}

// F23: whatever is wrong with a mirror is felt once, shortly.
func TestBrokenMirror(t *testing.T) {
	faults := map[string]registry.Action{
		"hang": registry.Hang(), "stall": registry.StallAfter(10), "500": registry.Answer(500, ""), "503": registry.Answer(503, "", "Retry-After", "3600"),
		"reset": registry.Reset(), "html": registry.HTML(), "401": registry.Answer(401, ""), "403": registry.Answer(403, ""),
		"429": registry.TooMany(time.Hour), "cut": registry.CutAfter(10), "trickle": registry.Trickle(500), "wrong range": registry.ShiftRange(3),
		"redirect loop": registry.Answer(307, "", "Location", "/v2/test/blobs/"+string(layer().Digest)),
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
			repo := openRepo(t, newClient(t, mirrored(t, server, mirror.Addr)), "upstream.example/test:one")
			mirror.Inject(registry.Match{}, 0, fault)
			begun := time.Now()
			img, err := repo.Resolve(context.Background(), "linux/amd64")
			if err != nil {
				t.Fatal(err)
			}
			for range 5 {
				wantRange(t, repo, middle)
			}
			if img.Layers[0].Digest != layer().Digest {
				t.Error("another image")
			}
			// MirrorIdle is 0.3 s here, RateWindow too: a generous bound on what may be felt, and well below
			// what waiting for the mirror each time would cost.
			if d := time.Since(begun); d > 5*time.Second {
				t.Errorf("took %s", d)
			}
			if n := mirror.Count(registry.Match{}); n > 12 {
				t.Errorf("the broken mirror was asked %d times", n)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
		mirror.Down()
		repo := openRepo(t, newClient(t, mirrored(t, server, mirror.Addr)), "upstream.example/test:one")
		wantRange(t, repo, middle)
	})
	t.Run("dies in mid-body", func(t *testing.T) {
		server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
		repo := openRepo(t, newClient(t, mirrored(t, server, mirror.Addr)), "upstream.example/test:one")
		mirror.SetRate(500_000)
		rc, err := repo.Blob(context.Background(), layer().Digest, middle)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		first := make([]byte, 50_000)
		if _, err := io.ReadFull(rc, first); err != nil {
			t.Fatal(err)
		}
		mirror.Down()
		rest, err := io.ReadAll(rc)
		if err != nil || string(append(first, rest...)) != string(layerBytes(1, layerSize)[middle.Start:middle.End]) {
			t.Error("wrong bytes", err)
		}
		if b := server.Bytes(anyBlob); b == 0 || b > middle.Len()-50_000 {
			t.Errorf("%d bytes from the registry", b)
		}
	})
}

// A changed hosts.toml counts from the next repository on; and the registry itself among its own hosts is
// still there for what that entry cannot do.
func TestHostsAreReadAgain(t *testing.T) {
	server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
	o := mirrored(t, server)
	c := newClient(t, o)
	wantRange(t, openRepo(t, c, "upstream.example/test:one"), middle)
	text := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n[host.\"http://%s\"]\ncapabilities = [\"pull\"]\n", server.Addr, mirror.Addr, server.Addr)
	writeFile(t, text, o.CertsDir, "upstream.example", "hosts.toml")
	repo := openRepo(t, c, "upstream.example/test:one")
	wantRange(t, repo, middle)
	if s, m := server.Count(anyBlob), mirror.Count(anyBlob); s != 1 || m != 1 {
		t.Errorf("%d requests to the registry, %d to the mirror", s, m)
	}
	pushArtifact(t, repo, Image{Digest: layer().Digest, MediaType: MediaTypeManifest}, 1)
	if n := server.Count(registry.Match{Kind: registry.Upload}); n == 0 {
		t.Error("no upload to the registry")
	}
}

// A mirror that gives another manifest than its digest says is passed over.
func TestLyingMirror(t *testing.T) {
	server, mirror := newWorld(t, registry.Options{}), newWorld(t, registry.Options{})
	repo := openRepo(t, newClient(t, mirrored(t, server, mirror.Addr)), "upstream.example/test:many")
	mirror.Inject(registry.Match{Kind: registry.Manifest}, 0, registry.FlipAt(100))
	img, err := repo.Resolve(context.Background(), "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	if got := ztoc.DigestOf(img.Manifest); got != img.Digest {
		t.Errorf("%s, want %s", got, img.Digest)
	}
	if n := server.Count(registry.Match{Kind: registry.Manifest}); n != 2 {
		t.Errorf("%d manifests from the registry", n)
	}
	server.Inject(registry.Match{Kind: registry.Manifest}, 0, registry.FlipAt(100))
	_, err = repo.Resolve(context.Background(), "linux/amd64")
	wantError(t, err, ErrDigest, server.Addr, "upstream.example/test:many")
}

// ca makes a certificate authority and certificates signed by it, as PEM files in dir.
type ca struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	n    int64
}

func newCA(t *testing.T) *ca {
	c := &ca{t: t, dir: t.TempDir(), n: 1}
	c.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &c.key.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	c.cert, _ = x509.ParseCertificate(der)
	c.write("ca.pem", "CERTIFICATE", der)
	return c
}

func (c *ca) write(name, kind string, der []byte) string {
	return writeFile(c.t, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})), c.dir, name)
}

func (c *ca) issue(name string) tls.Certificate {
	c.n++
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(c.n), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, &key.PublicKey, c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	k, _ := x509.MarshalECPrivateKey(key)
	cert, err := tls.LoadX509KeyPair(c.write(name+".pem", "CERTIFICATE", der), c.write(name+".key", "EC PRIVATE KEY", k))
	if err != nil {
		c.t.Fatal(err)
	}
	return cert
}

func TestTLS(t *testing.T) {
	w := newWorld(t, registry.Options{})
	c := newCA(t)
	pool := x509.NewCertPool()
	pool.AddCert(c.cert)
	serve := func(o *tls.Config) string {
		s := httptest.NewUnstartedServer(registry.Upstream(w.Addr))
		s.TLS = o
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.StartTLS()
		t.Cleanup(s.Close)
		return strings.TrimPrefix(s.URL, "https://")
	}
	cert := c.issue("server")
	c.issue("client")
	plain := serve(&tls.Config{Certificates: []tls.Certificate{cert}})
	mutual := serve(&tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
	capem := filepath.Join(c.dir, "ca.pem")
	client := fmt.Sprintf("client = [[%q, %q]]\n", filepath.Join(c.dir, "client.pem"), filepath.Join(c.dir, "client.key"))
	tests := []struct {
		name, addr, hosts string
		ok                bool
		words             string
	}{
		{"ca", plain, fmt.Sprintf("server = \"https://%s\"\nca = %q\n", plain, capem), true, ""},
		{"no ca", plain, fmt.Sprintf("server = \"https://%s\"\n", plain), false, "hosts.toml"},
		{"skip_verify", plain, fmt.Sprintf("server = \"https://%s\"\nskip_verify = true\n", plain), true, ""},
		{"host table", plain, fmt.Sprintf("[host.\"https://%s\"]\nca = [%q]\n", plain, capem), true, ""},
		{"client", mutual, fmt.Sprintf("server = \"https://%s\"\nca = %q\n%s", mutual, capem, client), true, ""},
		{"no client", mutual, fmt.Sprintf("server = \"https://%s\"\nca = %q\n", mutual, capem), false, "certificate"},
		{"tls to plain", w.Addr, fmt.Sprintf("server = \"https://%s\"\n", w.Addr), false, "--plain-http"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := quick()
			o.MaxWait, o.ResolveWait = time.Second, time.Second
			o.CertsDir = t.TempDir()
			writeFile(t, tt.hosts, o.CertsDir, strings.ReplaceAll(tt.addr, ":", "_")+"_", "hosts.toml")
			repo := openRepo(t, newClient(t, o), tt.addr+"/test:one")
			if tt.ok {
				wantRange(t, repo, middle)
				return
			}
			_, err := repo.Resolve(context.Background(), "")
			wantError(t, err, ErrUnreachable, tt.words, tt.addr)
		})
	}
	// Without any configuration a loopback host is spoken to in plain HTTP, unless it answers with TLS.
	o := quick()
	o.ResolveWait = time.Second
	_, err := openRepo(t, newClient(t, o), plain+"/test:one").Resolve(context.Background(), "")
	wantError(t, err, ErrUnreachable, "certificate")
	missing := quick()
	missing.CertsDir = t.TempDir()
	writeFile(t, "ca = \"nowhere.pem\"\n", missing.CertsDir, "x.example", "hosts.toml")
	ref, _ := ParseReference("x.example/y")
	_, err = newClient(t, missing).Repository(ref)
	wantError(t, err, ErrUsage, "nowhere.pem")
}

// Neither client certificates nor headers of hosts.toml go to a host that the registry redirects to.
func TestRedirectsTakeNothingAlong(t *testing.T) {
	w := newWorld(t, registry.Options{})
	c := newCA(t)
	cert := c.issue("server")
	c.issue("client")
	var certs, secrets atomic.Int64
	storage := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		certs.Add(int64(len(r.TLS.PeerCertificates)))
		if r.Header.Get("X-Secret")+r.Header.Get("Authorization")+r.Header.Get("Cookie") != "" {
			secrets.Add(1)
		}
		registry.Upstream(w.Addr).ServeHTTP(rw, r)
	}))
	storage.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
	storage.StartTLS()
	defer storage.Close()
	var shown atomic.Int64
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Secret") == "hunter2" && r.Header.Get("Authorization") != "" && len(r.TLS.PeerCertificates) == 1 {
			shown.Add(1)
		}
		if r.Header.Get("Authorization") == "" {
			rw.Header().Set("Www-Authenticate", "Basic realm=x")
			rw.WriteHeader(401)
			return
		}
		http.Redirect(rw, r, storage.URL+r.URL.Path, http.StatusFound)
	}))
	front.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
	front.StartTLS()
	defer front.Close()
	addr := strings.TrimPrefix(front.URL, "https://")
	o := quick()
	o.CertsDir = t.TempDir()
	writeFile(t, fmt.Sprintf("[host.%q]\nca = %q\nclient = [[%q, %q]]\n[host.%q.header]\nX-Secret = \"hunter2\"\n", front.URL,
		filepath.Join(c.dir, "ca.pem"), filepath.Join(c.dir, "client.pem"), filepath.Join(c.dir, "client.key"), front.URL), o.CertsDir, addr, "hosts.toml")
	writeFile(t, "", o.CertsDir, "unused")
	o.Credentials = Static(addr, Credential{Username: "u", Password: "hunter2"})
	wantRange(t, openRepo(t, newClient(t, o), addr+"/test:one"), middle)
	if shown.Load() == 0 {
		t.Error("the registry itself was not shown what is configured for it")
	}
	if certs.Load() != 0 || secrets.Load() != 0 {
		t.Errorf("the storage was shown %d certificates and %d secrets", certs.Load(), secrets.Load())
	}
}

// proxyFor is a forward proxy that reaches every host at addr.
func proxyFor(t *testing.T, addr string) (string, *atomic.Int64) {
	var n atomic.Int64
	p := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = "http", addr
	}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		if r.URL.Host != "far.example:5000" {
			t.Errorf("the proxy is asked for %s", r.URL.Host)
		}
		p.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL, &n
}

func TestProxy(t *testing.T) {
	w := newWorld(t, registry.Options{})
	proxy, n := proxyFor(t, w.Addr)
	o := quick()
	o.PlainHTTP = []string{"far.example"}
	u, _ := url.Parse(proxy)
	o.Proxy = http.ProxyURL(u)
	repo := openRepo(t, newClient(t, o), "far.example:5000/test:one")
	wantRange(t, repo, middle)
	if n.Load() == 0 {
		t.Error("the proxy was not used")
	}
	// HTTP_PROXY and NO_PROXY are read once per process, so this needs one of its own.
	if os.Getenv("MUSTER_TEST_PROXY") == "" {
		for _, noProxy := range []string{"", "far.example"} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestProxyOfEnvironment$", "-test.v")
			cmd.Env = append(os.Environ(), "MUSTER_TEST_PROXY=1", "HTTP_PROXY="+proxy, "http_proxy=", "NO_PROXY="+noProxy, "no_proxy=")
			out, err := cmd.CombinedOutput()
			if (err == nil) != (noProxy == "") {
				t.Errorf("NO_PROXY=%q: %v\n%s", noProxy, err, out)
			}
		}
	}
}

// TestProxyOfEnvironment is run by TestProxy with HTTP_PROXY set; alone it has nothing to test.
func TestProxyOfEnvironment(t *testing.T) {
	if os.Getenv("MUSTER_TEST_PROXY") == "" {
		return
	}
	o := quick()
	o.Proxy = nil
	o.PlainHTTP = []string{"*"}
	o.MaxWait = time.Second
	wantRange(t, openRepo(t, newClient(t, o), "far.example:5000/test:one"), middle)
}

// A slip of the pen in a host's name is told soon, with a hint.
func TestUnknownHost(t *testing.T) {
	t.Parallel()
	o := quick()
	o.ResolveWait = time.Minute
	// What a resolver would say; the proxy's choice is where a test can say it without one.
	o.Proxy = func(r *http.Request) (*url.URL, error) {
		return nil, &net.DNSError{Err: "no such host", Name: r.URL.Host, IsNotFound: true}
	}
	begun := time.Now()
	_, err := openRepo(t, newClient(t, o), "no-such-host.invalid/x:y").Resolve(context.Background(), "")
	wantError(t, err, ErrUnreachable, "no-such-host.invalid", "spelling")
	if d := time.Since(begun); d > 20*time.Second {
		t.Errorf("told after %s", d)
	}
}
