package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

const patience = time.Minute

var someDigest = ztoc.DigestOf([]byte("some blob"))

// full is a Source that has every blob, of zeros.
type full struct{}

func (full) Open(context.Context, Asker, ztoc.Digest) (Blob, error) { return full{}, nil }
func (full) Have(ztoc.Range) bool                                   { return true }
func (full) Promised(ztoc.Range) bool                               { return false }
func (full) ReadAt([]byte, int64) error                             { return nil }
func (full) Watch(func(ztoc.Range)) func()                          { return func() {} }
func (full) Close() error                                           { return nil }

func shortFrame(kind byte, want uint32, payload ...byte) []byte {
	return frame(header{kind: kind, want: want}, payload)
}

func wantFrame(id uint32, ranges ...ztoc.Range) []byte {
	b, _ := appendDigest(nil, someDigest)
	return frame(header{kind: kindWant, want: id}, appendRanges(b, ranges))
}

func helloFrame(p ztoc.Priority) []byte {
	b, _ := appendHello(nil, Hello{Plan: "p", Priority: p})
	return frame(header{kind: kindHello}, b)
}

func dataFrame(id uint32, off uint64, n int, more bool) []byte {
	h := header{kind: kindData, want: id, offset: off}
	if more {
		h.flags = flagMore
	}
	return frame(h, make([]byte, n))
}

// TestHostileChild says nonsense to a server: the connection ends, nothing is kept, and others are answered as before.
func TestHostileChild(t *testing.T) {
	m := NewMemory()
	s := NewServer(m.Host("a"), full{}, ServerOptions{})
	defer s.Close()
	addr, err := s.Listen("")
	if err != nil {
		t.Fatal(err)
	}
	ok := helloFrame(ztoc.Prefetch)
	huge := wantFrame(1, ztoc.Range{Start: 0, End: 1})
	binary.BigEndian.PutUint32(huge[16:], 1<<31)
	for name, says := range map[string][]byte{
		"garbage":                  bytes.Repeat([]byte{0xa5}, 100),
		"a want before hello":      wantFrame(1, ztoc.Range{Start: 0, End: 1}),
		"a hello that is too long": frame(header{kind: kindHello}, make([]byte, maxHello+1)),
		"a hello cut short":        shortFrame(kindHello, 0, 5, 'x'),
		"another priority":         append(slices.Clone(ok), helloFrame(ztoc.Demand)...),
		"a frame of a parent":      append(slices.Clone(ok), dataFrame(1, 0, 10, false)...),
		"an unknown frame":         append(slices.Clone(ok), shortFrame(99, 1)...),
		"want 0":                   append(slices.Clone(ok), wantFrame(0, ztoc.Range{Start: 0, End: 1})...),
		"a payload of 2 GiB":       append(slices.Clone(ok), huge...),
		"no ranges":                append(slices.Clone(ok), frame(header{kind: kindWant, want: 1}, append(make([]byte, 32), 0))...),
		"more ranges than bytes":   append(slices.Clone(ok), frame(header{kind: kindWant, want: 1}, append(make([]byte, 32), 0xff, 0xff, 3, 1))...),
		"too many pieces":          append(slices.Clone(ok), wantFrame(1, ztoc.Range{Start: 0, End: (MaxPieces + 1) * ztoc.PieceSize})...),
		"beyond any blob":          append(slices.Clone(ok), wantFrame(1, ztoc.Range{Start: maxOffset - 1, End: maxOffset + 1})...),
		"the same want twice":      append(slices.Clone(ok), append(wantFrame(1, ztoc.Range{Start: 0, End: 1 << 30}), wantFrame(1, ztoc.Range{Start: 0, End: 1})...)...),
	} {
		t.Run(name, func(t *testing.T) {
			ses, err := m.Host("b").dial(t.Context(), Host{"a", addr}, protoRanges)
			if err != nil {
				t.Fatal(err)
			}
			defer ses.Close()
			go ses.Write(says) // the server may not read to the end
			ses.SetReadDeadline(time.Now().Add(patience))
			buf := make([]byte, 1<<20)
			for err == nil {
				_, err = ses.Read(buf)
			}
			var late net.Error
			if errors.As(err, &late) && late.Timeout() {
				t.Error("the connection stays open")
			}
		})
	}
	c := NewClient(m.Host("c"), ClientOptions{})
	defer c.Close()
	if err := c.Read(t.Context(), Host{"a", addr}, Hello{}, someDigest, make([]byte, 10), 0); err != nil {
		t.Error(err)
	}
	for end := time.Now().Add(patience); s.Stats().Pieces != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d pieces are still wanted", s.Stats().Pieces)
		}
	}
}

