// Package tree merges the entries of an image's layers into one file system tree and keeps it as a
// single immutable table file, which every server of a mount maps. It knows nothing of FUSE, of
// blobs or of how layers are compressed: content is named as (layer, offset in the inflated layer).
//
// How a table is built (Build):
//
//  1. Layers are merged bottom to top, each in archive order, as umoci and the OCI image
//     specification do it. Names are cleaned beneath the root, symbolic links in parent position are
//     followed within the root, missing parents are made.
//  2. A whiteout removes what lower layers have at its name, an opaque directory what they have
//     beneath it, never what its own layer brings. A later entry of the same name replaces an earlier one. A hard link is
//     another name for an inode; an inode without a name is dropped.
//  3. Rows are numbered: the root is row 0, the others follow in the order in which a depth-first
//     walk in readdir order meets them. Readdir order is the order of the data in the layers, so that
//     reading a tree file by file reads spans in order.
//  4. Rows, directory entries, extents, xattrs and their bytes are written, in that order, behind a header with
//     the checksums. Equal input gives equal bytes.
//
// How a table is read (Open): every number that later indexes something is checked once, so that
// accessors are plain arithmetic on the mapped bytes: no allocation, no error, no lock. The kernel's
// node ID is row + 1; a directory's offset is a position in it. So a server that replaces another needs
// nothing but the same file.
//
// What is not promised: a table says nothing about the content of files, only where it lies. Whoever
// reads the content checks it against the span digests of the layer's ztoc. A table written by a
// newer version is refused (ErrVersion), never guessed at.
//
// The ids and modes in the table are the image's own. How they look to whom is a Presentation,
// applied on reading.
package tree
