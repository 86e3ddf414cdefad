package origin

import (
	"cmp"
	"context"
	"fmt"
	"slices"

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
	Tool     string                     // who built it
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

// FindIndex looks for a SOCI index of img: the one that the image names (version 2), else the one that
// refers to it (version 1) and covers most of its layers' bytes. None, a dangling name or a broken index is
// no error: the Index is empty and reason tells people why. The error is the end of ctx only.
func FindIndex(ctx context.Context, repo Repository, img Image) (x Index, reason string, err error) {
	x, why2 := findV2(ctx, repo, img)
	if len(x.Ztocs) > 0 {
		return x, "", nil
	}
	x, why1 := findV1(ctx, repo, img)
	switch {
	case ctx.Err() != nil:
		return Index{}, "", context.Cause(ctx)
	case len(x.Ztocs) > 0:
		return x, "", nil
	case why2 != "":
		return Index{}, why2 + "; " + why1, nil
	}
	return Index{}, why1, nil
}

// findV2 follows the annotation that a conversion leaves on the manifest and its descriptor. Tools that
// copy one platform only keep the annotation and drop the index.
func findV2(ctx context.Context, repo Repository, img Image) (Index, string) {
	name := cmp.Or(img.Annotations[annIndexDigest], img.IndexDescriptor.Annotations[annIndexDigest])
	if name == "" {
		// An index in the same OCI index may name the manifest, not the other way round.
		if m, err := parseManifest(MediaTypeIndex, img.IndexManifest); len(img.IndexManifest) > 0 && err == nil {
			for _, d := range m.manifests {
				if d.ArtifactType == MediaTypeSOCIv2 && d.Annotations[annImageDigest] == string(img.Digest) {
					name = string(d.Digest)
				}
			}
		}
	}
	if name == "" {
		return Index{}, ""
	}
	d, err := ztoc.ParseDigest(name)
	if err != nil {
		return Index{}, "the image names a SOCI index by something that is no digest"
	}
	x, err := readIndex(ctx, repo, img, d, 2)
	if err != nil {
		return Index{}, fmt.Sprintf("the SOCI index %s that the image names: %s", d, brief(err))
	}
	return x, ""
}

// maxIndexes bounds how many referring indexes are looked at.
const maxIndexes = 8

func findV1(ctx context.Context, repo Repository, img Image) (Index, string) {
	refs, err := repo.Referrers(ctx, img.Digest, MediaTypeSOCIv1)
	if err != nil {
		return Index{}, "referrers: " + brief(err)
	}
	if len(refs.Manifests) == 0 {
		return Index{}, refs.Reason
	}
	size := map[ztoc.Digest]int64{}
	for _, l := range img.Layers {
		size[l.Digest] = l.Size
	}
	var (
		best    Index
		covered int64 = -1
		why     string
	)
	// SOCI leaves open which of several is meant. Sorted, so that all hosts of a job choose the same.
	slices.SortFunc(refs.Manifests, func(a, b Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	for _, d := range refs.Manifests[:min(len(refs.Manifests), maxIndexes)] {
		x, err := readIndex(ctx, repo, img, d.Digest, 1)
		if err != nil {
			why = fmt.Sprintf("SOCI index %s: %s", d.Digest, brief(err))
			continue
		}
		var n int64
		for l := range x.Ztocs {
			n += size[l]
		}
		if n > covered {
			best, covered = x, n
		}
	}
	return best, why
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
	x := Index{Version: version, Digest: d, Tool: clean(m.annotations[annTool]), Ztocs: map[ztoc.Digest]Descriptor{}, Prefetch: map[ztoc.Digest]Descriptor{}}
	for _, z := range m.layers {
		l, err := ztoc.ParseDigest(z.Annotations[annLayerDigest])
		if err != nil || !layers[l] || z.Size <= 0 || z.Size > maxZtoc {
			continue
		}
		switch z.MediaType {
		case MediaTypeZtoc:
			x.Ztocs[l] = z
		case MediaTypePrefetch:
			x.Prefetch[l] = z
		}
	}
	if len(x.Ztocs) == 0 {
		return Index{}, fmt.Errorf("%w: it has no ztoc for a layer of this image", ErrProtocol)
	}
	return x, nil
}
