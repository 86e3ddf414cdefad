package origin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"time"
)

// An answer is a response with a status the call accepts; the caller closes it.
type answer struct {
	*http.Response
	e      *endpoint
	signed *url.URL // the kept redirect that led here; nil if none did
	rec    Request
	stop   context.CancelCauseFunc
	t0     time.Time
}

// send sends one request. On success the caller owns the answer's body.
func (r *remote) send(ctx context.Context, e *endpoint, c *call, u *url.URL, same bool, header string) (*answer, error) {
	own, stop := context.WithCancelCause(ctx)
	a := &answer{e: e, stop: stop, t0: time.Now(), rec: Request{
		Kind: c.kind, Method: c.method, Host: u.Host, Digest: c.digest, Range: c.rng, Mirror: e.mirror, Signed: !same, Attempt: c.tried,
	}}
	if a.rec.Method == "" {
		a.rec.Method = http.MethodGet
	}
	var body io.ReadCloser
	if c.body != nil {
		var err error
		if body, err = c.body(); err != nil {
			stop(nil)
			return nil, fmt.Errorf("reading what is to be pushed: %w", err)
		}
	}
	// The wait for an answer begins when the request has been written: before that it may wait for one of
	// the connections allowed, and that is no fault of the server.
	wait := &silence{after: e.headerWait(c), do: func() { stop(errSilent) }}
	trace := httptrace.WithClientTrace(own, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { wait.begin() }})
	req, err := http.NewRequestWithContext(trace, a.rec.Method, u.String(), nil)
	if err != nil {
		stop(nil)
		return nil, a.refuse(r, c, elsewhere, ErrProtocol, "an address that cannot be used", "")
	}
	if body != nil {
		req.Body, req.ContentLength = body, c.size
		if c.size == 0 {
			body.Close()
			req.Body = http.NoBody
		}
	}
	client := e.other
	if same {
		client = e.own
		for k, v := range e.cfg.header {
			req.Header[k] = v
		}
		if header != "" {
			req.Header.Set("Authorization", header)
		}
	}
	for k, v := range c.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", r.c.userAgent())
	if c.kind == KindBlob {
		req.Header.Set("Accept-Encoding", "identity")
	}
	resp, err := client.Do(req)
	wait.end()
	silent := context.Cause(own) == errSilent
	if err != nil {
		cause := bare(err)
		switch {
		case ctx.Err() != nil:
			cause = context.Cause(ctx)
		case silent:
			cause = errSilent
		}
		a.rec.Err = cause
		a.done()
		if ctx.Err() != nil {
			return nil, cause
		}
		return nil, r.broken(e, c, u.Host, cause)
	}
	a.Response = resp
	a.rec.Status, a.rec.Waited = resp.StatusCode, time.Since(a.t0)
	return a, nil
}

// silence does something a while after it began, unless it ends. The transport begins it from a goroutine
// of its own: perhaps twice (it sends again over a new connection when an idle one turns out dead), perhaps
// after the answer has come (a server may answer before it has read all).
type silence struct {
	after time.Duration
	do    func()

	mu    sync.Mutex
	timer *time.Timer
	ended bool
}

func (s *silence) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	if s.timer != nil {
		s.timer.Stop()
	}
	s.timer = time.AfterFunc(s.after, s.do)
}

func (s *silence) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

var errSilent = errors.New("no answer")

// headerWait is how long a request's answer is waited for. Each try waits longer: a pull-through cache
// may need minutes until it has a large blob, and asking it again does not make it faster.
func (e *endpoint) headerWait(c *call) time.Duration {
	const longest = 2 * time.Minute
	switch {
	case e.mirror:
		return e.idle
	case c.kind == KindUpload:
		return max(e.idle, longest) // storage may copy what was uploaded before it answers
	}
	return max(e.idle, min(e.idle<<min(c.tried, 10), longest))
}

// done ends the request and reports it, once.
func (a *answer) done() {
	if a.stop == nil {
		return
	}
	a.stop(nil)
	a.stop = nil
	a.rec.Duration = time.Since(a.t0)
	a.e.report(a.rec)
}

// drop reads the little that may be left so that the connection can be used again, then ends.
func (a *answer) drop(err error) {
	if a.stop == nil {
		return
	}
	if err == nil {
		n, _ := io.CopyN(io.Discard, a.Body, 4<<10)
		a.rec.Bytes += n
	}
	a.Body.Close()
	if err != nil {
		a.rec.Err = err
	}
	a.done()
}

