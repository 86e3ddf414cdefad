// Package images makes the test images: OCI layouts on disk that stand for what registries hold, from
// a real Debian root with numpy to a layer in every dialect of gzip and zstd that muster must read.
//
//  1. [Get] names an image and gets the directory of its OCI layout (tag "latest"). Layouts live in a
//     cache outside the checkout, /var/cache/muster-test-images (the user's cache directory when not
//     root; MUSTER_TEST_IMAGES moves it), so that a second clone does not build them again.
//  2. Several images may come from one build, an artifact: debian-scipy and one-layer are the same
//     files. An artifact's directory is named by a key over its builder's version, its inputs and the
//     Go release, whose gzip encoder is an input too. Raise the version in [artifacts] with any change
//     that changes bytes.
//  3. A build takes the artifact's lock (two builders: the second waits, then finds it done), builds in
//     a temporary directory beside the others and renames it. A killed build leaves a temporary
//     directory that the next builder of that artifact removes.
//  4. The Debian roots come from mmdebstrap and the Debian mirror that this machine's apt uses,
//     with times clamped to a fixed epoch, then dealt into layers by package. Everything else is
//     written here, byte by byte where the byte is the point.
//
// The same inputs give the same bytes. Debian's point releases are inputs that nothing here pins: a
// machine that builds months later gets newer packages under the same names, and so other digests.
//
// A test that needs a small image of its own composes it: [Layer] makes a layer of [Entry] values,
// [Gzip] and the other encoders one of any bytes, [WriteLayout] an image of layers.
package images
