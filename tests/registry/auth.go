package registry

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// TokenOptions are what a proxy asks of its clients.
type TokenOptions struct {
	TTL      time.Duration // how long a token holds; 0: for ever
	User     string        // who gets tokens; "" is anybody
	Password string
	Addr     string // where the token server listens; "" is a free port of 127.0.0.1
	Refused  int    // status for a missing or expired token; 0 is 401. ECR answers 403, without a challenge
}

// Tokens is the token server of a proxy: a listener of its own, as in real life.
type Tokens struct {
	o   TokenOptions
	p   *Proxy
	srv listener

	mu     sync.Mutex
	valid  map[string]time.Time // until when
	issued int
}

// RequireTokens makes the proxy want a bearer token for everything but its token server, which it starts.
// Requests to the token server are in the log as [Token].
func (p *Proxy) RequireTokens(o TokenOptions) (*Tokens, error) {
	t := &Tokens{o: o, p: p, valid: map[string]time.Time{}}
	t.srv.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.handle(w, r, question{kind: Token}, t.issue)
	})
	if err := t.srv.start(o.Addr); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens = t
	return t, nil
}

// Addr is where the token server listens.
func (t *Tokens) Addr() string { return t.srv.addr }

// Revoke makes all tokens given out so far worthless.
func (t *Tokens) Revoke() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.valid)
}

// Issued is how many tokens were given out.
func (t *Tokens) Issued() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.issued
}

func (t *Tokens) issue(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password = r.FormValue("username"), r.FormValue("password")
	}
	if t.o.User != "" && (user != t.o.User || password != t.o.Password) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"details":"incorrect username or password"}`)
		return
	}
	tok := rand.Text()
	until := time.Now().Add(t.o.TTL)
	if t.o.TTL == 0 {
		until = time.Now().Add(24 * time.Hour)
	}
	t.mu.Lock()
	t.valid[tok] = until
	t.issued++
	t.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"token": tok, "expires_in": max(1, int(t.o.TTL.Seconds()))})
}

// admit lets a request with a valid token pass, and answers any other.
func (t *Tokens) admit(w http.ResponseWriter, r *http.Request, q question) bool {
	tok, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	t.mu.Lock()
	until, ok := t.valid[tok]
	t.mu.Unlock()
	if ok && time.Now().Before(until) {
		return true
	}
	status := t.o.Refused
	if status == 0 || tok == "" {
		status = http.StatusUnauthorized
	}
	if status == http.StatusUnauthorized {
		w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test",scope="repository:%s:pull"`, t.srv.addr, q.repo))
	}
	refuse(w, status, "UNAUTHORIZED", "authentication required")
	return false
}

// RedirectOptions are how a proxy sends clients to its storage.
type RedirectOptions struct {
	TTL time.Duration // how long a signed URL holds; 0: an hour
}

// SignedStorage serves blobs by signed URLs at an address of its own, as S3 does for registries.
type SignedStorage struct {
	o   RedirectOptions
	p   *Proxy
	srv listener

	mu  sync.Mutex
	key []byte
}

// RedirectBlobs makes the proxy answer requests for blobs with a redirect to signed URLs of a storage
// server, which it starts. The storage refuses expired signatures with 403, and any request that carries an
// Authorization header with 400, as S3 does. Its requests are in the log as [Storage], with the blob's
// digest; rates, latency and faults hold for them too.
func (p *Proxy) RedirectBlobs(o RedirectOptions) (*SignedStorage, error) {
	if o.TTL == 0 {
		o.TTL = time.Hour
	}
	s := &SignedStorage{o: o, p: p, key: []byte(rand.Text())}
	s.srv.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := parsePath(r.URL.Path)
		q.kind = Storage
		p.handle(w, r, q, s.serve)
	})
	if err := s.srv.start(""); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.storage = s
	return s, nil
}

// Addr is where the storage listens.
func (s *SignedStorage) Addr() string { return s.srv.addr }

// Expire makes all URLs signed so far worthless.
func (s *SignedStorage) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key = []byte(rand.Text())
}

func (s *SignedStorage) signature(path, expires string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := hmac.New(sha256.New, s.key)
	h.Write([]byte(path + "\n" + expires))
	return hex.EncodeToString(h.Sum(nil))
}

func (s *SignedStorage) sign(path string) string {
	expires := strconv.FormatInt(time.Now().Add(s.o.TTL).UnixMilli(), 10)
	q := url.Values{"X-Test-Expires": {expires}, "Signature": {s.signature(path, expires)}}
	return "http://" + s.srv.addr + path + "?" + q.Encode()
}

func (s *SignedStorage) serve(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	expires, err := strconv.ParseInt(q.Get("X-Test-Expires"), 10, 64)
	xml := func(status int, code string) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		fmt.Fprintf(w, `<?xml version="1.0"?><Error><Code>%s</Code><Message>refused</Message><Signature>%s</Signature></Error>`, code, q.Get("Signature"))
	}
	switch {
	case r.Header.Get("Authorization") != "":
		xml(http.StatusBadRequest, "InvalidArgument")
	case err != nil || time.Now().UnixMilli() > expires || !hmac.Equal([]byte(s.signature(r.URL.Path, q.Get("X-Test-Expires"))), []byte(q.Get("Signature"))):
		xml(http.StatusForbidden, "AccessDenied")
	default:
		s.p.upstream.ServeHTTP(w, r)
	}
}
