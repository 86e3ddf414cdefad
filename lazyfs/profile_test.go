package lazyfs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/ztoc"
)

func TestProfileEncoding(t *testing.T) {
	p := lazyfs.Profile{Ranges: []lazyfs.ProfileRange{{Layer: 3, Start: 8192, End: 12288}, {Layer: 0, Start: 0, End: 100}}}
	want := "muster profile 1\n3 8192 12288\n0 0 100\n"
	if got := p.Encode(); string(got) != want {
		t.Errorf("%q", got)
	}
	if got, err := lazyfs.DecodeProfile([]byte(want)); err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{
		"", "muster profile 2\n", "muster profile 1", "muster profile 1\n1 2\n", "muster profile 1\n1 2 3", "muster profile 1\n1 3 3\n",
		"muster profile 1\n1 4 3\n", "muster profile 1\n-1 2 3\n", "muster profile 1\n1 02 3\n", "muster profile 1\n1 2 3 4\n",
		"muster profile 1\n1  2 3\n", "muster profile 1\n70000 2 3\n", "muster profile 1\n1 2 9223372036854775807\n",
		"muster profile 1\n1 0 536870913\n", "muster profile 1\n1 2 +3\n",
	} {
		if p, err := lazyfs.DecodeProfile([]byte(bad)); !errors.Is(err, lazyfs.ErrProfile) {
			t.Errorf("%q: %v, %v", bad, p, err)
		}
	}
}

func FuzzDecodeProfile(f *testing.F) {
	f.Add([]byte("muster profile 1\n3 8192 12288\n0 0 100\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := lazyfs.DecodeProfile(b)
		if err != nil {
			return
		}
		if got := p.Encode(); !bytes.Equal(got, b) {
			t.Fatalf("%q became %q", b, got)
		}
		m := p.Merge(p)
		if m.Bytes() > p.Bytes() {
			t.Fatalf("%d bytes merged with themselves are %d", p.Bytes(), m.Bytes())
		}
	})
}

// Merge covers exactly the union, no byte twice, what comes first in the order it came.
func TestProfileMerge(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const layers, size = 3, 400
	for range 500 {
		var all [layers][size]bool
		random := func() (p lazyfs.Profile) {
			for range r.IntN(12) {
				x := lazyfs.ProfileRange{Layer: r.IntN(layers), Start: r.Int64N(size - 1)}
				x.End = x.Start + 1 + r.Int64N(min(80, size-x.Start))
				p.Ranges = append(p.Ranges, x)
				for i := x.Start; i < x.End; i++ {
					all[x.Layer][i] = true
				}
			}
			return p
		}
		a, b := random(), random()
		m := a.Merge(b)
		var got [layers][size]bool
		for _, x := range m.Ranges {
			for i := x.Start; i < x.End; i++ {
				if got[x.Layer][i] {
					t.Fatalf("%v and %v: byte %d of layer %d twice in %v", a, b, i, x.Layer, m)
				}
				got[x.Layer][i] = true
			}
		}
		if got != all {
			t.Fatalf("%v and %v gave %v", a, b, m)
		}
		if len(a.Ranges) > 0 && (m.Ranges[0].Layer != a.Ranges[0].Layer || m.Ranges[0].Start != a.Ranges[0].Start) {
			t.Fatalf("%v and %v gave %v", a, b, m)
		}
	}
}

// profiled is an image of three files, of which a program reads parts.
func profiled(t testing.TB) *image {
	return build(t, testSpan, true, []member{file("one", text(1, 3<<20)), file("two", text(2, 3<<20))}, []member{file("three", text(3, 2<<20))})
}

func readParts(t *testing.T, m *mounted, img *image) {
	t.Helper()
	for _, x := range []struct {
		name   string
		off, n int
	}{{"three", 1 << 20, 300_000}, {"one", 2 << 20, 4096}, {"two", 0, 100}} {
		if got := pread(t, m.path(x.name), int64(x.off), x.n); !bytes.Equal(got, img.files[x.name][x.off:x.off+x.n]) {
			t.Errorf("wrong bytes of %s", x.name)
		}
	}
}

