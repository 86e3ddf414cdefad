package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/ztoc"
)

func (a *app) ztocCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "ztoc",
		Short: "tables of contents of single layers: build, show, verify, cat",
		Long: `A ztoc says where a layer's files lie and where its compressed stream can be restarted. These
commands work on files; 'muster run' and 'muster index' do the same by themselves.`,
	}
	c.AddCommand(a.ztocBuild(), a.ztocShow(), a.ztocVerify(), a.ztocCat())
	return c
}

// ztocSummary is a ztoc in numbers.
type ztocSummary struct {
	Format   string      `json:"format"`
	Tool     string      `json:"tool"`
	Blob     ztoc.Digest `json:"blob,omitempty"`
	BlobSize int64       `json:"blob_size"`
	DiffID   ztoc.Digest `json:"diff_id,omitempty"`
	Inflated int64       `json:"inflated_size"`
	SpanSize int64       `json:"span_size"`
	Spans    int         `json:"spans"`
	Files    int         `json:"files"`
	Written  int         `json:"ztoc_size,omitempty"`
	File     string      `json:"ztoc,omitempty"`
}

func summarise(z *ztoc.Ztoc) ztocSummary {
	return ztocSummary{
		Format: z.Format.String(), Tool: z.Tool, Blob: z.Blob, BlobSize: z.BlobSize, Inflated: z.InflatedSize,
		SpanSize: z.SpanSize, Spans: z.NumSpans(), Files: z.NumEntries(),
	}
}

func (s ztocSummary) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	defer tw.Flush()
	if s.File != "" {
		fmt.Fprintf(tw, "ztoc\t%s, %s (%.2f%% of the layer)\n", s.File, megabytes(int64(s.Written)), 100*float64(s.Written)/float64(max(1, s.BlobSize)))
	}
	fmt.Fprintf(tw, "layer\t%s %s\n", s.Format, s.Blob)
	if s.DiffID != "" {
		fmt.Fprintf(tw, "diff ID\t%s\n", s.DiffID)
	}
	fmt.Fprintf(tw, "size\t%s, inflated %s\n", megabytes(s.BlobSize), megabytes(s.Inflated))
	fmt.Fprintf(tw, "spans\t%d of %s\n", s.Spans, Size(s.SpanSize))
	fmt.Fprintf(tw, "files\t%d\n", s.Files)
	fmt.Fprintf(tw, "built by\t%s\n", s.Tool)
}

func (a *app) ztocBuild() *cobra.Command {
	var out, form, want, diffID string
	c := &cobra.Command{
		Use:   "build LAYER",
		Short: "build the ztoc of a layer in one pass, checking its digest; - reads standard input",
		Args:  arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o := ztoc.BuildOptions{SpanSize: int64(a.cfg.Index.SpanSize), Tool: "muster " + version, HashInflated: true}
			var err error
			if want != "" {
				if o.Want, err = ztoc.ParseDigest(want); err != nil {
					return usagef("--digest: %w", err)
				}
			}
			if diffID != "" {
				if o.DiffID, err = ztoc.ParseDigest(diffID); err != nil {
					return usagef("--diff-id: %w", err)
				}
			}
			encode := ztoc.EncodeSOCI
			switch form {
			case "soci":
			case "muster":
				encode = ztoc.Pack
			default:
				return usagef("--format is %q: it must be soci or muster", form)
			}
			layer := os.Stdin
			if args[0] != "-" {
				if layer, err = os.Open(args[0]); err != nil {
					return err
				}
				defer layer.Close()
			}
			// Closing is what ends a read of a pipe that nobody writes to.
			stop := context.AfterFunc(cmd.Context(), func() { _ = layer.Close() })
			defer stop()
			z, sums, err := ztoc.Build(layer, o)
			if cmd.Context().Err() != nil {
				return context.Cause(cmd.Context())
			}
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			b, err := encode(z)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			s := summarise(z)
			s.DiffID, s.Written = sums.DiffID, len(b)
			if out == "" {
				if args[0] == "-" {
					return usagef("a layer from standard input needs --output FILE for its ztoc")
				}
				out = args[0] + ".ztoc"
			}
			if out == "-" {
				_, err := a.out.Write(b)
				return err
			}
			if err := writeWhole(out, b); err != nil {
				return err
			}
			s.File = out
			return a.result(s, s.print)
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "", "file to write, - for standard output; default LAYER.ztoc")
	c.Flags().StringVar(&form, "format", "soci", "soci (0.9, which SOCI reads) or muster (packed)")
	c.Flags().StringVar(&want, "digest", "", "digest that the layer must have")
	c.Flags().StringVar(&diffID, "diff-id", "", "digest that the inflated layer must have")
	a.jsonFlag(c)
	return c
}

