package origin

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A Repository is where one image's blobs and manifests come from. There are two kinds: a repository of
// a registry (with its mirrors), and an OCI layout. All methods may be called by many goroutines.
type Repository interface {
	// Reference is the reference the repository was opened with.
	Reference() Reference
	// Resolve fetches the manifest and config of the reference for platform ("" is this machine's) and
	// checks every digest on the way. Layers are not touched.
	Resolve(ctx context.Context, platform string) (Image, error)
	// Manifest fetches a manifest or index by tag or digest; its digest is checked.
	Manifest(ctx context.Context, tagOrDigest string) (Manifest, error)
	// Blob opens bytes r of blob d. The zero Range means all of it. The body gives exactly the bytes
	// asked for, then io.EOF: whatever breaks below is resumed inside, and what cannot be resumed is an
	// error, never a short body. The bytes are not proven: the caller has the digests for that.
	// The body belongs to one goroutine; ctx must live as long as it is read. Close it.
	Blob(ctx context.Context, d ztoc.Digest, r ztoc.Range) (io.ReadCloser, error)
	// RangesIgnored says that the only sources answer ranged requests with whole blobs: reading a blob
	// once from its start is then far cheaper than reading ranges of it.
	RangesIgnored() bool
	// Referrers lists what refers to subject, of artifactType if that is not empty. A registry that
	// cannot say is no error: the list is empty and Reason tells why.
	Referrers(ctx context.Context, subject ztoc.Digest, artifactType string) (Referrers, error)
	// Tags lists the tags, sorted.
	Tags(ctx context.Context) ([]string, error)
	// PushBlob uploads a blob unless it is there; open may be called again after a failure.
	PushBlob(ctx context.Context, ref ztoc.BlobRef, open func() (io.ReadCloser, error)) error
	// PushManifest uploads a manifest under its digest and, if given, a tag. One with a subject is also
	// entered in the subject's fallback tag when the registry has no referrers API.
	PushManifest(ctx context.Context, mediaType string, body []byte, tag string) (ztoc.Digest, error)
}

// Options are what a Client is made with. The zero value is usable: anonymous, system certificates.
type Options struct {
	// Version goes into the User-Agent, "muster/VERSION".
	Version string
	// Credentials finds what to present to a host; nil is anonymous. Docker finds them where docker,
	// podman and skopeo keep them. Called at every token fetch, so that helpers can rotate.
	Credentials Credentials
	// CertsDir holds HOST/hosts.toml files in containerd's form; "" is /etc/containerd/certs.d. A
	// directory that does not exist is an empty one.
	CertsDir string
	// PlainHTTP lists hosts (host or host:port, "*" for all) that are spoken to without TLS. Loopback
	// hosts are anyway unless they answer with TLS.
	PlainHTTP []string
	// Proxy chooses the proxy of a request; nil takes HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
	Proxy func(*http.Request) (*url.URL, error)
	// MaxWait is how long a blob read goes on without a single byte before it gives up with
	// ErrUnreachable; the request under way then may add Idle. Too short, and a rebooting switch kills
	// jobs; too long, and a job burns its allocation waiting. 0 is 5 minutes.
	MaxWait time.Duration
	// ResolveWait is the same for manifests, tokens and lists, where a person waits and may have
	// mistyped. 0 is 20 seconds. A host name that does not exist is given 3 seconds at most.
	ResolveWait time.Duration
	// MaxConns bounds connections per host. More than the registry's bandwidth needs makes it slower
	// (every connection gets less, and trickles are mistaken for faults). 0 is 8.
	MaxConns int
	// Idle abandons a connection that has sent nothing for so long while somebody waited. 0 is 10 s.
	Idle time.Duration
	// MirrorIdle is Idle for mirrors, also for connecting: a dead mirror must not be felt. 0 is 2 s.
	MirrorIdle time.Duration
	// MinRate in bytes per second and RateWindow: a connection slower than this over a window is
	// abandoned, unless the whole host is that slow. 0 is 8 KiB/s over 5 s.
	MinRate    int64
	RateWindow time.Duration
	// OnRequest is called after each HTTP request, when its body has been read or dropped; from any
	// goroutine, so it must be quick.
	OnRequest func(Request)
}

func (o Options) withDefaults() Options {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.MaxWait, 5*time.Minute)
	set(&o.ResolveWait, 20*time.Second)
	set(&o.Idle, 10*time.Second)
	set(&o.MirrorIdle, 2*time.Second)
	set(&o.RateWindow, 5*time.Second)
	if o.MinRate == 0 {
		o.MinRate = 8 << 10
	}
	if o.MaxConns == 0 {
		o.MaxConns = 8
	}
	if o.CertsDir == "" {
		o.CertsDir = "/etc/containerd/certs.d"
	}
	if o.Proxy == nil {
		o.Proxy = http.ProxyFromEnvironment
	}
	if o.Version == "" {
		o.Version = "devel"
	}
	return o
}

// A Request is one finished HTTP request.
type Request struct {
	Kind     Kind
	Method   string
	Host     string      // spoken to: registry, mirror, token server or the host of a signed URL
	Digest   ztoc.Digest // of the blob or manifest asked for by digest
	Range    ztoc.Range  // asked for; zero for all
	Status   int         // 0: no answer
	Bytes    int64       // of body received
	Mirror   bool        // to a mirror or a host it redirected to
	Signed   bool        // to a host that was redirected to
	Attempt  int         // 0 for the first try of an operation
	Waited   time.Duration
	Duration time.Duration // Waited until the answer's header, Duration until the body's end
	Err      error
}

