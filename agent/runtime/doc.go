// Package runtime runs a command over a FUSE tree that the calling process serves, in namespaces that
// leave nothing behind however either side ends.
//
// # The algorithm
//
// Two processes are the same program: the front, which called Start, and the stage, process 1 of a
// PID namespace of its own. They talk over a socket pair.
//
//  1. The front clones the stage into a new mount and PID namespace, and for anybody but root into a
//     new user namespace too, in which the user keeps his own numbers and nobody else exists. The stage
//     gets SIGKILL when the front's thread dies, so that thread stays locked for the stage's life.
//  2. The stage mounts /proc and a private tmpfs, mounts the FUSE tree in there, and sends the
//     descriptor to the front. Start returns: the front serves the descriptor from now on.
//  3. Run sends the command. The stage lays an overlay over the tree (what is written goes into the
//     tmpfs), puts /dev, /proc, /sys, the host's resolv.conf and hosts and the binds into it, each target
//     resolved beneath the new root, looks up user and command there, and starts the chosen runtime.
//  4. The stage reaps children until the command's own process has ended, passes on the signals that
//     the front sends, and reports the exit code. Then it ends, and the kernel with it every process
//     in the PID namespace and every mount in the mount namespace.
//
// A front that is killed takes the stage with it by the death signal, and the stage takes all the
// rest. No file is made outside of the private tmpfs, no mount is seen by the host, and no cgroup is
// made: the command stays in the caller's cgroup, where a scheduler's limits and accounting apply.
// runc and crun are kept from making one by showing them the cgroup file systems read-only.
//
// # Runtimes
//
// All runtimes get the same root, put together by the stage. For root: runc, crun, builtin; for
// others: bwrap, ch-run, apptainer, runc, builtin. The first that is installed is used. "builtin" needs
// nothing installed: it changes into the root, gives up capabilities and executes the command.
//
// What the command sees: the host's network, hostname, IPC and /dev/shm; a /dev with the usual nodes; a
// /proc with its own processes only; /sys read-only. As root with runc it has docker's default
// capabilities less CAP_MKNOD; with any runtime a user has none and cannot gain any.
//
// # What is not promised
//
// The namespaces keep the host clean; they are no wall against a hostile program that was started as
// root. A user's command runs as that user alone: other owners, and the image's own User, need root.
package runtime
