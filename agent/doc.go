// Package agent is the daemon on a host: it stages images for jobs together with the agents of the job's other hosts, keeps their mounts, and serves
// what it has to others. It puts the other packages together and has no protocol of its own.
//
// # How an image is staged (stage.go is the same in code)
//
//  1. An order (image, hosts, user, readiness) reaches an agent through its socket, from a host of the job through the network, or as a
//     plan that another host follows already. Asking again joins what is under way.
//  2. One host, chosen by a hash of the job, resolves the reference, looks for tables of the layers, and freezes a JobSpec (freeze.go);
//     the others ask it. All make the same Plan of it.
//  3. Pieces come along the plan's trees (steps.go): a root asks the origin for long runs, everybody else has one stream from each
//     parent. What arrives goes into the store and is passed on at once (serve.go). Whoever is too late, gone or lies is passed
//     over for the rest of the job: the next ancestor takes its place, in the end the origin.
//  4. Beside it a layer without a table is inflated by one host while it arrives, and the table goes to the others (index.go).
//  5. With all tables here the tree is mounted by processes of its own (mounts.go); with all bytes here each layer's
//     SHA-256 is compared. Wrong bytes are traced to their source, dropped, and fetched again (heal.go).
//  6. The order is done when it is as ready as was asked for; what is missing goes on coming. Progress of all hosts
//     is gathered by the agent that was asked (gather.go).
//
// # What runs concurrently
//
// Run has one goroutine for each listener; a job has one, with a group under it: the steps, the tables, the hashing. A job ends by
// Unstage or with the agent, and both wait for it. Locks: Agent.mu guards the lists of jobs, job.mu a job's state, shelf.mu and held.mu
// what is open and who watches. None is held while waiting, and none is taken while another of them is held, except held.mu under no other.
//
// # What is not promised
//
// That the origin gives every byte exactly once: a host that is passed over may have fetched what another fetches again. That a mount outlives its
// parent process; it does outlive the agent, and reads that need one wait for it a while. That two orders of one name and different hosts agree:
// the first one counts.
package agent