// What is read is recorded until readers are quiet, in order; a later run has it at hand before it is asked for.
func TestProfileIsRecordedAndReplayed(t *testing.T) {
	img := profiled(t)
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		got := make(chan lazyfs.Profile, 1)
		m := mount(t, img, c, func(c *lazyfs.Config) {
			c.Quiet, c.Idle = 100*time.Millisecond, 200*time.Millisecond
			c.OnProfile = func(p lazyfs.Profile) { got <- p }
		})
		readParts(t, m, img)
		p := <-got
		pread(t, m.path("two"), 2<<20, 4096) // comes too late
		if len(p.Ranges) < 3 || p.Ranges[0].Layer != 1 || p.Ranges[len(p.Ranges)-1].Layer != 0 || p.Bytes() > 1<<20 {
			t.Errorf("profile %v", p)
		}
		waitFor(t, "memory to be given back", func() bool { return m.server.Stats().Memory == 0 })
		m.unmount(t)
		select {
		case p := <-got:
			t.Errorf("a second profile: %v", p)
		default:
		}

		spans := map[ztoc.Range]bool{}
		for _, r := range p.Ranges {
			z := img.layers[r.Layer].Ztoc
			lo, hi := z.SpansOf(ztoc.Range{Start: r.Start, End: r.End})
			for i := lo; i < hi; i++ {
				spans[z.Span(i).Blob] = true
			}
		}
		m = mount(t, img, c, func(c *lazyfs.Config) { c.Profile = p })
		waitFor(t, "the profile to be loaded", func() bool { return m.server.Stats().AheadInflated == int64(len(spans)) })
		for _, r := range m.blobs.asked() {
			if r.pri != ztoc.Prefetch {
				t.Errorf("asked on demand: %+v", r)
			}
		}
		m.blobs.forget()
		readParts(t, m, img)
		for _, r := range m.blobs.asked() {
			if r.pri == ztoc.Demand || spans[r.r] {
				t.Errorf("asked although loaded ahead: %v", r)
			}
		}
	})
}

// A profile that was not delivered when the mount ends is delivered then.
func TestProfileOfAShortMount(t *testing.T) {
	img := profiled(t)
	var got lazyfs.Profile
	m := mount(t, img, "", func(c *lazyfs.Config) { c.OnProfile = func(p lazyfs.Profile) { got = p } })
	readParts(t, m, img)
	m.unmount(t)
	if len(got.Ranges) < 3 {
		t.Errorf("%v", got)
	}
}

