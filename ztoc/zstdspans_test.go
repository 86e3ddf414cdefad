package ztoc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// Any number of cores gives the same table, sums and errors for zstd layers of all kinds of frames.
func TestZstdCores(t *testing.T) {
	layer := tarOf(t, someFiles(60)...)
	skip := append([]byte{0x5a, 0x2a, 0x4d, 0x18, 5, 0, 0, 0}, "hello"...)
	mixed := func(size int) (blob []byte) { // with and without their size in the header
		for i, b := 0, layer; len(b) > 0; i++ {
			n := min(size, len(b))
			if i%3 == 0 {
				blob = append(blob, zs(t, b[:n])...)
			} else {
				blob = append(blob, frameAll(t, b[:n])...)
			}
			blob = append(blob, skip...)
			b = b[n:]
		}
		return blob
	}
	changed := func(blob []byte, at int) []byte {
		blob = bytes.Clone(blob)
		blob[at] ^= 0x10
		return blob
	}
	small, large := mixed(9000), mixed(700_000)
	blobs := map[string][]byte{
		"small":       small,
		"medium":      mixed(150_000),
		"large":       large,
		"one":         zs(t, layer),
		"big at last": append(bytes.Clone(small), zs(t, make([]byte, 20<<20))...),
		"cut":         small[:len(small)*2/3],
		"garbage":     append(bytes.Clone(large), "what is this doing here?"...),
	}
	for i := range 12 {
		blobs[fmt.Sprint("changed ", i)] = changed(large, len(large)*i/12)
		blobs[fmt.Sprint("changed small ", i)] = changed(small, len(small)*i/12)
	}
	for name, blob := range blobs {
		var want string
		for _, o := range []BuildOptions{{}, {Cores: 2}, {Cores: 4}} {
			o.SpanSize, o.HashInflated, o.MaxBlock = 200_000, true, 1<<20
			z, sums, err := Build(bytes.NewReader(blob), o)
			got := fmt.Sprint(sums, err)
			if err == nil {
				b, err := Pack(z)
				if err != nil {
					t.Fatal(err)
				}
				got += string(DigestOf(b))
			} else if sums = (Sums{}); !errors.Is(err, ErrNoRestart) {
				got = fmt.Sprint(err) // how much was read before differs
			}
			if want == "" {
				want = got
			}
			if got != want {
				t.Errorf("%s, %d cores: %s\none: %s", name, o.Cores, got, want)
			}
		}
	}
}

// frameAll is b as one frame that says its size.
func frameAll(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// Frames that say they are large, but hold next to nothing, cost no memory; nor do many that hold a lot.
func TestZstdLies(t *testing.T) {
	lie := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0xff, 0, 9, 0, 0, 'x'} // 16 MB in a raw block of one byte
	if _, _, err := Build(bytes.NewReader(bytes.Repeat(lie, 1000)), BuildOptions{Cores: 2}); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	const blocks, block = 127, 128 << 10
	bomb := binary.LittleEndian.AppendUint32([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x80, 0x38}, blocks*block) // window 128 KiB
	for i := range blocks {
		head := block<<3 | 1<<1
		if i == blocks-1 {
			head |= 1
		}
		bomb = append(bomb, byte(head), byte(head>>8), byte(head>>16), 0)
	}
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	peak := uint64(0)
	_, sums, err := Build(bytes.NewReader(bytes.Repeat(bomb, 60)), BuildOptions{Cores: 4, Progress: func(_, _ int64) {
		runtime.ReadMemStats(&now)
		peak = max(peak, now.HeapInuse)
	}})
	if err != nil || sums.InflatedSize != 60*blocks*block {
		t.Fatal(sums, err)
	}
	runtime.ReadMemStats(&now)
	if used := int64(max(peak, now.HeapInuse)) - int64(before.HeapInuse); used > 120<<20 {
		t.Errorf("%d MiB of heap", used>>20)
	}
}
