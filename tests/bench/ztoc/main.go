// Command ztoc measures what building and using a layer's table costs, and how large it is.
//
//  1. Building, digests included, against `gzip -dc` of the same layer, in turns.
//  2. Inflating single cold spans against inflating the same bytes in one go.
//  3. For a range of span sizes: bytes of the table in SOCI's form and packed, and what a read of a
//     random 64 KiB costs to fetch. The table in docs/spans.md comes from here.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"time"

	"github.com/muster-hpc/muster/tests/bench/lab"
	"github.com/muster-hpc/muster/tests/bench/report"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/ztoc"
)

const (
	buildTarget = 0.9 // of gzip -dc's rate
	spanTarget  = 1.3 // times the cost of inflating its bytes
)

func main() {
	name := flag.String("image", "debian-scipy", "image whose largest layer is used")
	rounds := flag.Int("rounds", 5, "rounds per figure")
	flag.Parse()
	rows, err := run(context.Background(), *name, *rounds)
	if err == nil {
		_, err = report.Write(os.Stdout, "ztoc", rows)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-ztoc:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, name string, rounds int) ([]report.Row, error) {
	layout, err := images.Get(name)
	if err != nil {
		return nil, err
	}
	layers, err := lab.Layers(layout)
	if err != nil {
		return nil, err
	}
	layer := layers[0]
	blob, err := os.ReadFile(layer.Path)
	if err != nil {
		return nil, err
	}
	var gzip, build, plain []float64
	var z *ztoc.Ztoc
	for range rounds {
		start := time.Now()
		cmd := exec.CommandContext(ctx, "gzip", "-dc", layer.Path)
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		gzip = append(gzip, time.Since(start).Seconds())

		if z, err = timed(&build, func() (*ztoc.Ztoc, error) { return buildTable(layer.Path, ztoc.DefaultSpanSize) }); err != nil {
			return nil, err
		}
		if _, err = timed(&plain, func() (*ztoc.Ztoc, error) {
			_, err := layer.Inflate()
			return nil, err
		}); err != nil {
			return nil, err
		}
	}
	mb := float64(z.InflatedSize) / 1e6
	rows := []report.Row{
		report.Figure("gzip -dc", mb/report.Median(gzip), "MB/s out"),
		report.Figure("inflate alone, one core", mb/report.Median(plain), "MB/s out"),
		report.Figure("build, digests included", mb/report.Median(build), "MB/s out"),
		report.AtLeast("build / gzip -dc", report.Median(gzip)/report.Median(build), "", buildTarget),
	}
	span, err := spans(z, blob, rounds, report.Median(plain)/float64(z.InflatedSize))
	if err != nil {
		return nil, err
	}
	rows = append(rows, span...)
	for size := int64(256 << 10); size <= 4<<20; size *= 2 {
		more, err := tableSize(layer.Path, blob, size)
		if err != nil {
			return nil, err
		}
		rows = append(rows, more...)
	}
	return rows, nil
}

func timed(to *[]float64, f func() (*ztoc.Ztoc, error)) (*ztoc.Ztoc, error) {
	start := time.Now()
	z, err := f()
	*to = append(*to, time.Since(start).Seconds())
	return z, err
}

func buildTable(path string, span int64) (*ztoc.Ztoc, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, _, err := ztoc.Build(f, ztoc.BuildOptions{SpanSize: span})
	return z, err
}

// spans inflates spans in random order, hashing included, and holds the cost per byte against whole, that of
// inflating everything in one go.
func spans(z *ztoc.Ztoc, blob []byte, rounds int, whole float64) ([]report.Row, error) {
	var cost []float64
	rng := rand.New(rand.NewPCG(1, 2))
	for range rounds {
		var bytes int64
		start := time.Now()
		for range 64 {
			s := z.Span(rng.IntN(z.NumSpans()))
			dst := make([]byte, s.Out.Len())
			if err := z.Inflate(dst, s.Index, blob[s.Blob.Start:s.Blob.End]); err != nil {
				return nil, err
			}
			bytes += s.Out.Len()
		}
		cost = append(cost, time.Since(start).Seconds()/float64(bytes))
	}
	return []report.Row{
		report.Figure("one cold span, digest included", 1e-6/report.Median(cost), "MB/s out"),
		report.AtMost("one cold span / inflating its bytes", report.Median(cost)/whole, "per byte", spanTarget),
	}, nil
}

// tableSize is what a table with spans of the given size weighs, and what a random read costs with it.
func tableSize(path string, blob []byte, size int64) ([]report.Row, error) {
	z, err := buildTable(path, size)
	if err != nil {
		return nil, err
	}
	soci, err := ztoc.EncodeSOCI(z)
	if err != nil {
		return nil, err
	}
	packed, err := ztoc.Pack(z)
	if err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(3, 4))
	var fetched []float64
	for range 1000 {
		off := rng.Int64N(z.InflatedSize - 64<<10)
		lo, hi := z.SpansOf(ztoc.Range{Start: off, End: off + 64<<10})
		fetched = append(fetched, float64(z.Span(hi-1).Blob.End-z.Span(lo).Blob.Start))
	}
	name := func(what string) string { return fmt.Sprintf("span %d KiB: %s", size>>10, what) }
	return []report.Row{
		report.Figure(name("table for SOCI / layer"), float64(len(soci))/float64(len(blob)), ""),
		report.Figure(name("table packed / layer"), float64(len(packed))/float64(len(blob)), ""),
		report.Figure(name("fetched for a random 64 KiB"), report.Median(fetched)/1e3, "kB"),
	}, nil
}
