package origin

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// An upstream is all the places that answer for one registry: its mirrors in the order configured, then
// the registry itself.
type upstream struct {
	registry  string
	stamp     string // of the configuration it was made from
	endpoints []*endpoint

	mu   sync.Mutex
	gave map[ztoc.Digest]*endpoint // who answered last for a blob
}

// answered notes that bytes of a blob come from e.
func (u *upstream) answered(d ztoc.Digest, e *endpoint) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.gave) >= maxRemembered {
		clear(u.gave)
	}
	if u.gave == nil {
		u.gave = map[ztoc.Digest]*endpoint{}
	}
	u.gave[d] = e
}

// giver is who answered last for a blob; nil when nobody has.
func (u *upstream) giver(d ztoc.Digest) *endpoint {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.gave[d]
}

// An endpoint is one of them, with what was learned about it.
type endpoint struct {
	host   string // for people
	mirror bool
	ns     string // registry a mirror is asked about; empty for the registry itself
	cfg    hostConfig
	own    *http.Client // for the endpoint itself
	other  *http.Client // for hosts it redirects to: no client certificates, no headers of hosts.toml
	idle   time.Duration
	scheme atomic.Pointer[string] // overrides cfg.base.Scheme once a loopback host turned out to speak TLS
	report func(Request)

	answered atomic.Bool  // ever, with anything that is HTTP
	noRange  atomic.Bool  // answered 200 to a ranged request
	floor    atomic.Int64 // minimum rate; sinks while everything here is slow
	active   atomic.Int64 // bodies being waited for
	moved    atomic.Int64 // bytes received, for the rate of the whole host

	mu     sync.Mutex
	rest   time.Time                 // not to be asked before
	fails  int                       // rests in a row
	misses map[string]time.Time      // path → until when its 404 is believed
	wrong  map[ztoc.Digest]time.Time // until when its bytes of a blob are the last choice
	signed map[ztoc.Digest]signedURL
	auths  map[string]*authorizer // by scope
}

type signedURL struct {
	u       *url.URL
	expires time.Time
}

const (
	mirrorRest    = 30 * time.Second // a mirror that failed is left alone this long, doubled each time
	maxMirrorRest = 5 * time.Minute
	missLife      = time.Minute
	wrongLife     = 10 * time.Minute
	maxRemembered = 4096 // entries of misses and signed
)

// upstream finds or builds the endpoints of registry. A changed hosts.toml counts from the next repository
// that is opened, as with containerd.
func (c *Client) upstream(registry string) (*upstream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stamp := c.certs.stamp(registry)
	if u := c.upstreams[registry]; u != nil && u.stamp == stamp {
		return u, nil
	}
	f, _, err := c.certs.lookup(registry)
	if err != nil {
		return nil, err
	}
	u := &upstream{registry: registry, stamp: stamp}
	server := f.server
	if server.base.Host == "" {
		host := registry
		if host == dockerHub {
			host = dockerHubAPI
		}
		scheme := "https"
		if c.plain(registry) {
			scheme = "http"
		}
		server.base = url.URL{Scheme: scheme, Host: host, Path: "/v2"}
		if len(f.hosts) == 0 && (len(server.ca) > 0 || len(server.clients) > 0) {
			server.base.Scheme = "https" // who configures certificates means TLS
		}
		if !server.pull && !server.resolve && !server.push {
			server.pull, server.resolve, server.push = true, true, true
		}
	}
	for _, h := range f.hosts {
		// A host that is the registry itself carries the registry's settings; it is no mirror.
		e, err := c.endpoint(registry, h, h.base.Host != server.base.Host)
		if err != nil {
			return nil, certsError(registry, filepath.Join(c.o.CertsDir, registry), err)
		}
		u.endpoints = append(u.endpoints, e)
	}
	if !slices.ContainsFunc(f.hosts, func(h hostConfig) bool { return h.base == server.base && h.pull && h.resolve && h.push }) {
		e, err := c.endpoint(registry, server, false)
		if err != nil {
			return nil, certsError(registry, filepath.Join(c.o.CertsDir, registry), err)
		}
		u.endpoints = append(u.endpoints, e)
	}
	c.upstreams[registry] = u
	return u, nil
}

