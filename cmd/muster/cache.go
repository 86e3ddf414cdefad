package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

func (a *app) cacheCommand() *cobra.Command {
	c := &cobra.Command{Use: "cache", Short: "what the store holds: ls, gc, rm, pin, unpin"}
	c.AddCommand(a.cacheLs(), a.cacheGC(), a.cacheRm(), a.cachePin(), a.cacheUnpin())
	return c
}

// cacheList is what cache ls prints.
type cacheList struct {
	Dir    string            `json:"dir"`
	Usage  store.Usage       `json:"usage"`
	Images []store.ImageInfo `json:"images"`
}

func (a *app) cacheLs() *cobra.Command {
	c := &cobra.Command{
		Use:   "ls",
		Short: "list the images in the store, least recently used first",
		Args:  arguments(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			st, err := a.openStore()
			if err != nil {
				return err
			}
			defer st.Close()
			l := cacheList{Dir: st.Dir()}
			if l.Images, err = st.List(); err != nil {
				return err
			}
			if l.Usage, err = st.Usage(); err != nil {
				return err
			}
			return a.result(l, l.print)
		},
	}
	a.jsonFlag(c)
	return c
}

func (l cacheList) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "IMAGE\tDIGEST\tSIZE\tHERE\tON DISK\tUSED\t")
	for _, i := range l.Images {
		var flags []string
		if i.InUse {
			flags = append(flags, "in use")
		}
		if i.Pinned {
			flags = append(flags, "pinned")
		}
		here := 100.0
		if i.Size > 0 {
			here = 100 * float64(i.Present) / float64(i.Size)
		}
		fmt.Fprintf(tw, "%s\t%.12s\t%s\t%.0f%%\t%s\t%s\t%s\n",
			i.Reference, i.Key, megabytes(i.Size), here, megabytes(i.Alloc), ago(time.Since(i.Used)), strings.Join(flags, ", "))
	}
	_ = tw.Flush()
	fmt.Fprintf(w, "%s: %s used of %s, %s free on the disk\n", l.Dir, megabytes(l.Usage.Used), megabytes(l.Usage.Quota), megabytes(l.Usage.Free))
}

// ago is a time past, for people.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return "now"
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

func (a *app) cacheGC() *cobra.Command {
	var target Size
	var grace time.Duration
	c := &cobra.Command{
		Use:   "gc",
		Short: "remove what dead processes and forgotten images left, and keep the store within its quota",
		Args:  arguments(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			st, err := a.openStore()
			if err != nil {
				return err
			}
			defer st.Close()
			r, err := st.GC(store.GCOptions{Target: int64(target), Grace: max(grace, 1)}) // 0 would be the default
			if err != nil {
				return err
			}
			out := struct {
				Temp  int   `json:"temporary_files"`
				Files int   `json:"files"`
				Freed int64 `json:"freed"`
				Used  int64 `json:"used"`
			}{r.Temp, r.Files, r.Freed, r.Used}
			return a.result(out, func(w io.Writer) {
				fmt.Fprintf(w, "%s freed: %d files, %d of them temporary; %s used\n", megabytes(r.Freed), r.Files+r.Temp, r.Temp, megabytes(r.Used))
			})
		},
	}
	c.Flags().Var(&target, "target", "bring the store down to this size, evicting the least recently used; 0: its quota")
	c.Flags().DurationVar(&grace, "grace", store.DefaultGrace, "keep what belongs to no image for so long after its last use")
	a.jsonFlag(c)
	return c
}

func (a *app) cacheRm() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm IMAGE…",
		Short: "remove images from the store, by name, or by digest or the beginning of it",
		Args:  arguments(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			st, err := a.openStore()
			if err != nil {
				return err
			}
			defer st.Close()
			type removed struct {
				Image  string `json:"image"`
				Digest string `json:"digest"`
				Freed  int64  `json:"freed"`
			}
			done := []removed{}
			if err := eachImage(st, args, func(im store.Image) error {
				freed, err := st.Remove(im.Key)
				done = append(done, removed{im.Reference, "sha256:" + im.Key, freed})
				return err
			}); err != nil {
				return err
			}
			return a.result(done, func(w io.Writer) {
				for _, d := range done {
					fmt.Fprintf(w, "%s (%.19s): %s freed\n", d.Image, d.Digest, megabytes(d.Freed))
				}
			})
		},
	}
	a.jsonFlag(c)
	return c
}

func (a *app) cachePin() *cobra.Command {
	return &cobra.Command{
		Use:   "pin IMAGE…",
		Short: "keep what the store has, and gets, of these images: it is not evicted for others",
		Args:  arguments(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.pins(args, func(st *store.Store, im store.Image) error {
				blobs := make([]ztoc.Digest, len(im.Blobs))
				for i, b := range im.Blobs {
					blobs[i] = b.Digest
				}
				return st.Pin(im.Key, blobs)
			})
		},
	}
}

func (a *app) cacheUnpin() *cobra.Command {
	return &cobra.Command{
		Use:   "unpin IMAGE…",
		Short: "let these images be evicted again",
		Args:  arguments(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.pins(args, func(st *store.Store, im store.Image) error { return st.Unpin(im.Key) })
		},
	}
}

// pins changes the pins of images.
func (a *app) pins(names []string, change func(*store.Store, store.Image) error) error {
	st, err := a.openStore()
	if err != nil {
		return err
	}
	defer st.Close()
	return eachImage(st, names, func(im store.Image) error { return change(st, im) })
}

// eachImage calls f for the recorded images that names mean, and ends with the first error.
func eachImage(st *store.Store, names []string, f func(store.Image) error) error {
	images, err := st.Images()
	if err != nil {
		return err
	}
	for _, name := range names {
		found := findImages(images, name)
		if len(found) == 0 {
			return &coded{exitNoImage, fmt.Errorf("%s: not in the store %s: %w; 'muster cache ls' lists what is", name, st.Dir(), os.ErrNotExist)}
		}
		for _, im := range found {
			if err := f(im); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

// findImages is the recorded images that name means: all versions of a reference, or one digest, of which
// eight digits are enough when they are unambiguous.
func findImages(images []store.Image, name string) (found []store.Image) {
	ref, err := origin.ParseReference(name)
	for _, im := range images {
		if err == nil && im.Reference == ref.String() {
			found = append(found, im)
		}
	}
	if len(found) > 0 {
		return found
	}
	hex := strings.TrimPrefix(name, "sha256:")
	if len(hex) < 8 {
		return nil
	}
	for _, im := range images {
		if strings.HasPrefix(im.Key, hex) {
			found = append(found, im)
		}
	}
	if len(found) > 1 {
		return nil
	}
	return found
}
