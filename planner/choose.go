package planner

// treesFor is how many trees a job of n hosts has unless Params say otherwise; docs/trees.md has the arithmetic. Up to 64 hosts nobody can have too
// many peers, and many trees make the work even. Beyond, a host has one parent per tree and as many children in all.
func treesFor(n int) int {
	if n <= 64 {
		return 64
	}
	return 16
}

// fanoutFor is how many children a host that passes pieces on has in a tree.
func fanoutFor(n int) int {
	return 4
}
