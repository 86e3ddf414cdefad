package origin

import (
	"context"
	"io"
	"testing"

	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// BenchmarkBlob reads a blob whole, and in ranges of 1 MiB, from the embedded registry in this process.
func BenchmarkBlob(b *testing.B) {
	s, err := registry.Start(b.TempDir(), registry.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	ctx := context.Background()
	repo := openRepo(b, newClient(b, quick()), s.Addr+"/test:one")
	const size = 64 << 20
	body := layerBytes(1, size)
	ref := ztoc.BlobRef{Digest: ztoc.DigestOf(body), Size: size}
	if err := repo.PushBlob(ctx, ref, opener(body)); err != nil {
		b.Fatal(err)
	}
	for name, step := range map[string]int64{"whole": size, "1MiB": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			buf := make([]byte, 256<<10)
			for b.Loop() {
				for at := int64(0); at < size; at += step {
					rc, err := repo.Blob(ctx, ref.Digest, ztoc.Range{Start: at, End: at + step})
					if err != nil {
						b.Fatal(err)
					}
					if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{rc}, buf); err != nil {
						b.Fatal(err)
					}
					rc.Close()
				}
			}
		})
	}
}