// talk runs a client against a parent that says what the test tells it to, whatever it is asked.
func talk(t *testing.T, o ClientOptions, says func(conn net.Conn)) (*Client, *Stream) {
	t.Helper()
	m := NewMemory()
	l, err := m.Host("a").listen("")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		go func() { // what the child says is of no interest, but pipes hold nothing
			buf := make([]byte, 1024)
			for err == nil {
				_, err = conn.Read(buf)
			}
		}()
		says(conn)
	}()
	c := NewClient(m.Host("b"), o)
	t.Cleanup(func() { c.Close(); l.Close(); <-done })
	s, err := c.Open(t.Context(), Host{"a", l.Addr().String()}, Hello{Priority: ztoc.Prefetch})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Want(someDigest, []ztoc.Range{{Start: 0, End: 3 * FrameSize}}); err != nil {
		t.Fatal(err)
	}
	return c, s
}

// TestHostileParent hears nonsense: each ends in an error that says what it was, and is counted.
func TestHostileParent(t *testing.T) {
	for name, x := range map[string]struct {
		says []byte
		want error
	}{
		"garbage":                  {bytes.Repeat([]byte{0xa5}, 100), ErrProtocol},
		"a frame of a child":       {wantFrame(1, ztoc.Range{Start: 0, End: 1}), ErrProtocol},
		"another want":             {dataFrame(2, 0, 10, false), ErrProtocol},
		"bytes beyond the want":    {dataFrame(1, 3*FrameSize-1, 2, false), ErrProtocol},
		"bytes at 2^50":            {dataFrame(1, maxOffset, 2, false), ErrProtocol},
		"bytes at 2^63":            {dataFrame(1, 1<<63, 2, false), ErrProtocol},
		"a frame that is too long": {frame(header{kind: kindData, want: 1}, make([]byte, FrameSize+1)), ErrProtocol},
		"everything twice":         {bytes.Repeat(dataFrame(1, 0, FrameSize, false), 4), ErrProtocol},
		"malformed missing":        {shortFrame(kindMissing, 1, 1, 0x80, 0, 1), ErrProtocol},
		"bytes after the end":      {append(shortFrame(kindEnd, 1), dataFrame(1, 0, 1, false)...), ErrProtocol},
		"no place":                 {frame(header{kind: kindRefused, offset: refusal(ErrBusy)}, nil), ErrBusy},
		"nothing":                  {nil, ErrTruncated},
		"half a header":            {dataFrame(1, 0, 10, false)[:7], ErrTruncated},
		"half a frame":             {dataFrame(1, 0, 1000, false)[:500], ErrTruncated},
		"a frame of three":         {dataFrame(1, 0, FrameSize, true), ErrTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			c, s := talk(t, ClientOptions{Stall: patience}, func(conn net.Conn) { conn.Write(x.says) })
			var err error
			for range 10 {
				if _, err = s.Next(); err != nil {
					break
				}
			}
			if !errors.Is(err, x.want) {
				t.Errorf("%v, want %v", err, x.want)
			}
			if _, again := s.Next(); !errors.Is(again, x.want) {
				t.Errorf("then %v", again)
			}
			n := c.Stats()
			if counted := map[error]int64{ErrProtocol: n.Protocol, ErrTruncated: n.Truncated, ErrBusy: 1}[x.want]; counted != 1 {
				t.Errorf("counted %+v", n)
			}
		})
	}
}

