// Package peer is the swarm as one host sees it: who the others are, what they may be asked, and how
// ranges of blobs move between them. It knows no plan and no store: what it answers from comes through
// Source and through handlers of questions, which the agent gives it.
//
// # One listener, two kinds of connection
//
//  1. A Server listens on the host's data address. Both sides of a connection present a certificate that the
//     cluster's CA has issued; the name in it, the scheduler's node name, is who they are. The address proves
//     nothing, and a connection without such a certificate ends in the handshake. (Identity; identity.go)
//  2. ALPN says what the connection is for: "h2" is gRPC, for questions (Ask, Handle; question.go), "muster-range/1"
//     is for ranges, with frames of our own (frame.go), because a byte that moves should be copied and
//     encrypted once and touched by nothing else.
//  3. A host is dialled as Host{Name, Addr}. Gossip (Gossip; gossip.go) is one way to learn of hosts; a job's host
//     list and a port are another, and nothing here needs gossip to be up.
//
// # How ranges move
//
//  1. A child opens one Stream to each parent of a plan. Hello says for which plan, at which rank it stands and with what
//     grant; both ends know the other's name from its certificate.
//  2. Want names a blob and ranges of it, in any number and order, at any time, also while bytes arrive. The parent
//     cuts them at the grid of pieces. Drop takes ranges back that came from elsewhere.
//  3. For each Want the parent opens the blob at its Source, which checks the grant. Each piece is then in one of three states:
//     ready (the Source has all of it), promised (the Source says that this child may wait for it: it stands before
//     the child in the plan's order) or missing. Missing is told at once. Only the Source knows plans, so only the Source can
//     let somebody wait, and if it follows the rule of docs/design.md section 4, no wait can cycle.
//  4. One goroutine of the parent writes ready pieces in the order in which they became ready, in frames of at most FrameSize. It is told by
//     Blob.Watch what arrived or will not come after all, so a piece that waits costs one byte of memory and
//     no goroutine, and none blocks another.
//  5. When there is nothing to write for Beat, an empty frame says that the parent lives. A Want ends with a frame that says so, after
//     everything that it did not bring was told as missing. A connection that ends before that is an error, never a short
//     success.
//  6. The child reads with Next, into one buffer. Silence for Stall, or fewer than MinRate bytes a second over Window while a piece
//     is under way, is ErrSlow: a parent that waits itself is not slow, one that trickles is.
//
// Read is the same for one reader who waits: a connection of its own out of a few that are kept, ranges that the parent has now
// or has not, nothing promised. While a server answers demand, its prefetch streams hold back between two frames, at most
// HoldBack each time, and so do those of a client that waits for demand; so demand waits for one frame of each at most.
//
// # Bounds
//
// Messages have a bounded size and are checked before anything is allocated for them. A server has a bounded number of connections, of them so many
// per host, keeps places for demand, and bounds the pieces that are wanted of it at one time. Whoever is over a bound is told ErrBusy at once, never parked, so
// no set of hosts can wait for each other's places. Buffers for sending come from a bounded pool and are held only while something is
// written, with a deadline on each write. Every call has a context.
//
// # What runs concurrently
//
// Per connection at the parent: one goroutine that reads messages, one that writes frames. At the child: none but the
// caller of Next and Want, which may be two. Close of a Server, Client or Gossip waits for all that it started.
//
// # What is not promised
//
// Bytes are what the parent sent: whoever takes them hashes them. Nothing arrives in order, and a range may arrive twice. A parent that claims to wait for ever is not
// noticed here; deadlines of plans are the agent's matter. Holder lists are hints, and so is membership. A connection lives no longer than the
// certificate of its other end; who is cut off so opens another.
package peer
