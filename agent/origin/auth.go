package origin

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// An authorizer holds what one endpoint wants to see in the Authorization header for one scope. All
// requests of that scope share it: when a token has expired, the first to be refused fetches a new one
// and the others, refused with the same old header, wait for it.
type authorizer struct {
	scope string

	fetch chan struct{} // of capacity 1: full while a new header is made

	mu       sync.Mutex
	header   string // "" until the endpoint has asked for one
	gen      int    // counts headers
	last     []challenge
	accepted bool // header has opened the door at least once
}

func (a *authorizer) current() (header string, gen int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.header, a.gen
}

// worked notes that header gen was accepted: a later refusal is an expiry, not a wrong password.
func (a *authorizer) worked(gen int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if gen == a.gen {
		a.accepted = true
	}
}

func (a *authorizer) everWorked() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.accepted
}

const renewTimeout = 30 * time.Second

// errNoChallenge says that a host refused without telling what it wants.
var errNoChallenge = errors.New("the host does not say how to authenticate")

// renew makes a new header after one of generation gen was refused with h. It returns at once if
// another request has made one meanwhile.
func (c *Client) renew(ctx context.Context, e *endpoint, a *authorizer, repository string, gen int, h http.Header) error {
	select {
	case a.fetch <- struct{}{}:
		defer func() { <-a.fetch }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if _, now := a.current(); now != gen {
		return nil
	}
	var offers []challenge
	for _, v := range h.Values("Www-Authenticate") {
		offers = append(offers, parseChallenges(v)...)
	}
	if len(offers) == 0 {
		// ECR answers 403 without a challenge when a token has expired: the last one still holds.
		a.mu.Lock()
		offers = a.last
		a.mu.Unlock()
	}
	if len(offers) == 0 {
		return errNoChallenge
	}
	// Bounded as a whole, because all requests of the scope wait for it.
	ctx, cancel := context.WithTimeoutCause(ctx, renewTimeout, &Error{Op: "token", Host: e.host, Message: "no answer within " + renewTimeout.String(), Err: ErrUnreachable})
	defer cancel()
	cred, err := c.credential(ctx, e, repository)
	if err != nil {
		return err
	}
	header, err := c.authorization(ctx, e, a, offers, cred)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.header, a.last = header, offers
	a.gen++
	return nil
}

func (c *Client) credential(ctx context.Context, e *endpoint, repository string) (Credential, error) {
	if c.o.Credentials == nil {
		return Credential{}, nil
	}
	host := e.host
	if !e.mirror && host == dockerHubAPI {
		host = dockerHub
	}
	type answer struct {
		cred Credential
		err  error
	}
	ch := make(chan answer, 1)
	go func() { // a helper is a foreign program and may hang; it ends on its own, nobody waits for it
		cred, err := c.o.Credentials(ctx, host, repository)
		ch <- answer{cred, err}
	}()
	var got answer
	select {
	case got = <-ch:
	case <-ctx.Done():
		return Credential{}, context.Cause(ctx)
	}
	if err := got.err; err != nil {
		return Credential{}, &Error{Host: host, Message: "finding credentials: " + clean(err.Error()), Next: "check ~/.docker/config.json and its credential helper", Err: ErrUnauthorized, Cause: err}
	}
	return got.cred, nil
}

// authorization makes the header for the first offer it can take, Bearer before Basic.
func (c *Client) authorization(ctx context.Context, e *endpoint, a *authorizer, offers []challenge, cred Credential) (string, error) {
	if cred.RegistryToken != "" {
		return "Bearer " + cred.RegistryToken, nil
	}
	if i := slices.IndexFunc(offers, func(o challenge) bool { return o.scheme == "bearer" }); i >= 0 {
		tok, err := c.bearer(ctx, e, a, offers[i], cred)
		if err != nil {
			return "", err
		}
		return "Bearer " + tok, nil
	}
	if i := slices.IndexFunc(offers, func(o challenge) bool { return o.scheme == "basic" }); i >= 0 {
		if cred.Username == "" && cred.Password == "" {
			return "", &Error{Host: e.host, Message: "it wants a user and password, and none are known for it", Next: "docker login " + e.host, Err: ErrUnauthorized}
		}
		return basic(cred), nil
	}
	return "", &Error{Host: e.host, Message: fmt.Sprintf("it wants authentication by %.50q, muster knows Basic and Bearer", offers[0].scheme), Err: ErrUnauthorized}
}

func basic(c Credential) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
}

// maxToken bounds a token server's answer, bytes.
const maxToken = 64 << 10

