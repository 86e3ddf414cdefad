// Package planner says who fetches which piece from whom, and in which order, when a job's image reaches all its hosts from one pull. It
// is a pure function of a JobSpec: no clock, no network, nothing that one host sees and another does not.
//
// # How a plan is made
//
//  1. One host of the job (Resolver) freezes what a plan depends on in a JobSpec. Its encoding is canonical and its SHA-256 is the PlanID. The others
//     decode it, check its bounds, and call New.
//  2. The blobs, in the order in which they are wanted, are cut into pieces on a grid, numbered through (cut, plan.go).
//  3. Up to 16 hosts that may reach the origin are seeds, spread over groups (chooseSeeds, deal.go).
//  4. The bytes are cut into sections of about 8 MiB, the same number for each seed, dealt in turn. The pieces of a section go to its
//     seed's trees in turn (deal). What is adjacent in one blob is a run: one request (Runs).
//  5. Trees grow one after the other (grow, trees.go). The root is a seed. Those who have least to send so far are the ones
//     who pass on in the next tree, so that all send about the same in the end, and at any time. A root that has much to send already gives
//     each piece to one host, which gives it to the others. Where groups are known a group receives a piece once, and spreads it
//     inside. Slow hosts are leaves.
//  6. Layers without a table are dealt to hosts that build them (Indexers, place.go).
//
// New costs O(trees · hosts · log hosts + pieces). Everything else looks things up.
//
// # Why no wait can cycle
//
// Each tree has an order of all hosts (Rank) in which a parent stands before its children. A host lets a request wait only when the asker has
// the same PlanID and stands behind it in the order of the piece's tree (Before); else it answers at once from what it has. So for each
// PlanID and piece, whoever waits has a higher rank than whom it waits for; and a host with another PlanID waits for nobody.
// Requests of one host do not wait for each other. What Ancestors lists keeps to that order.
//
// # What is not promised
//
// A plan knows no rates: hosts that are slow and not said to be are found out by those who wait for them, and passed over. The
// work is even (bytes sent max ÷ mean ≤ 1.1) for up to 64 like hosts in one group when there are some hundred pieces; docs/trees.md says what holds elsewhere. With one
// seed for two hosts nothing can be even. Slow hosts send nothing, so the others send more.
package planner
