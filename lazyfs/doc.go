// Package lazyfs serves a mounted image: a FUSE server over a table, whose files are inflated when they are read.
//
// How a request is answered:
//
//  1. Few threads (Config.Loops) read requests from /dev/fuse into slots and answer them where they are. They never wait
//     for anything but the device. Names and attributes are arithmetic on the mapped table.
//  2. A READ is planned: inode and offset give extents of layers, these give spans. That too is arithmetic.
//  3. If all its spans are at hand, inflated, the reply is sent from where the bytes lie. They are referenced meanwhile.
//  4. Otherwise the read is parked: a record of a few words that waits at its first missing span, and a slot. Five hundred
//     of them cost next to nothing, whatever they wait for.
//  5. A missing span is put into a lane: near (what Local says is here), far (maybe the network), idle (ahead of demand). Each
//     lane has its own bound on workers and on compressed bytes in their hands, so none holds up another. A worker takes
//     the bytes from Blobs, waits for a processor, inflates, which proves them, and answers who waited. Bytes that
//     do not match are rejected and fetched again; when Blobs gives up the reader gets EIO, and the log one line per cause.
//  6. Inflated spans stay in memory within Config.Memory: what was read to its end goes first, then what was used least
//     recently. The page cache is the real cache.
//
// What runs ahead of readers, at low priority and within budgets:
//
//   - Whoever reads a layer in order (a large file, or a tree in readdir order) has the next spans inflated on all
//     processors, and tells Blobs of the compressed bytes further on.
//   - A start-up profile of an earlier run is replayed in its order.
//   - The span behind one that was missing is inflated too when it is local and a processor is free, as long as that
//     proves right often enough.
//   - A warm file, the inflated bytes that an earlier start read, replaces spans where it has them. Each piece is checked
//     when it is read. It is made from what readers get while the program starts (Config.KeepWarm), or by WriteWarm.
//
// Large files that are really read get plain copies, which the kernel reads by itself in later mounts (backing.go).
//
// Readers that are killed are let go at once; a signal that does not kill does not disturb a read (see interrupt.go).
//
// The server keeps nothing about inodes, except how large files were opened first, and counts no references: a node ID is a row of the table plus one, a directory's
// offset a position in it, for ever. What the kernel agreed on in INIT is kept (Init), requests lie in memory that can be shared
// with a parent (Slots). So another process can go on where this one died: package mountd does that.
//
// Locks: Server.mu guards what is at hand and on its way, and is never held while waiting. The recorder and the pools have
// locks of their own, which are taken last and alone.
//
// What is not promised: reading the mount from the very process that serves it. The Go runtime makes some system calls
// (epoll_ctl on opening a file, vfork) during which it cannot stop the world, and a reply may need it to go on.
package lazyfs
