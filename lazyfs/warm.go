package lazyfs

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/ztoc"
)

// The warm file holds the inflated bytes of a profile, in its order, so that the next start of the same
// program reads them from a disk in one sweep instead of inflating. Little endian:
//
//	header   "\x89mwarm\r\n", version uint32, zeros up to 4096 bytes
//	data     the pieces, one behind the other
//	index    of each piece: layer uint32, length uint32, offset in the inflated layer uint64, SHA-256 of its bytes
//	footer   number of pieces uint64, SHA-256 over the digests of the image's layers, SHA-256 of the index and the
//	         footer before this field, "\x89mwarm\r\n"
//
// A piece has at most WarmPiece bytes. It is hashed each time it is read, so the file needs no care: a rotten piece costs
// the inflating it would have saved.
const (
	warmMagic   = "\x89mwarm\r\n"
	warmVersion = 1
	warmHeader  = 4096
	warmEntry   = 16 + sha256.Size
	warmFooter  = 8 + 2*sha256.Size + len(warmMagic)

	// WarmPiece is the most bytes of a piece: what the kernel asks for at once when a file is read in order.
	WarmPiece = 128 << 10

	maxWarmPieces = MaxProfileRanges + MaxProfileBytes/WarmPiece
)

// ErrWarm says that a file is not a warm file of these layers.
var ErrWarm = errors.New("not a warm file of this image")

type warmPiece struct {
	layer int
	off   int64 // in the inflated layer
	n     int
	at    int64 // in the file
	sum   [sha256.Size]byte
}

type warm struct {
	f       *os.File
	pieces  []warmPiece
	byLayer [][]int // sorted by offset
	rotten  []atomic.Bool
	end     int64 // of the data
}

