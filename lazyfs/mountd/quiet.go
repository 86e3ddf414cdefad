package mountd

import (
	"runtime"
	"runtime/debug"
)

// maxThreads bounds how many processors the server of a mount uses at once, on machines that have more: the program it
// serves wants them.
const maxThreads = 8

// heapLimit bounds the collected heap of a server, which inflated spans are not in, bytes.
const heapLimit = 56 << 20

// beQuiet sets the limits of a server.
func beQuiet() {
	// Two more than inflate at most: requests that need no inflating must not wait for those that do.
	runtime.GOMAXPROCS(inflaters() + 2)
	debug.SetMemoryLimit(heapLimit)
}

// inflaters is how many spans a server inflates at once.
func inflaters() int { return min(runtime.NumCPU(), maxThreads) }
