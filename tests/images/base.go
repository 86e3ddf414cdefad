package images

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// The tree that images of dialects hold: enough of Debian to run sh, coreutils and python3, in three
// archives, bottom first.
var baseGroups = []group{
	{"libs", []string{"base-files", "dash", "coreutils"}, false},
	{"python", []string{"python3-minimal"}, false},
	{"stdlib", []string{"python3"}, false},
}

// buildBase writes the archives of baseGroups, taken out of debian-python.
func buildBase(ctx context.Context, b *build) error {
	dir, err := b.need("debian-python")
	if err != nil {
		return err
	}
	scratch, err := b.scratch()
	if err != nil {
		return err
	}
	whole := filepath.Join(scratch, "root.tar")
	if err := joinLayers(filepath.Join(dir, "debian-python"), whole); err != nil {
		return err
	}
	root, err := openRoot(whole)
	if err != nil {
		return err
	}
	defer root.close()
	p, err := root.part(baseGroups)
	if err != nil {
		return err
	}
	for i, g := range baseGroups {
		f, err := os.Create(filepath.Join(b.dir, g.name+".tar"))
		if err != nil {
			return err
		}
		if err := root.writeTar(ctx, f, p[i]); err != nil {
			f.Close()
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// readBase reads one of the archives.
func readBase(b *build, name string) ([]byte, error) {
	dir, err := b.need("base")
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(dir, name+".tar"))
}

// joinLayers writes the archives of a layout's gzip layers as one, bottom first.
func joinLayers(layout, to string) error {
	layers, err := ReadLayout(layout)
	if err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	for _, l := range layers {
		if err := joinLayer(out, l); err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	return out.Close()
}

// joinLayer appends the archive of a gzip layer to out but for the two blocks that end it.
func joinLayer(out io.Writer, l Blob) error {
	archive, err := Gunzip(l)
	if err != nil {
		return err
	}
	_, err = out.Write(archive[:len(archive)-1024])
	return err
}

// TarOf joins archives into one: their entries in order, ended once.
func TarOf(archives ...[]byte) []byte {
	var all []byte
	for i, a := range archives {
		if i < len(archives)-1 {
			a = a[:len(a)-1024]
		}
		all = append(all, a...)
	}
	return all
}