// plain reports whether a registry is spoken to without TLS.
func (c *Client) plain(registry string) bool {
	host := registry
	if h, _, err := net.SplitHostPort(registry); err == nil {
		host = h
	}
	for _, p := range c.o.PlainHTTP {
		if p == "*" || p == registry || p == host {
			return true
		}
	}
	return loopback(registry)
}

func loopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || strings.HasSuffix(host, ".localhost") || ip != nil && ip.IsLoopback()
}

// endpoint makes one. The caller holds Client.mu.
func (c *Client) endpoint(registry string, h hostConfig, mirror bool) (*endpoint, error) {
	e := &endpoint{
		host: h.base.Host, mirror: mirror, cfg: h, idle: c.o.Idle,
		misses: map[string]time.Time{}, wrong: map[ztoc.Digest]time.Time{}, signed: map[ztoc.Digest]signedURL{}, auths: map[string]*authorizer{},
	}
	e.floor.Store(c.o.MinRate)
	e.report = c.record
	if mirror {
		e.ns = registry
		e.idle = c.o.MirrorIdle
	}
	dial := cmp.Or(h.dial, min(e.idle, 30*time.Second))
	var err error
	if e.own, err = c.httpClient(h, dial); err != nil {
		return nil, err
	}
	h.clients = nil
	e.other, err = c.httpClient(h, dial)
	return e, err
}

// httpClient is the client for hosts configured as h. Endpoints with the same certificates share one, so
// that the limit on connections is one per host, not one per registry that the host mirrors. It follows no
// redirects: ask does, and knows what must not follow. The caller holds Client.mu.
func (c *Client) httpClient(h hostConfig, dial time.Duration) (*http.Client, error) {
	key := fmt.Sprint(h.skipVerify, dial)
	for _, f := range slices.Concat(h.ca, slices.Concat(pairs(h.clients)...)) {
		key += " " + f
		if st, err := os.Stat(f); err == nil {
			key += fmt.Sprint(st.ModTime().UnixNano())
		}
	}
	if client := c.clients[key]; client != nil {
		return client, nil
	}
	t, err := h.tlsConfig()
	if err != nil {
		return nil, err
	}
	var p http.Protocols
	p.SetHTTP1(true) // HTTP/2 would put all requests on one connection: one stall stalls all
	d := &net.Dialer{Timeout: dial, KeepAlive: 15 * time.Second}
	client := &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  c.o.Proxy,
			DialContext:            d.DialContext,
			TLSClientConfig:        t,
			TLSHandshakeTimeout:    dial,
			IdleConnTimeout:        90 * time.Second,
			MaxConnsPerHost:        c.o.MaxConns,
			MaxIdleConnsPerHost:    c.o.MaxConns,
			DisableCompression:     true, // blobs are compared byte by byte
			ReadBufferSize:         64 << 10,
			MaxResponseHeaderBytes: 64 << 10,
			Protocols:              &p,
		},
	}
	c.clients[key] = client
	return client, nil
}

func pairs(list [][2]string) [][]string {
	out := make([][]string, len(list))
	for i := range list {
		out[i] = list[i][:]
	}
	return out
}

// baseURL is the API's root as it is spoken to now.
func (e *endpoint) baseURL() url.URL {
	u := e.cfg.base
	if s := e.scheme.Load(); s != nil {
		u.Scheme = *s
	}
	return u
}

func (e *endpoint) can(c *call) bool {
	switch c.need {
	case needPull:
		return e.cfg.pull
	case needResolve:
		return e.cfg.resolve
	default:
		return e.cfg.push && !e.mirror
	}
}

// sleeps is how long e is not to be asked.
func (e *endpoint) sleeps(now time.Time) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rest.Sub(now)
}

// quiet makes everybody leave e alone until d from now.
func (e *endpoint) quiet(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := time.Now().Add(d); t.After(e.rest) {
		e.rest = t
	}
}

