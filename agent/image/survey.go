package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/ztoc"
)

// A Surveyed image is resolved, and of each layer is known what can be known without fetching it. It is what one host of a
// job finds out for all.
type Surveyed struct {
	Image origin.Image
	// Tables are the layers' packed tables, one for each layer; nil where it has to be built.
	Tables [][]byte
	// Reasons say why there is none.
	Reasons []string
	Profile []byte // start-up profile, encoded; nil: none is known
	Offline bool   // as Image.Offline
	Bytes   int64  // that came from the origin
}

// Survey does the first half of Open: it resolves the image and looks for views of its layers. It pulls nothing, unless all that is missing are
// the tables of layers below WholeBelow, which indexes leave out: with them the image can be mounted before it is there. Of Options it
// heeds Repo, Store, Platform, SpanSize, Tool, NoIndex, Requests, OnFetch and Log.
func Survey(ctx context.Context, opts Options) (*Surveyed, error) {
	o := &opener{Options: opts, surveying: true}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Progress = new(Progress)
	defer o.maps.close()
	s := &Surveyed{}
	var err error
	if s.Offline, err = o.resolve(ctx); err != nil {
		return nil, err
	}
	s.Image = o.img
	o.derived = derivedOrigin{o: o, from: map[ztoc.Digest]origin.Descriptor{}}
	o.chain = o.newChain(&o.derived)
	defer o.closeChains() //nolint:errcheck // nothing is kept open by it
	views, err := o.findViews(ctx)
	if err != nil {
		return nil, err
	}
	if onlySmallMissing(views) {
		if err := o.pullMissing(ctx, views); err != nil {
			return nil, err
		}
	}
	for i, v := range views {
		var packed []byte
		if v.ztoc != nil && v.ztoc.Blob == o.img.Layers[i].Digest {
			if packed, err = ztoc.Pack(v.ztoc); err != nil {
				packed, v.report.Reason = nil, err.Error()
			}
		}
		s.Tables = append(s.Tables, packed)
		s.Reasons = append(s.Reasons, v.report.Reason)
	}
	if !slices.ContainsFunc(views, func(v *view) bool { return v.ztoc == nil }) { // the name of a profile depends on the views
		key := startKey(o.img, views)
		o.fetchProfile(ctx, o.index, key)
		s.Profile = (&Image{o: o, startKey: key}).keptProfile()
	}
	s.Bytes = o.documents + o.chain.Stats().OriginBytes
	return s, nil
}

// onlySmallMissing reports whether some layers have a table, and those without are below WholeBelow, and few bytes altogether.
func onlySmallMissing(views []*view) bool {
	if !slices.ContainsFunc(views, func(v *view) bool { return v.ztoc != nil }) {
		return false
	}
	var bytes int64
	for _, v := range views {
		if v.ztoc == nil {
			if v.report.Size >= WholeBelow {
				return false
			}
			bytes += v.report.Size
		}
	}
	return bytes <= maxSurveyed
}

// maxSurveyed bounds what Survey pulls: beyond, the hosts of a job that build tables do it in less time than one alone.
const maxSurveyed = 4 * WholeBelow

// EncodeImage writes a resolved image so that DecodeImage of another host reads it.
func EncodeImage(img origin.Image) ([]byte, error) { return json.Marshal(img) }

// DecodeImage reads what EncodeImage wrote, and checks that it is the image of that manifest.
func DecodeImage(b []byte, manifest ztoc.Digest) (img origin.Image, err error) {
	if err := json.Unmarshal(b, &img); err != nil {
		return img, fmt.Errorf("resolved image: %w", err)
	}
	if img.Digest != manifest || ztoc.DigestOf(img.Manifest) != manifest || len(img.Layers) == 0 {
		return img, fmt.Errorf("resolved image: manifest %s: %w", manifest, ztoc.ErrMismatch)
	}
	return img, nil
}

// Keep has the store know what the image's reference resolved to, so that Open finds it there by name@digest and asks nobody.
func Keep(st *store.Store, img origin.Image, platform string) {
	o := &opener{Options: Options{Store: st, Platform: platform, Log: slog.Default()}, img: img}
	o.keepImage(img.Ref)
}

// KeepTable has the store know a layer's table in packed form, after checking that it is one and about that layer.
func KeepTable(st *store.Store, layer origin.Descriptor, packed []byte) error {
	z, err := ztoc.Unpack(packed)
	if err != nil {
		return err
	}
	if z.Blob != layer.Digest || z.BlobSize != layer.Size {
		return fmt.Errorf("%w: a table of blob %s of %d bytes", ztoc.ErrIndex, z.Blob, z.BlobSize)
	}
	return st.PutBytes(store.KindZtoc, layer.Digest.Hex(), packed)
}

// KeptTable is the packed table that the store has for a layer, or nil.
func KeptTable(st *store.Store, layer origin.Descriptor) []byte {
	f, err := st.Get(store.KindZtoc, layer.Digest.Hex())
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxIndexBlob))
	if err != nil {
		return nil
	}
	if z, err := ztoc.Unpack(b); err != nil || z.Blob != layer.Digest || z.BlobSize != layer.Size {
		return nil
	}
	return b
}

// BuildTable builds a layer's packed table from its bytes in order, all of which it reads, and checks their digest
// (ztoc.ErrMismatch). A layer that has no restart points is ErrDerive: each host makes its own view of it, in Open.
func BuildTable(r io.Reader, layer origin.Descriptor, o Options, cores int) ([]byte, error) {
	opts := (&opener{Options: o}).buildOptions(layer)
	opts.Cores = cores
	z, _, err := ztoc.Build(r, opts)
	if errors.Is(err, ztoc.ErrNoRestart) {
		return nil, fmt.Errorf("layer %s: %w: %w", layer.Digest, ErrDerive, err)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", layer.Digest, err)
	}
	if z.Blob == "" {
		z.Blob = layer.Digest
	}
	return ztoc.Pack(z)
}

// ErrDerive says that a layer has to be re-framed to be mounted, which Open does where the layer is complete.
var ErrDerive = errors.New("the layer has no restart points")
