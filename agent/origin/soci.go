package origin

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-hpc/muster/ztoc"
)

// Media types and annotations of SOCI (awslabs/soci-snapshotter).
const (
	MediaTypeSOCIv1   = "application/vnd.amazon.soci.index.v1+json"
	MediaTypeSOCIv2   = "application/vnd.amazon.soci.index.v2+json"
	MediaTypeZtoc     = "application/octet-stream"
	MediaTypePrefetch = "application/vnd.amazon.soci.prefetch.v1+json"

	annLayerDigest = "com.amazon.soci.image-layer-digest"
	annTool        = "com.amazon.soci.build-tool-identifier"
	annIndexDigest = "com.amazon.soci.index-digest"
	annImageDigest = "com.amazon.soci.image-manifest-digest"
)

// An Index is a SOCI index found beside an image: the tables of contents of some or all of its layers.
type Index struct {
	Version  int // 1: found by referrers or tag; 2: named by the image or its index
	Digest   ztoc.Digest
	Bytes    int64                      // of its manifest
	Tool     string                     // who built it
	Others   []Descriptor               // layers of other types, in order: what tools beside SOCI put there
	Ztocs    map[ztoc.Digest]Descriptor // by layer digest; layers without one are not an error
	Prefetch map[ztoc.Digest]Descriptor // SOCI's lists of spans to fetch first, by layer digest
}

// Size is the bytes of all ztocs of the index.
func (x Index) Size() int64 {
	var n int64
	for _, d := range x.Ztocs {
		n += d.Size
	}
	return n
}

// Empty reports whether x has nothing that could be used.
func (x Index) Empty() bool { return len(x.Ztocs) == 0 && len(x.Others) == 0 }

// A Found is an index that lies beside an image, or would if Reason did not say why it cannot be used.
type Found struct {
	Index
	Reason string
}

// FindIndex looks for a SOCI index of img: the one that the image names (version 2), else the one that
// refers to it (version 1) and covers most of its layers' bytes. None, a dangling name or a broken index is
// no error: the Index is empty and reason tells people why. The error is the end of ctx only.
func FindIndex(ctx context.Context, repo Repository, img Image) (x Index, reason string, err error) {
	size := map[ztoc.Digest]int64{}
	for _, l := range img.Layers {
		size[l.Digest] = l.Size
	}
	list, why, err := ListIndexes(ctx, repo, img)
	covered := int64(-1)
	var reasons []string
	for _, f := range list {
		if f.Reason != "" {
			reasons = append(reasons, f.Reason)
			continue
		}
		if f.Version == 2 {
			return f.Index, "", nil
		}
		// SOCI leaves open which of several is meant.
		var n int64
		for l := range f.Ztocs {
			n += size[l]
		}
		if n > covered {
			x, covered = f.Index, n
		}
	}
	if err != nil || !x.Empty() {
		return x, "", err
	}
	if why != "" {
		reasons = append(reasons, why)
	}
	return x, strings.Join(reasons, "; "), nil
}

// ListIndexes looks for all SOCI indexes of img, the one that it names first, then those that refer to it by
// digest, so that all hosts of a job see the same order. why says why there are no more; the error is the end
// of ctx only.
func ListIndexes(ctx context.Context, repo Repository, img Image) (list []Found, why string, err error) {
	if name := indexName(img); name != "" {
		list = append(list, readNamed(ctx, repo, img, name))
	}
	refs, err := repo.Referrers(ctx, img.Digest, MediaTypeSOCIv1)
	switch {
	case ctx.Err() != nil:
		return nil, "", context.Cause(ctx)
	case err != nil:
		return list, "referrers: " + brief(err), nil
	case len(refs.Manifests) == 0:
		return list, refs.Reason, nil
	}
	slices.SortFunc(refs.Manifests, func(a, b Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	for _, d := range refs.Manifests[:min(len(refs.Manifests), maxIndexes)] {
		f := Found{Index: Index{Version: 1, Digest: d.Digest}}
		if x, err := readIndex(ctx, repo, img, d.Digest, 1); err != nil {
			f.Reason = fmt.Sprintf("SOCI index %s: %s", d.Digest, brief(err))
		} else {
			f.Index = x
		}
		list = append(list, f)
	}
	if ctx.Err() != nil {
		return nil, "", context.Cause(ctx)
	}
	return list, "", nil
}

// maxIndexes bounds how many referring indexes are looked at.
const maxIndexes = 8

// indexName is the digest of the index that an image names. A conversion leaves it on the manifest and its
// descriptor; tools that copy one platform only keep it and drop the index.
func indexName(img Image) string {
	name := cmp.Or(img.Annotations[annIndexDigest], img.IndexDescriptor.Annotations[annIndexDigest])
	if name != "" || len(img.IndexManifest) == 0 {
		return name
	}
	// An index in the same OCI index may name the manifest, not the other way round.
	if m, err := parseManifest(MediaTypeIndex, img.IndexManifest); err == nil {
		for _, d := range m.manifests {
			if d.ArtifactType == MediaTypeSOCIv2 && d.Annotations[annImageDigest] == string(img.Digest) {
				name = string(d.Digest)
			}
		}
	}
	return name
}

func readNamed(ctx context.Context, repo Repository, img Image, name string) Found {
	f := Found{Index: Index{Version: 2}}
	d, err := ztoc.ParseDigest(name)
	if err != nil {
		f.Reason = "the image names a SOCI index by something that is no digest"
		return f
	}
	f.Digest = d
	if x, err := readIndex(ctx, repo, img, d, 2); err != nil {
		f.Reason = fmt.Sprintf("the SOCI index %s that the image names: %s", d, brief(err))
	} else {
		f.Index = x
	}
	return f
}

// maxZtoc bounds what an index may claim of one ztoc, bytes.
const maxZtoc = 1 << 30

func readIndex(ctx context.Context, repo Repository, img Image, d ztoc.Digest, version int) (Index, error) {
	doc, err := repo.Manifest(ctx, string(d))
	if err != nil {
		return Index{}, err
	}
	m, err := parseManifest(doc.MediaType, doc.Body)
	if err != nil {
		return Index{}, err
	}
	want := MediaTypeSOCIv1
	if version == 2 {
		want = MediaTypeSOCIv2
	}
	if m.index || m.config.MediaType != want && m.artifactType != want {
		return Index{}, fmt.Errorf("%w: not a SOCI index of version %d", ErrProtocol, version)
	}
	if version == 1 && m.subject != "" && m.subject != img.Digest {
		return Index{}, fmt.Errorf("%w: it is about another image", ErrProtocol)
	}
	layers := map[ztoc.Digest]bool{}
	for _, l := range img.Layers {
		layers[l.Digest] = true
	}
	x := Index{Version: version, Digest: d, Bytes: int64(len(doc.Body)), Tool: clean(m.annotations[annTool]), Ztocs: map[ztoc.Digest]Descriptor{}, Prefetch: map[ztoc.Digest]Descriptor{}}
	for _, z := range m.layers {
		if z.Size <= 0 || z.Size > maxZtoc {
			continue
		}
		l, err := ztoc.ParseDigest(z.Annotations[annLayerDigest])
		known := err == nil && layers[l]
		switch {
		case z.MediaType != MediaTypeZtoc && z.MediaType != MediaTypePrefetch:
			x.Others = append(x.Others, z)
		case known && z.MediaType == MediaTypeZtoc:
			x.Ztocs[l] = z
		case known:
			x.Prefetch[l] = z
		}
	}
	if x.Empty() {
		return Index{}, fmt.Errorf("%w: it has no ztoc for a layer of this image", ErrProtocol)
	}
	return x, nil
}
