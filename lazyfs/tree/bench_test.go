package tree

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

func bigLayers(n int) []Layer {
	var es []ztoc.Entry
	off := int64(0)
	for i := 0; i < n; i++ {
		if i%20 == 0 {
			es = append(es, ztoc.Entry{Name: fmt.Sprintf("usr/lib/python3/d%d/sub%d/", i/1000, i/20), Type: ztoc.TypeDir, Mode: 0o755, Offset: off + 512})
			off += 512
			continue
		}
		es = append(es, ztoc.Entry{Name: fmt.Sprintf("usr/lib/python3/d%d/sub%d/file_%d.py", i/1000, i/20, i), Mode: 0o644, Offset: off + 512, Size: 100, ModTime: time.Unix(1e9, 5)})
		off += 1024
	}
	return []Layer{{Entries: es}}
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{50000, 200000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l := bigLayers(n)
			b.ReportAllocs()
			for b.Loop() {
				var w bytes.Buffer
				if _, err := Build(&w, l, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, n := range []int{50000, 200000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var w bytes.Buffer
			if _, err := Build(&w, bigLayers(n), Options{}); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.ReportMetric(float64(w.Len()), "size")
			for b.Loop() {
				if _, err := Open(w.Bytes()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	var w bytes.Buffer
	if _, err := Build(&w, bigLayers(50000), Options{}); err != nil {
		b.Fatal(err)
	}
	t, err := Open(w.Bytes())
	if err != nil {
		b.Fatal(err)
	}
	d, err := t.Resolve("/usr/lib/python3/d0/sub1", true)
	if err != nil {
		b.Fatal(err)
	}
	name := []byte("file_25.py")
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := t.Lookup(d, name); !ok {
			b.Fatal()
		}
	}
}
