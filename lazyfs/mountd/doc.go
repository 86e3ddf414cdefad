// Package mountd is the processes of one mount.
//
// A mount outlives the command that asked for it, so it has processes of its own, started by running this
// executable again:
//
//	parent   tiny. It mounts, watches the mount and the server, and starts another server when that one dies.
//	server   finds the image (the caller's Builder), inflates and answers. It starts another parent when that one dies.
//
// Both hold everything that the mount is (kit): the descriptor of /dev/fuse, the table file, the memory that requests are
// read into, and what was agreed when it began (standing: the kernel's INIT and its answer, what the Builder was asked and
// said). A Keeper in another process may hold it too.
//
// How a mount comes to be (Start):
//
//  1. The command starts the parent in a session of its own and hands it the request over a socket.
//  2. The parent starts the server and passes the request on. The server builds: whatever takes long or can fail happens
//     before anything is mounted.
//  3. The server says "built" and sends the table file's descriptor. The parent mounts, answers the kernel's INIT, and sends
//     the kit. The server serves.
//  4. The parent looks at the root directory through the mount. Only when that works Start returns. Any failure
//     before unmounts again and comes back as Start's error, with the exit code that the Builder's process gave it.
//
// How it ends:
//
//   - Somebody unmounts. The device says so, the server ends, then the parent. If processes were still inside (lazy
//     detach), they are served on for Options.Linger, then the connection is aborted: nothing of ours stays behind.
//   - The parent gets SIGTERM: it unmounts.
//   - The command goes away before the mount is ready: its socket ends, the parent unmounts and ends.
//   - Its processes die too often (see deaths.go): whoever is left aborts the connection, so that all who wait get an
//     error, unmounts, and says why in the log.
//
// Which deaths it survives, once it is ready:
//
//	the server             The parent starts another. It gets the kit and answers the requests that it finds in the slots, so
//	                       that none is lost on any kernel. It takes all limits from the stored INIT, not from its version.
//	the parent             The server serves on and starts another.
//	both at once           A keeper that has the kit starts a parent, which starts a server. Without one the last descriptor of
//	                       the device is gone: the kernel ends the connection at once, and a dead mount stays, which muster
//	                       umount takes away.
//	the keeper             Nobody needs it for anything else. The next one asks the mounts that there are.
//	no parent to be had    The server tries for adoptWait (30 s), then unmounts and serves who is inside for Options.Linger.
//	no server to be had    Five tries, about a second, then the mount is aborted.
//	keeper in vain         The same.
//
// How it gets another program under it (Upgrade):
//
//  1. Somebody asks at the mount's control socket and brings the program's file along.
//  2. The parent starts it as a standby parent with the kit; that one starts a standby server, which builds from the same
//     table. Both must be able to read what they are given. If they cannot, they end and the asker is told why: the old
//     processes have noticed nothing.
//  3. The parent kills its server, like any that dies, and when it is dead tells the new parent to go on, whose server then
//     answers what lies in the slots. The old parent ends.
//
// Whoever dies in between, one side goes on: the new parent when the old server is dead, the old server (which starts a
// parent of its own program) when it is not.
//
// Concurrently run: in the parent one goroutine that decides, and others that only wait (for the server, the mount table,
// askers) and send it events; in the server the goroutines of package lazyfs and one that listens to the parent. At rest all
// wait in the kernel, without a timer.
//
// What is not promised: that a server's profile and warm file survive its being killed; that a mount in a network
// namespace can be asked from another one; anything when the muster that is run lies on a mount of muster.
package mountd
