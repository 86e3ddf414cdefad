// Package report says what starting a job really took: how well its hosts were coordinated, who was slow and why, and what the waiting cost. It
// is arithmetic over what the hosts' agents remember ([control.Record]): no network, no disk, no clock.
//
//  1. [Of] takes the records of one stage, whose times are by one clock already (the agent that was asked has seen to that, and says how far it
//     may be off), and places each host's phases on the job's own time line: seconds after the first host began.
//  2. From these: start skew, makespan, slowest ÷ median, bytes by source, and the time that hosts stood ready and waited for others.
//  3. A host that took more than [SlowAbove] times as long as the median host is slow. The reason is what of its time stands out most against
//     the median host's (slow.go).
//  4. What hosts took in earlier stages tells whether it is always the same ones.
//  5. [Events] gives the same in the columns of the study, so that package costmodel fits and scores on it.
//
// Seconds and bytes everywhere.
//
// # What is not promised
//
// A reason is what stands out, not a proof: a host whose disk and link are both bad gets the one that cost more. What
// nobody measured has no reason.
package report
