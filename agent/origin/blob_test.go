package origin

import (
	"context"
	"errors"
	"io"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

type neturl = url.URL

var (
	anyBlob   = registry.Match{Kind: registry.Blob}
	middle    = ztoc.Range{Start: 1000, End: 300_000}
	wholeBlob = ztoc.Range{}
)

func TestBlobRanges(t *testing.T) {
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	for _, r := range []ztoc.Range{{Start: 0, End: 1}, {Start: 399_999, End: 400_000}, {Start: 0, End: layerSize}, middle, wholeBlob} {
		wantRange(t, repo, r)
	}
	if n := w.Count(anyBlob); n != 5 {
		t.Errorf("%d requests for 5 ranges", n)
	}
	if n := w.PeakConns(); n != 1 {
		t.Errorf("%d connections one after the other", n)
	}
	_, err := readRange(context.Background(), repo, layer().Digest, ztoc.Range{Start: 10, End: 10})
	wantError(t, err, ErrUsage)
	_, err = readRange(context.Background(), repo, layer().Digest, ztoc.Range{Start: 10, End: layerSize + 1})
	wantError(t, err, ErrDigest, "test", w.Addr)
	_, err = readRange(context.Background(), repo, layer().Digest, ztoc.Range{Start: layerSize, End: layerSize + 1})
	wantError(t, err, ErrDigest)
	none := ztoc.DigestOf([]byte("none"))
	_, err = readRange(context.Background(), repo, none, middle)
	wantError(t, err, ErrNotFound, string(none), "404", w.Addr, "BLOB_UNKNOWN")
}

// Whatever a server does to a body, the reader sees the right bytes.
func TestBlobResumes(t *testing.T) {
	tests := []struct {
		name     string
		fault    registry.Action
		times    int
		requests int // at most
	}{
		{"cut", registry.CutAfter(50_000), 1, 2},
		{"cut at once", registry.CutAfter(0), 1, 2},
		{"cut again and again", registry.CutAfter(20_000), 6, 7},
		{"reset", registry.Reset(), 3, 4},
		{"stall", registry.StallAfter(70_000), 1, 2},
		{"stall before the first byte", registry.StallAfter(0), 1, 2},
		{"no answer", registry.Hang(), 1, 2},
		{"trickle", registry.Trickle(4000), 1, 2},
		{"500", registry.Answer(500, "oops"), 2, 3},
		{"503 with Retry-After", registry.Answer(503, "later", "Retry-After", "1"), 1, 2},
		{"429", registry.TooMany(time.Second), 1, 2},
		{"429 without Retry-After", registry.TooMany(0), 2, 3},
		{"range ignored", registry.IgnoreRange(), 1, 1},
		{"chunked", registry.Chunked(), 1, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			repo := w.open(quick())
			w.Inject(anyBlob, tt.times, tt.fault)
			wantRange(t, repo, middle)
			if n := w.Count(anyBlob); n > tt.requests {
				t.Errorf("%d requests, want at most %d", n, tt.requests)
			}
			// Resumed, not begun anew: no byte is sent twice, but for what was under way when we hung up.
			if n := w.Bytes(anyBlob); n > middle.Len()*3/2 && tt.name != "range ignored" {
				t.Errorf("%d bytes sent for %d", n, middle.Len())
			}
			wantRange(t, repo, wholeBlob)
		})
	}
}

func TestBlobRetryAfterIsHonoured(t *testing.T) {
	t.Parallel()
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	w.Inject(anyBlob, 1, registry.TooMany(time.Second))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { wantRange(t, repo, middle) })
	}
	wg.Wait()
	// The others may be on their way when the first is told to wait; after that nobody asks before the second is over.
	log, early := w.Log(anyBlob), 0
	for _, r := range log[1:] {
		if r.Time.Sub(log[0].Time) < 950*time.Millisecond {
			early++
		}
	}
	if early > 3 {
		t.Errorf("asked %d times more within a second of being told to wait that long", early)
	}

	// Longer than we are willing to wait: told at once.
	o := quick()
	o.MaxWait = 2 * time.Second
	repo = w.open(o)
	w.Inject(anyBlob, 1, registry.TooMany(time.Hour))
	_, err := readRange(context.Background(), repo, layer().Digest, middle)
	wantError(t, err, ErrTooMany, "pull rate limit", "1h0m0s", "429")
}

