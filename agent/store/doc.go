// Package store keeps ranges of blobs, and small files about them, on a local disk. Several processes
// of one host share a store without a daemon.
//
// How it works:
//
//  1. Each blob is one sparse file: its bytes at offset 0, and after them its presence: a table of
//     64-bit words that every process maps shared. A word stands for 32 blocks of 4 KiB: the low half
//     says which of them are here, the high half counts how often the word was emptied.
//  2. A writer notes the words, writes the bytes, and then sets its bits by compare-and-swap against the
//     counts it noted. A reader notes the words, reads, and looks at them again. So bytes that were
//     evicted in between are neither marked by one nor believed by the other.
//  3. Presence is a hint and the digest is the truth: nothing is ever synced to disk, and whoever
//     reads hashes. Power loss, torn writes, bit rot and wrong bytes from the network are one
//     case: the reader calls Drop and fetches again. Small files, which nobody hashes, carry a checksum
//     that is looked at once in each boot.
//  4. All processes add what they are about to write to one shared counter. Whoever takes it over the
//     quota holds the store's lock, counts the blocks that are really allocated, and evicts: first
//     whole blobs and files that nobody has open, least recently used first, by unlinking; then
//     ranges of open blobs: their words are emptied (odd count: nobody may mark), the hole is
//     punched, the words are released (even count). What is pinned stays.
//  5. An open handle holds a shared flock on the blob's file, so the kernel itself forgets who uses a blob
//     when a process is killed. The same goes for temporary files: one that can be locked
//     belongs to nobody and is swept.
//  6. Plain copies of large files (spare.go) are made from free room only, and go before all else, also while they are open.
//  7. When the disk is full or the quota cannot be met, writes give ErrNoSpace, one warning names the
//     directory, and every few seconds a write is tried again. Reads go on.
//
// Not promised: that what was written can be read later; that the order of eviction is exact
// (times of use are noted once a second); that processes which open one store with different quotas agree: the
// smallest holds. The quota may be exceeded by what is being written at one moment, at most
// 1 MiB for each process.
//
// On disk, all in one directory that only its owner may enter:
//
//	format              "muster store 1"
//	host                JSON: boot ID, machine ID and node name of the host that has claimed the store
//	lock                flock of whoever evicts or collects
//	usage               one page; at byte 64 the counter of allocated bytes, in the host's byte order
//	blobs/HEX-SIZE      a blob: its bytes; at the next multiple of 64 KiB a header of 4 KiB (magic "MUSTERB\x01", size,
//	                    at byte 48 where the next punch starts, at byte 64 the digest) and the words, in the host's byte order
//	files/KIND/KEY      small files, each with a seal (seal.go)
//	images/KEY pins/KEY JSON records
//	tmp/                files being written
//
// A store is for one host: words and locks are shared by memory of one kernel. Open refuses file
// systems that reach further, and a directory that another host has claimed.
package store
