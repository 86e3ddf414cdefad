package origin

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

var anyToken = registry.Match{Kind: registry.Token}

func TestAnonymousToken(t *testing.T) {
	w := newWorld(t, registry.Options{})
	if _, err := w.RequireTokens(registry.TokenOptions{}); err != nil {
		t.Fatal(err)
	}
	repo := w.open(quick())
	if _, err := repo.Resolve(context.Background(), "linux/amd64"); err != nil {
		t.Fatal(err)
	}
	wantRange(t, repo, middle)
	log := w.Log(anyToken)
	if len(log) != 1 || log[0].Auth != "" || !strings.Contains(log[0].Query, "scope=repository%3Atest%3Apull") || !strings.Contains(log[0].Query, "service=test") {
		t.Errorf("%+v", log)
	}
}

// All requests refused with one token share one new token.
func TestTokenIsRenewedOnceForAll(t *testing.T) {
	w := newWorld(t, registry.Options{})
	tok, err := w.RequireTokens(registry.TokenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o := quick()
	o.MaxConns, o.Idle = 32, 10*time.Second // a token fetched in vain because it came late counts
	repo := w.open(o)
	for round := 1; round <= 3; round++ {
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() { wantRange(t, repo, middle) })
		}
		wg.Wait()
		if n := tok.Issued(); n != round {
			t.Errorf("%d tokens in round %d", n, round)
		}
		tok.Revoke()
	}
}

// F6: tokens and signed URLs that expire all the time, refusals by 401 and by 403: every read succeeds.
func TestNothingExpiresForTheReader(t *testing.T) {
	for _, refused := range []int{401, 403} {
		t.Run(fmt.Sprint(refused), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			if _, err := w.RequireTokens(registry.TokenOptions{TTL: 250 * time.Millisecond, Refused: refused, User: "u", Password: "hunter2"}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.RedirectBlobs(registry.RedirectOptions{TTL: 100 * time.Millisecond}); err != nil {
				t.Fatal(err)
			}
			o := quick()
			o.Idle = 10 * time.Second
			o.Credentials = Static(w.Addr, Credential{Username: "u", Password: "hunter2"})
			repo := w.open(o)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for i := int64(0); i < 40; i++ {
						wantRange(t, repo, ztoc.Range{Start: i * 100, End: i*100 + 5000})
						time.Sleep(15 * time.Millisecond)
					}
				})
			}
			wg.Wait()
			if n := w.Count(registry.Match{Kind: registry.Storage, Status: 400}); n > 0 {
				t.Errorf("%d times credentials followed the redirect", n)
			}
			if n := w.Count(registry.Match{Kind: registry.Storage, Status: 403}); n == 0 {
				t.Error("no signed URL has expired: the test tests nothing")
			}
		})
	}
}

func TestSignedURLIsKept(t *testing.T) {
	w := newWorld(t, registry.Options{})
	store, err := w.RedirectBlobs(registry.RedirectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	repo := w.open(quick())
	for range 5 {
		wantRange(t, repo, middle)
	}
	if n := w.Count(anyBlob); n != 1 {
		t.Errorf("the registry was asked %d times for one signed URL", n)
	}
	store.Expire()
	wantRange(t, repo, middle)
	wantRange(t, repo, middle)
	if n := w.Count(anyBlob); n != 2 {
		t.Errorf("the registry was asked %d times for two signed URLs", n)
	}
	// A storage that has gone away: the registry may know another.
	w.Inject(registry.Match{Kind: registry.Storage}, 1, registry.Answer(503, ""))
	wantRange(t, repo, middle)
	if n := w.Count(anyBlob); n != 3 {
		t.Errorf("the registry was asked %d times for three signed URLs", n)
	}
	// A storage that refuses for good is an error, which does not show the signature.
	w.Inject(registry.Match{Kind: registry.Storage}, 0, registry.Answer(403, `<Error><Code>AccessDenied</Code><Message>no</Message><StringToSign>hunter2</StringToSign></Error>`))
	_, err = readRange(context.Background(), repo, layer().Digest, middle)
	wantError(t, err, ErrNotFound, store.Addr(), "403", w.Addr)
}

func TestRefusedCredentials(t *testing.T) {
	w := newWorld(t, registry.Options{})
	tok, err := w.RequireTokens(registry.TokenOptions{User: "u", Password: "right"})
	if err != nil {
		t.Fatal(err)
	}
	for name, cred := range map[string]Credentials{"none": nil, "wrong": Static(w.Addr, Credential{Username: "u", Password: "hunter2"})} {
		t.Run(name, func(t *testing.T) {
			o := quick()
			o.Credentials = cred
			_, err := w.open(o).Resolve(context.Background(), "")
			wantError(t, err, ErrUnauthorized, "/test:one", "incorrect username or password", "401", "docker login", tok.Addr())
		})
	}
	// A helper that fails is told by its own words.
	o := quick()
	o.Credentials = func(context.Context, string, string) (Credential, error) {
		return Credential{}, fmt.Errorf("vault is sealed")
	}
	_, err = w.open(o).Resolve(context.Background(), "")
	wantError(t, err, ErrUnauthorized, "vault is sealed")
}

func TestBasicAuth(t *testing.T) {
	w := newWorld(t, registry.Options{})
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("u:hunter2"))
	w.Inject(registry.Match{Where: func(r *registry.Record) bool { return r.Auth != want }}, 0,
		registry.Answer(401, "", "Www-Authenticate", `Negotiate`, "Www-Authenticate", `Basic realm="a, b"`))
	o := quick()
	o.Credentials = Static(w.Addr, Credential{Username: "u", Password: "hunter2"})
	wantRange(t, w.open(o), middle)
	_, err := readRange(context.Background(), w.open(quick()), layer().Digest, middle)
	wantError(t, err, ErrUnauthorized, "docker login "+w.Addr)
}