func TestBlobLies(t *testing.T) {
	tests := []struct {
		name     string
		fault    registry.Action
		sentinel error
	}{
		{"another range", registry.ShiftRange(5), ErrProtocol},
		{"a longer range", registry.LongRange(5), ErrProtocol},
		{"unreadable range", registry.Answer(206, "x", "Content-Range", "bytes five-six/seven"), ErrProtocol},
		{"no range", registry.Answer(206, "x"), ErrProtocol},
		{"a login page", registry.Answer(200, "<html>"+strings.Repeat("x", layerSize)+"</html>"), ErrProtocol},
		{"encoded", registry.Answer(206, "x", "Content-Encoding", "gzip", "Content-Range", "bytes 1000-299999/400000"), ErrProtocol},
		{"not implemented", registry.Answer(400, `{"errors":[{"code":"UNSUPPORTED","message":"no"}]}`), ErrProtocol},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			repo := w.open(quick())
			w.Inject(anyBlob, 0, tt.fault)
			b, err := readRange(context.Background(), repo, layer().Digest, middle)
			wantError(t, err, tt.sentinel, w.Addr)
			if len(b) > 0 {
				t.Errorf("%d bytes of it", len(b))
			}
		})
	}
}

// F9: the network is away for a while: the read waits, and then is right.
func TestBlobWaitsForTheNetwork(t *testing.T) {
	t.Parallel()
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	w.SetRate(300_000)
	rc, err := repo.Blob(context.Background(), layer().Digest, middle)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	got := make([]byte, 1000)
	if _, err := io.ReadFull(rc, got); err != nil {
		t.Fatal(err)
	}
	w.Down()
	w.SetRate(0)
	back := time.AfterFunc(1500*time.Millisecond, func() { w.Up() })
	defer back.Stop()
	rest, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	if string(append(got, rest...)) != string(layerBytes(1, layerSize)[middle.Start:middle.End]) {
		t.Error("wrong bytes")
	}
}

// A pull-through cache is silent for longer than any timer until it has the blob itself: waited for longer
// each time, it answers.
func TestSilentRegistryIsWaitedFor(t *testing.T) {
	t.Parallel()
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	w.Inject(anyBlob, 0, registry.Delay(3*quick().Idle))
	wantRange(t, repo, middle)
	if n := w.Count(anyBlob); n > 4 {
		t.Errorf("%d requests", n)
	}
}

func TestBlobGivesUpInTheEnd(t *testing.T) {
	w := newWorld(t, registry.Options{})
	o := quick()
	o.MaxWait = 700 * time.Millisecond
	repo := w.open(o)
	w.SetConnRate(200_000)
	rc, err := repo.Blob(context.Background(), layer().Digest, middle)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	w.Down()
	b, err := io.ReadAll(rc)
	wantError(t, err, ErrUnreachable, w.Addr, "tried")
	if string(b) != string(layerBytes(1, layerSize)[middle.Start:][:len(b)]) {
		t.Error("wrong bytes before the error")
	}
	if _, again := rc.Read(make([]byte, 10)); again == nil || again == io.EOF {
		t.Error("the error is forgotten:", again)
	}
}

func TestBlobEndsWithItsContext(t *testing.T) {
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	w.Inject(anyBlob, 0, registry.StallAfter(1000))
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("the job was cancelled")
	time.AfterFunc(100*time.Millisecond, func() { cancel(cause) })
	begun := time.Now()
	_, err := readRange(ctx, repo, layer().Digest, middle)
	if !errors.Is(err, cause) {
		t.Errorf("error %v, want the context's cause", err)
	}
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("ended after %s", d)
	}
	w.Down()
	ctx, cancel2 := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel2()
	if _, err := readRange(ctx, repo, layer().Digest, middle); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the deadline", err)
	}
}

// A server that ignores ranges is noticed: what it sends is right, and others are preferred.
func TestIgnoredRangesAreRemembered(t *testing.T) {
	w := newWorld(t, registry.Options{})
	c := newClient(t, quick())
	repo := openRepo(t, c, w.repo+":one")
	if repo.RangesIgnored() {
		t.Error("known before the first request")
	}
	w.Inject(anyBlob, 0, registry.IgnoreRange())
	wantRange(t, repo, middle)
	if !repo.RangesIgnored() {
		t.Error("not remembered")
	}
	if n := c.Stats().Skipped; n != middle.Start {
		t.Errorf("%d bytes skipped, want %d", n, middle.Start)
	}
}

// F24: one connection that trickles while the registry is healthy costs a window, not the whole time.
// A registry that never finishes a manifest is given up after the patience, whether it cuts or trickles.
func TestManifestNeverEnds(t *testing.T) {
	for name, fault := range map[string]registry.Action{"cut": registry.CutAfter(10), "trickle": registry.Trickle(20)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, registry.Options{})
			w.Inject(registry.Match{Kind: registry.Manifest}, 0, fault)
			o := quick()
			o.ResolveWait = time.Second
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_, err := openRepo(t, newClient(t, o), w.Addr+"/test:one").Resolve(ctx, "linux/amd64")
			if !errors.Is(err, ErrUnreachable) || ctx.Err() != nil {
				t.Errorf("got %v, want ErrUnreachable before a minute is over", err)
			}
		})
	}
}

