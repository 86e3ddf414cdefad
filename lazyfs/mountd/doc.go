// Package mountd is the processes of one mount.
//
// A mount outlives the command that asked for it, so it has processes of its own, started by running this
// executable again:
//
//	parent   tiny. It mounts, holds the descriptor of /dev/fuse, the kernel's INIT and its answer, the table file
//	         and the memory that requests are read into. It can start another server.
//	server   finds the image (the caller's Builder), inflates and answers.
//
// How a mount comes to be (Start):
//
//  1. The command starts the parent in a session of its own and hands it the request over a socket.
//  2. The parent starts the server and passes the request on. The server builds: whatever takes long or can fail happens
//     before anything is mounted.
//  3. The server says "built" and sends the table file's descriptor. The parent mounts, answers the kernel's INIT, and sends
//     the device's descriptor and that exchange. The server serves.
//  4. The parent looks at the root directory through the mount. Only when that works Start returns. Any failure
//     before unmounts again and comes back as Start's error, with the exit code that the Builder's process gave it.
//
// How it ends:
//
//   - Somebody unmounts. The device says so, the server ends, then the parent. If processes were still inside (lazy
//     detach), they are served on for Options.Linger, then the connection is aborted: nothing of ours stays behind.
//   - The command goes away before the mount is ready: its socket ends, the parent unmounts and ends.
//   - The server dies: the parent starts another under the live mount. It gets the same table file, the same INIT, the
//     same memory, and answers the requests it finds there. Five deaths within thirty seconds are too many: the
//     parent unmounts and says why.
//   - The parent dies: the server's socket ends, the server unmounts.
//
// What is not promised: when both are killed at the same moment a dead mount stays, which `muster umount` takes away.
// The parent itself cannot be replaced yet.
package mountd
