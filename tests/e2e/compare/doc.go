// Package compare lists real directory trees and tells two listings apart: a mount and a plain unpack of
// the same image must not differ in anything a program could see.
//
// Walk goes through a tree on one goroutine, by lstat and readdir, and hashes the content of regular files
// on several, each inode once. A listing is sorted by path and so the same for the same tree. It fails,
// rather than lists, when a tree contradicts itself: a name that readdir gives twice, a type that readdir
// and lstat disagree on.
//
// What is not compared: atime, ctime, inode numbers, the sizes of directories, blocks. All of them are
// the file system's own business.
package compare