// writeWhole writes a file under another name first, so that a reader finds all of it or none.
func writeWhole(file string, b []byte) error {
	f, err := os.CreateTemp(path.Dir(file), ".muster-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// maxZtocFile bounds what is read as a ztoc; that of a layer of 180,000 files has 81 MB in SOCI's form.
const maxZtocFile = 2 << 30

// readZtoc reads a ztoc in either form.
func readZtoc(file string) (*ztoc.Ztoc, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxZtocFile))
	if err != nil {
		return nil, err
	}
	z, packed := ztoc.Unpack(b)
	if packed == nil {
		return z, nil
	}
	z, err = ztoc.DecodeSOCI(b)
	if err != nil {
		return nil, fmt.Errorf("%s: neither muster's form (%w) nor SOCI's (%w)", file, packed, err)
	}
	return z, nil
}

type spanRow struct {
	Index int      `json:"index"`
	Blob  [2]int64 `json:"blob"`
	Out   [2]int64 `json:"out"`
}

type fileRow struct {
	Name   string `json:"name"`
	Type   string `json:"type"`
	Mode   string `json:"mode"`
	Owner  string `json:"owner"`
	Size   int64  `json:"size"`
	Offset int64  `json:"offset"`
	Link   string `json:"link,omitempty"`
}

var typeNames = [...]string{"reg", "dir", "symlink", "hardlink", "char", "block", "fifo"}

func fileRows(z *ztoc.Ztoc) ([]fileRow, error) {
	entries, err := z.Entries()
	if err != nil {
		return nil, err
	}
	rows := make([]fileRow, len(entries))
	for i, e := range entries {
		rows[i] = fileRow{e.Name, typeNames[e.Type], fmt.Sprintf("%04o", e.Mode&0o7777), fmt.Sprintf("%d:%d", e.UID, e.GID), e.Size, e.Offset, e.Linkname}
	}
	return rows, nil
}

func (a *app) ztocShow() *cobra.Command {
	var spans, files bool
	c := &cobra.Command{
		Use:   "show ZTOC",
		Short: "show what a ztoc says",
		Args:  arguments(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			z, err := readZtoc(args[0])
			if err != nil {
				return err
			}
			shown := struct {
				ztocSummary
				SpanList []spanRow `json:"span_list,omitempty"`
				FileList []fileRow `json:"file_list,omitempty"`
			}{ztocSummary: summarise(z)}
			if spans {
				for i := range z.NumSpans() {
					s := z.Span(i)
					shown.SpanList = append(shown.SpanList, spanRow{i, [2]int64{s.Blob.Start, s.Blob.End}, [2]int64{s.Out.Start, s.Out.End}})
				}
			}
			if files {
				if shown.FileList, err = fileRows(z); err != nil {
					return err
				}
			}
			return a.result(shown, func(w io.Writer) {
				shown.print(w)
				tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
				defer tw.Flush()
				for _, s := range shown.SpanList {
					fmt.Fprintf(tw, "span %d\tlayer [%d, %d)\tinflated [%d, %d)\n", s.Index, s.Blob[0], s.Blob[1], s.Out[0], s.Out[1])
				}
				for _, f := range shown.FileList {
					link := ""
					if f.Link != "" {
						link = " -> " + printable(f.Link)
					}
					fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s%s\n", f.Type, f.Mode, f.Owner, f.Size, printable(f.Name), link)
				}
			})
		},
	}
	c.Flags().BoolVar(&spans, "spans", false, "list the spans")
	c.Flags().BoolVar(&files, "files", false, "list the files")
	a.jsonFlag(c)
	return c
}

// printable keeps a layer's names from writing control characters to a terminal.
func printable(s string) string {
	q := fmt.Sprintf("%q", s)
	if q == `"`+s+`"` {
		return s
	}
	return q
}

// layerAndZtoc opens a layer's file and its ztoc.
func layerAndZtoc(zfile, lfile string) (*ztoc.Ztoc, *os.File, error) {
	z, err := readZtoc(zfile)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.Open(lfile)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Size() != z.BlobSize {
		err = fmt.Errorf("%s has %d bytes, the ztoc is about a layer of %d: %w", lfile, st.Size(), z.BlobSize, ztoc.ErrMismatch)
	}
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return z, f, nil
}

// spanReader inflates spans of a layer one after another, each by itself, as a mount does.
type spanReader struct {
	ctx        context.Context
	z          *ztoc.Ztoc
	layer      io.ReaderAt
	in, out    []byte
	next, stop int
	rest       []byte
}

func (r *spanReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.next >= r.stop {
			return 0, io.EOF
		}
		if err := r.ctx.Err(); err != nil {
			return 0, context.Cause(r.ctx)
		}
		s := r.z.Span(r.next)
		r.in, r.out = sized(r.in, s.Blob.Len()), sized(r.out, s.Out.Len())
		if _, err := r.layer.ReadAt(r.in, s.Blob.Start); err != nil {
			return 0, fmt.Errorf("span %d: %w", r.next, err)
		}
		if err := r.z.Inflate(r.out, r.next, r.in); err != nil {
			return 0, fmt.Errorf("span %d, bytes %s of the layer: %w", r.next, s.Blob, err)
		}
		r.rest = r.out
		r.next++
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func sized(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		return make([]byte, n)
	}
	return b[:n]
}

