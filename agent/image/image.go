package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// ErrNotLazy says that Options.RequireLazy was given and a layer would have to be fetched whole.
var ErrNotLazy = errors.New("the image cannot be mounted before it is fetched")

// Options say which image is opened and with what means.
type Options struct {
	Repo         origin.Repository
	Store        *store.Store
	Platform     string            // "os/arch[/variant]", "" for this machine's
	Presentation tree.Presentation // how ids look through the mount
	// Command is what will be run, for the guess of what it touches first. Nil: the image's own.
	Command []string
	// SpanSize is how many inflated bytes lie between restart points of tables built here. Small ones
	// make demand reads cheap and tables large. 0: ztoc.DefaultSpanSize.
	SpanSize int64
	// RequireLazy refuses an image (ErrNotLazy) of which a layer of 4 MiB or more would be fetched whole.
	RequireLazy bool
	// NoIndex passes over indexes beside the image, as if there were none.
	NoIndex bool
	// Table is the table file of a mount that is alive, for the successor of its server: it is used as it is, and
	// never built again. Nil: as usual.
	Table    *os.File
	Tool     string            // what tables built here say they were built by
	Progress *Progress         // may be nil
	Requests int               // to the origin at once; 0: the chain's default
	OnFetch  func(fetch.Event) // told of each request to the origin; may be nil
	// AskAlways asks the origin also where the store knows what a digest names: only the origin can say whether its credentials may have it.
	AskAlways bool
	// Unclaimed leaves it to Repo to keep the processes of this host from fetching the same twice: it is the agent, which claims what it
	// fetches itself.
	Unclaimed bool
	// Temporary, Patience and PatientPrefetch are fetch.Options'.
	Temporary       func(error) bool
	Patience        time.Duration
	PatientPrefetch bool
	Log             *slog.Logger
}

// An Image is an opened image: everything a mount needs. Close it after the mount has ended.
type Image struct {
	Resolved origin.Image
	Layers   []LayerReport
	Offline  bool // the origin could not be asked; the manifest is the one kept from an earlier time
	Tree     tree.Totals
	Notes    []string // entries that are not in the tree, and why

	o        *opener
	table    *tree.Table
	file     *os.File // that table lies in; nil when it lies in memory
	config   lazyfs.Config
	start    string
	startKey string
}

// opener is Open under way.
type opener struct {
	Options
	img     origin.Image
	chain   *fetch.Chain
	derived derivedOrigin
	maps    mappings
	// documents is the bytes of manifests, indexes and their tables that came from the origin. Open adds to it
	// from one goroutine at a time.
	documents int64
	index     *foundIndex // set by findViews when an index was needed and found
	surveying bool        // nothing is pulled
}

