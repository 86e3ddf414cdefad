// Package origin reads images from where they come from: registries, their mirrors, and OCI layouts on a
// file system.
//
// A read of a part of a blob, which is what the rest of muster does most, goes like this:
//
//  1. [ParseReference] makes a [Reference] of what people write, and [Client.Repository] finds the places
//     that answer for its registry: the mirrors of certs.d/HOST/hosts.toml in their order, then the
//     registry itself. Nothing is asked yet.
//  2. [Repository.Blob] asks the first of them that does not rest and has not lately said no (remote.doExcept).
//     A mirror that fails is left alone for half a minute and more each time; a mirror's 404 is believed
//     for a minute. The registry itself is asked again after a pause with full jitter, or when it says
//     (Retry-After), and a 429 to one request quiets all.
//  3. One question (remote.ask) follows redirects itself, so that nothing that proves who we are goes to
//     another host: no Authorization, no client certificate, no header of hosts.toml. The signed URL that a
//     blob redirects to is kept while it is valid; when it is refused, the registry is asked again.
//  4. A 401, or a 403 where a token held before, makes a new token. The first request to be refused fetches
//     it, the others refused with the same token wait for that one.
//  5. The body (type body) hands on what arrives. When a response breaks, stalls for longer than
//     Options.Idle, or trickles below Options.MinRate while others do not, the rest is asked for again from
//     where it stopped. A server that answers 200 to a Range request has its bytes skipped, and is asked
//     last from then on.
//  6. Patience is counted from the last byte that came. When Options.MaxWait is over, the read fails with
//     [ErrUnreachable] (or [ErrTooMany]); until then it waits. It never gives fewer bytes than asked for
//     without an error, and never bytes that did not come from a server.
//
// [Repository.Resolve] goes from a tag or digest to a manifest for a platform and its config in the same
// way, with the shorter patience Options.ResolveWait, and checks every digest. [Repository.Referrers] lists
// what lies beside an image, by the API or the fallback tag; a registry that answers oddly has nothing there.
// [FindIndex] tells from that which layers have a SOCI ztoc.
//
// Requests of all repositories of a [Client] run concurrently and share connections (at most
// Options.MaxConns per host), tokens and what was learned about hosts. The package starts no goroutines
// that outlive a call, except a credential helper that hangs.
//
// Not promised: that the bytes of a blob are right. A range has no digest of its own; whoever reads it has
// (see package ztoc), and so do [ReadBlob] and the manifests. Nor that a limit on connections is one over
// all processes of a host. Addresses are not filtered here: a registry can redirect to any host that this
// process can reach.
package origin