// refuse ends the answer and makes a refusal of it.
func (a *answer) refuse(r *remote, c *call, v verdict, sentinel error, message, next string) *refusal {
	err := &Error{Op: c.op, Image: r.ref.String(), Host: a.rec.Host, Status: a.rec.Status, Message: message, Next: next, Err: sentinel}
	if a.Response != nil && a.stop != nil {
		if message == "" {
			b, _ := io.ReadAll(io.LimitReader(a.Body, maxErrorBody))
			a.rec.Bytes += int64(len(b))
			err.Message = registryMessage(a.Header.Get("Content-Type"), b)
		}
		a.drop(nil)
	}
	return &refusal{verdict: v, err: err}
}

// later reports whether a status is worth asking again.
func later(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests,
		http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return status > 504
}

// status turns a status that is no answer into a refusal.
func (r *remote) status(e *endpoint, c *call, a *answer) *refusal {
	s := a.StatusCode
	after := retryAfter(a.Header, time.Now())
	switch {
	case s == http.StatusTooManyRequests:
		// Everybody asks this host later, not only this call.
		e.quiet(max(after, 100*time.Millisecond))
		f := a.refuse(r, c, again, ErrTooMany, "", "try again later, or log in: registries allow users more than strangers")
		f.after = after
		return f
	case later(s):
		if after > 0 {
			e.quiet(after)
		}
		f := a.refuse(r, c, again, ErrUnreachable, "", "try again later")
		f.after = after
		return f
	case s == http.StatusNotFound:
		e.miss(r.path(c))
		next := "check name and tag"
		if c.kind == KindBlob {
			next = "the image is not complete in the registry: push it again"
		}
		return a.refuse(r, c, elsewhere, ErrNotFound, "", next)
	case s == http.StatusRequestedRangeNotSatisfiable:
		return a.refuse(r, c, elsewhere, ErrDigest, "the blob is shorter than its descriptor says", "")
	case s == http.StatusBadRequest && e.needsTLS(a):
		f := a.refuse(r, c, again, ErrUnreachable, "", "")
		f.err.Cause = errNeedsTLS
		return f
	case s == http.StatusProxyAuthRequired:
		return a.refuse(r, c, elsewhere, ErrUnauthorized, "the proxy wants authentication", "put user and password into HTTPS_PROXY")
	}
	f := a.refuse(r, c, elsewhere, ErrProtocol, "", "")
	if c.kind == KindUpload && strings.Contains(f.err.Message, "DIGEST_INVALID") {
		f.err.Err = ErrDigest
	}
	return f
}

// errNeedsTLS says that a host we spoke plain HTTP to wants TLS.
var errNeedsTLS = errors.New("the host wants TLS")

// needsTLS reports whether a 400 to plain HTTP is a TLS server's (the text is Go's and nginx's).
func (e *endpoint) needsTLS(a *answer) bool {
	u := e.baseURL()
	if u.Scheme != "http" || !loopback(u.Host) || e.answered.Load() {
		return false
	}
	b, _ := io.ReadAll(io.LimitReader(a.Body, 4<<10))
	s := strings.ToLower(string(b))
	a.Body.Close()
	a.Body = io.NopCloser(strings.NewReader(string(b)))
	return strings.Contains(s, "to an https server") || strings.Contains(s, "to https port")
}

// switchScheme makes a loopback host that turned out to speak TLS be spoken to so from now on.
func (e *endpoint) switchScheme(err *Error) bool {
	if !errors.Is(err, errNeedsTLS) || e.scheme.Load() != nil {
		return false
	}
	s := "https"
	e.scheme.Store(&s)
	return true
}

// broken turns a failure below HTTP into a refusal: what time cannot heal is final.
func (r *remote) broken(e *endpoint, c *call, host string, cause error) *refusal {
	f := &refusal{verdict: again, err: &Error{
		Op: c.op, Image: r.ref.String(), Host: host, Message: clean(cause.Error()), Err: ErrUnreachable, Cause: cause,
		Next: "check network, proxy settings and that the registry runs",
	}}
	var (
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
		verify   *tls.CertificateVerificationError
		record   tls.RecordHeaderError
		dns      *net.DNSError
	)
	switch {
	case errors.As(cause, &unknown), errors.As(cause, &hostname), errors.As(cause, &invalid), errors.As(cause, &verify):
		f.verdict = elsewhere
		f.err.Next = "put its CA into " + r.c.o.CertsDir + "/" + r.up.registry + "/hosts.toml (ca = \"file\")"
	case errors.As(cause, &record), strings.Contains(cause.Error(), "server gave HTTP response to HTTPS client"):
		f.verdict = elsewhere
		f.err.Next = "if it really has no TLS: --plain-http"
	case errors.As(cause, &dns) && dns.IsNotFound:
		f.err.Next = "check the spelling of the registry's name"
	}
	return f
}
