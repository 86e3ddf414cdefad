package tree

import (
	"errors"
	"io"

	"github.com/muster-hpc/muster/ztoc"
)

// A Layer is one layer to merge: what the table will call it, and its entries in archive order.
type Layer struct {
	LayerRef
	Entries []ztoc.Entry
}

// Options of Build; the zero value is usable.
type Options struct {
	// Meta is kept in the table as it is, at most 64 KiB: what the mount wants to know of the image.
	Meta []byte
	// MaxInodes bounds the rows of a table; 0 means 16 million. A larger image is refused.
	MaxInodes int
	// MaxNotes bounds Stats.Notes; 0 means 100. More are counted, not kept.
	MaxNotes int
}

// Stats says what Build did.
type Stats struct {
	Totals
	Entries   int    // read from all layers
	Whiteouts int    // whiteout and opaque entries
	Skipped   int    // entries that are not in the tree because they cannot be, each with a note
	Notes     []Note // in the order of the entries
	NotesCut  int    // notes beyond MaxNotes
	Size      int64  // bytes written
}

// A Note says what became of an entry that is not in the tree as it is in the layer.
type Note struct {
	Layer  int    // index of the layer
	Name   string // as the archive has it
	Reason string
}

// Build merges layers, bottom to top, and writes the table file of the result to w.
func Build(w io.Writer, layers []Layer, o Options) (Stats, error) {
	return Stats{}, errors.New("not yet")
}
