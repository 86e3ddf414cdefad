package origin

import (
	"cmp"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"unicode"
)

// What callers decide on. Every error of this package that is not the end of a context wraps one of them.
var (
	ErrUsage        = errors.New("wrong usage")                   // a name or option that cannot be right
	ErrNotFound     = errors.New("not found")                     // the origin answers, and has no such thing
	ErrUnauthorized = errors.New("not authorised")                // no credentials, or they were refused
	ErrUnreachable  = errors.New("origin unreachable")            // no useful answer within the patience allowed
	ErrTooMany      = errors.New("too many requests")             // the registry limits us for longer than the patience allowed
	ErrDigest       = errors.New("content does not match digest") // bytes or sizes that are not what was named
	ErrProtocol     = errors.New("unusable answer")               // answers that no registry may give, after asking everywhere
	ErrPlatform     = errors.New("no such platform")              // the image exists, not for this platform
	ErrUnsupported  = errors.New("not supported")                 // a format muster does not handle: schema 1, foreign layers, artifacts
)

// An Error says what was asked, of whom, what came back and what to try next. It never holds
// credentials nor the query of a URL, which may be a signature.
type Error struct {
	Op      string // what was asked for: "manifest latest", "blob sha256:…"
	Image   string // the image as people write it
	Host    string // who answered, or did not
	Status  int    // HTTP status; 0 if there was none
	Message string // the registry's own words, shortened, or the cause below HTTP
	Next    string // what to try; may be empty
	Err     error  // one of the sentinels
	Cause   error  // what lies below, for errors.Is and As; may be nil
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.Image != "" {
		b.WriteString(e.Image + ": ")
	}
	b.WriteString(e.Err.Error())
	if e.Op != "" {
		b.WriteString(": " + e.Op)
	}
	if e.Host != "" {
		b.WriteString(" from " + e.Host)
	}
	if e.Status != 0 {
		fmt.Fprintf(&b, ": HTTP %d %s", e.Status, http.StatusText(e.Status))
	}
	if e.Message != "" {
		b.WriteString(": " + e.Message)
	}
	if next := cmp.Or(e.Next, usualNext[e.Err]); next != "" {
		b.WriteString("; " + next)
	}
	return b.String()
}

// usualNext is what to try where nothing better is known.
var usualNext = map[error]string{
	ErrUnreachable: "try again later",
	ErrTooMany:     "try again later",
	ErrDigest:      "try again; if it stays, the registry, a mirror or a proxy gives damaged data",
	ErrProtocol:    "check that this is a registry, and what proxies are in between",
}

// Unwrap gives the sentinel and the cause.
func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Err}
	}
	return []error{e.Err, e.Cause}
}

const (
	maxErrorBody = 64 << 10
	maxMessage   = 300
)

// registryMessage shortens the body of a refusal to what helps a reader: OCI's error list, S3's code and
// message, or the first words of plain text. S3's other fields quote the signature, so they are left out.
func registryMessage(contentType string, body []byte) string {
	var list struct {
		Errors []struct{ Code, Message string } `json:"errors"`
		Msg    string                           `json:"message"`
		Detail string                           `json:"details"` // docker's token server
	}
	if json.Unmarshal(body, &list) == nil {
		var parts []string
		for _, e := range list.Errors[:min(len(list.Errors), 3)] {
			switch {
			case e.Code == "":
				parts = append(parts, e.Message)
			case e.Message == "":
				parts = append(parts, e.Code)
			default:
				parts = append(parts, e.Code+": "+e.Message)
			}
		}
		if len(parts) == 0 {
			parts = append(parts, list.Msg+list.Detail)
		}
		return clean(strings.Join(parts, ", "))
	}
	var s3 struct {
		XMLName xml.Name
		Code    string
		Message string
	}
	if xml.Unmarshal(body, &s3) == nil && s3.Code != "" {
		return clean(s3.Code + ": " + s3.Message)
	}
	if strings.Contains(contentType, "html") || strings.HasPrefix(strings.TrimSpace(string(body)), "<") {
		return "a web page, not a registry's answer"
	}
	return clean(string(body))
}

var reQuery = regexp.MustCompile(`\?[^\s"'<>]+`)

// clean makes foreign text fit for one line of a terminal or log.
func clean(s string) string {
	s = reQuery.ReplaceAllString(s, "?…")
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return s
}

// bare strips what net/http wraps around a cause: its text has the whole URL, signed query included.
func bare(err error) error {
	for {
		var u *url.Error
		if !errors.As(err, &u) {
			return err
		}
		err = u.Err
	}
}
