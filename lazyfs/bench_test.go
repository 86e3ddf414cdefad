package lazyfs_test

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/lazyfs"
)

// dropCaches forgets page cache, dentries and inodes of the whole machine.
func dropCaches(b *testing.B) {
	b.Helper()
	exec.Command("sync").Run()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		b.Fatal(err)
	}
}

func run(b *testing.B, name string, args ...string) time.Duration {
	b.Helper()
	cmd := exec.Command(name, args...)
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", name, err, out)
	}
	return time.Since(began)
}

// manyFiles is n small files in directories of 100.
func manyFiles(n int) []member {
	var l []member
	for i := range n {
		if i%100 == 0 {
			l = append(l, member{tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%04d", i/100), Mode: 0o755}, nil})
		}
		l = append(l, file(fmt.Sprintf("d%04d/some-file-%06d.txt", i/100, i), []byte(fmt.Sprintf("content %d\n", i))))
	}
	return l
}

// BenchmarkWalk is find -printf over 50,000 inodes, beside the same tree on the file system of the temporary directory.
func BenchmarkWalk(b *testing.B) {
	members := manyFiles(50_000)
	img := build(b, 1<<20, true, members)
	m := mount(b, img, "", nil)
	plain := b.TempDir()
	for _, f := range members {
		if f.Typeflag == tar.TypeDir {
			os.Mkdir(filepath.Join(plain, f.Name), 0o755)
		} else if err := os.WriteFile(filepath.Join(plain, f.Name), f.body, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	for _, dir := range []struct{ name, path string }{{"plain", plain}, {"muster", m.dir}} {
		walk := func(b *testing.B) time.Duration {
			return run(b, "sh", "-c", "exec find "+dir.path+" -printf '%s\\n' >/dev/null")
		}
		b.Run("cold/"+dir.name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				dropCaches(b)
				run(b, "find", "/usr/bin/find", "-maxdepth", "0") // the program itself
				b.StartTimer()
				walk(b)
			}
		})
		b.Run("warm/"+dir.name, func(b *testing.B) {
			walk(b)
			for b.Loop() {
				walk(b)
			}
		})
	}
}

// BenchmarkSequential reads a file of 128 MiB with a cold page cache and nothing inflated; beside it one processor inflates
// the same bytes.
func BenchmarkSequential(b *testing.B) {
	const size = 128 << 20
	img := build(b, 1<<20, true, []member{file("big", text(3, size))})
	l := img.layers[0]
	blob := img.blobs[l.Ref.Digest]
	b.Run("inflate", func(b *testing.B) {
		b.SetBytes(size)
		before := processor()
		dst := make([]byte, 4<<20)
		for b.Loop() {
			for i := range l.Ztoc.NumSpans() {
				s := l.Ztoc.Span(i)
				if err := l.Ztoc.Inflate(dst[:s.Out.Len()], i, blob[s.Blob.Start:s.Blob.End]); err != nil {
					b.Fatal(err)
				}
			}
		}
		b.ReportMetric(float64((processor()-before).Milliseconds())/float64(b.N), "cpu-ms/op")
	})
	for _, ahead := range []int{128 << 10, 512 << 10, 1 << 20, 4 << 20} {
		b.Run(fmt.Sprintf("read/ahead=%dKiB", ahead>>10), func(b *testing.B) {
			b.SetBytes(size)
			buf := make([]byte, 1<<20)
			var used time.Duration
			for b.Loop() {
				b.StopTimer()
				m := mount(b, img, "", nil)
				c, err := lazyfs.Mounted(m.dir)
				if err != nil {
					b.Fatal(err)
				}
				if err := c.SetReadahead(ahead); err != nil {
					b.Fatal(err)
				}
				f, err := os.Open(m.path("big"))
				if err != nil {
					b.Fatal(err)
				}
				before := processor()
				b.StartTimer()
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
				if err != nil || n != size {
					b.Fatal(n, err)
				}
				b.StopTimer()
				used += processor() - before
				f.Close()
				m.unmount(b)
				b.StartTimer()
			}
			b.ReportMetric(float64(used.Milliseconds())/float64(b.N), "cpu-ms/op")
		})
	}
}

// processor is the processor time of this process.
func processor() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
