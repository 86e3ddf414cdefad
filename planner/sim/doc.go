// Package sim is clusters that exist only as numbers: it says what plans cost before anything is sent.
//
//  1. ShapeOf counts what a plan's trees make of N hosts: peers, bytes sent, bytes into racks, hops, and what one late host touches.
//  2. Run lets the pieces of a real plan travel over shaped links, whose rates are shared max-min fairly, and says when each host has them all.
//  3. Tables prints both for many N. docs/trees.md holds what it prints, and says which numbers of package planner follow.
//  4. Simulate is a discrete-event simulation of a plan on a Cluster of any size: links, uplinks of groups, disks, processors and indexers do one
//     piece after the other; an origin has a rate and a limit of requests; hosts may be slow, late, or die, and are passed over as agents do it.
//     Where only links count it agrees with Run within a tenth (a test). make sim draws it for up to 16,384 hosts.
//
// # What is not promised
//
// Neither knows packets: no slow start, no loss, no processor that has other things to do. In Run a host that is late is late for ever, nobody passes it
// over; its work grows with pieces · hosts², so it is for some hundred hosts at most. Simulate's grows with pieces · hosts: seven million
// pieces on 16,384 hosts take half a minute. How agents judge their parents is modelled roughly: a sender has eight children at once, whatever their number.
package sim