// Kind is what a request was for.
type Kind string

// The kinds of request.
const (
	KindManifest  Kind = "manifest"
	KindBlob      Kind = "blob"
	KindToken     Kind = "token"
	KindReferrers Kind = "referrers"
	KindTags      Kind = "tags"
	KindUpload    Kind = "upload"
)

// Stats are counts since the Client was made.
type Stats struct {
	Requests  int64 // HTTP requests, tokens and redirected ones included
	Bytes     int64 // of bodies received
	Blobs     int64 // requests for bytes of blobs that were answered with bytes
	BlobBytes int64
	Skipped   int64 // bytes received and dropped because a server ignored Range
	Failures  int64 // requests without a useful answer, 404 not among them
	Resumed   int64 // bodies that broke and were resumed
	Throttled int64 // answers 429
	Tokens    int64 // token fetches
}

// A Client speaks to registries for all repositories of a process. It keeps connections, tokens and
// what it learned about hosts.
type Client struct {
	o     Options
	certs *certsDir

	fallbackPause time.Duration // between writing a fallback tag and looking whether it survived

	mu        sync.Mutex
	upstreams map[string]*upstream    // by registry
	clients   map[string]*http.Client // by what httpClient makes them from

	n struct {
		requests, bytes, blobs, blobBytes, skipped, failures, resumed, throttled, tokens atomic.Int64
	}
}

// New makes a client. It touches neither network nor disk.
func New(o Options) (*Client, error) {
	o = o.withDefaults()
	if o.MaxConns < 1 || o.MaxWait < 0 || o.ResolveWait < 0 || o.Idle < 0 || o.MinRate < 0 {
		return nil, &Error{Message: "negative limits", Err: ErrUsage}
	}
	return &Client{o: o, certs: &certsDir{dir: o.CertsDir}, upstreams: map[string]*upstream{}, clients: map[string]*http.Client{}, fallbackPause: 200 * time.Millisecond}, nil
}

// Repository opens the repository of ref. Only the configuration of its host is read: nothing is asked.
func (c *Client) Repository(ref Reference) (Repository, error) {
	if ref.Layout != "" {
		return openLayout(ref)
	}
	if ref.Registry == "" || ref.Repository == "" {
		return nil, usage(ref.String(), "an empty reference", "use ParseReference")
	}
	u, err := c.upstream(ref.Registry)
	if err != nil {
		return nil, err
	}
	return &remote{c: c, up: u, ref: ref}, nil
}

// Close drops idle connections. Bodies under way go on.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, client := range c.clients {
		client.CloseIdleConnections()
	}
	return nil
}

// Stats are the counts so far.
func (c *Client) Stats() Stats {
	n := &c.n
	return Stats{
		Requests: n.requests.Load(), Bytes: n.bytes.Load(), Blobs: n.blobs.Load(), BlobBytes: n.blobBytes.Load(),
		Skipped: n.skipped.Load(), Failures: n.failures.Load(), Resumed: n.resumed.Load(),
		Throttled: n.throttled.Load(), Tokens: n.tokens.Load(),
	}
}

func (c *Client) record(r Request) {
	n := &c.n
	n.requests.Add(1)
	n.bytes.Add(r.Bytes)
	if r.Kind == KindBlob && (r.Status == http.StatusOK || r.Status == http.StatusPartialContent) {
		n.blobs.Add(1)
		n.blobBytes.Add(r.Bytes)
	}
	if r.Kind == KindToken {
		n.tokens.Add(1)
	}
	if r.Status == http.StatusTooManyRequests {
		n.throttled.Add(1)
	}
	if r.Status == 0 || r.Status >= 500 || r.Status == http.StatusTooManyRequests || r.Err != nil {
		n.failures.Add(1)
	}
	if c.o.OnRequest != nil {
		c.o.OnRequest(r)
	}
}

// ReadBlob fetches a whole small blob and checks its digest and size. Larger ones than limit are refused
// before a byte is asked for.
func ReadBlob(ctx context.Context, repo Repository, d Descriptor, limit int64) ([]byte, error) {
	if d.Size > limit {
		return nil, &Error{
			Op: "blob " + string(d.Digest), Image: repo.Reference().String(),
			Message: fmt.Sprintf("%d bytes, at most %d are read", d.Size, limit), Err: ErrUnsupported,
		}
	}
	if d.Size == 0 {
		if d.Digest == ztoc.DigestOf(nil) {
			return nil, nil
		}
		return nil, &Error{Op: "blob " + string(d.Digest), Image: repo.Reference().String(), Message: "size 0 is not its size", Err: ErrDigest}
	}
	rc, err := repo.Blob(ctx, d.Digest, ztoc.Range{End: d.Size})
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	b := make([]byte, d.Size)
	if _, err := io.ReadFull(rc, b); err != nil {
		return nil, err
	}
	if got := ztoc.DigestOf(b); got != d.Digest {
		return nil, &Error{Op: "blob " + string(d.Digest), Image: repo.Reference().String(), Message: "its bytes hash to " + string(got), Err: ErrDigest}
	}
	return b, nil
}
