package main

import (
	"strings"

	"github.com/muster-hpc/muster/jobhooks/hostlist"
)

// expandHosts reads a host list as schedulers write it: "n1,n2", "node[001-016,20],login1". An item may carry an address, "n1=10.0.0.1:7464".
func expandHosts(list string) ([]string, error) {
	hosts, err := hostlist.Parse(strings.TrimRight(list, ", "))
	if err != nil {
		return nil, usage(err)
	}
	var items []string
	for _, h := range hosts {
		if h.Addr != "" {
			h.Name += "=" + h.Addr
		}
		items = append(items, h.Name)
	}
	return items, nil
}
