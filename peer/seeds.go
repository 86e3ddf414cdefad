package peer

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Seeds say whom to join: "10.0.0.1:7946", "node1:7946", or without the port where it is the usual one. They are asked at the start and again and again, so a list
// that grows is noticed.
type Seeds func(ctx context.Context) ([]string, error)

// SeedList is a list that does not change.
func SeedList(hosts ...string) Seeds {
	return func(context.Context) ([]string, error) { return hosts, nil }
}

// SeedFile is a file with a host a line; what follows # is a comment.
func SeedFile(path string) Seeds {
	return func(context.Context) ([]string, error) {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var hosts []string
		for _, line := range strings.Split(string(text), "\n") {
			line, _, _ = strings.Cut(line, "#")
			hosts = append(hosts, strings.Fields(line)...)
		}
		return hosts, nil
	}
}

// SeedDNS is all addresses of a name ("muster.cluster.example:7946").
func SeedDNS(name string) Seeds {
	return func(ctx context.Context) ([]string, error) {
		host, port, err := net.SplitHostPort(name)
		if err != nil {
			host, port = name, ""
		}
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, err
		}
		var hosts []string
		for _, a := range addrs {
			if port == "" {
				hosts = append(hosts, a.Unmap().String())
			} else {
				hosts = append(hosts, net.JoinHostPort(a.Unmap().String(), port))
			}
		}
		return hosts, nil
	}
}

// AllSeeds asks all of seeds. It fails when none of them answers.
func AllSeeds(seeds ...Seeds) Seeds {
	return func(ctx context.Context) (hosts []string, err error) {
		answered := false
		var errs []error
		for _, s := range seeds {
			some, err := s(ctx)
			hosts = append(hosts, some...)
			answered = answered || err == nil
			errs = append(errs, err)
		}
		if answered {
			return hosts, nil
		}
		return nil, errors.Join(errs...)
	}
}

// resolve turns a seed into addresses.
func resolve(ctx context.Context, seed string, port uint16) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddrPort(seed); err == nil {
		return []netip.AddrPort{a}, nil
	}
	if a, err := netip.ParseAddr(seed); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a, port)}, nil
	}
	host := seed
	if h, p, err := net.SplitHostPort(seed); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			return nil, err
		}
		host, port = h, uint16(n)
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var all []netip.AddrPort
	for _, a := range addrs {
		all = append(all, netip.AddrPortFrom(a.Unmap(), port))
	}
	return all, nil
}
