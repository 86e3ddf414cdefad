package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/tests/registry"
	"github.com/muster-hpc/muster/ztoc"
)

// A world is a registry with one test image in it.
type world struct {
	t     *testing.T
	proxy *registry.Proxy
	ref   string
}

func newWorld(t *testing.T, name string) *world {
	t.Helper()
	layout, err := images.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	return newWorldOf(t, layout)
}

func newWorldOf(t *testing.T, layout string) *world {
	t.Helper()
	h, err := registry.NewHandler(t.TempDir(), registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := registry.StartProxy(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	w := &world{t, p, p.Addr + "/test:latest"}
	if _, err := registry.Push(t.Context(), w.ref, layout, "latest"); err != nil {
		t.Fatal(err)
	}
	p.ResetLog()
	return w
}

func (w *world) repo() origin.Repository {
	w.t.Helper()
	c, err := origin.New(origin.Options{ResolveWait: 1e9, MaxWait: 1e9})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	ref, err := origin.ParseReference(w.ref)
	if err != nil {
		w.t.Fatal(err)
	}
	r, err := c.Repository(ref)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func newStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (w *world) try(s *store.Store, change ...func(*Options)) (*Image, error) {
	o := Options{Repo: w.repo(), Store: s, Tool: "test"}
	for _, c := range change {
		c(&o)
	}
	im, err := Open(w.t.Context(), o)
	if err == nil {
		w.t.Cleanup(func() { im.Close() })
	}
	return im, err
}

func (w *world) open(s *store.Store, change ...func(*Options)) *Image {
	w.t.Helper()
	im, err := w.try(s, change...)
	if err != nil {
		w.t.Fatal(err)
	}
	return im
}

func (w *world) blobBytes() int64 { return w.proxy.Bytes(registry.Match{Kind: registry.Blob}) }

func modes(im *Image) (m []Mode) {
	for _, l := range im.Layers {
		m = append(m, l.Mode)
	}
	return m
}

// readSpans inflates every span of layer i through the image's means, as a mount would.
func readSpans(im *Image, i int, w io.Writer) error {
	l := im.Config().Layers[i]
	for k := range l.Ztoc.NumSpans() {
		s := l.Ztoc.Span(k)
		packed, out := make([]byte, s.Blob.Len()), make([]byte, s.Out.Len())
		if err := im.Config().Blobs.ReadAt(context.Background(), l.Ref, packed, s.Blob.Start, ztoc.Demand); err != nil {
			return err
		}
		if err := l.Ztoc.Inflate(out, k, packed); err != nil {
			return err
		}
		if _, err := w.Write(out); err != nil {
			return err
		}
	}
	return nil
}

func checkDiffIDs(t *testing.T, im *Image) {
	t.Helper()
	for i, l := range im.Layers {
		h := sha256.New()
		if err := readSpans(im, i, h); err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		got := ztoc.DigestFromSum([sha256.Size]byte(h.Sum(nil)))
		if l.Mode != ModeTOC && l.Format != "estargz" && l.Format != "zstd:chunked" && got != im.Resolved.DiffIDs[i] {
			t.Errorf("layer %d, %s: spans add up to %s, the diff ID is %s", i, l.Format, got, im.Resolved.DiffIDs[i])
		}
	}
}

// TestOpenKinds opens every kind of layer, twice, and reads all of it.
func TestOpenKinds(t *testing.T) {
	for name, want := range map[string]Mode{
		"gzip": ModePulled, "gzip-members": ModePulled, "tar": ModePulled, "zstd-frames": ModePulled,
		"gzip-giant": ModeDerived, "zstd-single": ModeDerived,
		"estargz": ModeTOC, "zstd-chunked-stargz": ModeTOC, "zstd-chunked-podman": ModeTOC,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, name)
			s := newStore(t)
			im := w.open(s)
			if m := modes(im); !slices.Contains(m, want) {
				t.Errorf("modes are %v, none is %s; layers %+v", m, want, im.Layers)
			}
			checkDiffIDs(t, im)
			if n, size := w.blobBytes(), im.Resolved.Size()+int64(len(im.Resolved.Config)); want != ModeTOC && n != size {
				t.Errorf("%d bytes were fetched for everything, the image has %d", n, size)
			}
			im.Close()

			w.proxy.ResetLog()
			again := w.open(s)
			for _, m := range modes(again) {
				if m != ModeKept {
					t.Errorf("the second time modes are %v", modes(again))
				}
			}
			checkDiffIDs(t, again)
			if n := w.blobBytes() - int64(len(im.Resolved.Config)); n > 0 {
				t.Errorf("%d bytes of layers were fetched again", n)
			}
		})
	}
}

