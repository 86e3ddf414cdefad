// Package image turns a reference into something that can be mounted: it is the one place that tells
// how an image is opened.
//
// # The algorithm
//
// Open does, in this order:
//
//  1. Resolve the reference at its origin: manifest and config, both checked against their digests.
//     When the origin cannot be reached and the same reference was opened here before, the manifest
//     kept from then is used and a warning says so. From here on only digests travel.
//  2. Find each layer's view (a ztoc and the blob it describes), the cheapest first:
//     a ztoc kept from an earlier time; the layer's own table of contents (eStargz, zstd:chunked),
//     when the manifest's annotations give its digest; an index beside the image (SOCI v2 by the
//     manifest's annotation, SOCI v1 by referrers). An index that dangles or does not decode is a
//     reason in the report, never an error.
//  3. Pull the layers that have no view yet, several at once, the largest first: a layer streams
//     from the origin into the store and through ztoc.Build in one pass, which checks its digest.
//     A layer without useful restart points is re-framed into a derived blob by ztoc.Derive. The
//     views are kept for the next time.
//  4. Build the table of the merged tree, or take the one kept for the same manifest and the same
//     views.
//  5. Map table and ztocs, and hand out a lazyfs.Config whose Blobs is the chain store → origin, with
//     the start-up profile of an earlier run, or else with a guess made from the command, its
//     interpreter, the libraries it is linked with and what a Python program imports.
//
// Step 3 is what makes an image without any index work: its first mount costs one pull that does not
// unpack, and every later one costs nothing.
//
// # What runs concurrently
//
// The views of all layers are looked for at once, at most four layers are pulled at a time.
// Everything ends when the context given to Open ends; after Open returned, only the chain and the
// lazyfs server have goroutines, and Image.Close ends those of the chain.
//
// # What is not promised
//
// Bytes in the store are hints (see package store): a view that was kept is trusted because its own
// checksum matches, a span's bytes only when their digest does, at each read. A derived blob that was
// evicted under a live mount is made again from the layer, at the cost of reading that layer from its
// beginning.
package image
