package registry

import (
	"fmt"
	"io"
	"net/http"
	"time"
)

// An Action is what [Proxy.Inject] does to a request. Offsets count bytes of the response's body.
type Action struct {
	name   string
	delay  time.Duration
	rate   int64
	before func(w *writer, r *http.Request) (done bool) // instead of or before the registry's answer
	header func(h http.Header, status int)
	at     int64 // where during is called
	during func(w *writer)
	flips  bool
	flip   int64
}

type fault struct {
	m    Match
	left int // negative: for ever
	do   Action
}

// take reports whether the fault happens once more. The caller holds Proxy.mu.
func (f *fault) take() bool {
	if f.left == 0 {
		return false
	}
	f.left--
	return true
}

// Inject does something to the next n requests that match; n ≤ 0 means to all from now on. Of several
// that match, the one injected first happens.
func (p *Proxy) Inject(m Match, n int, do Action) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n <= 0 {
		n = -1
	}
	p.faults = append(p.faults, &fault{m, n, do})
}

// Clear ends all that was injected.
func (p *Proxy) Clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = nil
}

// Answer gives status and body instead of the registry's answer. header is pairs of key and value. A body
// that starts with "<" is sent as HTML, with "{" as JSON, else as text.
func Answer(status int, body string, header ...string) Action {
	return Action{name: fmt.Sprintf("answer %d", status), before: func(w *writer, r *http.Request) bool {
		kind := "text/plain"
		switch {
		case len(body) > 0 && body[0] == '<':
			kind = "text/html; charset=utf-8"
		case len(body) > 0 && body[0] == '{':
			kind = "application/json"
		}
		w.Header().Set("Content-Type", kind)
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Add(header[i], header[i+1])
		}
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			io.WriteString(w, body)
		}
		return true
	}}
}

// TooMany answers 429 with Retry-After in whole seconds, if not zero.
func TooMany(after time.Duration) Action {
	body := `{"errors":[{"code":"TOOMANYREQUESTS","message":"you have reached your pull rate limit"}]}`
	if after == 0 {
		return Answer(http.StatusTooManyRequests, body)
	}
	return Answer(http.StatusTooManyRequests, body, "Retry-After", fmt.Sprint(int(after.Seconds())))
}

// HTML answers 200 with a web page, as proxies and some registries do to what they do not know.
func HTML() Action {
	return Answer(http.StatusOK, "<!DOCTYPE html><html><head><title>Sign in</title></head><body>Sign in</body></html>")
}

// Reset closes the connection without an answer.
func Reset() Action {
	return Action{name: "reset", before: func(*writer, *http.Request) bool { panic(http.ErrAbortHandler) }}
}

// Hang sends nothing at all until the client goes away.
func Hang() Action {
	return Action{name: "hang", before: func(_ *writer, r *http.Request) bool {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}}
}

// Delay answers later.
func Delay(d time.Duration) Action { return Action{name: "delay", delay: d} }

// CutAfter closes the connection after n bytes of the body.
func CutAfter(n int64) Action {
	return Action{name: "cut", at: n, during: func(*writer) { panic(http.ErrAbortHandler) }}
}

// StallAfter sends n bytes of the body, then nothing, until the client goes away.
func StallAfter(n int64) Action {
	return Action{name: "stall", at: n, during: func(w *writer) {
		<-w.r.Context().Done()
		panic(http.ErrAbortHandler)
	}}
}

// Trickle sends the body at so many bytes per second.
func Trickle(bytesPerSecond int64) Action { return Action{name: "trickle", rate: bytesPerSecond} }

// FlipAt flips a bit of byte n of the body.
func FlipAt(n int64) Action { return Action{name: "flip", flips: true, flip: n} }

// IgnoreRange answers 200 with the whole blob to a request for a part of it.
func IgnoreRange() Action {
	return Action{name: "ignore range", before: func(_ *writer, r *http.Request) bool {
		r.Header.Del("Range")
		return false
	}}
}

// ShiftRange says in Content-Range that the bytes start n later than they do.
func ShiftRange(n int64) Action {
	return Action{name: "shift range", header: func(h http.Header, _ int) {
		var a, b, size int64
		if _, err := fmt.Sscanf(h.Get("Content-Range"), "bytes %d-%d/%d", &a, &b, &size); err == nil {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a+n, b+n, size+n))
		}
	}}
}

// LongRange answers a request for a part with n bytes more than were asked for.
func LongRange(n int64) Action {
	return Action{name: "long range", before: func(_ *writer, r *http.Request) bool {
		var a, b int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &a, &b); err == nil {
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", a, b+n))
		}
		return false
	}}
}

// Chunked leaves Content-Length out, so that the body's end is all that tells its size.
func Chunked() Action {
	return Action{name: "chunked", header: func(h http.Header, _ int) { h.Del("Content-Length") }}
}
