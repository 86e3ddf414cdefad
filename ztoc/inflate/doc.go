// Package inflate reads gzip files (RFC 1951, RFC 1952) at the speed of the machine, can take up inflating
// in the middle of one, and can use several cores on one file.
//
// # One core
//
// A Reader holds 128 KiB of input and 256 KiB of output with the window in it; what is inflated is
// summed, handed out and then slid away. The work is in blocks with codes:
//
//  1. The code lengths in the block's header become two tables. The next 11 bits of the stream find an
//     entry of the literal/length table: one literal, two literals if both their codes fit, a length,
//     the end, or the way to a second table. The next 9 bits find an entry of the distance table.
//     The table for codes of up to n+1 bits is that for up to n bits written twice.
//  2. The fast loop (fastBMI2 in assembly, fastGo in Go, chosen by the CPU) decodes while there are 16
//     bytes of input and room for 6 literals and a match, so that nothing is checked in between. It loads
//     eight bytes at a time into a bit buffer of 64 bits, writes two bytes for every literal, and copies 32
//     bytes for every match and then 16 at a time, for a distance below 16 a pattern made by one shuffle.
//     What it writes too much is overwritten later, or is in the slack behind the output.
//  3. The careful loop takes up every symbol by itself: at the ends of input and output, and where
//     something is wrong with the stream, which it then says.
//
// Nothing is done by halves: a symbol, a stored length or a block's header for which not all the input is
// there is taken up again from its start when there is more. So a Reader never waits for more input than
// it takes to go on.
//
// A Checkpoint is reported at ends of blocks and starts of members; Span inflates from there, given the
// window. It does the first 32 KiB of a span in a buffer behind the window, and the rest in place.
//
// # Several cores
//
// With Options.Cores above 1 the file is dealt out to a crew of workers in chunks of 2 MiB:
//
//  1. The Reader's goroutine, within Read and WriteTo, reads input some chunks ahead and gives each chunk to
//     a worker.
//  2. A worker looks for the start of a block in its chunk: every bit where a header with codes is right in
//     all respects. There it begins, not knowing the window: into elements of 16 bits, in which markers stand
//     for the 32 Ki unknown bytes and are copied like bytes. Where the last 32 Ki elements have no markers, or
//     the window becomes known, it goes on in bytes.
//  3. It ends at the first end of a block behind its chunk, or, if the next chunk's worker began further on,
//     there. When its own start is certain, because the chunk before ended there, it tells the next chunk its
//     window; then the markers are looked up. A worker that began in the wrong place begins anew.
//  4. The Reader takes the chunks in order, adds up their checksums, reports the checkpoints and hands out
//     the data.
//
// A worker that waits, for the chunk before or for input, lets another take its place: there is one more than
// Cores.
//
// Whatever is odd (malformed data, a checksum that is wrong, chunks that inflate to more than 16 MiB on average,
// blocks that cannot be found, as stored ones, the end of the file) ends the crew's work at the start
// of the chunk, and one core goes on from there; after some MiB without trouble it hires again. So
// data, checkpoints and errors are those of one core. At most Cores+3 chunks are held.
//
// # What is not promised
//
// The checksums of a span are not checked: its digest is to cover that. A span that began in the middle
// of a member does not know how far back the member's data went, if the window it is given reaches further.
// Malformed input costs time in proportion to its size and an Error that names the position, to the byte
// where decoding could not go on, which may be behind the byte that is wrong. Fields of gzip headers are
// checked and passed over.
package inflate