// failed notes that a request begun at started got nothing useful. A mirror is then left alone for a
// while; the registry itself is not, for there is nobody else to ask.
func (e *endpoint) failed(started time.Time) {
	if !e.mirror {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if e.rest.After(now) || e.rest.After(started) {
		return // one outage, noticed by many
	}
	d := min(mirrorRest<<min(e.fails, 8), maxMirrorRest)
	e.rest = now.Add(d)
	e.fails++
}

func (e *endpoint) worked() {
	e.answered.Store(true)
	if !e.mirror {
		return
	}
	e.mu.Lock()
	e.fails = 0
	e.mu.Unlock()
}

// missed reports whether e lately said it does not have path; miss makes it remember.
func (e *endpoint) missed(path string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	t, ok := e.misses[path]
	return ok && time.Now().Before(t)
}

func (e *endpoint) miss(path string) {
	if !e.mirror {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.misses) >= maxRemembered {
		clear(e.misses)
	}
	e.misses[path] = time.Now().Add(missLife)
}

// rank orders those that could be asked for c: who gave wrong bytes of the blob comes last, and for a part of a blob who ignores
// ranges before that.
func (e *endpoint) rank(c *call) (n int) {
	if c.rng.Start > 0 && e.noRange.Load() {
		n = 1
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if t, ok := e.wrong[c.digest]; ok && time.Now().Before(t) {
		n += 2
	}
	return n
}

// reject makes e the last choice for a blob for a while.
func (e *endpoint) reject(d ztoc.Digest) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.wrong) >= maxRemembered {
		clear(e.wrong)
	}
	e.wrong[d] = time.Now().Add(wrongLife)
	delete(e.signed, d) // perhaps it was not e but where e sent us
}

func (e *endpoint) signedFor(d ztoc.Digest) *url.URL {
	e.mu.Lock()
	defer e.mu.Unlock()
	s, ok := e.signed[d]
	if !ok {
		return nil
	}
	if time.Now().After(s.expires) {
		delete(e.signed, d)
		return nil
	}
	return s.u
}

func (e *endpoint) keepSigned(d ztoc.Digest, u *url.URL, until time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.signed) >= maxRemembered {
		clear(e.signed)
	}
	e.signed[d] = signedURL{u, until}
}

// dropSigned forgets u, not a newer one that another request has brought meanwhile.
func (e *endpoint) dropSigned(d ztoc.Digest, u *url.URL) {
	if u == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.signed[d].u == u {
		delete(e.signed, d)
	}
}

// auth is the authorizer for a scope such as "repository:library/debian:pull".
func (e *endpoint) auth(scope string) *authorizer {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.auths[scope]
	if a == nil {
		a = &authorizer{scope: scope, fetch: make(chan struct{}, 1)}
		e.auths[scope] = a
	}
	return a
}

// expiry is until when a signed URL is used again: what it says itself in the ways S3, Google and Azure
// do, less a margin; else a guess that a refusal corrects.
func expiry(u *url.URL, now time.Time) time.Time {
	const guess, margin = 5 * time.Minute, 10 * time.Second
	q := u.Query()
	end := now.Add(guess)
	for _, p := range []string{"X-Amz-", "X-Goog-"} {
		t, err := time.Parse("20060102T150405Z", q.Get(p+"Date"))
		if n, ok := number(q.Get(p + "Expires")); ok && err == nil && n < 1<<31 {
			end = t.Add(time.Duration(n) * time.Second)
		}
	}
	if n, ok := number(q.Get("Expires")); ok && n < 1<<40 {
		end = time.Unix(n, 0)
	}
	if t, err := time.Parse(time.RFC3339, q.Get("se")); err == nil {
		end = t
	}
	if limit := now.Add(time.Hour); end.After(limit) {
		end = limit
	}
	return end.Add(-min(margin, max(0, end.Sub(now)/4)))
}

// jitter is a random duration up to the nth step of an exponential: 0.2 s doubled up to 10 s.
func jitter(n int) time.Duration {
	return time.Duration(rand.Int64N(int64(min(200*time.Millisecond<<min(n, 10), 10*time.Second)))) + time.Millisecond
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
