package peer

import (
	"fmt"
	"net"
	"net/netip"
)

// ChooseAddr is this host's address on a network that is given as a CIDR ("10.2.0.0/16", "fd00::/8") or as the name of an interface
// ("ib0"). Of an interface, IPv4 comes first and link-local addresses never. The prefixes are what belongs to that network:
// the CIDR, or what the interface is directly connected to.
func ChooseAddr(network string) (netip.Addr, []netip.Prefix, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, nil, err
	}
	all := map[string][]netip.Prefix{}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil || i.Flags&net.FlagUp == 0 {
			continue
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				all[i.Name] = append(all[i.Name], p)
			}
		}
	}
	return choose(network, all)
}

// choose does ChooseAddr over the addresses of interfaces, with their prefix lengths.
func choose(network string, interfaces map[string][]netip.Prefix) (netip.Addr, []netip.Prefix, error) {
	var found []netip.Addr
	var nets []netip.Prefix
	if cidr, err := netip.ParsePrefix(network); err == nil {
		nets = []netip.Prefix{cidr.Masked()}
		for _, prefixes := range interfaces {
			for _, p := range prefixes {
				if cidr.Contains(p.Addr()) {
					found = append(found, p.Addr())
				}
			}
		}
	} else {
		for _, p := range interfaces[network] {
			if !p.Addr().IsLinkLocalUnicast() {
				found = append(found, p.Addr())
				nets = append(nets, p.Masked())
			}
		}
	}
	var best netip.Addr
	for _, a := range found {
		// The same choice at each start: IPv4 before IPv6, then the lowest.
		if !best.IsValid() || a.Less(best) {
			best = a
		}
	}
	if !best.IsValid() {
		return best, nil, fmt.Errorf("no interface that is up has an address in network %q", network)
	}
	return best, nets, nil
}
