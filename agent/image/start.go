package image

import (
	"slices"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/ztoc"
)

// kept is the opener and the views of an image whose tables are all in the store; false when one is missing.
func kept(st *store.Store, img origin.Image) (*opener, []*view, bool) {
	o := &opener{Options: Options{Store: st}, img: img}
	var views []*view
	for _, l := range img.Layers {
		z, err := o.mapZtoc(l.Digest)
		if err != nil {
			o.maps.close()
			return nil, nil, false
		}
		views = append(views, &view{ztoc: z, report: LayerReport{Digest: l.Digest}})
	}
	return o, views, true
}

// KeepProfile has the store know a start-up profile of an image whose tables it has, unless it knows one. Mounts use it.
func KeepProfile(st *store.Store, img origin.Image, profile []byte) error {
	if _, err := lazyfs.DecodeProfile(profile); err != nil {
		return err
	}
	o, views, ok := kept(st, img)
	if !ok {
		return nil
	}
	defer o.maps.close()
	key := startKey(img, views)
	if f, err := st.Get(store.KindProfile, key); err == nil {
		return f.Close()
	}
	return st.PutBytes(store.KindProfile, key, profile)
}

// StartRanges is what of the layers' blobs a program needs first, by the profile that the store has of the image, in its order within each
// blob; false when none is known. Layers of which each host has a blob of its own are left out.
func StartRanges(st *store.Store, img origin.Image) (map[ztoc.Digest][]ztoc.Range, bool) {
	o, views, ok := kept(st, img)
	if !ok {
		return nil, false
	}
	defer o.maps.close()
	p, err := lazyfs.DecodeProfile((&Image{o: o, startKey: startKey(img, views)}).keptProfile())
	if err != nil || len(p.Ranges) == 0 {
		return nil, false
	}
	out := map[ztoc.Digest][]ztoc.Range{}
	for _, r := range p.Ranges {
		if r.Layer < 0 || r.Layer >= len(views) || views[r.Layer].ztoc.Blob != img.Layers[r.Layer].Digest {
			continue
		}
		z, d := views[r.Layer].ztoc, img.Layers[r.Layer].Digest
		lo, hi := z.SpansOf(ztoc.Range{Start: r.Start, End: r.End})
		if lo >= hi {
			continue
		}
		out[d] = append(out[d], ztoc.Range{Start: z.Span(lo).Blob.Start, End: z.Span(hi - 1).Blob.End})
	}
	for d, list := range out {
		slices.SortFunc(list, func(a, b ztoc.Range) int { return int(max(-1, min(1, a.Start-b.Start))) })
		n := 0
		for _, r := range list[1:] {
			if r.Start <= list[n].End {
				list[n].End = max(list[n].End, r.End)
				continue
			}
			n++
			list[n] = r
		}
		out[d] = list[:n+1]
	}
	return out, true
}
