// Package lab is a cluster on one machine, for tests and benches: hosts with links of their own, a registry behind a
// link, and real agents that can be killed, cut off and slowed down.
//
//  1. New makes a switch and N hosts. Each is a process that does nothing, in network, mount and PID namespaces of
//     its own: whatever runs on the host runs in these, and ends with that process, mounts included. The namespaces have
//     no names, and the processes end with the program that made them; so nothing is left however it ends, and
//     labs may run beside each other.
//  2. A host's link is a pair of virtual interfaces to the switch's bridge, shaped by tc tbf at both ends: Rate bounds
//     what the host sends and, apart from that, what it receives. Slow, Cut and Heal change one link.
//  3. The origin is Debian's docker-registry, with a proxy of tests/registry in front of it that listens in a namespace
//     with a link like the hosts'. The proxy counts, and breaks things on purpose; Lab.Origin is its methods.
//  4. Host.Start runs an agent with a store, a config and a certificate of its own; Host.Stage asks one for a stage and
//     Host.Muster runs any muster command on the host.
//
// What runs concurrently: nothing here. All methods of one host are called one after the other; hosts differ.
//
// Not promised: that a link is exact. A bucket of burst bytes passes unshaped after each pause, and frames carry about 5 % of headers,
// which count against the rate.
package lab
