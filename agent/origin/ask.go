package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// What an endpoint must be capable of to be asked.
type need int

const (
	needPull need = iota
	needResolve
	needPush
)

// A call is one question to a registry, whichever of its endpoints answers.
type call struct {
	kind   Kind
	op     string // for people
	method string // "" is GET
	path   string // below the repository: "manifests/latest"
	abs    *url.URL
	query  url.Values
	header http.Header
	body   func() (io.ReadCloser, error) // nil: none
	size   int64
	need   need
	digest ztoc.Digest
	rng    ztoc.Range // of a blob; zero: all
	status []int      // what is an answer, besides 200
	tried  int
}

func (c *call) answers(status int) bool {
	if status == http.StatusOK {
		return true
	}
	for _, s := range c.status {
		if s == status {
			return true
		}
	}
	return false
}

// patience is how long one operation has got nothing useful.
type patience struct {
	max   time.Duration
	since time.Time
	tries int // failures since then
}

func newPatience(d time.Duration) *patience { return &patience{max: d, since: time.Now()} }

// progress starts the patience afresh.
func (p *patience) progress() { p.since, p.tries = time.Now(), 0 }

// A verdict is what a failure of one endpoint means for the call.
type verdict int

const (
	elsewhere verdict = iota // this endpoint has said no; another may say yes
	again                    // nobody has said no: ask again, here or elsewhere
)