// Open opens an image; see the package comment. It may pull whole layers, and ends with ctx.
func Open(ctx context.Context, opts Options) (_ *Image, err error) {
	o := &opener{Options: opts}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Progress == nil {
		o.Progress = new(Progress)
	}
	im := &Image{o: o}
	defer func() {
		if err != nil {
			im.Close()
		}
	}()
	o.Progress.phase("resolve")
	if im.Offline, err = o.resolve(ctx); err != nil {
		return nil, err
	}
	im.Resolved = o.img
	o.derived = derivedOrigin{o: o, from: map[ztoc.Digest]origin.Descriptor{}}
	o.chain = o.newChain(&o.derived)
	o.Progress.watch(o.chain)

	o.Progress.phase("index")
	views, err := o.findViews(ctx)
	if err != nil {
		return nil, err
	}
	if o.RequireLazy {
		if err := requireLazy(o.img.Ref.String(), views); err != nil {
			return nil, err
		}
	}
	o.Progress.phase("pull")
	if err := o.pullMissing(ctx, views); err != nil {
		return nil, err
	}
	o.Progress.phase("table")
	err = im.openTable(views)
	if errors.Is(err, tree.ErrEntries) || errors.Is(err, ztoc.ErrInvalid) {
		// A table somebody else made has entries that cannot be true. Ours will not.
		o.Log.Warn("indexes that were found are not used", "image", o.img.Ref, "cause", err)
		if err = o.pullAgain(ctx, views, err); err == nil {
			err = im.openTable(views)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", o.img.Ref, err)
	}
	im.startKey = startKey(o.img, views)
	o.fetchProfile(ctx, o.index, im.startKey)
	im.record(views)
	im.configure(views)
	o.Progress.phase("ready")
	return im, nil
}

// newChain makes a chain store → from.
func (o *opener) newChain(from fetch.Origin) *fetch.Chain {
	return fetch.New(fetch.Options{
		Store: fetch.StoreFunc(func(ref ztoc.BlobRef) (fetch.Blob, error) {
			b, err := o.Store.Blob(ref)
			if err == nil && o.Unclaimed {
				return unclaimed{b}, nil
			}
			return b, err
		}),
		Origin:    from,
		Requests:  o.Requests,
		Temporary: o.Temporary,
		Patience:  o.Patience,
		OnEvent:   o.OnFetch,

		PatientPrefetch: o.PatientPrefetch,
	})
}

// closeChains ends what is being fetched.
func (o *opener) closeChains() error {
	if o.chain == nil {
		return nil
	}
	return errors.Join(o.chain.Close(), o.derived.Close())
}

// An unclaimed blob is one that no fetch.Claimer can be seen in.
type unclaimed struct{ fetch.Blob }

// resolve fills o.img from the origin, or from what was kept when the origin cannot be reached.
func (o *opener) resolve(ctx context.Context) (offline bool, err error) {
	ref := o.Repo.Reference()
	if ref.Digest != "" && !o.AskAlways {
		// A digest never means anything else, so what is kept needs no asking.
		if o.img, err = o.keptImage(ref); err == nil {
			return false, nil
		}
	}
	o.img, err = o.Repo.Resolve(ctx, o.Platform)
	if err == nil {
		o.documents += int64(len(o.img.Manifest) + len(o.img.Config) + len(o.img.IndexManifest))
		o.keepImage(ref)
		return false, nil
	}
	if !errors.Is(err, origin.ErrUnreachable) && !errors.Is(err, origin.ErrTooMany) {
		return false, err
	}
	kept, keptErr := o.keptImage(ref)
	if keptErr != nil {
		return false, err
	}
	o.img = kept
	o.Log.Warn("the origin cannot be asked; using the image as it was resolved before", "image", ref, "digest", kept.Digest, "cause", err)
	return true, nil
}

func (o *opener) refKey(ref origin.Reference) string {
	if ref.Digest != "" {
		ref.Tag = "" // says nothing beside a digest: name@digest is found under what name:tag came to
	}
	return store.Key(ref.String() + " " + cmp.Or(o.Platform, origin.DefaultPlatform()))
}

func (o *opener) keptImage(ref origin.Reference) (origin.Image, error) {
	var img origin.Image
	f, err := o.Store.Get(store.KindRef, o.refKey(ref))
	if err != nil {
		return img, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4*origin.MaxDocument))
	if err != nil {
		return img, err
	}
	if err := json.Unmarshal(b, &img); err != nil {
		return img, err
	}
	if img.Digest != ztoc.DigestOf(img.Manifest) || len(img.Layers) == 0 {
		return img, fmt.Errorf("kept manifest of %s: %w", ref, ztoc.ErrMismatch)
	}
	img.Ref = ref
	return img, nil
}

func (o *opener) keepImage(ref origin.Reference) {
	// By digest too: what once was resolved is then opened again without asking anybody.
	for _, r := range []origin.Reference{ref, ref.WithDigest(o.img.Digest)} {
		err := o.Store.Put(store.KindRef, o.refKey(r), func(w io.Writer) error { return json.NewEncoder(w).Encode(o.img) })
		if err != nil {
			o.Log.Debug("a resolved reference is not kept", "image", r, "cause", err)
		}
	}
}

// openTable maps the kept table of the image, or builds it.
func (im *Image) openTable(views []*view) error {
	if im.o.Table != nil {
		return im.mapTable(im.o.Table)
	}
	key := tableKey(views)
	if f, err := im.o.Store.Get(store.KindTable, key); err == nil {
		if err = im.mapTable(f); err == nil {
			return nil
		}
		im.o.Log.Warn("building a table again", "cause", err)
	}
	layers := make([]tree.Layer, len(views))
	for i, v := range views {
		entries, err := v.entries()
		if err != nil {
			return fmt.Errorf("layer %s: %w", v.report.Digest, err)
		}
		layers[i] = tree.Layer{
			LayerRef: tree.LayerRef{Blob: v.blob(), Ztoc: v.report.Digest.Hex(), Size: v.ztoc.InflatedSize},
			Entries:  entries,
		}
	}
	put := im.o.Store.Put(store.KindTable, key, func(w io.Writer) error {
		stats, err := tree.Build(w, layers, tree.Options{})
		for _, n := range stats.Notes {
			im.Notes = append(im.Notes, fmt.Sprintf("layer %d, %q: %s", n.Layer, n.Name, n.Reason))
		}
		return err
	})
	if put == nil {
		f, err := im.o.Store.Get(store.KindTable, key)
		if err != nil {
			return err
		}
		return im.mapTable(f)
	}
	if !errors.Is(put, store.ErrNoSpace) {
		return put
	}
	// The mount works from memory; only the next one has to build again.
	var buf memory
	if _, err := tree.Build(&buf, layers, tree.Options{}); err != nil {
		return err
	}
	im.table, put = tree.Open(buf)
	return put
}

// mapTable opens the table that f holds; f is the image's from here on.
func (im *Image) mapTable(f *os.File) error {
	b, err := im.o.maps.add(f)
	if err == nil {
		im.table, err = tree.Open(b)
	}
	if err != nil {
		_ = f.Close()
		return err
	}
	im.file = f
	return nil
}

