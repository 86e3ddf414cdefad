package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/ztoc"
)

func (a *app) indexCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "index",
		Short: "SOCI-compatible indexes beside images: create, push, list",
		Long: `An index lets even the very first run of an image start at once. It lies beside the image
in the registry and changes nothing about it; SOCI reads it too. Without one, muster makes
its own at the first run.`,
	}
	c.AddCommand(a.indexMake(false), a.indexMake(true), a.indexList())
	return c
}

// madeIndex is what index create and push print.
type madeIndex struct {
	Image string `json:"image"`
	*image.Index
	Pushed bool `json:"pushed"`
}

func (a *app) indexMake(push bool) *cobra.Command {
	var f imageFlags
	var minLayer, sociSpan Size
	var plain bool
	c := &cobra.Command{
		Use:   "create IMAGE",
		Short: "make the index of an image and keep its tables in the store; fetches the image once",
		Args:  arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			img, err := a.openImage(cmd.Context(), args[0], f, nil, nil)
			if err != nil {
				return err
			}
			defer img.Close()
			x, err := img.MakeIndex(cmd.Context(), image.IndexOptions{MinLayer: int64(minLayer), SOCISpan: int64(sociSpan), PlainSOCI: plain})
			if err != nil {
				return err
			}
			m := madeIndex{args[0], x, push}
			if push {
				repo, err := a.repository(args[0])
				if err != nil {
					return err
				}
				if err := x.Push(cmd.Context(), repo); err != nil {
					return fmt.Errorf("%s: pushing the index: %w", args[0], err)
				}
			}
			return a.result(m, m.print)
		},
	}
	if push {
		c.Use, c.Short = "push IMAGE", "make the index of an image and push it beside the image"
	}
	c.Flags().StringVar(&f.platform, "platform", "", "platform of the image, such as linux/arm64; default this machine's")
	c.Flags().Var(&minLayer, "min-layer", "leave out layers smaller than this; 0: 4MiB")
	c.Flags().Var(&sociSpan, "soci-span-size", "span size of the tables for SOCI; 0: 4MiB")
	c.Flags().BoolVar(&plain, "plain-soci", false, "leave out what only muster reads: packed tables, start-up profile")
	a.jsonFlag(c)
	return c
}

func (m madeIndex) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "LAYER\tSIZE\tSOCI\tPACKED\t")
	for _, l := range m.Layers {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", short(l.Digest), megabytes(l.Size), sizeOrNone(l.SOCI), sizeOrNone(l.Packed), l.Reason)
	}
	_ = tw.Flush()
	state := "not pushed: 'muster index push' does that"
	if m.Pushed {
		state = "pushed"
	}
	fmt.Fprintf(w, "index %s of %s, %s\n", m.Digest, m.Image, state)
}

func sizeOrNone(n int64) string {
	if n == 0 {
		return "-"
	}
	return megabytes(n)
}

// short is enough of a digest to tell layers of one image apart.
func short(d ztoc.Digest) string {
	return d.Hex()[:min(12, len(d.Hex()))]
}

func (a *app) indexList() *cobra.Command {
	var platform string
	c := &cobra.Command{
		Use:   "list IMAGE",
		Short: "list the indexes that lie beside an image",
		Args:  arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			repo, err := a.repository(args[0])
			if err != nil {
				return err
			}
			list, why, err := image.ListIndexes(cmd.Context(), repo, platform)
			if err != nil {
				return err
			}
			if list == nil {
				list = []image.ListedIndex{}
			}
			return a.result(list, func(w io.Writer) {
				if len(list) == 0 {
					fmt.Fprintf(w, "%s: no index: %s\n", args[0], why)
					return
				}
				tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
				fmt.Fprintln(tw, "INDEX\tFORMAT\tLAYERS\tPACKED\tPROFILE\tTO FETCH\t")
				for _, l := range list {
					fmt.Fprintf(tw, "%s\tSOCI %s\t%d\t%d\t%v\t%s\t%s\n", short(l.Digest), l.Version, l.Layers, l.Packed, l.Profile, megabytes(l.Bytes), l.Reason)
				}
				_ = tw.Flush()
			})
		},
	}
	c.Flags().StringVar(&platform, "platform", "", "platform of the image, such as linux/arm64; default this machine's")
	a.jsonFlag(c)
	return c
}
