package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/ztoc"
)

// measureHere replaces assumptions by what this machine shows in two seconds: the rate at which a core inflates, hashes and
// indexes a layer, as a first start does while it streams.
func measureHere(ctx context.Context, p costmodel.Parameters) error {
	layer, err := sampleLayer()
	if err != nil {
		return err
	}
	var rates []float64
	for began := time.Now(); time.Since(began) < 2*time.Second || len(rates) < 3; {
		if err := ctx.Err(); err != nil {
			return err
		}
		start := time.Now()
		if _, _, err := ztoc.Build(bytes.NewReader(layer), ztoc.BuildOptions{Tool: "muster estimate", HashInflated: true}); err != nil {
			return fmt.Errorf("measuring how fast a core inflates: %w", err)
		}
		rates = append(rates, float64(len(layer))/time.Since(start).Seconds())
	}
	slices.Sort(rates)
	v := p[costmodel.ParamInflate]
	v.Range = costmodel.Range{Low: rates[0], Mid: rates[len(rates)/2], High: rates[len(rates)-1]}
	v.Origin = costmodel.Measured
	v.Note = fmt.Sprintf("compressed bytes inflated, hashed and indexed per core: slowest, median and fastest of %d layers of %s made up here", len(rates), megabytes(int64(len(layer))))
	p[costmodel.ParamInflate] = v
	return nil
}

// sampleLayer is a gzip layer of files that compress about three times, as programs and libraries do.
func sampleLayer() ([]byte, error) {
	const files, size = 64, 256 << 10
	rng := rand.New(rand.NewPCG(1, 1))
	words := make([]byte, 64<<10)
	for i := range words {
		words[i] = byte(rng.Uint32())
	}
	var out bytes.Buffer
	zip, err := gzip.NewWriterLevel(&out, 6)
	if err != nil {
		return nil, err
	}
	w := tar.NewWriter(zip)
	body := make([]byte, 0, size+64)
	for i := range files {
		body = body[:0]
		for len(body) < size {
			at, n := rng.IntN(len(words)-32), 4+rng.IntN(24)
			body = append(body, words[at:at+n]...)
		}
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("usr/lib/sample%d.so", i), Mode: 0o644, Size: int64(len(body))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(body); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	if err := zip.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
