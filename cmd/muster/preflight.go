package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

// Numbers that estimates are made with. They are rough on purpose: the answer wanted is "seconds or
// minutes", before a byte has been fetched.
const (
	inflateRate   = 120e6 // compressed bytes one core streams through inflating and hashing in a second
	unpackRate    = 20e6  // compressed bytes a container engine pulls and unpacks in a second
	inflateFactor = 3.2   // inflated bytes of one compressed byte
	indexFactor   = 0.012 // of a layer's size, what its table takes
	dockerLayers  = 125   // docker refuses images with more layers
	hugeLayer     = 2 << 30
	emptyLayer    = 100 // blobs up to this size are a compressed archive of nothing
	manyLayers    = 30  // in a table for people
)

// How bad a finding is.
const (
	levelNote = "note" // good to know
	levelWarn = "warn" // it will work, slower or with more space than need be
	levelFail = "fail" // it will not work
)

type finding struct {
	Level string `json:"level"`
	Text  string `json:"text"`
}

// A preflight is what can be said about an image before any layer is fetched.
type preflight struct {
	Image     string      `json:"image"`
	Digest    ztoc.Digest `json:"digest,omitempty"`
	Platform  string      `json:"platform,omitempty"`
	Platforms []string    `json:"platforms,omitempty"` // that the image exists for, when it is an index

	Layers  []preflightLayer `json:"layers"`
	Size    int64            `json:"size"`    // of all distinct blobs
	Largest int64            `json:"largest"` // layer

	OverlayLimit int `json:"overlay_limit"` // layers that this kernel's overlayfs stacks, 0 when it could not be tried

	Index       ztoc.Digest `json:"index,omitempty"`
	IndexSize   int64       `json:"index_size,omitempty"`
	IndexReason string      `json:"index_reason,omitempty"` // why none is used

	FirstPull     int64   `json:"first_pull"`         // bytes to stream before the first mount
	FirstPullTime float64 `json:"first_pull_seconds"` // estimated
	PlainTime     float64 `json:"plain_pull_seconds"` // estimated, what a pull and unpack would take
	Link          float64 `json:"link_mbit"`

	StoreDir  string `json:"store"`
	Needed    int64  `json:"space_needed"`
	Here      bool   `json:"in_store"` // the store has this image, or part of it
	Free      int64  `json:"space_free"`
	Quota     int64  `json:"quota"`
	Unpacked  int64  `json:"unpacked"` // estimated, what a plain unpack would need
	StoreKind string `json:"store_file_system"`

	Findings []finding `json:"findings"`
}

type preflightLayer struct {
	Digest ztoc.Digest `json:"digest"`
	Size   int64       `json:"size"`
	Kind   string      `json:"kind"` // gzip, tar, zstd, zstd:chunked, eStargz, foreign, unknown
	First  string      `json:"first"`
	Times  int         `json:"times"` // that this blob is used in the image
}

// What the first mount does with a layer.
const (
	firstIndexed = "index" // its table is fetched, its content on demand
	firstTOC     = "toc"   // it brings its own table
	firstWhole   = "whole" // small: fetched whole, whatever there is
	firstStream  = "pull"  // streamed once, its table is built
	firstDerived = "pull, re-framed"
	firstRefused = "refused"
)

func (p *preflight) add(level, format string, args ...any) {
	p.Findings = append(p.Findings, finding{level, fmt.Sprintf(format, args...)})
}

func (a *app) preflightCommand() *cobra.Command {
	var platform string
	link := 1000.0
	c := &cobra.Command{
		Use:   "preflight IMAGE",
		Short: "tell what will hurt about an image, before any of it is fetched",
		Long: `Looks at manifest, config and indexes only, and tells: size and largest layer, layers
against the limits of docker and of this kernel's overlayfs, a missing platform, what the
first start will cost without an index, space needed and free, layers that are empty or
repeated, and kinds of layer that muster or others cannot handle.

The exit code is 0 when the image can be used, else the one that 'muster run' would have
found. Times are estimates.`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if link <= 0 {
				return usagef("--link must be more than 0 Mbit/s")
			}
			p, err := a.preflight(cmd.Context(), args[0], platform, link)
			if p == nil {
				return err
			}
			return errors.Join(a.result(p, p.print), err)
		},
	}
	c.Flags().StringVar(&platform, "platform", "", "platform of the image, such as linux/arm64; default this machine's")
	c.Flags().Float64Var(&link, "link", link, "speed of the link to the registry in Mbit/s, for the estimates")
	a.jsonFlag(c)
	return c
}