// bearer fetches a token (distribution's token and OAuth2 specifications).
func (c *Client) bearer(ctx context.Context, e *endpoint, a *authorizer, ch challenge, cred Credential) (string, error) {
	realm, err := url.Parse(ch.params["realm"])
	if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != "http" || realm.User != nil {
		return "", &Error{Host: e.host, Message: fmt.Sprintf("its challenge names no usable token server: %s", clean(ch.params["realm"])), Err: ErrProtocol}
	}
	base := e.baseURL()
	if realm.Scheme == "http" && base.Scheme == "https" && !c.plain(realm.Host) {
		return "", &Error{Host: e.host, Message: "a registry with TLS names a token server without it: " + realm.Host, Next: "credentials are not sent there; tell the registry's administrator", Err: ErrUnauthorized}
	}
	scopes := []string{a.scope}
	if s := ch.params["scope"]; s != "" && s != a.scope {
		scopes = append(scopes, s)
	}
	var tries []*http.Request
	form := url.Values{"service": {ch.params["service"]}, "scope": {strings.Join(scopes, " ")}, "client_id": {"muster"}}
	post := func() {
		r, _ := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		tries = append(tries, r)
	}
	get := func() {
		u := *realm
		q := u.Query()
		q.Set("service", ch.params["service"])
		q["scope"] = scopes
		u.RawQuery = q.Encode()
		r, _ := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if cred.Username != "" || cred.Password != "" {
			r.Header.Set("Authorization", basic(cred))
		}
		tries = append(tries, r)
	}
	if cred.IdentityToken != "" {
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", cred.IdentityToken)
		post()
	} else {
		get()
		if cred.Username != "" {
			// Some token servers know only the OAuth2 form.
			form.Set("grant_type", "password")
			form.Set("username", cred.Username)
			form.Set("password", cred.Password)
			post()
		}
	}
	for i, r := range tries {
		tok, err := c.token(e, r, base.Host == realm.Host)
		var oe *Error
		if err == nil {
			return tok, nil
		}
		if i+1 < len(tries) && errors.As(err, &oe) && (oe.Status == http.StatusNotFound || oe.Status == http.StatusMethodNotAllowed) {
			continue
		}
		return "", err
	}
	return "", &Error{Host: realm.Host, Err: ErrUnauthorized}
}

// token asks a token server once. Its redirects are not followed: credentials would go with them.
func (c *Client) token(e *endpoint, r *http.Request, same bool) (string, error) {
	client := e.other
	if same {
		client = e.own
	}
	r.Header.Set("User-Agent", c.userAgent())
	outer := r.Context()
	ctx, cancel := context.WithTimeout(outer, e.idle) // an answer is a few hundred bytes
	defer cancel()
	r = r.WithContext(ctx)
	rec := Request{Kind: KindToken, Method: r.Method, Host: r.URL.Host, Mirror: e.mirror}
	begun := time.Now()
	defer func() {
		rec.Duration = time.Since(begun)
		c.record(rec)
	}()
	fail := func(status int, msg string, sentinel, cause error) (string, error) {
		rec.Err = sentinel
		return "", &Error{Op: "token", Host: r.URL.Host, Status: status, Message: msg, Err: sentinel, Cause: cause}
	}
	resp, err := client.Do(r)
	if err != nil {
		if outer.Err() != nil {
			return "", context.Cause(outer)
		}
		return fail(0, clean(bare(err).Error()), ErrUnreachable, bare(err))
	}
	defer resp.Body.Close()
	rec.Status, rec.Waited = resp.StatusCode, time.Since(begun)
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxToken+1))
	rec.Bytes = int64(len(body))
	if err != nil {
		return fail(resp.StatusCode, clean(bare(err).Error()), ErrUnreachable, bare(err))
	}
	switch {
	case resp.StatusCode == http.StatusOK:
	case later(resp.StatusCode):
		sentinel := ErrUnreachable
		if resp.StatusCode == http.StatusTooManyRequests {
			sentinel = ErrTooMany
		}
		e.quiet(retryAfter(resp.Header, time.Now()))
		return fail(resp.StatusCode, registryMessage(resp.Header.Get("Content-Type"), body), sentinel, nil)
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return fail(resp.StatusCode, "the token server redirects; credentials do not follow", ErrUnauthorized, nil)
	default:
		return fail(resp.StatusCode, registryMessage(resp.Header.Get("Content-Type"), body), ErrUnauthorized, nil)
	}
	var t struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &t); err != nil || len(body) > maxToken {
		return fail(resp.StatusCode, "not a token server's answer", ErrProtocol, nil)
	}
	if t.Token == "" {
		t.Token = t.AccessToken
	}
	if t.Token == "" || strings.ContainsAny(t.Token, "\r\n\x00") {
		return fail(resp.StatusCode, "no token in the answer", ErrProtocol, nil)
	}
	return t.Token, nil
}

func (c *Client) userAgent() string { return "muster/" + c.o.Version }