func TestTrickleIsLeft(t *testing.T) {
	t.Parallel()
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	w.Inject(anyBlob, 1, registry.Trickle(1000))
	wantRange(t, repo, middle)
	log := w.Log(anyBlob)
	if len(log) != 2 || log[0].Bytes > 10_000 {
		t.Errorf("log %+v", log)
	}
}

// F14: a slow registry and many readers: few connections, no storm of retries, every byte once.
func TestSlowRegistryManyReaders(t *testing.T) {
	w := newWorld(t, registry.Options{})
	o := quick()
	o.MaxConns, o.Idle = 4, 10*time.Second
	o.MinRate = 64 << 10
	c := newClient(t, o)
	repo := openRepo(t, c, w.repo+":one")
	w.SetRate(100_000) // 25 KB/s each: below MinRate, but the host as a whole is not
	const readers, size = 100, 1000
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			at := int64(i * size)
			wantRange(t, repo, ztoc.Range{Start: at, End: at + size})
		})
	}
	wg.Wait()
	if n := w.PeakConns(); n > o.MaxConns {
		t.Errorf("%d connections, at most %d allowed", n, o.MaxConns)
	}
	if n := w.Count(anyBlob); n != readers {
		t.Errorf("%d requests for %d reads", n, readers)
	}
	if s := c.Stats(); s.BlobBytes != readers*size || s.Blobs != readers || s.Failures != 0 {
		t.Errorf("%+v", s)
	}
}

func TestSlowAsAWholeIsPutUpWith(t *testing.T) {
	t.Parallel()
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	w.SetRate(4000) // half of MinRate
	wantRange(t, repo, ztoc.Range{Start: 0, End: 8000})
	if n := w.Count(anyBlob); n > 3 {
		t.Errorf("%d requests: the connection was blamed for the registry", n)
	}
}

// A reader that takes its time is not a server that stalls.
func TestSlowReaderIsNoStall(t *testing.T) {
	t.Parallel()
	w := newWorld(t, registry.Options{})
	o := quick()
	o.Idle = 150 * time.Millisecond
	repo := w.open(o)
	rc, err := repo.Blob(context.Background(), layer().Digest, middle)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	for range 3 {
		if _, err := io.ReadFull(rc, make([]byte, 50_000)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
	}
	if _, err := io.Copy(io.Discard, rc); err != nil {
		t.Fatal(err)
	}
	if n := w.Count(anyBlob); n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestRequestsAreReported(t *testing.T) {
	w := newWorld(t, registry.Options{})
	o := quick()
	var mu sync.Mutex
	var seen []Request
	o.OnRequest = func(r Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r)
	}
	c := newClient(t, o)
	repo := openRepo(t, c, w.repo+":one")
	w.Inject(anyBlob, 1, registry.CutAfter(100))
	wantRange(t, repo, middle)
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 2 || seen[0].Bytes != 100 || seen[0].Err == nil || seen[1].Bytes != middle.Len()-100 || seen[1].Err != nil || seen[1].Attempt == 0 {
		t.Errorf("%+v", seen)
	}
	if seen[0].Host != w.Addr || seen[0].Digest != layer().Digest || seen[0].Range != middle || seen[1].Range.Start != middle.Start+100 {
		t.Errorf("%+v", seen)
	}
	if s := c.Stats(); s.Resumed != 1 || s.BlobBytes != middle.Len() || s.Requests != 2 {
		t.Errorf("%+v", s)
	}
	for _, r := range w.Log(registry.Match{}) {
		if !strings.HasPrefix(r.Agent, "muster/test") {
			t.Errorf("User-Agent %q", r.Agent)
		}
	}
}

// Close from another goroutine ends a Read that waits, and neither trips over the other.
func TestBlobClosedWhileRead(t *testing.T) {
	w := newWorld(t, registry.Options{})
	repo := w.open(quick())
	for i := range 40 {
		w.Inject(anyBlob, 1, registry.StallAfter(int64(i*500)))
		b, err := repo.Blob(context.Background(), layer().Digest, middle)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			io.Copy(io.Discard, b) //nolint:errcheck // it fails, or was faster than Close
		}()
		if i%2 == 0 {
			time.Sleep(time.Millisecond)
		}
		b.Close()
		<-ended
	}
}
