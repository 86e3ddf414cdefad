package image

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"testing"

	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
)

// TestWarmFile keeps a warm file, uses it, and goes on without it when it is cut or belongs to other layers.
func TestWarmFile(t *testing.T) {
	w := newWorld(t, "gzip")
	s := newStore(t)
	im := w.open(s)
	p := lazyfs.Profile{Ranges: []lazyfs.ProfileRange{{Layer: 0, Start: 0, End: 4096}}}
	im.keepProfile(p)
	var good bytes.Buffer
	c := im.Config()
	if err := lazyfs.WriteWarm(t.Context(), &good, c.Layers, c.Blobs, p); err != nil {
		t.Fatal(err)
	}
	keep := func(b []byte) {
		if err := c.KeepWarm(func(w io.Writer) error { _, err := w.Write(b); return err }); err != nil {
			t.Fatal(err)
		}
	}
	other := bytes.Clone(good.Bytes())
	other[len(other)-40] ^= 1 // in the digests at its end
	for _, tc := range []struct {
		name string
		b    []byte
		want string
	}{
		{"whole", good.Bytes(), "warm"},
		{"cut", good.Bytes()[:good.Len()/2], "profile"},
		{"of something else", other, "profile"},
		{"empty", nil, "profile"},
	} {
		keep(tc.b)
		im := w.open(s)
		if im.Start() != tc.want {
			t.Errorf("%s: the start is by %q, want %q", tc.name, im.Start(), tc.want)
		}
		if _, err := lazyfs.New(im.Config()); err != nil {
			t.Errorf("%s: no server: %v", tc.name, err)
		}
		_, err := s.Get(store.KindWarm, im.startKey)
		if gone := errors.Is(err, fs.ErrNotExist); gone != (tc.want != "warm") {
			t.Errorf("%s: afterwards %v", tc.name, err)
		}
	}
}