// tableKey names a table by everything it depends on: which spans the offsets in it count from.
func tableKey(views []*view) string {
	s := "table 1"
	for _, v := range views {
		s += " " + v.id()
	}
	return store.Key(s)
}

// record tells the store what belongs to the image, for cache ls, gc and rm.
func (im *Image) record(views []*view) {
	rec := store.Image{
		Key:       im.Resolved.Digest.Hex(),
		Reference: im.Resolved.Ref.String(),
		Files: []store.File{
			{Kind: store.KindTable, Key: tableKey(views)},
			{Kind: store.KindRef, Key: im.o.refKey(im.Resolved.Ref)},
			{Kind: store.KindRef, Key: im.o.refKey(im.Resolved.Ref.WithDigest(im.Resolved.Digest))},
			{Kind: store.KindProfile, Key: im.startKey},
			{Kind: store.KindWarm, Key: im.startKey},
		},
	}
	for i, v := range views {
		rec.Blobs = append(rec.Blobs, im.Resolved.Layers[i].Ref())
		if v.blob().Digest != v.report.Digest {
			rec.Blobs = append(rec.Blobs, v.blob())
		}
		rec.Files = append(rec.Files, store.File{Kind: store.KindZtoc, Key: v.report.Digest.Hex()})
		im.Layers = append(im.Layers, v.report)
	}
	if err := im.o.Store.PutImage(rec); err != nil {
		im.o.Log.Debug("the image is not recorded in the store", "cause", err)
	}
}

// configure fills the lazyfs configuration.
func (im *Image) configure(views []*view) {
	im.Tree = im.table.Totals()
	im.config = lazyfs.Config{
		Table:        im.table,
		Blobs:        im.o.chain,
		Presentation: im.o.Presentation,
		Log:          im.o.Log,
		OnProfile:    im.keepProfile,
		KeepWarm: func(write func(io.Writer) error) error {
			err := im.o.Store.Put(store.KindWarm, im.startKey, write)
			if errors.Is(err, store.ErrNoSpace) {
				return nil // the store has said so
			}
			return err
		},
	}
	im.config.Backing = newBacking(im.o.Store, views)
	for _, v := range views {
		im.config.Layers = append(im.config.Layers, lazyfs.Layer{Ref: v.blob(), Ztoc: v.ztoc})
	}
	im.start = im.loadProfile()
}

// Config is what a lazyfs.Server needs to serve the image. Each call gives the same means: one server
// at a time.
func (im *Image) Config() lazyfs.Config { return im.config }

// Table is the image's tree.
func (im *Image) Table() *tree.Table { return im.table }

// TableFile is the file that the table lies in, nil when it lies in memory. It stays open until Close.
func (im *Image) TableFile() *os.File { return im.file }

// Start says what the mount fetches ahead by: "warm", "profile", "guess" or "nothing".
func (im *Image) Start() string { return im.start }

// Fetched is what the image has cost so far.
func (im *Image) Fetched() fetch.Stats {
	if im.o.chain == nil {
		return fetch.Stats{}
	}
	return im.o.chain.Stats()
}

// Close ends what is still being fetched and releases the mappings. No server may use the image any
// more.
func (im *Image) Close() error {
	err := im.o.closeChains()
	if im.config.Warm != nil {
		im.config.Warm.Close()
	}
	im.o.maps.close()
	if im.file != nil {
		_ = im.file.Close()
	}
	return err
}

// A Summary is an opened image in numbers, for --json and reports.
type Summary struct {
	Image    string        `json:"image"`
	Digest   ztoc.Digest   `json:"digest"`
	Platform string        `json:"platform"`
	Offline  bool          `json:"offline"`
	Start    string        `json:"start"`
	Layers   []LayerReport `json:"layers"`
	Inodes   int64         `json:"inodes"`
	Notes    []string      `json:"notes,omitempty"`
	Took     []Phase       `json:"phases"`
	Fetched  fetch.Stats   `json:"fetched"`
	// Bytes is everything that came from the origin: manifests, indexes and ranges of layers.
	Bytes int64 `json:"origin_bytes"`
}

// Summary says how the image was opened and what it cost up to now.
func (im *Image) Summary() Summary {
	fetched := im.Fetched()
	return Summary{
		Image: im.Resolved.Ref.String(), Digest: im.Resolved.Digest, Platform: im.Resolved.Platform,
		Offline: im.Offline, Start: im.start, Layers: im.Layers, Inodes: im.Tree.Inodes, Notes: im.Notes,
		Took: im.o.Progress.Phases(), Fetched: fetched,
		Bytes: fetched.OriginBytes + im.o.documents,
	}
}

// memory is a growing byte slice that can be written to.
type memory []byte

func (m *memory) Write(p []byte) (int, error) {
	*m = append(*m, p...)
	return len(p), nil
}

// A Phase is a step of opening an image and how long it took.
type Phase struct {
	Name string        `json:"name"`
	Took time.Duration `json:"took"`
}
