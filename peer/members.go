package peer

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// A Member is a host as gossip, or a Roster, knows it.
type Member struct {
	Name    string
	Control netip.AddrPort // where it listens for gossip; not valid in a Roster
	Data    netip.AddrPort // where its Server listens
	Version string         // of its agent; 32 bytes at most
	Rate    uint8          // class of its data link, in the agent's words
	Epoch   uint64         // changes when the agent starts anew, so that what was known of it may be forgotten
}

// Host is how the member is dialled.
func (m Member) Host() Host { return Host{Name: m.Name, Addr: m.Data.String()} }

// A MemberEvent says that a member came, changed or went.
type MemberEvent struct {
	Kind   MemberEventKind
	Member Member
}

// A MemberEventKind is what happened to a member.
type MemberEventKind uint8

// The kinds of MemberEvent.
const (
	Joined MemberEventKind = iota + 1
	Updated
	Left // on purpose or not: memberlist does not tell them apart here
)

// A Roster is a set of members that somebody keeps by hand: a test with many agents in one process, or a cluster without gossip.
// The zero value is empty. Gossip keeps one.
type Roster struct {
	mu       sync.Mutex
	members  map[string]Member
	watchers map[int]func(MemberEvent)
	next     int
}

// Members is who is there now, sorted by name.
func (r *Roster) Members() []Member {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.SortedFunc(maps.Values(r.members), func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
}

// Lookup finds a member by name.
func (r *Roster) Lookup(name string) (Member, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, ok := r.members[name]
	return m, ok
}

// Watch has f called for each event from now on until stop is called. f must not block, and must not call Set or Remove.
func (r *Roster) Watch(f func(MemberEvent)) (stop func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watchers == nil {
		r.watchers = map[int]func(MemberEvent){}
	}
	id := r.next
	r.next++
	r.watchers[id] = f
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.watchers, id)
	}
}

// Set adds a member or changes it.
func (r *Roster) Set(m Member) {
	r.mu.Lock()
	if r.members == nil {
		r.members = map[string]Member{}
	}
	old, known := r.members[m.Name]
	r.members[m.Name] = m
	kind := Joined
	if known {
		kind = Updated
	}
	r.tell(!known || old != m, MemberEvent{kind, m})
}

// Remove takes a member out.
func (r *Roster) Remove(name string) {
	r.mu.Lock()
	m, known := r.members[name]
	delete(r.members, name)
	r.tell(known, MemberEvent{Left, m})
}

// tell unlocks r.mu and calls the watchers if there is news.
func (r *Roster) tell(news bool, e MemberEvent) {
	all := slices.Collect(maps.Values(r.watchers))
	r.mu.Unlock()
	if !news {
		return
	}
	for _, f := range all {
		f(e)
	}
}

// What a member says of itself in gossip, 512 bytes at most by memberlist's rule and far fewer here, since every host hears it of every other:
//
//	1 byte   version of this form, 1
//	1 byte   length of the data address: 0 (the same as control), 4 or 16; the address
//	2 bytes  port of the data address
//	1 byte   rate class
//	uvarint  epoch
//	rest     version of the agent, at most 32 bytes
//
// Later versions of the form add at the end of what is before the rest; hosts leave members out whose form they do not know.
const (
	metaForm   = 1
	maxVersion = 32
)

func appendMeta(b []byte, m Member) []byte {
	addr := m.Data.Addr().Unmap().WithZone("").AsSlice()
	if m.Data.Addr().Unmap() == m.Control.Addr().Unmap() {
		addr = nil
	}
	b = append(b, metaForm, byte(len(addr)))
	b = append(b, addr...)
	b = binary.BigEndian.AppendUint16(b, m.Data.Port())
	b = append(b, m.Rate)
	b = binary.AppendUvarint(b, m.Epoch)
	return append(b, m.Version[:min(len(m.Version), maxVersion)]...)
}

// parseMeta fills in what b says. Name and Control are set already.
func parseMeta(m Member, b []byte) (Member, error) {
	bad := func() (Member, error) { return m, fmt.Errorf("%w: %s says %.40x of itself", ErrProtocol, m.Name, b) }
	if len(b) < 2 || b[0] != metaForm || len(b) < 2+int(b[1])+3 {
		return bad()
	}
	addr, n := m.Control.Addr(), 2+int(b[1])
	if b[1] != 0 {
		var ok bool
		if addr, ok = netip.AddrFromSlice(b[2:n]); !ok {
			return bad()
		}
	}
	m.Data = netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(b[n:]))
	m.Rate = b[n+2]
	rest := b[n+3:]
	var k int
	if m.Epoch, k = binary.Uvarint(rest); k <= 0 || len(rest)-k > maxVersion {
		return bad()
	}
	m.Version = string(rest[k:])
	return m, nil
}
