package images

import (
	"slices"
	"strings"
)

// Plain says which image umoci 0.4.7 can unpack to get the tree of name, for comparing with what a
// mount shows: name itself, or gzip, whose layers have the same archives. It is empty when there is none:
// for broken images, torture-odd, mixed and platform indexes. What umoci refuses besides:
//
//   - zstd, in any form, and Docker's media types;
//   - gzip-extras: a header CRC together with a name, which it sums wrongly;
//   - gzip-zeros: zeros behind the last member, which it takes for another header.
//
// The layers of eStargz and of the stargz-snapshotter's zstd:chunked hold [Markers] besides.
func Plain(name string) string {
	switch name {
	case "torture-odd", "docker", "mixed", "multi-arch", "arm64-only":
		return ""
	case "gzip-extras", "gzip-zeros":
		return "gzip"
	}
	switch {
	case strings.HasPrefix(name, "broken-"), !slices.Contains(Names(), name):
		return ""
	case strings.HasPrefix(name, "zstd-"):
		return "gzip"
	}
	return name
}

// Markers are the files that the stargz-snapshotter's builder adds to a layer: a landmark for
// prefetching and, in a gzip layer, the table of contents.
var Markers = []string{".no.prefetch.landmark", "stargz.index.json"}
