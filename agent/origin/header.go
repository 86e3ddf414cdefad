package origin

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A challenge is one offer of a WWW-Authenticate header.
type challenge struct {
	scheme string            // lower case
	params map[string]string // keys in lower case
}

// maxHeader bounds what is looked at in one header value; longer ones are cut, never an error.
const maxHeader = 16 << 10

// parseChallenges reads the value of one WWW-Authenticate header (RFC 9110 section 11.6.1), which may
// hold several challenges. Malformed rests are dropped.
func parseChallenges(s string) []challenge {
	if len(s) > maxHeader {
		s = s[:maxHeader]
	}
	var out []challenge
	for {
		s = strings.TrimLeft(s, " \t,")
		word, rest := token(s)
		if word == "" {
			return out
		}
		s = rest
		// A word is a parameter's name when "=" and a value follow, else a new scheme.
		if after, ok := strings.CutPrefix(strings.TrimLeft(s, " \t"), "="); ok && len(out) > 0 {
			var val string
			val, s, ok = value(strings.TrimLeft(after, " \t"))
			if !ok {
				return out
			}
			out[len(out)-1].params[strings.ToLower(word)] = val
			continue
		}
		out = append(out, challenge{strings.ToLower(word), map[string]string{}})
	}
}

func isToken(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.IndexByte("!#$%&'*+-.^_`|~/", c) >= 0
}

func token(s string) (word, rest string) {
	i := 0
	for i < len(s) && isToken(s[i]) {
		i++
	}
	return s[:i], s[i:]
}

// value reads a token or a quoted string.
func value(s string) (val, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		i := strings.IndexAny(s, ", \t")
		if i < 0 {
			i = len(s)
		}
		return s[:i], s[i:], true
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:], true
		case '\\':
			if i++; i == len(s) {
				return "", "", false
			}
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}

// contentRange is what a 206 says it holds: bytes [start, end) of a blob of size, -1 if not told.
type contentRange struct{ start, end, size int64 }

func parseContentRange(s string) (contentRange, bool) {
	s, ok := strings.CutPrefix(strings.TrimSpace(s), "bytes ")
	if !ok {
		return contentRange{}, false
	}
	span, total, ok := strings.Cut(s, "/")
	if !ok {
		return contentRange{}, false
	}
	a, b, ok := strings.Cut(span, "-")
	if !ok {
		return contentRange{}, false
	}
	start, ok1 := number(a)
	last, ok2 := number(b)
	if !ok1 || !ok2 || last < start {
		return contentRange{}, false
	}
	r := contentRange{start, last + 1, -1}
	if total != "*" {
		if r.size, ok = number(total); !ok || r.size < r.end {
			return contentRange{}, false
		}
	}
	return r, true
}

// number reads a plain decimal below 2^62.
func number(s string) (int64, bool) {
	s = strings.TrimSpace(s)
	if s == "" || s[0] < '0' || s[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n < 1<<62
}

// nextLink finds the target of rel="next" in a Link header (RFC 8288).
func nextLink(h http.Header) string {
	for _, v := range h.Values("Link") {
		if len(v) > maxHeader {
			continue
		}
		for {
			_, rest, ok := strings.Cut(v, "<")
			if !ok {
				break
			}
			target, rest, ok := strings.Cut(rest, ">")
			if !ok {
				break
			}
			params, more, _ := strings.Cut(rest, "<")
			v = ""
			if more != "" {
				v = "<" + more
			}
			for p := range strings.SplitSeq(params, ";") {
				k, val, _ := strings.Cut(strings.Trim(p, " \t,"), "=")
				val = strings.Trim(strings.TrimSpace(val), `"`)
				if strings.EqualFold(strings.TrimSpace(k), "rel") && strings.EqualFold(val, "next") {
					return target
				}
			}
		}
	}
	return ""
}

// retryAfter reads Retry-After: seconds, or a date. 0 if there is none. It is never more than a day.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	if v == "" {
		return 0
	}
	d := time.Duration(0)
	if n, ok := number(v); ok {
		d = time.Duration(min(n, 86400)) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), 24*time.Hour)
}
