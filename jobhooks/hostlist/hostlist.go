// Package hostlist reads and writes lists of hosts as schedulers and people have them: "login1,node[001-016,20]".
//
//	list  = item {"," item}             spaces around items do not count
//	item  = name ["=" address]          the address only where Parse reads it: "node1=10.0.0.1:7464"
//	name  = {letter | digit | "." | "-" | "_" | bracket}
//	bracket = "[" part {"," part} "]"   several in one name multiply, the last one varies fastest
//	part  = number ["-" number]         zeros before the first number are width: [08-11] is 08, 09, 10, 11
//
// It is strict: what is not of that form, a host that comes twice, or more than MaxHosts of them, is ErrInvalid. Expand of
// what Fold wrote gives the same hosts in the same order.
package hostlist

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Bounds of a list.
const (
	MaxHosts = 1 << 16 // hosts it may expand to
	MaxBytes = 4 << 20 // of the list as written
	maxName  = 255     // bytes of a name
	maxDigit = 9       // digits of a number in brackets
)

// ErrInvalid says that a list is malformed or beyond a bound. The error names the item.
var ErrInvalid = errors.New("not a host list")

// A Host is one host of a list, with its address where one is given.
type Host struct {
	Name string
	Addr string // "host:port", empty when only the name is given
}

// Expand is the names of a list, in order. An empty list has none.
func Expand(list string) ([]string, error) {
	hosts, err := Parse(list)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, h := range hosts {
		if h.Addr != "" {
			return nil, fmt.Errorf("%w: %.80q: no addresses here", ErrInvalid, h.Name+"="+h.Addr)
		}
		names = append(names, h.Name)
	}
	return names, nil
}

// Parse is the hosts of a list whose items may carry addresses.
func Parse(list string) ([]Host, error) {
	if len(list) > MaxBytes {
		return nil, fmt.Errorf("%w: %d bytes", ErrInvalid, len(list))
	}
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	var hosts []Host
	seen := map[string]bool{}
	for rest, more := list, true; more; {
		var item string
		item, rest, more = cutItem(rest)
		item = strings.TrimSpace(item)
		pattern, addr, given := strings.Cut(item, "=")
		if given && (addr == "" || strings.ContainsAny(pattern, "[]") || strings.ContainsAny(addr, " \t\r\n=")) {
			return nil, fmt.Errorf("%w: %.80q", ErrInvalid, item)
		}
		names, err := expand(pattern, MaxHosts-len(hosts))
		if err != nil {
			return nil, fmt.Errorf("%w: %.80q: %w", ErrInvalid, item, err)
		}
		for _, name := range names {
			if seen[name] {
				return nil, fmt.Errorf("%w: %.80q: %s comes twice", ErrInvalid, item, name)
			}
			seen[name] = true
			hosts = append(hosts, Host{name, addr})
		}
	}
	return hosts, nil
}

// cutItem cuts a list at its first comma outside brackets.
func cutItem(list string) (item, rest string, more bool) {
	depth := 0
	for i := range len(list) {
		switch list[i] {
		case '[':
			depth++
		case ']':
			depth--
		case ',':
			if depth <= 0 {
				return list[:i], list[i+1:], true
			}
		}
	}
	return list, "", false
}

// expand is the names that a pattern means, room at most.
func expand(pattern string, room int) ([]string, error) {
	names := []string{""}
	for pattern != "" {
		plain, rest, open := strings.Cut(pattern, "[")
		for i := range len(plain) {
			if c := plain[i]; !letter(c) && !digit(c) && c != '.' && c != '-' && c != '_' {
				return nil, fmt.Errorf("%q cannot stand in a name", c)
			}
		}
		words := []string{""}
		pattern = ""
		if open {
			inside, after, closed := strings.Cut(rest, "]")
			if !closed {
				return nil, errors.New("a bracket is not closed")
			}
			var err error
			if words, err = numbers(inside, room); err != nil {
				return nil, err
			}
			pattern = after
		}
		if len(names)*len(words) > room {
			return nil, fmt.Errorf("more than %d hosts", MaxHosts)
		}
		product := make([]string, 0, len(names)*len(words))
		for _, n := range names {
			if len(n)+len(plain)+maxDigit > maxName {
				return nil, errors.New("the name is too long")
			}
			for _, w := range words {
				product = append(product, n+plain+w)
			}
		}
		names = product
	}
	if names[0] == "" || names[0][0] == '.' || names[0][0] == '-' {
		return nil, errors.New("not a name")
	}
	return names, nil
}

// numbers is what a bracket stands for.
func numbers(inside string, room int) (words []string, err error) {
	for part := range strings.SplitSeq(inside, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		lo, err1 := number(from)
		hi, err2 := number(to)
		switch {
		case err1 != nil || err2 != nil || hi < lo:
			return nil, fmt.Errorf("%.40q is not a number or a range", part)
		case len(to) != len(from) && (from[0] == '0' || to[0] == '0'):
			return nil, fmt.Errorf("%.40q: of what width?", part)
		case hi-lo >= room-len(words):
			return nil, fmt.Errorf("more than %d hosts", MaxHosts)
		}
		for n := lo; n <= hi; n++ {
			words = append(words, padded(n, len(from)))
		}
	}
	return words, nil
}

func number(s string) (int, error) {
	if s == "" || len(s) > maxDigit {
		return 0, strconv.ErrSyntax
	}
	for i := range len(s) {
		if !digit(s[i]) {
			return 0, strconv.ErrSyntax
		}
	}
	return strconv.Atoi(s)
}

func padded(n, width int) string {
	s := strconv.Itoa(n)
	return strings.Repeat("0", max(0, width-len(s))) + s
}

func letter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
func digit(c byte) bool  { return c >= '0' && c <= '9' }

// Fold writes names as a short list, in their order: runs of names that differ in their last number become a bracket.
func Fold(names []string) string {
	var b strings.Builder
	var parts []part // of the bracket that is open
	var prefix, suffix string
	flush := func() {
		if parts == nil {
			return
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		if len(parts) == 1 && parts[0].lo == parts[0].hi {
			b.WriteString(prefix + parts[0].String() + suffix)
		} else {
			b.WriteString(prefix + "[")
			for i, p := range parts {
				if i > 0 {
					b.WriteByte(',')
				}
				b.WriteString(p.String())
			}
			b.WriteString("]" + suffix)
		}
		parts = nil
	}
	for _, name := range names {
		pre, n, width, suf, ok := lastNumber(name)
		if !ok {
			flush()
			if b.Len() > 0 {
				b.WriteByte(',')
			}
			b.WriteString(name)
			continue
		}
		if parts == nil || pre != prefix || suf != suffix {
			flush()
			prefix, suffix = pre, suf
		}
		if k := len(parts) - 1; k >= 0 && n == parts[k].hi+1 && len(padded(n, parts[k].width)) == width && len(strconv.Itoa(n)) <= maxDigit {
			parts[k].hi = n
			continue
		}
		parts = append(parts, part{n, n, width})
	}
	flush()
	return b.String()
}

type part struct{ lo, hi, width int }

func (p part) String() string {
	if p.lo == p.hi {
		return padded(p.lo, p.width)
	}
	return padded(p.lo, p.width) + "-" + padded(p.hi, p.width)
}

// lastNumber takes a name apart at its last digits. Not ok: it has none, or too many.
func lastNumber(name string) (prefix string, n, width int, suffix string, ok bool) {
	end := strings.LastIndexAny(name, "0123456789") + 1
	from := end
	for from > 0 && digit(name[from-1]) {
		from--
	}
	n, err := number(name[from:end])
	return name[:from], n, end - from, name[end:], err == nil
}