// A refusal is one endpoint's failure to answer.
type refusal struct {
	verdict verdict
	after   time.Duration // not before this; 0: as the back-off says
	err     *Error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// do asks the endpoints in turn until one answers, all have said no, or patience ends: mirrors first,
// those that rest or lately said no passed over, then the registry itself; and again after a pause.
func (r *remote) do(ctx context.Context, c *call, p *patience) (*answer, error) {
	return r.doExcept(ctx, c, p, map[*endpoint]*refusal{})
}

// doExcept is do for a caller that has heard a no already, or will find one in what an answer holds.
func (r *remote) doExcept(ctx context.Context, c *call, p *patience, no map[*endpoint]*refusal) (*answer, error) {
	var (
		last   *refusal
		lastOf *endpoint
	)
	for {
		e, wait := r.pick(c, no)
		if e == nil {
			return nil, r.verdict(c, no)
		}
		if lastOf == e {
			wait = max(wait, last.after, jitter(p.tries-1))
		} else if wait > 0 {
			wait += jitter(0) // all that wait for the same rest do not end it together
		}
		if wait > 0 {
			if left := p.max - time.Since(p.since); wait > left {
				return nil, r.exhausted(c, last, p, wait)
			}
			if err := sleep(ctx, wait); err != nil {
				return nil, err
			}
		}
		begun := time.Now()
		a, err := r.ask(ctx, e, c)
		c.tried++
		if err == nil {
			e.worked()
			return a, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var f *refusal
		if !errors.As(err, &f) {
			return nil, err
		}
		if f.verdict == elsewhere {
			no[e] = f
			if f.err.Err != ErrNotFound {
				e.failed(begun)
			}
			continue
		}
		last, lastOf = f, e
		p.tries++
		e.failed(begun)
		if time.Since(p.since) > p.limit(e, f) {
			if e.mirror {
				no[e] = f
				continue
			}
			return nil, r.exhausted(c, last, p, 0)
		}
	}
}

// limit is the patience with this kind of failure: a host name that does not exist is a slip of the
// pen unless the host has answered before.
func (p *patience) limit(e *endpoint, f *refusal) time.Duration {
	var dns *net.DNSError
	if !e.answered.Load() && errors.As(f.err, &dns) && dns.IsNotFound {
		return min(p.max, 3*time.Second)
	}
	return p.max
}

// pick chooses whom to ask: the first that can, has not refused and does not rest; else the one whose
// rest ends first, and how long that is. See endpoint.rank for who comes last.
func (r *remote) pick(c *call, no map[*endpoint]*refusal) (*endpoint, time.Duration) {
	var (
		best *endpoint
		wait time.Duration
		now  = time.Now()
	)
	better := func(e *endpoint, d time.Duration) bool {
		switch {
		case best == nil:
			return true
		case d > 0 || wait > 0:
			return d < wait
		default:
			return e.rank(c) < best.rank(c)
		}
	}
	refused := false // by the registry itself: then no mirror is waited for
	for e := range no {
		refused = refused || !e.mirror
	}
	for _, e := range r.up.endpoints {
		if !e.can(c) || no[e] != nil || e.mirror && e.missed(r.path(c)) {
			continue
		}
		d := max(0, e.sleeps(now))
		if d > 0 && refused {
			continue
		}
		if better(e, d) {
			best, wait = e, d
		}
	}
	return best, wait
}

// verdict makes one error of what all endpoints said. The registry's own word counts; mirrors' only
// when it was not asked.
func (r *remote) verdict(c *call, no map[*endpoint]*refusal) error {
	var out *Error
	for _, e := range r.up.endpoints {
		if f := no[e]; f != nil {
			out = f.err
		}
	}
	if out == nil {
		return &Error{Op: c.op, Image: r.ref.String(), Message: "no configured host may be asked for this", Next: "check capabilities in certs.d", Err: ErrUnsupported}
	}
	return out
}

// exhausted is the error when patience has ended.
func (r *remote) exhausted(c *call, last *refusal, p *patience, wait time.Duration) error {
	if last == nil {
		return &Error{Op: c.op, Image: r.ref.String(), Host: r.up.registry, Message: fmt.Sprintf("it asked to be left alone for %s more", wait.Round(time.Second)), Next: "try again later", Err: ErrTooMany}
	}
	e := *last.err
	waited := time.Since(p.since).Round(100 * time.Millisecond)
	if last.after > 0 && wait > 0 {
		e.Message = strings.TrimPrefix(fmt.Sprintf("%s, wants to be left alone for %s", e.Message, wait.Round(time.Second)), ", ")
	} else {
		e.Message = fmt.Sprintf("%s (tried %d times in %s)", e.Message, p.tries, waited)
	}
	return &e
}

// path is the path of a call below an endpoint's root.
func (r *remote) path(c *call) string { return r.ref.Repository + "/" + c.path }

func (r *remote) scope(c *call) string {
	s := "repository:" + r.ref.Repository + ":pull"
	if c.need == needPush {
		s += ",push"
	}
	return s
}

const (
	maxHops    = 6 // redirects of one request
	maxExpired = 8 // signed URLs of one request that are refused one after the other
)

// ask asks one endpoint: sends, follows redirects without taking credentials along, renews tokens and
// signed URLs that have expired. The error is a *refusal or the end of ctx.
func (r *remote) ask(ctx context.Context, e *endpoint, c *call) (*answer, error) {
	root := e.baseURL()
	own := e.url(&root, r.ref.Repository, c)

	auth := e.auth(r.scope(c))
	u := own
	var signed *url.URL // the redirect kept for this blob, by the pointer it is kept as
	ranged := c.kind == KindBlob && c.method == ""
	if ranged {
		if signed = e.signedFor(c.digest); signed != nil {
			u = signed
		}
	}
	renewals, expired, hops := 0, 0, 0
	for {
		same := u.Scheme == root.Scheme && u.Host == root.Host
		header, gen := "", 0
		if same {
			header, gen = auth.current()
		}
		a, err := r.send(ctx, e, c, u, same, header)
		if err != nil {
			e.dropSigned(c.digest, signed) // the registry may know another host
			return nil, err
		}
		a.signed = signed
		status := a.StatusCode
		switch {
		case c.answers(status):
			if same {
				auth.worked(gen)
			}
			return a, nil
		case status == 301 || status == 302 || status == 303 || status == 307 || status == 308:
			next, err := u.Parse(a.Header.Get("Location"))
			a.drop(nil)
			if hops++; err != nil || hops > maxHops || next.Host == "" || next.Scheme != "http" && next.Scheme != "https" || a.Header.Get("Location") == "" {
				return nil, a.refuse(r, c, elsewhere, ErrProtocol, "a redirect that leads nowhere", "")
			}
			if same {
				auth.worked(gen)
			}
			if c.kind == KindUpload {
				return nil, a.refuse(r, c, elsewhere, ErrProtocol, "it redirects an upload to "+next.Host, "")
			}
			next.User = nil
			if ranged && signed == nil && (next.Scheme != root.Scheme || next.Host != root.Host) {
				signed = next
				e.keepSigned(c.digest, signed, expiry(signed, time.Now()))
			}
			u = next
		case !same && !later(status) && status != http.StatusRequestedRangeNotSatisfiable:
			// A signed URL that has expired, or storage that does not have it yet: the registry knows.
			e.dropSigned(c.digest, signed)
			if expired++; expired > maxExpired {
				return nil, a.refuse(r, c, elsewhere, ErrNotFound, "the storage that "+e.host+" redirects to refuses", "tell the registry's administrator")
			}
			a.drop(nil)
			if expired > 1 {
				if err := sleep(ctx, jitter(expired-2)); err != nil {
					return nil, err
				}
			}
			u, signed, hops = own, nil, 0
		case same && (status == http.StatusUnauthorized || status == http.StatusForbidden):
			f := a.refuse(r, c, elsewhere, ErrUnauthorized, "", r.loginHint(e))
			limit := 2
			if auth.everWorked() {
				limit = 6 // it held before, so this is expiry, and a fast rotation can win a race
			}
			if renewals++; renewals > limit {
				return nil, f
			}
			if renewals > 2 {
				if err := sleep(ctx, jitter(renewals-3)); err != nil {
					return nil, err
				}
			}
			if err := r.c.renew(ctx, e, auth, r.ref.Repository, gen, a.Header); err != nil {
				return nil, r.renewFailed(e, c, f, err)
			}
		default:
			e.dropSigned(c.digest, signed)
			f := r.status(e, c, a)
			if e.switchScheme(f.err) {
				return r.ask(ctx, e, c)
			}
			return nil, f
		}
	}
}

// url is where a call goes at an endpoint whose root is root.
func (e *endpoint) url(root *url.URL, repository string, c *call) *url.URL {
	q := url.Values{}
	for k, v := range c.query {
		q[k] = v
	}
	if e.ns != "" {
		q.Set("ns", e.ns)
	}
	u := root.JoinPath(repository, c.path)
	if c.abs != nil {
		cp := *c.abs // its query is kept to the letter: it may be signed
		u = &cp
	}
	if extra := q.Encode(); extra != "" {
		u.RawQuery = strings.TrimPrefix(u.RawQuery+"&"+extra, "&")
	}
	return u
}

func (r *remote) loginHint(e *endpoint) string {
	return "check the name; if it is private: docker login " + strings.Replace(e.host, dockerHubAPI, dockerHub, 1)
}

// renewFailed says what it means that there is no new token.
func (r *remote) renewFailed(e *endpoint, c *call, f *refusal, err error) error {
	if errors.Is(err, errNoChallenge) {
		return f
	}
	var oe *Error
	if !errors.As(err, &oe) {
		return err
	}
	cp := *oe
	cp.Image, cp.Op = r.ref.String(), c.op
	if oe.Op != "" {
		cp.Op += " (" + oe.Op + ")"
	}
	if cp.Next == "" && cp.Err == ErrUnauthorized {
		cp.Next = r.loginHint(e)
	}
	v := elsewhere
	if cp.Err == ErrUnreachable || cp.Err == ErrTooMany {
		v = again
	}
	return &refusal{verdict: v, err: &cp}
}
