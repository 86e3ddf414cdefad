package origin

import (
	"maps"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

func TestParseChallenges(t *testing.T) {
	tests := []struct {
		in   string
		want []challenge
	}{
		{`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"`, []challenge{{"bearer", map[string]string{"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"}}}},
		{`Basic realm=x`, []challenge{{"basic", map[string]string{"realm": "x"}}}},
		{`Negotiate, Basic realm="a, b"`, []challenge{{"negotiate", nil}, {"basic", map[string]string{"realm": "a, b"}}}},
		{`BEARER Realm = "q\"uo\\te" , error="invalid_token"`, []challenge{{"bearer", map[string]string{"realm": `q"uo\te`, "error": "invalid_token"}}}},
		{`Bearer realm="cut`, []challenge{{"bearer", nil}}},
		{``, nil},
		{`,,,`, nil},
		{`"quoted"`, nil},
	}
	for _, tt := range tests {
		got := parseChallenges(tt.in)
		if len(got) != len(tt.want) {
			t.Errorf("%s: %v", tt.in, got)
			continue
		}
		for i := range got {
			if got[i].scheme != tt.want[i].scheme || !maps.Equal(got[i].params, tt.want[i].params) {
				t.Errorf("%s: %v, want %v", tt.in, got[i], tt.want[i])
			}
		}
	}
}

func FuzzParseChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push", Basic realm=x`)
	f.Add(`Negotiate abc==, a="\"`)
	f.Fuzz(func(t *testing.T, s string) {
		for _, c := range parseChallenges(s) {
			if c.scheme == "" || c.scheme != strings.ToLower(c.scheme) || len(c.params) > len(s) {
				t.Errorf("%q: %v", s, c)
			}
		}
	})
}

func TestParseContentRange(t *testing.T) {
	for in, want := range map[string]contentRange{
		"bytes 0-0/1":         {0, 1, 1},
		"bytes 10-19/100":     {10, 20, 100},
		" bytes 10-19/* ":     {10, 20, -1},
		"bytes 0-99/100":      {0, 100, 100},
		"bytes 4-4611/999999": {4, 4612, 999999},
	} {
		if got, ok := parseContentRange(in); !ok || got != want {
			t.Errorf("%s: %v %t", in, got, ok)
		}
	}
	for _, in := range []string{
		"", "bytes", "bytes */100", "bytes 5-4/100", "bytes 0-100/100", "bytes -5/100", "bytes 5-/100", "items 0-1/2", "bytes 0-1",
		"bytes 0--1/2", "bytes +1-2/3", "bytes 0-9223372036854775807/9223372036854775807", "bytes 0x1-2/3", "bytes 1 - 2/3x",
	} {
		if got, ok := parseContentRange(in); ok {
			t.Errorf("%s: %v", in, got)
		}
	}
}

func FuzzParseContentRange(f *testing.F) {
	f.Add("bytes 10-19/100")
	f.Add("bytes 10-19/*")
	f.Fuzz(func(t *testing.T, s string) {
		r, ok := parseContentRange(s)
		if ok && (r.start < 0 || r.end <= r.start || r.size >= 0 && r.size < r.end) {
			t.Errorf("%q: %v", s, r)
		}
	})
}

func TestNextLink(t *testing.T) {
	for in, want := range map[string]string{
		`</v2/a/tags/list?last=x&n=2>; rel="next"`: "/v2/a/tags/list?last=x&n=2",
		`<a>; rel=prev, <b>; rel=next`:             "b",
		`<a>; title="x;y"; rel="next"`:             "a",
		`<b>;REL=Next`:                             "b",
		`<a>`:                                      "",
		`<a; rel=next`:                             "",
		`nothing`:                                  "",
		`<` + strings.Repeat("x", maxHeader) + `>; rel=next`: "",
	} {
		if got := nextLink(http.Header{"Link": {in}}); got != want {
			t.Errorf("%.60s: %q, want %q", in, got, want)
		}
	}
}

func FuzzNextLink(f *testing.F) {
	f.Add(`<a>; rel=prev, <b>; rel="next"`)
	f.Fuzz(func(t *testing.T, s string) {
		if got := nextLink(http.Header{"Link": {s}}); !strings.Contains(s, got) {
			t.Errorf("%q: %q", s, got)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, " 7 ": 7 * time.Second, "-3": 0, "soon": 0, "1e9": 0,
		"99999999999": 24 * time.Hour, "Fri, 02 Jan 2026 03:04:15 GMT": 10 * time.Second, "Fri, 02 Jan 2025 03:04:15 GMT": 0,
	} {
		if got := retryAfter(http.Header{"Retry-After": {in}}, now); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for query, want := range map[string]time.Duration{
		"": 5*time.Minute - 10*time.Second,
		"X-Amz-Date=20260102T030405Z&X-Amz-Expires=1200":  20*time.Minute - 10*time.Second,
		"X-Goog-Date=20260102T030405Z&X-Goog-Expires=900": 15*time.Minute - 10*time.Second,
		"Expires=1767323105":                              time.Minute - 10*time.Second,
		"se=2026-01-02T03%3A04%3A25Z":                     15 * time.Second,
		"X-Amz-Date=20250102T030405Z&X-Amz-Expires=1200":  -365*24*time.Hour + 20*time.Minute,
		"X-Amz-Date=x&X-Amz-Expires=99999999999999999999": 5*time.Minute - 10*time.Second,
		"Expires=99999999999":                             time.Hour - 10*time.Second,
	} {
		u := &url.URL{Host: "h", RawQuery: query}
		if got := expiry(u, now).Sub(now); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
}

func TestRegistryMessage(t *testing.T) {
	for _, tt := range []struct{ kind, body, want string }{
		{"application/json", `{"errors":[{"code":"DENIED","message":"requested access"},{"code":"X"},{"message":"y"},{"code":"Z"}]}`, "DENIED: requested access, X, y"},
		{"application/json", `{"details":"incorrect username or password"}`, "incorrect username or password"},
		{"application/json", `{"message":"hm"}`, "hm"},
		{"application/json", `{"other":{"token":"hunter2"}}`, ""},
		{"application/xml", `<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message><StringToSign>hunter2</StringToSign></Error>`, "AccessDenied: Request has expired"},
		{"text/html", "<html>x</html>", "a web page, not a registry's answer"},
		{"text/plain", "see https://h/p?Signature=hunter2&x=y now\n\x1b[31mred", "see https://h/p?… now [31mred"},
		{"text/plain", strings.Repeat("é", 400), strings.Repeat("é", 150) + "…"},
	} {
		if got := registryMessage(tt.kind, []byte(tt.body)); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.body, got, tt.want)
		}
	}
}
