// Command images builds test images: "images list" names them, "images all" builds all of them into
// the cache, "images NAME" builds one and prints where its OCI layout is, "images NAME DIR" copies the
// layout to DIR, and "images clean" removes what the present sources would not use.
package main

import (
	"fmt"
	"os"

	"github.com/muster-hpc/muster/tests/images"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "list":
		for _, name := range images.Names() {
			fmt.Println(name)
		}
	case len(args) == 1 && args[0] == "all":
		for _, name := range images.Names() {
			dir, err := images.Get(name)
			if err != nil {
				return err
			}
			fmt.Printf("%-24s %s\n", name, dir)
		}
	case len(args) == 1 && args[0] == "clean":
		gone, err := images.Clean()
		for _, dir := range gone {
			fmt.Println("removed", dir)
		}
		return err
	case len(args) == 1:
		dir, err := images.Get(args[0])
		if err != nil {
			return err
		}
		fmt.Println(dir)
	case len(args) == 2:
		dir, err := images.Get(args[0])
		if err != nil {
			return err
		}
		return os.CopyFS(args[1], os.DirFS(dir))
	default:
		return fmt.Errorf("usage: images NAME [DIR] | list | all | clean")
	}
	return nil
}