func TestWarmFile(t *testing.T) {
	img := profiled(t)
	path := filepath.Join(t.TempDir(), "warm")
	kept := make(chan error, 1)
	m := mount(t, img, "", func(c *lazyfs.Config) {
		c.Quiet = 50 * time.Millisecond
		c.KeepWarm = func(write func(io.Writer) error) error {
			f, err := os.Create(path)
			if err != nil {
				return err
			}
			defer f.Close()
			err = write(f)
			kept <- err
			return err
		}
	})
	readParts(t, m, img)
	if err := <-kept; err != nil {
		t.Fatal(err)
	}
	m.unmount(t)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	open := func(t *testing.T, b []byte) *os.File {
		t.Helper()
		name := filepath.Join(t.TempDir(), "warm")
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	eachMode(t, func(t *testing.T, c lazyfs.Compat) {
		t.Run("serves", func(t *testing.T) {
			m := mount(t, img, c, func(c *lazyfs.Config) { c.Warm = open(t, good) })
			readParts(t, m, img)
			for _, r := range m.blobs.asked() {
				if r.pri == ztoc.Demand {
					t.Errorf("asked although it is in the warm file: %v", r)
				}
			}
			for name, want := range img.files {
				if got, err := os.ReadFile(m.path(name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", name, len(got), err)
				}
			}
			if s := m.server.Stats(); s.WarmPieces == 0 || s.WarmBad != 0 {
				t.Errorf("%+v", s)
			}
		})
		t.Run("rotten", func(t *testing.T) {
			b := slices.Clone(good)
			for i := 4096; i < 400_000; i += 40_000 {
				b[i] ^= 1
			}
			m := mount(t, img, c, func(c *lazyfs.Config) { c.Warm = open(t, b) })
			readParts(t, m, img)
			for name, want := range img.files {
				if got, err := os.ReadFile(m.path(name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", name, len(got), err)
				}
			}
			if s := m.server.Stats(); s.WarmBad == 0 || s.Failed != 0 {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("refused", func(t *testing.T) {
		other := small(t)
		if _, err := lazyfs.New(lazyfs.Config{Table: other.table, Layers: other.layers, Blobs: &memory{}, Warm: open(t, good)}); !errors.Is(err, lazyfs.ErrWarm) {
			t.Errorf("of other layers: %v", err)
		}
		r := rand.New(rand.NewPCG(1, 1))
		tail := 80 + 48*int(binary.LittleEndian.Uint64(good[len(good)-80:])) // footer and index
		for range 300 {
			b := slices.Clone(good)
			if r.IntN(2) == 0 {
				b = b[:r.IntN(len(b))]
			} else {
				b[len(b)-1-r.IntN(tail)] ^= 1 << r.IntN(8)
			}
			if _, err := lazyfs.New(lazyfs.Config{Table: img.table, Blobs: &memory{}, Layers: img.layers, Warm: open(t, b)}); err == nil {
				t.Fatal("a damaged index was accepted")
			}
		}
	})
	t.Run("without a server", func(t *testing.T) {
		var b bytes.Buffer
		p := lazyfs.Profile{Ranges: []lazyfs.ProfileRange{{Layer: 0, Start: 5000, End: 900_000}, {Layer: 1, Start: 0, End: 1 << 40}, {Layer: 0, Start: 0, End: 6000}}}
		if err := lazyfs.WriteWarm(context.Background(), &b, img.layers, &memory{blobs: img.blobs}, p); err != nil {
			t.Fatal(err)
		}
		m := mount(t, img, "", func(c *lazyfs.Config) { c.Warm = open(t, b.Bytes()) })
		if got, err := os.ReadFile(m.path("three")); err != nil || !bytes.Equal(got, img.files["three"]) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if l := m.blobs.asked(); len(l) != 0 {
			t.Errorf("asked: %v", l)
		}
	})
}

// Bulk reading is no start: no warm file is made of it, and what was begun is not kept. The profile has what was read
// beside it.
func TestNoWarmFileOfBulk(t *testing.T) {
	zeros := make([]byte, 120<<20)
	img := build(t, 4<<20, true, []member{file("before", text(1, 64<<10))}, []member{file("bulk", zeros)})
	var kept error
	var got lazyfs.Profile
	m := mount(t, img, "", func(c *lazyfs.Config) {
		c.OnProfile = func(p lazyfs.Profile) { got = p }
		c.KeepWarm = func(write func(io.Writer) error) error {
			kept = write(io.Discard)
			return kept
		}
	})
	for _, name := range []string{"before", "bulk"} {
		if got, err := os.ReadFile(m.path(name)); err != nil || !bytes.Equal(got, img.files[name]) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	m.unmount(t)
	if n := got.Bytes(); n < 4<<10 || n > 1<<20 {
		t.Errorf("the profile has %d bytes: %v", n, got)
	}
	if kept == nil {
		t.Error("a warm file of 120 MiB read in order was kept")
	}
	if m.log.String() != "" {
		t.Errorf("logged: %s", m.log)
	}
}

func FuzzOpenWarm(f *testing.F) {
	img := profiled(f)
	var b bytes.Buffer
	p := lazyfs.Profile{Ranges: []lazyfs.ProfileRange{{Layer: 0, Start: 5000, End: 6000}, {Layer: 1, Start: 0, End: 100}}}
	if err := lazyfs.WriteWarm(context.Background(), &b, img.layers, &memory{blobs: img.blobs}, p); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := os.Create(filepath.Join(dir, "warm"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := lazyfs.New(lazyfs.Config{Table: img.table, Layers: img.layers, Blobs: &memory{}, Warm: file}); err != nil && !errors.Is(err, lazyfs.ErrWarm) {
			t.Fatal(err)
		}
	})
}
