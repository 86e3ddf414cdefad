package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/muster-hpc/muster/tests/images"
	"github.com/muster-hpc/muster/ztoc/inflate"
)

// An input is something to inflate.
type input struct {
	name  string
	gz    []byte
	path  string // of a file in memory with gz
	layer bool
	size  int64 // inflated, bytes
}

// gather makes the inputs: layers of these files or of debian-python, and others of up to size bytes.
func gather(files []string, size int64) ([]input, error) {
	if len(files) == 0 {
		var err error
		if files, err = layers("debian-python", 8<<20); err != nil {
			return nil, err
		}
	}
	var inputs []input
	for _, f := range files {
		gz, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		n, err := io.Copy(io.Discard, inflate.NewReader(bytes.NewReader(gz), inflate.Options{}))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		inputs = append(inputs, input{name: fmt.Sprintf("layer %.8s", filepath.Base(f)), gz: gz, layer: true, size: n})
	}
	more, err := others(size)
	return append(inputs, more...), err
}

// layers are the files of an image's gzip layers of at least so many bytes.
func layers(image string, size int64) ([]string, error) {
	layout, err := images.Get(image)
	if err != nil {
		return nil, err
	}
	blobs, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	if err != nil {
		return nil, err
	}
	var files []string
	for _, name := range blobs {
		st, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if st.Size() >= size {
			files = append(files, name)
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no layer of %d bytes", image, size)
	}
	return files, nil
}

// others are the inputs that are no layers.
func others(size int64) ([]input, error) {
	text, binaries, err := contents(size)
	if err != nil {
		return nil, err
	}
	noise := make([]byte, size)
	if _, err := rand.NewChaCha8([32]byte{}).Read(noise); err != nil {
		return nil, err
	}
	var runs []byte // of one byte each, from short to very long
	for r := rand.New(rand.NewPCG(1, 2)); int64(len(runs)) < size; {
		runs = append(runs, bytes.Repeat([]byte{byte(r.Uint32())}, 1<<r.IntN(17))...)
	}
	var inputs []input
	for _, in := range []struct {
		name string
		data []byte
	}{{"text", text}, {"binaries", binaries}, {"incompressible", noise}, {"runs", runs}} {
		cmd := exec.Command("gzip", "-c") // the compressor of most layers and archives
		cmd.Stdin, cmd.Stderr = bytes.NewReader(in.data), os.Stderr
		gz, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		inputs = append(inputs, input{name: in.name, gz: gz, size: int64(len(in.data))})
	}
	small, err := smallBlocks(text[:min(len(text), 10<<20)])
	return append(inputs, small), err
}

// smallBlocks compresses data with a block for every 1000 bytes, most with codes of their own: making tables
// is most of the work.
func smallBlocks(data []byte) (input, error) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	for at := 0; at < len(data); at += 1000 {
		if _, err := w.Write(data[at:min(len(data), at+1000)]); err != nil {
			return input{}, err
		}
		if err := w.Flush(); err != nil {
			return input{}, err
		}
	}
	err := w.Close()
	return input{name: "small blocks", gz: b.Bytes(), size: int64(len(data))}, err
}

// contents are the text files and the programs and libraries of one-layer, up to size bytes of each.
func contents(size int64) (text, binaries []byte, err error) {
	files, err := layers("one-layer", 100<<20)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.Open(files[0])
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	tr := tar.NewReader(inflate.NewReader(f, inflate.Options{}))
	for int64(len(text)) < size || int64(len(binaries)) < size {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, err
		}
		if h.Size < 1000 || h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return nil, nil, err
		}
		switch {
		case bytes.HasPrefix(data, []byte("\x7fELF")):
			binaries = append(binaries, data[:min(int64(len(data)), max(0, size-int64(len(binaries))))]...)
		case bytes.IndexByte(data, 0) < 0 && !strings.HasSuffix(h.Name, ".gz"):
			text = append(text, data[:min(int64(len(data)), max(0, size-int64(len(text))))]...)
		}
	}
	return text, binaries, nil
}