func (a *app) preflight(ctx context.Context, ref, platform string, link float64) (*preflight, error) {
	repo, err := a.repository(ref)
	if err != nil {
		return nil, err
	}
	p := &preflight{Image: ref, Link: link, Layers: []preflightLayer{}}
	img, err := repo.Resolve(ctx, platform)
	switch {
	case errors.Is(err, origin.ErrPlatform):
		p.Platforms = platformsOf(ctx, repo)
		p.add(levelFail, "there is no %s in it: it exists for %s", cmp.Or(platform, origin.DefaultPlatform()), orNone(strings.Join(p.Platforms, ", ")))
		return p, err
	case errors.Is(err, origin.ErrUnsupported):
		p.add(levelFail, "%v", err)
		return p, err
	case err != nil:
		return nil, err
	}
	p.Digest, p.Platform, p.Size = img.Digest, img.Platform, img.Size()
	indexes, reason, err := image.ListIndexes(ctx, repo, platform)
	if err != nil {
		return nil, err
	}
	var index image.ListedIndex
	if p.IndexReason = reason; len(indexes) > 0 {
		index = indexes[0] // the one that a mount takes
		p.Index, p.IndexReason = index.Digest, index.Reason
	}
	p.OverlayLimit = overlayLimit(ctx)
	err = p.layers(img, index)
	p.counts()
	p.cost()
	a.space(p, img)
	if strings.HasPrefix(img.Platform, "windows/") {
		p.add(levelFail, "it is an image for Windows")
		err = errors.Join(err, unsupported("%s: it is an image for Windows", ref))
	}
	return p, err
}