// TestSlowParent is in time that is not real: who stalls or trickles is given up within bounds, who waits himself is not.
func TestSlowParent(t *testing.T) {
	for name, x := range map[string]struct {
		says  func(conn net.Conn)
		slow  bool
		after time.Duration // at most
	}{
		"stalled": {func(net.Conn) { time.Sleep(time.Hour) }, true, 2 * time.Second},
		"stalled in a frame": {func(conn net.Conn) {
			conn.Write(dataFrame(1, 0, FrameSize, false)[:1000])
			time.Sleep(time.Hour)
		}, true, 4 * time.Second},
		"1 KB/s": {func(conn net.Conn) {
			b := dataFrame(1, 0, FrameSize, false)
			for len(b) > 100 {
				if _, err := conn.Write(b[:100]); err != nil {
					return
				}
				b = b[100:]
				time.Sleep(100 * time.Millisecond)
			}
		}, true, 4 * time.Second},
		"1 KB/s in small frames": {func(conn net.Conn) {
			for i := range 1000 {
				if _, err := conn.Write(dataFrame(1, uint64(i*100), 100, true)); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}, true, 4 * time.Second},
		"waits itself for a minute": {func(conn net.Conn) {
			for range 120 {
				conn.Write(shortFrame(kindBeat, 0))
				time.Sleep(Beat)
			}
			for i := range 3 {
				conn.Write(dataFrame(1, uint64(i*FrameSize), FrameSize, i < 2))
			}
			conn.Write(shortFrame(kindEnd, 1))
		}, false, 2 * time.Minute},
		"100 KB/s": {func(conn net.Conn) {
			for i := range 3 {
				time.Sleep(1280 * time.Millisecond)
				conn.Write(dataFrame(1, uint64(i*FrameSize), FrameSize, i < 2))
			}
			conn.Write(shortFrame(kindEnd, 1))
		}, false, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, s := talk(t, ClientOptions{}, x.says)
				start := time.Now()
				var err error
				for err == nil {
					var e Event
					if e, err = s.Next(); e.Kind == Done {
						break
					}
				}
				if errors.Is(err, ErrSlow) != x.slow || (err != nil) != x.slow {
					t.Errorf("%v", err)
				}
				if took := time.Since(start); took > x.after {
					t.Errorf("after %v, want %v at most", took, x.after)
				}
				if n := c.Stats().Slow; n != map[bool]int64{true: 1}[x.slow] {
					t.Errorf("%d slow parents counted", n)
				}
				s.Close()
			})
		})
	}
}

// hang is a Source that never answers.
type hang struct{ full }

func (hang) Open(ctx context.Context, _ Asker, _ ztoc.Digest) (Blob, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestHangingSource shows that a reader is answered at once, and that a child knows that its parent lives.
func TestHangingSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMemory()
		s := NewServer(m.Host("a"), hang{}, ServerOptions{})
		defer s.Close()
		addr, err := s.Listen("")
		if err != nil {
			t.Fatal(err)
		}
		c := NewClient(m.Host("b"), ClientOptions{})
		defer c.Close()
		start := time.Now()
		if err := c.Read(t.Context(), Host{"a", addr}, Hello{}, someDigest, make([]byte, 10), 0); !errors.Is(err, ErrNotHere) {
			t.Errorf("%v, want ErrNotHere", err)
		}
		if took := time.Since(start); took > 50*time.Millisecond {
			t.Errorf("the answer took %v", took)
		}
		st, err := c.Open(t.Context(), Host{"a", addr}, Hello{Priority: ztoc.Prefetch})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		if _, err := st.Want(someDigest, []ztoc.Range{{Start: 0, End: 1}}); err != nil {
			t.Fatal(err)
		}
		waited := 0
		for {
			e, err := st.Next()
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind == Refused {
				break
			}
			waited++
		}
		if waited < 10 {
			t.Errorf("%d signs of life in %v", waited, time.Since(start))
		}
	})
}

// FuzzChild gives a server what a child may say.
func FuzzChild(f *testing.F) {
	ok := helloFrame(ztoc.Prefetch)
	w := wantFrame(1, ztoc.Range{Start: 5, End: 1 << 20}, ztoc.Range{Start: 1 << 21, End: 1<<21 + 1})
	f.Add(slices.Concat(ok, w))
	f.Add(slices.Concat(ok, w, frame(header{kind: kindDrop, want: 1}, appendRanges(nil, []ztoc.Range{{Start: 0, End: 1 << 22}}))))
	f.Add(slices.Concat(helloFrame(ztoc.Demand), w, wantFrame(2, ztoc.Range{Start: 0, End: 1})))
	f.Fuzz(func(t *testing.T, says []byte) {
		m := NewMemory()
		s := NewServer(m.Host("a"), full{}, ServerOptions{Pieces: 100})
		addr, err := s.Listen("")
		if err != nil {
			t.Fatal(err)
		}
		ses, err := m.Host("b").dial(t.Context(), Host{"a", addr}, protoRanges)
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			buf := make([]byte, 1<<16)
			for err := error(nil); err == nil; {
				_, err = ses.Read(buf)
			}
		}()
		ses.SetWriteDeadline(time.Now().Add(patience))
		ses.Write(says)
		ses.Close()
		<-read
		s.Close()
		if n := s.Stats(); n.Pieces != 0 || n.Conns != 0 {
			t.Errorf("left behind: %+v", n)
		}
	})
}

