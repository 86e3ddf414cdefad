// Package fetchtest has what tests of agent/fetch, and of stores that it may use, need: a store in memory,
// an origin with faults and a log, and the suite that every store must pass.
package fetchtest
