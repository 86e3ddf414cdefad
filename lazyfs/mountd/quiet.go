package mountd

import (
	"runtime"
	"runtime/debug"
)

// What keeps a server out of the way of the programs that it serves: it does what it is asked for and little ahead of that, on
// few threads, with little memory, and sleeps in the kernel otherwise, without a timer.
//
// No thread of it has a lower priority than another. Go's runtime stops all threads together now and then, and each has to reach
// a place for that: one at idle priority on a busy processor gets three thousandths of it, and would hold up every answer for up
// to a second. What nobody waits for, such as completing an image, belongs to a process that answers nobody, or into a control
// group with a small weight, which bounds the whole process (configs/systemd).

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