func TestTokenServerTroubles(t *testing.T) {
	tests := []struct {
		name     string
		fault    registry.Action
		times    int
		sentinel error // nil: it works in the end
	}{
		{"500 once", registry.Answer(500, ""), 1, nil},
		{"reset", registry.Reset(), 2, nil},
		{"429", registry.TooMany(time.Second), 1, nil},
		{"hang", registry.Hang(), 1, nil},
		{"html", registry.HTML(), 0, ErrProtocol},
		{"no token", registry.Answer(200, `{"expires_in":5}`), 0, ErrProtocol},
		{"token with line break", registry.Answer(200, `{"token":"a\r\nX: y"}`), 0, ErrProtocol},
		{"huge", registry.Answer(200, `{"token":"`+strings.Repeat("x", maxToken)+`"}`), 0, ErrProtocol},
		{"redirect", registry.Answer(302, "", "Location", "http://127.0.0.1:1/"), 0, ErrUnauthorized},
		{"worthless token", registry.Answer(200, `{"access_token":"abc"}`), 0, ErrUnauthorized},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			if _, err := w.RequireTokens(registry.TokenOptions{}); err != nil {
				t.Fatal(err)
			}
			repo := w.open(quick())
			w.Inject(anyToken, tt.times, tt.fault)
			_, err := repo.Resolve(context.Background(), "linux/amd64")
			if tt.sentinel == nil && err != nil {
				t.Error(err)
			}
			if tt.sentinel != nil {
				wantError(t, err, tt.sentinel)
				if n := w.Count(anyToken); n > 4 {
					t.Errorf("%d token requests", n)
				}
			}
		})
	}
}

func TestIdentityTokenAndOAuth2(t *testing.T) {
	w := newWorld(t, registry.Options{})
	var form string
	auth := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(rw, "", http.StatusMethodNotAllowed)
			return
		}
		r.ParseForm()
		form = r.PostForm.Encode()
		fmt.Fprint(rw, `{"access_token":"opened"}`)
	}))
	defer auth.Close()
	w.Inject(registry.Match{Where: func(r *registry.Record) bool { return r.Auth != "Bearer opened" }}, 0,
		registry.Answer(401, "", "Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/t",service="s",scope="repository:test:pull"`, auth.URL)))
	for want, cred := range map[string]Credential{
		"client_id=muster&grant_type=refresh_token&refresh_token=idtoken&scope=repository%3Atest%3Apull&service=s":  {Username: "<token>", IdentityToken: "idtoken"},
		"client_id=muster&grant_type=password&password=hunter2&scope=repository%3Atest%3Apull&service=s&username=u": {Username: "u", Password: "hunter2"},
		"": {RegistryToken: "opened"},
	} {
		form = ""
		o := quick()
		o.Credentials = Static(w.Addr, cred)
		wantRange(t, w.open(o), middle)
		if form != want {
			t.Errorf("%s\nwant %s", form, want)
		}
	}
}

// A registry with TLS may not send passwords to a token server without.
func TestTokenServerWithoutTLS(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Www-Authenticate", `Bearer realm="http://token.example.org/t",service="s"`)
		rw.WriteHeader(401)
	}))
	defer srv.Close()
	addr := strings.TrimPrefix(srv.URL, "https://")
	dir := t.TempDir()
	writeFile(t, fmt.Sprintf("server = %q\nskip_verify = true\n", srv.URL), dir, addr, "hosts.toml")
	o := quick()
	o.CertsDir = dir
	o.Credentials = Static(addr, Credential{Username: "u", Password: "hunter2"})
	_, err := openRepo(t, newClient(t, o), addr+"/test:one").Resolve(context.Background(), "")
	wantError(t, err, ErrUnauthorized, "token.example.org")
}

func TestDockerCredentials(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", "")
	os.Unsetenv("DOCKER_CONFIG")
	t.Setenv("XDG_RUNTIME_DIR", home)
	t.Setenv("PATH", home+":"+os.Getenv("PATH"))
	writeFile(t, `{"auths":{"plain.example:5000":{"auth":"`+base64.StdEncoding.EncodeToString([]byte("u:hunter2"))+`"},
		"https://index.docker.io/v1/":{"auth":"`+base64.StdEncoding.EncodeToString([]byte("hub:pw"))+`"}},
		"credHelpers":{"helped.example":"muster-test","broken.example":"missing"}}`, home, ".docker", "config.json")
	helper := writeFile(t, "#!/bin/sh\nread host\ntest $1 = get && echo '{\"ServerURL\":\"'$host'\",\"Username\":\"h\",\"Secret\":\"s-'$host'\"}'\n", home, "docker-credential-muster-test")
	if err := os.Chmod(helper, 0o755); err != nil {
		t.Fatal(err)
	}
	find := Docker()
	for host, want := range map[string]Credential{
		"plain.example:5000": {Username: "u", Password: "hunter2"},
		"docker.io":          {Username: "hub", Password: "pw"},
		"helped.example":     {Username: "h", Password: "s-helped.example"},
		"other.example":      {},
	} {
		got, err := find(context.Background(), host, "a/b")
		if err != nil || got != want {
			t.Errorf("%s: %#v, %v", host, got.Username, err)
		}
	}
	if _, err := find(context.Background(), "broken.example", "a/b"); err == nil {
		t.Error("a missing helper is no error")
	}
	secret := Credential{Username: "u", Password: "hunter2"}
	if s := fmt.Sprintf("%v %+v %#v %s", secret, secret, secret, secret); strings.Contains(s, "hunter2") {
		t.Error(s)
	}
}
