// Package control is the agent's local API: gRPC on a unix socket, the questions in it, its client and its server.
//
// How a call goes:
//
//  1. The client dials the socket. The kernel tells the server which process that is (SO_PEERCRED), and every
//     handler gets its Caller: no password, no token, nothing that could be forged.
//  2. Messages are JSON, one Go struct each (messages.go is the whole protocol), except the bytes of a blob, which go as
//     they are. There is no generated code and no second description of the types.
//  3. Stage and Prestage stream events until the work is done; the last one carries the Report. A client that goes away ends only
//     its watching: the stage goes on, and asking again for the same job joins it.
//  4. Read is what the processes of mounts use for what is not in the store.
//
// An error keeps its exit code on the way (Error): the agent knows what failed, the command only says it.
//
// What runs concurrently: each call has a goroutine; Close ends the calls and waits for them.
//
// Not promised: that two versions of muster understand each other's messages. Client and server are one binary; Version
// is compared on the first call, and a difference is said, not guessed around.
package control