// layersSum is what a warm file belongs to.
func layersSum(layers []Layer) [sha256.Size]byte {
	h := sha256.New()
	for _, l := range layers {
		io.WriteString(h, string(l.Ref.Digest)+"\n")
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// WriteWarm writes the warm file of p to w. It needs no server: bytes come from blobs with the priority of a prefetch and
// are inflated one span after the other, in the calling goroutine; a few spans are remembered, because profiles come
// back to them.
func WriteWarm(ctx context.Context, w io.Writer, layers []Layer, blobs Blobs, p Profile) error {
	return writeWarm(ctx, w, &inflater{layers: layers, blobs: blobs, budget: 16 << 20}, p)
}

func writeWarm(ctx context.Context, w io.Writer, in *inflater, p Profile) error {
	out, err := newWarmWriter(w)
	if err != nil {
		return err
	}
	var there Profile
	for _, r := range p.Ranges {
		if r.Layer >= 0 && r.Layer < len(in.layers) {
			r.End = min(r.End, inflatedSize(in.layers[r.Layer]))
			there.Ranges = append(there.Ranges, r)
		}
	}
	buf := make([]byte, 0, WarmPiece)
	for _, r := range (Profile{}).Merge(there).Ranges { // no byte twice
		for at := r.Start; at < r.End; at += int64(len(buf)) {
			buf = buf[:min(r.End-at, WarmPiece)]
			if err := in.read(ctx, r.Layer, at, buf); err != nil {
				return fmt.Errorf("warm file: %w", err)
			}
			if err := out.add(r.Layer, at, buf); err != nil {
				return err
			}
		}
	}
	return out.end(in.layers)
}

// A warmWriter writes a warm file piece by piece.
type warmWriter struct {
	w     io.Writer
	index []byte
}

func newWarmWriter(w io.Writer) (*warmWriter, error) {
	head := make([]byte, warmHeader)
	copy(head, warmMagic)
	binary.LittleEndian.PutUint32(head[len(warmMagic):], warmVersion)
	_, err := w.Write(head)
	return &warmWriter{w: w}, err
}

// add appends a piece of at most WarmPiece bytes. Beyond what a warm file may hold it does nothing.
func (x *warmWriter) add(layer int, off int64, b []byte) error {
	if len(x.index) >= maxWarmPieces*warmEntry {
		return nil
	}
	if _, err := x.w.Write(b); err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	x.index = binary.LittleEndian.AppendUint32(x.index, uint32(layer))
	x.index = binary.LittleEndian.AppendUint32(x.index, uint32(len(b)))
	x.index = binary.LittleEndian.AppendUint64(x.index, uint64(off))
	x.index = append(x.index, sum[:]...)
	return nil
}

func (x *warmWriter) end(layers []Layer) error {
	belongs := layersSum(layers)
	tail := binary.LittleEndian.AppendUint64(x.index, uint64(len(x.index)/warmEntry))
	tail = append(tail, belongs[:]...)
	sum := sha256.Sum256(tail)
	tail = append(append(tail, sum[:]...), warmMagic...)
	_, err := x.w.Write(tail)
	return err
}

// An inflater reads inflated layers, with the spans it needed last at hand.
type inflater struct {
	layers []Layer
	blobs  Blobs
	budget int        // bytes of spans
	held   int        // of it
	spans  []inflated // last used last
}

type inflated struct {
	id  unitID
	buf []byte
}

func (in *inflater) read(ctx context.Context, layer int, off int64, p []byte) error {
	z := in.layers[layer].Ztoc
	for len(p) > 0 {
		i, hi := z.SpansOf(ztoc.Range{Start: off, End: off + 1})
		if i >= hi {
			return fmt.Errorf("layer %d has no byte %d", layer, off)
		}
		b, err := in.span(ctx, layer, i)
		if err != nil {
			return err
		}
		n := copy(p, b[off-z.Span(i).Out.Start:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (in *inflater) span(ctx context.Context, layer, i int) ([]byte, error) {
	id := unitOf(layer, i)
	if at := slices.IndexFunc(in.spans, func(s inflated) bool { return s.id == id }); at >= 0 {
		s := in.spans[at]
		in.spans = append(slices.Delete(in.spans, at, at+1), s)
		return s.buf, nil
	}
	l := in.layers[layer]
	span := l.Ztoc.Span(i)
	packed := make([]byte, span.Blob.Len())
	buf := make([]byte, span.Out.Len())
	for try := 0; ; try++ {
		if err := in.blobs.ReadAt(ctx, l.Ref, packed, span.Blob.Start, ztoc.Prefetch); err != nil {
			return nil, err
		}
		err := l.Ztoc.Inflate(buf, i, packed)
		if err == nil {
			break
		}
		if !errors.Is(err, ztoc.ErrMismatch) {
			return nil, err
		}
		if e := in.blobs.Reject(l.Ref, span.Blob, err); e != nil || try == maxRejects {
			return nil, errors.Join(e, err)
		}
	}
	in.spans = append(in.spans, inflated{id, buf})
	for in.held += len(buf); in.held > in.budget && len(in.spans) > 1; {
		in.held -= len(in.spans[0].buf)
		in.spans = slices.Delete(in.spans, 0, 1)
	}
	return buf, nil
}

func openWarm(f *os.File, layers []Layer) (*warm, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	bad := func(why string) error { return fmt.Errorf("%w: %s", ErrWarm, why) }
	size := st.Size()
	if size < int64(warmHeader+warmFooter) {
		return nil, bad("too short")
	}
	head, foot := make([]byte, len(warmMagic)+4), make([]byte, warmFooter)
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, err
	}
	if _, err := f.ReadAt(foot, size-int64(warmFooter)); err != nil {
		return nil, err
	}
	if string(head[:len(warmMagic)]) != warmMagic || string(foot[warmFooter-len(warmMagic):]) != warmMagic {
		return nil, bad("no magic at its ends")
	}
	if v := binary.LittleEndian.Uint32(head[len(warmMagic):]); v != warmVersion {
		return nil, bad(fmt.Sprintf("version %d", v))
	}
	if sum := layersSum(layers); !bytes.Equal(foot[8:8+sha256.Size], sum[:]) {
		return nil, bad("other layers")
	}
	n := binary.LittleEndian.Uint64(foot)
	if n > maxWarmPieces || int64(n)*warmEntry > size-int64(warmHeader+warmFooter) {
		return nil, bad(fmt.Sprintf("%d pieces", n))
	}
	w := &warm{f: f, pieces: make([]warmPiece, n), byLayer: make([][]int, len(layers)), rotten: make([]atomic.Bool, n)}
	index := make([]byte, int64(n)*warmEntry, int(n)*warmEntry+warmFooter)
	if _, err := f.ReadAt(index, size-int64(warmFooter)-int64(len(index))); err != nil && len(index) > 0 {
		return nil, err
	}
	sum := sha256.Sum256(append(index, foot[:8+sha256.Size]...))
	if !bytes.Equal(sum[:], foot[8+sha256.Size:8+2*sha256.Size]) {
		return nil, bad("its index is damaged")
	}
	w.end = warmHeader
	for i := range w.pieces {
		e := index[i*warmEntry:]
		p := warmPiece{
			layer: int(binary.LittleEndian.Uint32(e)),
			n:     int(binary.LittleEndian.Uint32(e[4:])),
			off:   int64(binary.LittleEndian.Uint64(e[8:])),
			at:    w.end,
			sum:   [sha256.Size]byte(e[16:]),
		}
		if p.layer >= len(layers) || p.n == 0 || p.n > WarmPiece || p.off < 0 || p.off > maxInflated {
			return nil, bad(fmt.Sprintf("piece %d is impossible", i))
		}
		w.pieces[i] = p
		w.end += int64(p.n)
		w.byLayer[p.layer] = append(w.byLayer[p.layer], i)
	}
	if w.end != size-int64(warmFooter)-int64(len(index)) {
		return nil, bad("its pieces are not its data")
	}
	for _, l := range w.byLayer {
		slices.SortFunc(l, func(a, b int) int { return cmp.Compare(w.pieces[a].off, w.pieces[b].off) })
		for i := 1; i < len(l); i++ {
			if a := w.pieces[l[i-1]]; a.off+int64(a.n) > w.pieces[l[i]].off {
				return nil, bad("its pieces overlap")
			}
		}
	}
	return w, nil
}

// find is the piece that has byte off of a layer, how far into it that is and how many bytes it has from there on; or
// -1 and how many bytes from off on are in no piece.
func (w *warm) find(layer int, off int64) (piece int, lo, have int64) {
	l := w.byLayer[layer]
	i, _ := slices.BinarySearchFunc(l, off, func(piece int, off int64) int {
		if p := &w.pieces[piece]; p.off+int64(p.n) <= off {
			return -1
		}
		return 1
	})
	if i == len(l) {
		return -1, 0, math.MaxInt64 - off
	}
	p := &w.pieces[l[i]]
	switch {
	case p.off > off:
		return -1, 0, p.off - off
	case w.rotten[l[i]].Load():
		return -1, 0, p.off + int64(p.n) - off
	}
	return l[i], off - p.off, p.off + int64(p.n) - off
}

func (w *warm) size(piece int) int64 { return int64(w.pieces[piece].n) }

// read reads a piece and checks it. A piece that is not what was written is not offered again.
func (w *warm) read(p []byte, piece int) error {
	m := &w.pieces[piece]
	_, err := w.f.ReadAt(p, m.at)
	if err == nil && sha256.Sum256(p) != m.sum {
		err = errors.New("it does not match its digest")
	}
	if err != nil {
		w.rotten[piece].Store(true)
		return fmt.Errorf("piece %d at %d: %w", piece, m.at, err)
	}
	return nil
}

// advise asks the kernel to read the file ahead, which it does in the background.
func (w *warm) advise() {
	const step = 4 << 20
	for at := int64(0); at < w.end; at += step {
		_ = unix.Fadvise(int(w.f.Fd()), at, step, unix.FADV_WILLNEED)
	}
}

// readLayer fills p from off of an inflated layer, loading what is not at hand ahead of nobody.
func (s *Server) readLayer(ctx context.Context, layer int, off int64, p []byte) error {
	for len(p) > 0 {
		id, end := s.unitAt(layer, off)
		if id == zeroUnit {
			return fmt.Errorf("layer %d has no byte %d", layer, off)
		}
		u, err := s.acquire(ctx, id)
		if errors.Is(err, errRotten) {
			continue // it is not offered again
		}
		if err != nil {
			return err
		}
		k := min(int64(len(p)), end-off)
		copy(p, u.buf[u.size-(end-off):][:k])
		s.unpin([]*unit{u})
		p, off = p[k:], off+k
	}
	return nil
}

// acquire waits for a unit, at the lowest priority, and takes a reference to it.
func (s *Server) acquire(ctx context.Context, id unitID) (*unit, error) {
	s.mu.Lock()
	var none int64
	created := s.loadAhead(id, &none)
	u := s.units[id]
	if created {
		s.settle(u)
	}
	if u.state == ready {
		u.refs++
		s.touch(u)
		s.mu.Unlock()
		return u, nil
	}
	m := &miss{inner: make(chan error, 1)}
	u.wait(m)
	s.start()
	s.mu.Unlock()
	var err error
	select {
	case err = <-m.inner:
		return u, err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-s.ctx.Done():
		err = context.Cause(s.ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m.over = true
	select {
	case e := <-m.inner:
		if e == nil {
			u.refs--
		}
	default:
	}
	return nil, err
}
