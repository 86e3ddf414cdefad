package planner

// Choices of the planner where Params say nothing. docs/trees.md has the arithmetic they come from.
const (
	// DefaultSeeds is how many hosts fetch from the origin. More would only be more clients of the registry: its link is full with
	// a few.
	DefaultSeeds = 16
	// DefaultRun is bytes of one request to the origin. Registries count requests; but one request cannot be shared, so a small
	// image is cut finer.
	DefaultRun = 8 << 20
	// DefaultFanout is how many children a host has in a tree that it passes pieces on in. Fewer make trees deep, more make
	// a piece wait for its turn, and the work uneven.
	DefaultFanout = 4

	manyPieces = 1 << 15
	fewHosts   = 64
)

// treesFor is how many trees a job of n hosts has. Up to 64 hosts nobody can have too many peers, and many trees make the work even. Beyond, a
// host has one parent per tree and as many children in all.
func treesFor(n int) int {
	if n <= fewHosts {
		return 64
	}
	return 16
}
