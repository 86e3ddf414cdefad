package main

import (
	"fmt"
	"strconv"
	"strings"
)

// maxHosts bounds what a host list may expand to.
const maxHosts = 1 << 16

// expandHosts reads a host list as schedulers write it: "n1,n2", "node[001-016,20],login1". An item may carry an address, "n1=10.0.0.1:7464".
func expandHosts(list string) (hosts []string, err error) {
	for _, item := range splitHosts(list) {
		if hosts, err = expandItem(hosts, item); err != nil {
			return nil, err
		}
	}
	return hosts, nil
}

// splitHosts splits at commas that are not in brackets.
func splitHosts(list string) (items []string) {
	depth, from := 0, 0
	for i, c := range list + "," {
		switch {
		case c == '[':
			depth++
		case c == ']':
			depth--
		case c == ',' && depth <= 0:
			if s := strings.TrimSpace(list[from:i]); s != "" {
				items = append(items, s)
			}
			from = i + 1
		}
	}
	if from < len(list) { // a bracket that is never closed
		items = append(items, list[from:])
	}
	return items
}

func expandItem(hosts []string, item string) ([]string, error) {
	name, addr, given := strings.Cut(item, "=")
	open := strings.IndexByte(name, '[')
	if given || open < 0 {
		if strings.ContainsAny(name, "[]") || (given && addr == "") {
			return nil, usagef("%q is not a host", item)
		}
		return append(hosts, item), nil
	}
	end := strings.IndexByte(name, ']')
	if end < open {
		return nil, usagef("%q: a bracket is not closed", item)
	}
	for part := range strings.SplitSeq(name[open+1:end], ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		lo, err1 := strconv.ParseUint(from, 10, 32)
		hi, err2 := strconv.ParseUint(to, 10, 32)
		if err1 != nil || err2 != nil || hi < lo || hi-lo >= maxHosts {
			return nil, usagef("%q: %q is not a number or a range", item, part)
		}
		for n := lo; n <= hi; n++ {
			var err error
			if hosts, err = expandItem(hosts, fmt.Sprintf("%s%0*d%s", name[:open], len(from), n, name[end+1:])); err != nil {
				return nil, err
			}
			if len(hosts) > maxHosts {
				return nil, usagef("%q: more than %d hosts", item, maxHosts)
			}
		}
	}
	return hosts, nil
}
