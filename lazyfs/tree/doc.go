// Package tree merges the entries of an image's layers into one file system tree and keeps it as a
// single immutable table file, which every server of a mount maps. It knows nothing of FUSE, of
// blobs or of how layers are compressed: content is named as (layer, offset in the inflated layer).
//
// How a table is built (Build):
//
//  1. Layers are merged bottom to top, each in archive order, as umoci unpacks them (which is what the OCI
//     image specification asks for). Names are cleaned beneath the root, symbolic links in parent position
//     are followed within the root, missing parents are made.
//  2. A whiteout removes what lower layers have at its name, an opaque directory what they have beneath
//     it, never what its own layer brought. A later entry of a name replaces the earlier one, but for a
//     directory over a directory, which keeps what is in it. A hard link is another name for an inode; an
//     inode without a name is gone.
//  3. An entry at which umoci would give up is refused alone: the tree is as if it were not in the archive, and
//     Stats says why. Only an index that cannot be true (ErrEntries) is an error.
//  4. Inodes are numbered, the root 0, then breadth first, so that those of one directory lie together.
//     The names of a directory stand in the order of the data beneath them in the layers, so that reading a
//     tree file by file reads spans from front to back.
//  5. Layers, rows, names, their order for look-ups, extents, xattrs and all their bytes are written behind a
//     header with checksums. Equal input gives equal bytes.
//
// How a table is read (Open): every number that later indexes something is checked once, in one linear
// pass, so that accessors are plain arithmetic on the mapped bytes: no allocation, no error, no lock, on
// any number of goroutines. The kernel's node ID is row + 1; a directory's offset is a position in it. So a
// server that replaces another needs nothing but the same file.
//
// What is not promised. A table says where content lies, not that it is right: whoever reads it checks it
// against the span digests of the layer's ztoc. A table of another version is refused (ErrVersion), never
// guessed at. Checksums find rot, not malice: a table written by an enemy is safe to use, and lies.
// Directories that no layer has an entry for have the time 1970; umoci has the time of the unpacking, and
// also on a directory above one that it made.
//
// The ids and modes in the table are the image's own. How they look to whom is a Presentation, applied on
// reading.
package tree
