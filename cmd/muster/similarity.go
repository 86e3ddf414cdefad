package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/costmodel"
)

// A similarity is costmodel's with the schedule's savings.
type similarity struct {
	Set string `json:"set,omitempty"`
	costmodel.Similarity
	Savings  costmodel.Savings `json:"savings"`
	Schedule []int             `json:"schedule"` // indices of images, from 0
}

type similarityFlags struct {
	layers, set, jobs, html, svg, platform string
}

func (a *app) similarityCommand() *cobra.Command {
	var f similarityFlags
	c := &cobra.Command{
		Use:   "similarity IMAGE...",
		Short: "tell what images share, and what a common base would save",
		Long: `Compares the layers of images: how alike each two are (Jaccard: shared / all, by number
and by bytes), how many pulls and bytes are unique, and what a common base would save on a
schedule of jobs. Only manifests are fetched.

IMAGE is a name in a registry, an OCI layout (oci:/path:tag) or sizes as in 'muster
estimate'. --layers takes them from a CSV file instead, with the columns image, digest and
bytes, and set where it holds several sets. --jobs is the schedule: numbers of images, from 1
in the order given, such as 1,2,1,3; default is each once.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := a.similarities(cmd.Context(), args, &f)
			if err != nil {
				return err
			}
			if f.html != "" {
				if err := writeFile(f.html, func(w io.Writer) error { return similarityPage(w, all) }); err != nil {
					return err
				}
			}
			if f.svg != "" {
				if len(all) > 1 {
					return badScenario("--svg draws one set of images: choose it with --set")
				}
				if err := writeFile(f.svg, func(w io.Writer) error { return similaritySVG(w, all[0]) }); err != nil {
					return err
				}
			}
			return a.result(all, func(w io.Writer) { printSimilarities(w, all) })
		},
	}
	c.Flags().StringVar(&f.layers, "layers", "", "CSV file of layers, in place of images")
	c.Flags().StringVar(&f.set, "set", "", "only this set of the CSV file")
	c.Flags().StringVar(&f.jobs, "jobs", "", "images in the order that jobs need them, such as 1,2,1,3")
	c.Flags().StringVar(&f.html, "html", "", "write a page with a clustered heat map to this file; it needs no network")
	c.Flags().StringVar(&f.svg, "svg", "", "write the heat map alone to this file")
	c.Flags().StringVar(&f.platform, "platform", "", "platform of the images, such as linux/arm64; default this machine's")
	a.jsonFlag(c)
	return c
}

// An imageSet is images that are compared with each other.
type imageSet struct {
	name   string
	images []costmodel.Image
}

func (a *app) similarities(ctx context.Context, args []string, f *similarityFlags) ([]similarity, error) {
	var sets []imageSet
	switch {
	case f.layers != "" && len(args) > 0:
		return nil, badScenario("images and --layers are both given: one is enough")
	case f.layers != "":
		var err error
		if sets, err = readLayers(f.layers); err != nil {
			return nil, err
		}
		if f.set != "" {
			names := make([]string, len(sets))
			for i, s := range sets {
				names[i] = s.name
			}
			i := slices.Index(names, f.set)
			if i < 0 {
				return nil, badScenario("%s has no set %.60q; it has %s", f.layers, f.set, strings.Join(names, ", "))
			}
			sets = sets[i : i+1]
		}
	case len(args) == 0:
		return nil, badScenario("no image: name two or more, or a CSV file of layers with --layers")
	default:
		var set imageSet
		for _, arg := range args {
			img, _, err := a.estimateImage(ctx, arg, f.platform)
			if err != nil {
				return nil, err
			}
			set.images = append(set.images, img)
		}
		sets = append(sets, set)
	}
	var all []similarity
	for _, set := range sets {
		s, err := costmodel.Similar(set.images)
		if err != nil {
			return nil, err
		}
		schedule, err := parseJobs(f.jobs, len(set.images))
		if err != nil {
			return nil, err
		}
		saved, err := costmodel.Save(set.images, s, schedule)
		if err != nil {
			return nil, err
		}
		all = append(all, similarity{set.name, s, saved, schedule})
	}
	return all, nil
}

// parseJobs reads a schedule of images, counted from 1. An empty one is each image once.
func parseJobs(text string, images int) ([]int, error) {
	var jobs []int
	if text == "" {
		for i := range images {
			jobs = append(jobs, i)
		}
		return jobs, nil
	}
	for _, part := range strings.Split(text, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil || n < 1 || n > images {
			return nil, badScenario("--jobs: %.20q is no image; they are 1 to %d, in the order given", part, images)
		}
		jobs = append(jobs, n-1)
	}
	return jobs, nil
}

const maxLayerRows = 1_000_000

// readLayers reads sets of images from CSV with the columns image, digest and bytes, and set.
func readLayers(file string) ([]imageSet, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, badScenario("%v", err)
	}
	defer func() { _ = f.Close() }()
	c := csv.NewReader(f)
	head, err := c.Read()
	if err != nil {
		return nil, badScenario("%s: no header of CSV: the columns are image, digest, bytes, and set", file)
	}
	at := map[string]int{}
	for i, name := range head {
		at[strings.TrimSpace(name)] = i
	}
	for _, name := range []string{"image", "digest", "bytes"} {
		if _, ok := at[name]; !ok {
			return nil, badScenario("%s: column %s missing; needed are image, digest, bytes, and set for several sets", file, name)
		}
	}
	var sets []imageSet
	where := map[[2]string][2]int{} // set, image: their indices
	for rows := 0; ; rows++ {
		rec, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		line, _ := c.FieldPos(0)
		if err != nil {
			return nil, badScenario("%s: %v", file, err)
		}
		size, err := strconv.ParseFloat(strings.TrimSpace(rec[at["bytes"]]), 64)
		if err != nil || !(size > 0) || size > 1<<50 || rec[at["image"]] == "" || rec[at["digest"]] == "" || rows == maxLayerRows {
			return nil, badScenario("%s: line %d: a layer needs an image, a digest and its bytes (more than 0), and there may be %d", file, line, maxLayerRows)
		}
		key := [2]string{"", rec[at["image"]]}
		if i, ok := at["set"]; ok {
			key[0] = rec[i]
		}
		w, ok := where[key]
		if !ok {
			w[0] = slices.IndexFunc(sets, func(s imageSet) bool { return s.name == key[0] })
			if w[0] < 0 {
				w[0] = len(sets)
				sets = append(sets, imageSet{name: key[0]})
			}
			s := &sets[w[0]]
			w[1] = len(s.images)
			s.images = append(s.images, costmodel.Image{Name: key[1]})
			where[key] = w
		}
		img := &sets[w[0]].images[w[1]]
		img.Layers = append(img.Layers, costmodel.Layer{Name: rec[at["digest"]], Bytes: size})
	}
	if len(sets) == 0 {
		return nil, badScenario("%s: no layer after the header", file)
	}
	return sets, nil
}

func printSimilarities(w io.Writer, all []similarity) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "SET\tIMAGES\tLAYERS\tUNIQUE\tUNIQUE PULLS\tBYTES\tUNIQUE BYTES\tSHARE\tMEAN JACCARD\tOFF-DIAGONAL\tBY BYTES")
	for _, s := range all {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%.1f %%\t%s\t%s\t%.3f\t%.3f\t%.3f\t%.3f\n", cmp.Or(s.Set, "these"), len(s.Images), s.Layers, s.Unique, 100*s.UniquePulls,
			megabytes(int64(s.Bytes)), megabytes(int64(s.UniqueBytes)), s.UniqueShare, s.Mean, s.OffDiagonal, s.MeanBytes)
	}
	_ = tw.Flush()
	for _, s := range all {
		fmt.Fprintln(w)
		if s.Set != "" {
			fmt.Fprintf(w, "%s\n", s.Set)
		}
		v := s.Savings
		fmt.Fprintf(w, "%d jobs pull %s per host; %s if no two shared a layer; with a common base %s, which saves %s (%.0f %%), %s per host at %.1f MB/s.\n",
			v.Jobs, megabytes(int64(v.Bytes)), megabytes(int64(v.Worst)), megabytes(int64(v.WithBase)), megabytes(int64(v.Saved)), 100*v.SavedShare, took(v.Seconds.Mid), costmodel.StudyRate.Mid/1e6)
		if len(s.Common) > 0 {
			fmt.Fprintf(w, "%d layers with %s are in more than half of the images.\n", len(s.Common), megabytes(int64(s.CommonBytes)))
		}
		if len(s.Images) > 40 {
			continue // the matrix is in --json and --html
		}
		for k, i := range s.Order {
			fmt.Fprintf(tw, "%d\t%s", i+1, s.Images[i])
			for _, j := range s.Order[:k+1] {
				fmt.Fprintf(tw, "\t%s", strings.TrimPrefix(fmt.Sprintf("%.2f", s.Matrix[i][j]), "0"))
			}
			fmt.Fprintln(tw)
		}
		_ = tw.Flush()
	}
}
