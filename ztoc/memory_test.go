package ztoc

import (
	"archive/tar"
	"bytes"
	"io"
	"runtime"
	"testing"
)

// Building takes the same memory for any size of layer, but for the table: so much of it that a
// layer of 20 GB (60 GB inflated) fits beside a job.
func TestBuildMemory(t *testing.T) {
	const pieces = 20
	piece := text(7, 16<<20)
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "large", Mode: 0o644, Size: pieces * int64(len(piece))}); err != nil {
		t.Fatal(err)
	}
	layer := []io.Reader{bytes.NewReader(gz(t, head.Bytes()))}
	zipped := gz(t, piece)
	for range pieces {
		layer = append(layer, bytes.NewReader(zipped))
	}
	layer = append(layer, bytes.NewReader(gz(t, make([]byte, 1024))))
	piece = nil
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	var peak uint64
	step := int64(0)
	z, _, err := Build(io.MultiReader(layer...), BuildOptions{HashInflated: true, Progress: func(blob, inflated int64) {
		if blob>>24 != step {
			step = blob >> 24
			runtime.GC()
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapAlloc)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	used := int64(peak) - int64(before.HeapAlloc)
	t.Logf("%d MB inflated, %d spans: %d KiB of live heap at most, of which the table is %d KiB",
		z.InflatedSize/1e6, z.NumSpans(), used>>10, z.MemorySize()>>10)
	if limit := int64(32<<20 + 2*z.MemorySize()); used > limit {
		t.Fatalf("live heap grew by %d bytes, more than %d", used, limit)
	}
}
