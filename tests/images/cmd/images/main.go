// Command images builds test images: "images list" names them, "images all" builds all of them into
// the cache and "images test" all but those that only benchmarks use, "images NAME" builds one and
// prints where its OCI layout is, "images NAME DIR" copies the layout to DIR, and "images clean" removes
// what the present sources would not use.
package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

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
	case len(args) == 1 && (args[0] == "all" || args[0] == "test"):
		names := images.Names()
		if args[0] == "test" {
			names = slices.DeleteFunc(names, func(n string) bool { return n == "debian-scipy" || n == "one-layer" })
		}
		return build(names)
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
		return fmt.Errorf("usage: images NAME [DIR] | list | all | test | clean")
	}
	return nil
}

// build makes the images called names, as many at once as there are cores, and lists where they are.
func build(names []string) error {
	dirs := make([]string, len(names))
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	for i, name := range names {
		g.Go(func() (err error) {
			dirs[i], err = images.Get(name)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, name := range names {
		fmt.Printf("%-24s %s\n", name, dirs[i])
	}
	return nil
}