// FuzzParent gives a client what a parent may say. What it takes lies within what it wanted.
func FuzzParent(f *testing.F) {
	f.Add(slices.Concat(dataFrame(1, 0, 100, true), dataFrame(1, 100, 50, false), shortFrame(kindBeat, 0), shortFrame(kindEnd, 1)))
	f.Add(frame(header{kind: kindMissing, want: 1}, appendRanges(nil, []ztoc.Range{{Start: 3, End: 9}})))
	f.Add(frame(header{kind: kindRefused, want: 1, offset: 1}, nil))
	f.Fuzz(func(t *testing.T, says []byte) {
		_, s := talk(t, ClientOptions{Stall: patience}, func(conn net.Conn) { conn.Write(says) })
		var got int64
		for {
			e, err := s.Next()
			if err != nil {
				break
			}
			if e.Kind == Bytes {
				got += e.Range.Len()
				if e.Range.Start < 0 || e.Range.End > 3*FrameSize || int64(len(e.Data)) != e.Range.Len() {
					t.Errorf("took %v", e.Range)
				}
			}
		}
		if got > 3*FrameSize {
			t.Errorf("took %d bytes of %d", got, 3*FrameSize)
		}
	})
}

// FuzzFrames holds the decoders to: what parses encodes back to the same bytes.
func FuzzFrames(f *testing.F) {
	f.Add(helloFrame(ztoc.Demand))
	f.Add(wantFrame(7, ztoc.Range{Start: 0, End: 5}, ztoc.Range{Start: 300, End: 70000}))
	f.Add(dataFrame(7, 5, 10, true))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= headerSize {
			if h, err := parseHeader(b); err == nil {
				var back [headerSize]byte
				if h.put(back[:]); !bytes.Equal(back[:], b[:headerSize]) {
					t.Errorf("header %x became %x", b[:headerSize], back)
				}
			}
			b = b[headerSize:]
		}
		if h, err := parseHello(b); err == nil {
			if back, err := appendHello(nil, h); err != nil || !bytes.Equal(back, b) {
				t.Errorf("hello %x became %x, %v", b, back, err)
			}
		}
		if d, rest, err := parseDigest(b); err == nil {
			if back, err := appendDigest(nil, d); err != nil || !bytes.Equal(back, b[:32]) {
				t.Errorf("digest %x became %x, %v", b[:32], back, err)
			}
			b = rest
		}
		if r, err := parseRanges(b); err == nil {
			if back := appendRanges(nil, r); !bytes.Equal(back, b) {
				t.Errorf("ranges %x became %x", b, back)
			}
			if n, err := normal(r); err != nil || !slices.Equal(n, r) {
				t.Errorf("ranges %v are not normal: %v, %v", r, n, err)
			}
			if c, err := newCut(r); err == nil {
				for i := range min(c.len(), 100) {
					if x := c.item(i); x.Empty() || !holds(r, x) || x.Start/ztoc.PieceSize != (x.End-1)/ztoc.PieceSize {
						t.Errorf("piece %d of %v is %v", i, r, x)
					}
				}
			}
		}
	})
}

func TestCut(t *testing.T) {
	const p = ztoc.PieceSize
	ranges := []ztoc.Range{{Start: 5, End: p}, {Start: p + 1, End: 3*p + 1}, {Start: 10 * p, End: 10*p + 1}}
	c, err := newCut(ranges)
	if err != nil {
		t.Fatal(err)
	}
	want := []ztoc.Range{{Start: 5, End: p}, {Start: p + 1, End: 2 * p}, {Start: 2 * p, End: 3 * p}, {Start: 3 * p, End: 3*p + 1}, {Start: 10 * p, End: 10*p + 1}}
	for i, r := range want {
		if got := c.item(i); got != r {
			t.Errorf("piece %d is %v, want %v", i, got, r)
		}
	}
	if c.len() != len(want) {
		t.Errorf("%d pieces", c.len())
	}
	for _, r := range []ztoc.Range{{Start: 0, End: 5}, {Start: 0, End: 6}, {Start: p - 1, End: p + 1}, {Start: p, End: 2*p + 1}, {Start: 0, End: 1 << 49}, {Start: 4 * p, End: 9 * p}} {
		var got, brute []int
		c.touching(r, func(i int) { got = append(got, i) })
		for i, x := range want {
			if !x.Intersect(r).Empty() {
				brute = append(brute, i)
			}
		}
		if !slices.Equal(got, brute) {
			t.Errorf("%v touches %v, want %v", r, got, brute)
		}
	}
}
