package agent

import (
	"cmp"
	"slices"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// Blobs is what a stage of an image brings to each host, in the order of the JobSpec, and the content of those blobs that no registry has.
func Blobs(found *image.Surveyed) (blobs []planner.Blob, content map[ztoc.Digest][]byte, err error) {
	content = map[ztoc.Digest][]byte{}
	add := func(k planner.Kind, b []byte) ztoc.Digest {
		d := ztoc.DigestOf(b)
		if content[d] == nil && len(b) > 0 {
			content[d] = b
			blobs = append(blobs, planner.Blob{BlobRef: ztoc.BlobRef{Digest: d, Size: int64(len(b))}, Kind: k})
		}
		return d
	}
	resolved, err := image.EncodeImage(found.Image)
	if err != nil {
		return nil, nil, err
	}
	add(planner.Meta, resolved)
	if len(found.Profile) > 0 {
		add(planner.Meta, found.Profile)
	}
	var layers []planner.Blob
	for i, l := range found.Image.Layers {
		b := planner.Blob{BlobRef: l.Ref(), Kind: planner.Layer}
		if slices.ContainsFunc(layers, func(o planner.Blob) bool { return o.Digest == b.Digest }) {
			continue
		}
		if t := found.Tables[i]; t != nil {
			b.Ztoc = add(planner.Table, t)
		}
		layers = append(layers, b)
	}
	// What still has to be inflated comes first, and of that the largest: it decides when all can be mounted.
	slices.SortStableFunc(layers, func(x, y planner.Blob) int {
		if (x.Ztoc == "") != (y.Ztoc == "") {
			return cmp.Compare(len(x.Ztoc), len(y.Ztoc))
		}
		if x.Ztoc != "" {
			return 0
		}
		return cmp.Compare(y.Size, x.Size)
	})
	return append(blobs, layers...), content, nil
}
