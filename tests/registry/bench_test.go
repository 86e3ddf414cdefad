package registry_test

import (
	"context"
	"io"
	"net/http"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/muster-hpc/muster/tests/registry"
)

// BenchmarkProxy reads a blob of 32 MB through the proxy, in front of the embedded registry and of Debian's.
// With a rate, MB/s is to be that rate; without, it is what the proxy itself costs.
func BenchmarkProxy(b *testing.B) {
	h, err := registry.NewHandler(b.TempDir(), registry.Options{})
	if err != nil {
		b.Fatal(err)
	}
	deb, err := registry.StartDebian(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer deb.Close()
	img, err := random.Image(32e6, 1)
	if err != nil {
		b.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		b.Fatal(err)
	}
	d, _ := layers[0].Digest()
	for where, handler := range map[string]http.Handler{"embedded": h, "debian": deb.Handler()} {
		p, err := registry.StartProxy(handler)
		if err != nil {
			b.Fatal(err)
		}
		defer p.Close()
		ref, _ := name.ParseReference(p.Addr+"/test:v1", name.Insecure)
		if err := remote.Write(ref, img, remote.WithContext(context.Background())); err != nil {
			b.Fatal(err)
		}
		for rate, n := range map[string]int64{"unlimited": 0, "1Gbit": registry.Gbit, "300Mbit": 300 * registry.Mbit} {
			b.Run(where+"/"+rate, func(b *testing.B) {
				p.SetRate(n)
				b.SetBytes(32e6)
				for b.Loop() {
					resp, err := http.Get("http://" + p.Addr + "/v2/test/blobs/" + d.String())
					if err != nil {
						b.Fatal(err)
					}
					if n, err := io.Copy(io.Discard, resp.Body); err != nil || n < 32e6 {
						b.Fatal(n, err)
					}
					resp.Body.Close()
				}
			})
		}
	}
}