// platformsOf is the platforms of an index, as far as its entries say them.
func platformsOf(ctx context.Context, repo origin.Repository) (all []string) {
	r := repo.Reference()
	m, err := repo.Manifest(ctx, cmp.Or(string(r.Digest), cmp.Or(r.Tag, "latest")))
	if err != nil {
		return nil
	}
	var doc struct {
		Manifests []struct {
			Platform struct{ OS, Architecture, Variant string }
		}
	}
	if json.Unmarshal(m.Body, &doc) != nil {
		return nil
	}
	for _, d := range doc.Manifests {
		if p := d.Platform; p.OS != "" && p.OS != "unknown" {
			all = append(all, strings.Trim(p.OS+"/"+p.Architecture+"/"+p.Variant, "/"))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// kindOf says what kind of layer a descriptor announces.
func kindOf(d origin.Descriptor) string {
	m, chunked := d.MediaType, ztoc.Announced(d.MediaType, d.Annotations)
	switch {
	case strings.Contains(m, "foreign") || strings.Contains(m, "nondistributable"):
		return "foreign"
	case chunked != 0:
		return chunked.String()
	case strings.HasSuffix(m, "zstd"):
		return "zstd"
	case strings.HasSuffix(m, "gzip"):
		return "gzip"
	case strings.HasSuffix(m, ".tar"):
		return "tar"
	}
	return "unknown"
}

// layers fills p.Layers and says what the first mount does with each.
func (p *preflight) layers(img origin.Image, index image.ListedIndex) (err error) {
	for _, l := range img.Layers {
		if i := slices.IndexFunc(p.Layers, func(o preflightLayer) bool { return o.Digest == l.Digest }); i >= 0 {
			p.Layers[i].Times++
			continue
		}
		row := preflightLayer{Digest: l.Digest, Size: l.Size, Kind: kindOf(l), Times: 1}
		table, indexed := index.Covers[l.Digest]
		switch {
		case row.Kind == "foreign" || row.Kind == "unknown":
			row.First = firstRefused
			p.add(levelFail, "layer %s has the media type %s, which muster does not handle", short(l.Digest), l.MediaType)
			err = unsupported("%s: layer %s has the media type %s", p.Image, l.Digest, l.MediaType)
		case l.Size < image.WholeBelow:
			row.First = firstWhole
		case row.Kind == ztoc.FormatEStargz.String() || row.Kind == ztoc.FormatZstdChunked.String():
			row.First = firstTOC
		case indexed:
			row.First = firstIndexed
			p.IndexSize += table
		case row.Kind == "zstd":
			row.First = firstDerived
		default:
			row.First = firstStream
		}
		p.Largest = max(p.Largest, l.Size)
		p.Layers = append(p.Layers, row)
	}
	return err
}

// counts finds what numbers of layers tell.
func (p *preflight) counts() {
	n, repeated, empty := 0, 0, 0
	for _, l := range p.Layers {
		n += l.Times
		repeated += l.Times - 1
		if l.Size <= emptyLayer {
			empty += l.Times
		}
	}
	if n > dockerLayers {
		p.add(levelWarn, "%d layers: docker takes at most %d. muster has no limit", n, dockerLayers)
	}
	if p.OverlayLimit > 0 && n > p.OverlayLimit {
		p.add(levelWarn, "%d layers: overlayfs of this kernel stacks %d. muster mounts one tree and has no limit", n, p.OverlayLimit)
	}
	if p.OverlayLimit == 0 {
		p.add(levelNote, "how many layers this kernel's overlayfs stacks could not be tried")
	}
	if repeated > 0 {
		p.add(levelNote, "%d layers are repeated: fetched once, but each is a layer to other tools", repeated)
	}
	if empty > 1 {
		p.add(levelNote, "%d layers are empty", empty)
	}
	if p.Largest > hugeLayer {
		p.add(levelWarn, "the largest layer has %s: other tools fetch and unpack it in one stream", megabytes(p.Largest))
	}
}

// cost estimates the first start.
func (p *preflight) cost() {
	var largest, small int64
	derived := 0
	for _, l := range p.Layers {
		switch l.First {
		case firstDerived:
			derived++
			fallthrough
		case firstStream:
			p.FirstPull += l.Size
			largest = max(largest, l.Size)
		case firstWhole:
			small += l.Size
		}
	}
	rate := p.Link * 1e6 / 8
	cores := float64(goruntime.NumCPU())
	streamed := float64(p.FirstPull + small)
	// Bound by the link, by all cores together, or by the one core that has the largest layer.
	p.FirstPullTime = max((streamed+float64(p.IndexSize))/rate, streamed/inflateRate/cores, float64(largest)/inflateRate)
	p.PlainTime = max(float64(p.Size)/rate, float64(p.Size)/unpackRate)
	switch {
	case p.FirstPull == 0 && p.IndexSize > 0:
		p.add(levelNote, "an index lies beside it: the first start fetches %s of tables, then what the program reads", megabytes(p.IndexSize+small))
	case p.FirstPull == 0:
		p.add(levelNote, "it can be mounted at once: no layer has to be fetched whole but small ones")
	default:
		why := "it has no index"
		if p.IndexSize > 0 {
			why = "its index does not cover all layers"
		}
		p.add(levelWarn, "%s: the first start streams %s, about %s at %g Mbit/s (a plain pull and unpack: about %s). "+
			"The next starts on this host are immediate. 'muster index push' makes all first starts so",
			why, megabytes(p.FirstPull), seconds(p.FirstPullTime), p.Link, seconds(p.PlainTime))
	}
	if derived > 0 {
		p.add(levelNote, "%d zstd layers may have no restart points: then they are re-framed once while they stream", derived)
	}
}

func seconds(s float64) string {
	if s < 10 {
		return fmt.Sprintf("%.1f s", s)
	}
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}

// space compares what the image needs with what there is. A directory that does not exist is not made.
func (a *app) space(p *preflight, img origin.Image) {
	p.Needed = p.Size + int64(float64(p.Size)*indexFactor)
	p.Unpacked = int64(float64(p.Size) * inflateFactor)
	dir, err := a.cfg.storeDir()
	if err != nil {
		p.add(levelWarn, "where the store would be: %v", err)
		return
	}
	p.StoreDir = dir
	var used int64
	if st, err := os.Stat(filepath.Join(dir, ".")); err == nil && st.IsDir() {
		if s, err := a.openStore(); err == nil {
			p.Quota, p.StoreKind = s.Quota(), s.FS().Type
			if u, err := s.Usage(); err == nil {
				used = u.Used
			}
			if all, err := s.List(); err == nil {
				p.Here = slices.ContainsFunc(all, func(i store.ImageInfo) bool { return i.Key == img.Digest.Hex() })
			}
			_ = s.Close()
		} else {
			p.add(levelFail, "the store cannot be used: %v", err)
		}
	}
	var fs unix.Statfs_t
	if unix.Statfs(existing(dir), &fs) == nil {
		p.Free = int64(fs.Bavail) * fs.Bsize
	}
	switch {
	case p.Here:
		p.add(levelNote, "the store has it already, or part of it")
	case p.Free > 0 && p.Needed > p.Free:
		p.add(levelWarn, "%s needs %s and has %s free: what does not fit is fetched again each time it is read", dir, megabytes(p.Needed), megabytes(p.Free))
	}
	if p.Quota > 0 && p.Needed > p.Quota {
		p.add(levelWarn, "it is larger than the store's quota of %s: parts are evicted and fetched again", megabytes(p.Quota))
	} else if p.Quota > 0 && !p.Here && used+p.Needed > p.Quota {
		p.add(levelNote, "other images will be evicted from the store (%s of %s used)", megabytes(used), megabytes(p.Quota))
	}
}

// existing is dir or the nearest directory above it that exists.
func existing(dir string) string {
	for dir != "/" && dir != "." {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	return dir
}

func (p *preflight) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "image\t%s\n", p.Image)
	if p.Digest != "" {
		n := 0
		for _, l := range p.Layers {
			n += l.Times
		}
		fmt.Fprintf(tw, "digest\t%s, %s\n", p.Digest, p.Platform)
		fmt.Fprintf(tw, "size\t%s in %d layers, the largest %s; about %s unpacked\n", megabytes(p.Size), n, megabytes(p.Largest), megabytes(p.Unpacked))
		fmt.Fprintf(tw, "layer limits\tdocker %d, overlayfs of this kernel %s, muster none\n", dockerLayers, zeroUnknown(p.OverlayLimit))
		if p.Index != "" {
			fmt.Fprintf(tw, "index\t%s, %s to fetch\n", short(p.Index), megabytes(p.IndexSize))
		} else {
			fmt.Fprintf(tw, "index\tnone: %s\n", p.IndexReason)
		}
		fmt.Fprintf(tw, "first start\tstreams %s, about %s at %g Mbit/s; plain pull and unpack about %s\n",
			megabytes(p.FirstPull), seconds(p.FirstPullTime), p.Link, seconds(p.PlainTime))
		fmt.Fprintf(tw, "store\t%s: needs up to %s, %s free\n", p.StoreDir, megabytes(p.Needed), megabytes(p.Free))
	}
	_ = tw.Flush()
	if len(p.Layers) > 0 {
		fmt.Fprintln(w)
		fmt.Fprintln(tw, "LAYER\tSIZE\tKIND\tFIRST START\t")
		hidden, bytes := 0, int64(0)
		for _, l := range p.Layers {
			if len(p.Layers) > manyLayers && l.First == firstWhole {
				hidden += l.Times
				bytes += l.Size
				continue
			}
			times := ""
			if l.Times > 1 {
				times = fmt.Sprintf("%d times", l.Times)
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", short(l.Digest), megabytes(l.Size), l.Kind, l.First, times)
		}
		_ = tw.Flush()
		if hidden > 0 {
			fmt.Fprintf(w, "and %d small layers, %s together\n", hidden, megabytes(bytes))
		}
	}
	fmt.Fprintln(w)
	for _, f := range p.Findings {
		fmt.Fprintf(w, "%s: %s\n", f.Level, f.Text)
	}
}

func zeroUnknown(n int) string {
	if n == 0 {
		return "unknown"
	}
	return fmt.Sprint(n)
}
