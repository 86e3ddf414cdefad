// Package sim is clusters that exist only as numbers: it says what plans cost before anything is sent.
//
//  1. ShapeOf counts what a plan's trees make of N hosts: peers, bytes sent, bytes into racks, hops, and what one late host touches.
//  2. Run lets the pieces of a real plan travel over shaped links, whose rates are shared max-min fairly, and says when each host has them all.
//  3. Tables prints both for many N. docs/trees.md holds what it prints, and says which numbers of package planner follow.
//
// # What is not promised
//
// Run knows no packets: no slow start, no loss, no processor that has other things to do. A host that is late is late for ever, nobody passes it
// over. Time costs nothing here, but work grows with pieces · hosts², so Run is for some hundred hosts at most.
package sim
