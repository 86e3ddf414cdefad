package tree

import (
	"fmt"
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
	Seq    int    // index of the entry in its layer
	Name   string // as the archive has it
	Reason string
}

// Build merges layers, bottom to top, and writes the table file of the result to w. Equal input gives equal
// bytes. It needs about 200 bytes of memory per entry beyond the entries, and the table's size. Entries that
// cannot be in a file system are skipped and noted; ErrEntries says that an index is broken.
func Build(w io.Writer, layers []Layer, o Options) (Stats, error) {
	if o.MaxInodes <= 0 {
		o.MaxInodes = 16 << 20
	}
	o.MaxInodes = min(o.MaxInodes, maxRows)
	if o.MaxNotes == 0 {
		o.MaxNotes = 100
	}
	if len(layers) > maxLayers {
		return Stats{}, fmt.Errorf("image has %d layers, more than %d", len(layers), maxLayers)
	}
	if len(o.Meta) > maxMeta {
		return Stats{}, fmt.Errorf("%d bytes about the image, more than %d", len(o.Meta), maxMeta)
	}
	entries := 0
	for _, l := range layers {
		entries += len(l.Entries)
	}
	if entries > maxRows {
		return Stats{}, errTooMany(maxRows)
	}
	m := newMerge(o, entries)
	for i, l := range layers {
		m.layer, m.layerEnd = i, l.Size
		for k := range l.Entries {
			m.seq = k
			if err := m.apply(&l.Entries[k]); err != nil {
				return m.stats, err
			}
		}
	}
	c := &encoder{m: m, have: make(map[string]uint32, m.live), sets: make(map[string]uint32)}
	if err := c.layers(layers); err != nil {
		return m.stats, err
	}
	if err := c.tree(); err != nil {
		return m.stats, err
	}
	m.stats.Totals = c.totals
	var err error
	m.stats.Size, err = c.write(w, o.Meta)
	return m.stats, err
}
