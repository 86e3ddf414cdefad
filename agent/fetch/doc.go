// Package fetch gets ranges of blobs from the nearest place that has them: the store on this host, else
// the origin. It is the chain below every read of a lazily mounted image.
//
// How a read goes (Chain.ReadAt):
//
//  1. What the store has is read from there.
//  2. For the rest the reader becomes a waiter and joins the flights that will bring it. A flight is one request
//     to the origin in progress or queued; the flights of a blob never overlap, so no byte is fetched
//     twice at once. Before it makes a flight of its own it looks into the store again.
//  3. A flight copies bytes to its waiters the moment they arrive, and stores them in chunks. A reader is
//     served when its own bytes are there, not when the flight ends.
//
// What a flight fetches: a small read is widened to the aligned unit around it (256 KiB) as far as blocks are
// absent, and by four units more when the block before it is present, since files that are used together
// lie together. Neighbours that still wait in the queue are merged into one request when it starts. Present
// blocks are never fetched again.
//
// Who goes first: demand before streams before prefetch, and some requests are reserved for demand. A
// demand read of what is queued, or far ahead in a running prefetch or stream, is cut out of it and becomes a
// flight of its own.
//
// When it ends: a reader whose context ends leaves at once; a flight that nobody wants any more is
// cancelled unless it is nearly done; Close cancels all and waits.
//
// Several processes of a host may have a chain each on one store. A flight claims its range in the store
// when it starts; another's flight for the same range waits, looking into the store every 10 ms, as long as
// bytes arrive there. Claims are advice and end with their process; a flight that waits in vain goes ahead.
//
// Stream gives a whole blob in order, for the first pull. It is a reader with a flight that runs ahead
// of it, by a bounded distance; other readers join it.
//
// Memory: a flight holds what has arrived and is not in the store yet: one chunk. When the store keeps
// nothing (no space) it holds up to 3 MiB, so that late joiners are served; with 8 flights that is 24
// MiB, however many readers wait.
//
// One lock guards flights, queues and waiters; reads of the store and of the network, and writes to the store,
// happen outside it. What is running: one goroutine for each flight in progress, at most Options.Requests.
//
// Not promised: that the bytes are right. Callers hash them, and call Reject when they are not; after three
// wrong answers for one range Reject gives the error to give up with. Also not promised: that a byte is
// fetched only once whatever happens. Evicted ones come again, and so may up to a chunk where a flight is
// cut or cancelled.
package fetch