// TestIndexBeside pushes an index and opens from it, on a host that has nothing.
func TestIndexBeside(t *testing.T) {
	w := newWorld(t, "gzip")
	im := w.open(newStore(t))
	x, err := im.MakeIndex(t.Context(), IndexOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Push(t.Context(), w.repo()); err != nil {
		t.Fatal(err)
	}
	w.proxy.ResetLog()
	lazy := w.open(newStore(t), func(o *Options) { o.RequireLazy = true })
	if n := w.blobBytes(); n > im.Resolved.Size()/20 {
		t.Errorf("mounting fetched %d of %d bytes", n, im.Resolved.Size())
	}
	for i, l := range lazy.Layers {
		if l.Size >= WholeBelow && l.Mode != ModeIndex {
			t.Errorf("layer %d of %d bytes is %s: %s", i, l.Size, l.Mode, l.Reason)
		}
	}
	checkDiffIDs(t, lazy)

	list, why, err := ListIndexes(t.Context(), w.repo(), "")
	if err != nil || len(list) != 1 || list[0].Digest != x.Digest || list[0].Packed == 0 {
		t.Errorf("listed %+v, %q, %v; want the one that was pushed", list, why, err)
	}
	if plain := w.open(newStore(t), func(o *Options) { o.NoIndex = true }); slices.Contains(modes(plain), ModeIndex) {
		t.Error("NoIndex used an index")
	}
}

func TestRequireLazy(t *testing.T) {
	w := newWorld(t, "gzip")
	_, err := w.try(newStore(t), func(o *Options) { o.RequireLazy = true })
	if !errors.Is(err, ErrNotLazy) || !strings.Contains(err.Error(), w.ref) {
		t.Errorf("got %v, want ErrNotLazy with the image's name", err)
	}
	if n := w.proxy.Count(registry.Match{Kind: registry.Blob}); n > 1 {
		t.Errorf("%d blobs were asked for, only the config may be", n)
	}
}

// TestOffline opens an image again while its registry is away.
func TestOffline(t *testing.T) {
	w := newWorld(t, "gzip-members")
	s := newStore(t)
	first := w.open(s)
	checkDiffIDs(t, first)
	first.Close()
	if err := w.proxy.Down(); err != nil {
		t.Fatal(err)
	}
	im := w.open(s)
	if !im.Offline {
		t.Error("it does not say that the registry was not asked")
	}
	checkDiffIDs(t, im)
	if _, err := w.try(newStore(t)); !errors.Is(err, origin.ErrUnreachable) {
		t.Errorf("with an empty store: %v, want ErrUnreachable", err)
	}
}

// TestDerivedAgain takes a derived blob away under a live image.
func TestDerivedAgain(t *testing.T) {
	w := newWorld(t, "zstd-single")
	s := newStore(t)
	im := w.open(s)
	for i, l := range im.Layers {
		if l.Mode != ModeDerived {
			continue
		}
		b, err := s.Blob(im.Config().Layers[i].Ref)
		if err != nil {
			t.Fatal(err)
		}
		b.Drop(ztoc.Range{End: im.Config().Layers[i].Ref.Size})
		b.Close()
	}
	checkDiffIDs(t, im)
}

// TestDerivedAgainByMany has a derived blob that nobody kept read by many at once, with as few requests as there can be, while the
// layer that it is made from has rotted in the store.
func TestDerivedAgainByMany(t *testing.T) {
	w := newWorld(t, "zstd-single")
	s := newStore(t)
	im := w.open(s, func(o *Options) { o.Requests = 2 })
	for i, l := range im.Layers {
		if l.Mode != ModeDerived {
			continue
		}
		layer := im.Resolved.Layers[i].Ref()
		b, err := s.Blob(im.Config().Layers[i].Ref)
		if err != nil {
			t.Fatal(err)
		}
		b.Drop(ztoc.Range{End: im.Config().Layers[i].Ref.Size})
		b.Close()
		_, hex, _ := strings.Cut(string(layer.Digest), ":")
		files, err := filepath.Glob(filepath.Join(s.Dir(), "blobs", hex+"*"))
		if err != nil || len(files) != 1 {
			t.Fatal(files, err)
		}
		rot, err := os.OpenFile(files[0], os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := rot.WriteAt([]byte("rot"), layer.Size/3); err != nil {
			t.Fatal(err)
		}
		rot.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		var wg sync.WaitGroup
		view := im.Config().Layers[i]
		for k := range view.Ztoc.NumSpans() {
			wg.Go(func() {
				sp := view.Ztoc.Span(k)
				packed, out := make([]byte, sp.Blob.Len()), make([]byte, sp.Out.Len())
				for {
					if err := im.Config().Blobs.ReadAt(ctx, view.Ref, packed, sp.Blob.Start, ztoc.Demand); err != nil {
						if ctx.Err() != nil || errors.Is(err, fetch.ErrWrong) {
							t.Errorf("span %d: %v", k, err)
							return
						}
						continue // the layer is being fetched again
					}
					err := view.Ztoc.Inflate(out, k, packed)
					if err == nil {
						return
					}
					if err := im.Config().Blobs.Reject(view.Ref, sp.Blob, err); err != nil {
						t.Errorf("span %d: %v", k, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

// TestWrongBytes is F8 for a first pull: one flipped byte costs a second fetch; a registry that
// always lies is an error, and nothing of it is kept as a table.
func TestWrongBytes(t *testing.T) {
	w := newWorld(t, "gzip-members")
	match := registry.Match{Kind: registry.Blob, Ref: string(w.open(newStore(t)).Resolved.Layers[0].Digest)}
	w.proxy.Inject(match, 1, registry.FlipAt(5000))
	checkDiffIDs(t, w.open(newStore(t)))

	w.proxy.Inject(match, 0, registry.FlipAt(5000))
	s := newStore(t)
	if _, err := w.try(s); !errors.Is(err, ztoc.ErrMismatch) && !errors.Is(err, ztoc.ErrInvalid) {
		t.Errorf("got %v, want ErrMismatch", err)
	}
	w.proxy.Clear()
	checkDiffIDs(t, w.open(s))
}

// A reader answers a guess from an opened image without a mount.
type reader struct {
	im     *Image
	mu     sync.Mutex
	wanted []lazyfs.ProfileRange
}

func (r *reader) Ahead(_ context.Context, p lazyfs.Profile) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wanted = append(r.wanted, p.Ranges...)
}

func (r *reader) ReadFile(_ context.Context, row tree.Row, p []byte, off int64) (int, error) {
	e := r.im.Table().Extent(row, off)
	if e.Len < int64(len(p)) {
		return 0, io.EOF
	}
	var all bytes.Buffer
	l := r.im.Config().Layers[e.Layer]
	lo, hi := l.Ztoc.SpansOf(ztoc.Range{Start: e.Offset, End: e.Offset + int64(len(p))})
	for k := lo; k < hi; k++ {
		s := l.Ztoc.Span(k)
		packed, out := make([]byte, s.Blob.Len()), make([]byte, s.Out.Len())
		if err := r.im.Config().Blobs.ReadAt(context.Background(), l.Ref, packed, s.Blob.Start, ztoc.Demand); err != nil {
			return 0, err
		}
		if err := l.Ztoc.Inflate(out, k, packed); err != nil {
			return 0, err
		}
		all.Write(out)
	}
	return copy(p, all.Bytes()[e.Offset-l.Ztoc.Span(lo).Out.Start:]), nil
}

// TestGuess follows a program of a real Debian to its loader and libraries, directly and through a
// script.
func TestGuess(t *testing.T) {
	w := newWorld(t, "debian-python")
	im := w.open(newStore(t))
	for _, args := range [][]string{{"python3", "-c", "1"}, {"/usr/bin/true"}} {
		var found []string
		r := &reader{im: im}
		im.o.Command = args
		im.start = "guess"
		g := im.guesser(t.Context(), r)
		var mu sync.Mutex
		g.found = func(row tree.Row, _ []ztoc.Range) {
			mu.Lock()
			defer mu.Unlock()
			found = append(found, path.Base(string(im.Table().AppendPath(nil, row))))
		}
		g.guess(t.Context(), args)
		for _, want := range []string{"ld.so.cache", "libc.so.6"} {
			if !slices.Contains(found, want) {
				t.Errorf("%v: the guess is %v, without %s", args, found, want)
			}
		}
		if !slices.ContainsFunc(found, func(s string) bool { return strings.HasPrefix(s, "ld-linux") }) {
			t.Errorf("%v: the guess is %v, without the loader", args, found)
		}
		im.Guess(t.Context(), r)
		if len(r.wanted) == 0 {
			t.Errorf("%v: nothing is fetched ahead", args)
		}
	}
}

// TestGuessPython follows imports of a real numpy: through packages, relative imports, byte code, extension modules
// and the libraries these are linked with.
func TestGuessPython(t *testing.T) {
	w := newWorld(t, "debian-python")
	im := w.open(newStore(t))
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"python3", "-c", "import numpy as np; print(np)"}, []string{
			"usr/lib/python3/dist-packages/numpy/__pycache__/__init__.cpython-311.pyc",
			"usr/lib/python3/dist-packages/numpy/core/multiarray.py",
			"usr/lib/python3/dist-packages/numpy/core/_multiarray_umath.cpython-311-x86_64-linux-gnu.so",
			"usr/lib/python3.11/re/_compiler.py",
			"usr/lib/python3.11/encodings/utf_8.py",
		}},
		{[]string{"/usr/bin/python3.11", "-X", "dev", "-m", "json.tool"}, []string{"usr/lib/python3.11/json/tool.py", "usr/lib/python3.11/json/decoder.py"}},
	} {
		var mu sync.Mutex
		found := map[string]bool{}
		g := im.guesser(t.Context(), &reader{im: im})
		g.found = func(row tree.Row, _ []ztoc.Range) {
			mu.Lock()
			defer mu.Unlock()
			name := strings.TrimPrefix(string(im.Table().AppendPath(nil, row)), "/")
			if found[name] {
				t.Errorf("%s is found twice", name)
			}
			found[name] = true
		}
		g.guess(t.Context(), c.args)
		for _, name := range c.want {
			if !found[name] {
				t.Errorf("%v: the guess of %d files lacks %s", c.args, len(found), name)
			}
		}
		if found["usr/lib/python3.11/os.py"] {
			t.Errorf("%v: os is frozen, it is read from nowhere", c.args)
		}
	}
}

func TestImports(t *testing.T) {
	const source = `#!/usr/bin/python3
"""A doc string.
import nothing
"""
from __future__ import annotations
import a, b.c as d  # import e
from . import f, g as h
from .i import (j,
    # a comment
    k as l,
)
from ..m.n \
    import *
import o; import p
try:
    import q
except ImportError:
    import r
def s():
    import u
    x = """
import v
"""
class w:
    import x
if TYPE_CHECKING:
    import y
else:
    import z
text = 'from the "start'
if __name__ == "__main__":
    import main
    from `
	want := []string{
		"__future__", "__future__.annotations", "a", "b.c", "pkg.sub", "pkg.sub.f", "pkg.sub.g", "pkg.sub.i", "pkg.sub.i.j", "pkg.sub.i.k",
		"pkg.m.n", "o", "p", "q", "z",
	}
	if got := imports([]byte(source), "pkg.sub", false); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := imports([]byte(source), "pkg.sub", true); !slices.Equal(got, append(want, "main")) {
		t.Errorf("run as a program: %q", got)
	}
}

// FuzzImports reads anything as Python source.
func FuzzImports(f *testing.F) {
	f.Add("from . import (a,\n b)\nimport x", "p.q")
	f.Add("'\"\"\"", "")
	f.Fuzz(func(t *testing.T, source, pkg string) {
		for _, n := range imports([]byte(source), pkg, true) {
			if n == "" || strings.Contains(strings.TrimPrefix(n, pkg), "/") {
				t.Errorf("%q", n)
			}
		}
	})
}

func TestShebang(t *testing.T) {
	for text, want := range map[string]string{
		"#!/bin/sh\n":                    "/bin/sh",
		"#! /usr/bin/env python3\nx":     "/usr/bin/env python3",
		"#!/usr/bin/env -S python3 -u\n": "/usr/bin/env",
		"#!/usr/bin/perl -w\n":           "/usr/bin/perl",
		"#!":                             "",
	} {
		got, ok := shebang(strings.NewReader(text))
		if !ok || strings.Join(got, " ") != want {
			t.Errorf("%q: got %q, %v, want %q", text, got, ok, want)
		}
	}
	if _, ok := shebang(strings.NewReader("\x7fELF")); ok {
		t.Error("an ELF file has no interpreter line")
	}
}

// FuzzDynamic reads anything as an ELF file: a guess may fail, it may not hang or panic.
func FuzzDynamic(f *testing.F) {
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		dynamic(bytes.NewReader(b), "/usr/bin")
		shebang(bytes.NewReader(b))
	})
}
