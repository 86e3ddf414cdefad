// Trees prints the tables of docs/trees.md; with -w it writes them into it.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"

	"github.com/muster-hpc/muster/planner/sim"
)

func main() {
	file := flag.String("w", "", "the page between whose marks the tables go")
	flag.Parse()
	if err := run(*file); err != nil {
		fmt.Fprintln(os.Stderr, "trees:", err)
		os.Exit(1)
	}
}

func run(file string) error {
	if file == "" {
		return sim.Tables(os.Stdout)
	}
	page, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, _, after, err := sim.Between(page)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	var tables bytes.Buffer
	if err := sim.Tables(&tables); err != nil {
		return err
	}
	return os.WriteFile(file, bytes.Join([][]byte{before, tables.Bytes(), after}, nil), 0o644)
}
