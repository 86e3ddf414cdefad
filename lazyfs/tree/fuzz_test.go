package tree_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/ztoc"
)

// FuzzOpen opens arbitrary bytes, and the same with right checksums, and uses what opens.
func FuzzOpen(f *testing.F) {
	f.Add(golden(f))
	f.Add(write(f, tree.Options{}))
	f.Add([]byte("\x89muster\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		for _, b := range [][]byte{b, seal(bytes.Clone(b))} {
			tab, err := tree.Open(b)
			if err == nil {
				use(t, tab)
			} else if !errors.Is(err, tree.ErrCorrupt) && !errors.Is(err, tree.ErrVersion) {
				t.Fatalf("an error of no kind: %v", err)
			}
		}
	})
}

// FuzzBuild builds a table from arbitrary entries: it must open, and hold what the totals say.
func FuzzBuild(f *testing.F) {
	f.Add([]byte("\x01a/b\x00\x00\x05\x01a\x00x\x00\x02d/.wh..wh..opq\x00"))
	f.Add([]byte("\x22l\x00d/..\x00\x10\x00l/f\x00\x00\x10\x33g\x00l/f\x00\xff\x00.wh.d\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<14 {
			return
		}
		ls := invent(b)
		var w bytes.Buffer
		st, err := tree.Build(&w, ls, tree.Options{MaxNotes: 1 << 20})
		if errors.Is(err, tree.ErrEntries) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		tab, err := tree.Open(w.Bytes())
		if err != nil {
			t.Fatalf("%v: %+v", err, ls)
		}
		use(t, tab)
		if got := tab.Totals(); got != st.Totals || int(got.Inodes) != tab.Len() {
			t.Fatalf("built %+v, opened %+v, %d rows", st.Totals, got, tab.Len())
		}
		var again bytes.Buffer
		if _, err := tree.Build(&again, ls, tree.Options{}); err != nil || !bytes.Equal(again.Bytes(), w.Bytes()) {
			t.Fatalf("built twice, not the same: %v", err)
		}
	})
}

// invent makes layers of arbitrary bytes: a byte of type and flags, a name and a target that each end with
// NUL, a byte of numbers.
func invent(b []byte) []tree.Layer {
	ls := []tree.Layer{{}}
	str := func() string {
		i := bytes.IndexByte(b, 0)
		if i < 0 {
			i = len(b)
		}
		s := string(b[:i])
		b = b[min(i+1, len(b)):]
		return s
	}
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		e := ztoc.Entry{Type: ztoc.EntryType(kind & 7), Name: str(), Linkname: str()}
		if len(b) > 0 {
			n := int64(int8(b[0]))
			b = b[1:]
			e.Mode, e.UID, e.GID, e.Devmajor = n*37, int(n), int(n)*3, n
			e.Size, e.Offset, e.ModTime = max(n, -1), n*n, time.Unix(n<<50, n&0xff)
			if kind&8 != 0 {
				e.Sparse = []ztoc.Extent{{FileOff: n / 4, Offset: 5, Len: n / 8}, {FileOff: n / 2, Offset: 1, Len: 1}}
			}
		}
		if kind&16 != 0 {
			e.PAX = []ztoc.Record{{Key: ztoc.XattrPrefix + e.Linkname, Value: e.Name}, {Key: ztoc.XattrPrefix + "user.a", Value: "1"}}
		}
		if kind&32 != 0 {
			ls = append(ls, tree.Layer{})
		}
		ls[len(ls)-1].Entries = append(ls[len(ls)-1].Entries, e)
	}
	return ls
}
