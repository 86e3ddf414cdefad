package lazyfs

import (
	"testing"
)

// Requests of one reader that overtake each other are one stream, whatever their size, and are none when they lie far apart.
func TestStreamsOfOvertakingRequests(t *testing.T) {
	for _, size := range []int64{128 << 10, 512 << 10, 1 << 20} {
		s := &Server{}
		at := func(off int64) *stream {
			st := s.streamAt(stretch{off: off, n: size}, 7)
			s.clock++
			st.used = s.clock
			if gain := off + size - st.next; gain > 0 {
				st.done += min(gain, size)
				st.next += gain
			}
			return st
		}
		first := at(0)
		for _, i := range []int64{2, 1, 3, 6, 5, 4, 7} {
			if at(i*size) != first {
				t.Errorf("requests of %d bytes: the one at %d is another stream", size, i)
			}
		}
		if at(64<<20) == first {
			t.Errorf("requests of %d bytes: one far away is the same stream", size)
		}
	}
}

// What was loaded ahead outlives what was read, but does not stay for ever.
func TestMakeRoomSparesWhatIsToBeRead(t *testing.T) {
	var c cache
	c.init(Config{Memory: 4 * bufferGrain})
	var budget int64
	add := func(i int, ahead bool) *unit {
		u := &unit{id: unitOf(0, i), size: bufferGrain, state: ready, buf: make([]byte, bufferGrain)}
		if ahead {
			u.ahead = &budget
			budget += u.size
		}
		c.units[u.id] = u
		c.bytes += u.size
		c.link(u)
		return u
	}
	there := func(u *unit) bool { return c.units[u.id] == u }
	ahead := []*unit{add(0, true), add(1, true)}
	was := []*unit{add(2, false), add(3, false)}
	if free := c.makeRoom(2 * bufferGrain); len(free) != 2 || there(was[0]) || there(was[1]) || !there(ahead[0]) || !there(ahead[1]) {
		t.Errorf("what was read stays, or what was not does not: %d buffers", len(free))
	}
	if free := c.makeRoom(4 * bufferGrain); len(free) != 2 || budget != 0 || c.bytes != 0 {
		t.Errorf("what nobody reads stays: %d buffers, %d bytes of a budget, %d in all", len(free), budget, c.bytes)
	}
	lonely := add(4, true)
	if free := c.makeRoom(4 * bufferGrain); len(free) != 1 || there(lonely) {
		t.Errorf("the only unit stays")
	}
}

func TestProfileWithout(t *testing.T) {
	p := Profile{Ranges: []ProfileRange{{0, 0, 40960}, {1, 8192, 12288}, {1, 0, 4096}, {1, 4096, 8192}}}
	got := p.without(stretch{1, 5000, 4000}).without(stretch{0, 8192, 8192})
	want := "muster profile 1\n0 0 8192\n0 16384 40960\n1 0 4096\n"
	// [5000, 9000) is the pages [4096, 12288).
	if string(got.Encode()) != want {
		t.Errorf("%q", got.Encode())
	}
}

// A buffer of another size is made to fit, and nothing is counted twice.
func TestPoolResizes(t *testing.T) {
	p := newPool(8 << 20)

	for _, n := range []int{600 << 10, 700 << 10, 3 << 20, 64 << 10, 600 << 10} {
		b, err := p.get(n)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) != n || p.bytes() != int64(cap(b)) {
			t.Errorf("%d bytes: got %d of %d, pool has %d", n, len(b), cap(b), p.bytes())
		}
		for i := range b {
			b[i] = byte(i)
		}
		p.put(b)
	}
	p.trim()
	if p.bytes() != 0 {
		t.Errorf("%d bytes held", p.bytes())
	}
}