func (a *app) ztocVerify() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify ZTOC LAYER",
		Short: "check a ztoc against its layer: every span's digest, that it inflates by itself, and every file",
		Args:  arguments(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			z, layer, err := layerAndZtoc(args[0], args[1])
			if err != nil {
				return err
			}
			defer layer.Close()
			r := &spanReader{ctx: cmd.Context(), z: z, layer: layer, stop: z.NumSpans()}
			// What the spans give is a tar archive again, whose table must be the same.
			plain, _, err := ztoc.Build(bufio.NewReaderSize(r, 1<<20), ztoc.BuildOptions{})
			if err != nil {
				return fmt.Errorf("%s: %w", args[1], err)
			}
			if err := sameEntries(z, plain); err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			s := summarise(z)
			return a.result(s, func(w io.Writer) {
				fmt.Fprintf(w, "%s describes %s: %d spans, %d files\n", args[0], args[1], s.Spans, s.Files)
			})
		},
	}
	a.jsonFlag(c)
	return c
}

// sameEntries compares what both say about files and their places.
func sameEntries(z, plain *ztoc.Ztoc) error {
	got, err := z.Entries()
	if err != nil {
		return err
	}
	want, err := plain.Entries()
	if err != nil {
		return err
	}
	if z.Format.Chunked() {
		return nil // their tables list files in their own order, and leave out their own
	}
	if len(got) != len(want) {
		return fmt.Errorf("%w: it has %d files, the layer %d", ztoc.ErrIndex, len(got), len(want))
	}
	for i, g := range got {
		w := want[i]
		if g.Name != w.Name || g.Type != w.Type || g.Linkname != w.Linkname || g.Size != w.Size || g.Mode != w.Mode ||
			g.UID != w.UID || g.GID != w.GID || (g.Size > 0 && g.Type == ztoc.TypeReg && g.Offset != w.Offset) {
			return fmt.Errorf("%w: file %d is %s, size %d at %d; in the layer %s, size %d at %d", ztoc.ErrIndex,
				i, printable(g.Name), g.Size, g.Offset, printable(w.Name), w.Size, w.Offset)
		}
	}
	return nil
}

func (a *app) ztocCat() *cobra.Command {
	return &cobra.Command{
		Use:   "cat ZTOC LAYER PATH",
		Short: "write one file of a layer to standard output, inflating only the spans it lies in",
		Args:  arguments(cobra.ExactArgs(3)),
		RunE: func(cmd *cobra.Command, args []string) error {
			z, layer, err := layerAndZtoc(args[0], args[1])
			if err != nil {
				return err
			}
			defer layer.Close()
			e, err := findEntry(z, args[2])
			if err != nil {
				return fmt.Errorf("%s: %w", args[1], err)
			}
			return catEntry(cmd.Context(), a.out, z, layer, e)
		},
	}
}

// findEntry is the last entry of that name, since later ones replace earlier ones; hard links are followed.
func findEntry(z *ztoc.Ztoc, name string) (e ztoc.Entry, err error) {
	entries, err := z.Entries()
	if err != nil {
		return e, err
	}
	clean := func(s string) string { return strings.TrimPrefix(path.Clean("/"+s), "/") }
	want := clean(name)
	for range len(entries) + 1 {
		found := -1
		for i := range entries {
			if clean(entries[i].Name) == want {
				found = i
			}
		}
		if found < 0 {
			return e, &coded{exitOther, fmt.Errorf("%s: %w", want, os.ErrNotExist)}
		}
		e = entries[found]
		switch e.Type {
		case ztoc.TypeReg:
			return e, nil
		case ztoc.TypeHardlink:
			// The target is an earlier entry: what comes later cannot be meant.
			want, entries = clean(e.Linkname), entries[:found]
		default:
			return e, fmt.Errorf("%s is a %s, not a regular file", want, typeNames[e.Type])
		}
	}
	return e, fmt.Errorf("%s: too many hard links in a row", name)
}

func catEntry(ctx context.Context, w io.Writer, z *ztoc.Ztoc, layer io.ReaderAt, e ztoc.Entry) error {
	extents := e.Sparse
	if extents == nil {
		extents = []ztoc.Extent{{Offset: e.Offset, Len: e.Size}}
	}
	at := int64(0)
	for _, x := range extents {
		if err := zeros(w, x.FileOff-at); err != nil {
			return err
		}
		lo, hi := z.SpansOf(ztoc.Range{Start: x.Offset, End: x.Offset + x.Len})
		if lo < hi {
			r := &spanReader{ctx: ctx, z: z, layer: layer, next: lo, stop: hi}
			if _, err := io.CopyN(io.Discard, r, x.Offset-z.Span(lo).Out.Start); err != nil {
				return err
			}
			if _, err := io.CopyN(w, r, x.Len); err != nil {
				return err
			}
		}
		at = x.FileOff + x.Len
	}
	return zeros(w, e.Size-at)
}

// zeros writes a hole.
func zeros(w io.Writer, n int64) error {
	buf := make([]byte, min(max(n, 0), 64<<10))
	for n > 0 {
		m, err := w.Write(buf[:min(n, int64(len(buf)))])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}
