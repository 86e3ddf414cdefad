package peer

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// Who has a blob is soft state: a few directory hosts of each blob keep a list, holders announce themselves every third of the TTL, and
// what is not announced again is forgotten. Which hosts those are follows from the blob and the names of all hosts, so hosts with
// nearly the same idea of who is there mostly ask the right ones, and those with another idea pay one useless question.

// DirectoryHosts is how many hosts keep the list of one blob.
const DirectoryHosts = 3

// MaxHolders is how many holders of a blob are kept and told.
const MaxHolders = 32

// HoldersAsk asks for the holders of blobs.
type HoldersAsk struct{ Digests []ztoc.Digest }

// HoldersAnswer has the holders of each blob that was asked for and is known, the latest announced first.
type HoldersAnswer struct{ Holders map[ztoc.Digest][]Host }

// An Announcement says that the host that sends it has blobs, all of each, and listens at Addr.
type Announcement struct {
	Addr    string
	Digests []ztoc.Digest
	Gone    []ztoc.Digest `json:",omitempty"` // and has these no more
	TTL     time.Duration
}

// A HolderTable is what a directory host keeps. Its methods may be called at the same time.
type HolderTable struct {
	mu      sync.Mutex
	blobs   map[ztoc.Digest][]holder // latest announced first, MaxHolders at most
	max     int
	swept   time.Time
	nowFunc func() time.Time
}

type holder struct {
	Host
	until time.Time
}

// NewHolderTable makes a table of at most max blobs; 0 is 65,536, which is about 100 MB when each has 32 holders.
func NewHolderTable(max int) *HolderTable {
	if max <= 0 {
		max = 1 << 16
	}
	return &HolderTable{blobs: map[ztoc.Digest][]holder{}, max: max, nowFunc: time.Now}
}

// maxTTL bounds what an announcement may promise.
const maxTTL = time.Hour

// Announce takes in what a host says of itself. It fits Handle.
func (t *HolderTable) Announce(_ context.Context, from string, a Announcement) (struct{}, error) {
	if a.TTL < 0 || len(a.Addr) > MaxName {
		return struct{}{}, fmt.Errorf("%w: announcement", ErrProtocol)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.nowFunc()
	t.sweep(now)
	for _, d := range a.Gone {
		t.remove(d, from)
	}
	for _, d := range a.Digests {
		if _, err := ztoc.ParseDigest(string(d)); err != nil {
			return struct{}{}, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		t.remove(d, from)
		list, known := t.blobs[d]
		if !known && len(t.blobs) >= t.max {
			return struct{}{}, fmt.Errorf("%w: %d blobs are known already", ErrBusy, t.max)
		}
		list = slices.Insert(list, 0, holder{Host{from, a.Addr}, now.Add(min(a.TTL, maxTTL))})
		t.blobs[d] = list[:min(len(list), MaxHolders)]
	}
	return struct{}{}, nil
}

// Find answers who holds blobs. It fits Handle.
func (t *HolderTable) Find(_ context.Context, _ string, ask HoldersAsk) (HoldersAnswer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.nowFunc()
	t.sweep(now)
	answer := HoldersAnswer{Holders: map[ztoc.Digest][]Host{}}
	for _, d := range ask.Digests {
		for _, h := range t.blobs[d] {
			if now.Before(h.until) {
				answer.Holders[d] = append(answer.Holders[d], h.Host)
			}
		}
	}
	return answer, nil
}

// Len is how many blobs are known.
func (t *HolderTable) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.blobs)
}

func (t *HolderTable) remove(d ztoc.Digest, name string) {
	list, known := t.blobs[d]
	if !known {
		return
	}
	list = slices.DeleteFunc(list, func(h holder) bool { return h.Name == name })
	if len(list) == 0 {
		delete(t.blobs, d)
		return
	}
	t.blobs[d] = list
}

// sweep forgets what ran out, at most every ten seconds.
func (t *HolderTable) sweep(now time.Time) {
	if now.Sub(t.swept) < 10*time.Second {
		return
	}
	t.swept = now
	maps.DeleteFunc(t.blobs, func(d ztoc.Digest, list []holder) bool {
		list = slices.DeleteFunc(list, func(h holder) bool { return !now.Before(h.until) })
		t.blobs[d] = list // an existing key: allowed while ranging
		return len(list) == 0
	})
}

// Rendezvous is the n names with the highest hash for key, in that order, whatever the order of names: all who know the same names choose the same,
// and a name more or less changes one choice at most.
func Rendezvous(key string, names []string, n int) []string {
	type scored struct {
		score uint64
		name  string
	}
	all := make([]scored, len(names))
	for i, name := range names {
		h := fnv.New64a()
		h.Write([]byte(name))
		h.Write([]byte{0})
		h.Write([]byte(key))
		all[i] = scored{mix(h.Sum64()), name}
	}
	slices.SortFunc(all, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(a.name, b.name))
	})
	all = slices.Compact(all)
	out := make([]string, 0, min(n, len(all)))
	for _, s := range all[:min(n, len(all))] {
		out = append(out, s.name)
	}
	return out
}

// mix spreads FNV's low bits over all, as in MurmurHash3's finalizer: FNV alone gives names that differ in the last
// letter nearly the same order for all keys.
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// A Directory asks and tells the directory hosts of blobs. Hosts gives all hosts that may be directory hosts now, this one included.
type Directory struct {
	Client *Client
	Hosts  func() []Host
	// Self is this host, and Table is what it keeps as a directory host itself.
	Self  Host
	Table *HolderTable
	// TTL is how long an announcement holds. Default 5 minutes; too short costs questions, too long sends hosts
	// to holders that are gone.
	TTL time.Duration
}

// keepers groups blobs by the host that keeps their i-th list.
func (d *Directory) keepers(digests []ztoc.Digest) (by map[Host][]ztoc.Digest) {
	addrs := map[string]string{}
	var names []string
	for _, h := range d.Hosts() {
		addrs[h.Name] = h.Addr
		names = append(names, h.Name)
	}
	by = map[Host][]ztoc.Digest{}
	for _, digest := range digests {
		for _, name := range Rendezvous(string(digest), names, DirectoryHosts) {
			h := Host{name, addrs[name]}
			by[h] = append(by[h], digest)
		}
	}
	return by
}

// Announce tells the directory hosts that this host has all of some blobs (gone: and has not others any more). To be called again before
// a third of the TTL is over. Hosts that cannot be reached are left out; the error is of one of them, when none was reached.
func (d *Directory) Announce(ctx context.Context, have, gone []ztoc.Digest) error {
	ttl := cmp.Or(d.TTL, 5*time.Minute)
	calls := map[Host]*Announcement{}
	call := func(h Host) *Announcement {
		if calls[h] == nil {
			calls[h] = &Announcement{Addr: d.Self.Addr, TTL: ttl}
		}
		return calls[h]
	}
	for h, list := range d.keepers(have) {
		call(h).Digests = list
	}
	for h, list := range d.keepers(gone) {
		call(h).Gone = list
	}
	reached, err := d.each(slices.Collect(maps.Keys(calls)), func(h Host) error {
		if h.Name == d.Self.Name {
			_, err := d.Table.Announce(ctx, h.Name, *calls[h])
			return err
		}
		_, err := Ask(ctx, d.Client, h, Announce, *calls[h])
		return err
	})
	if reached > 0 || len(calls) == 0 {
		return nil
	}
	return err
}

// Find asks who holds blobs: each directory host once, all at the same time. Its answer is a hint, without this host. It waits for the slowest
// until ctx ends, so give it a short one.
func (d *Directory) Find(ctx context.Context, digests []ztoc.Digest) map[ztoc.Digest][]Host {
	calls := d.keepers(digests)
	var mu sync.Mutex
	found := map[ztoc.Digest][]Host{}
	d.each(slices.Collect(maps.Keys(calls)), func(h Host) error {
		var a HoldersAnswer
		var err error
		if ask := (HoldersAsk{calls[h]}); h.Name == d.Self.Name {
			a, err = d.Table.Find(ctx, h.Name, ask)
		} else {
			a, err = Ask(ctx, d.Client, h, Holders, ask)
		}
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, digest := range calls[h] { // what was asked, not what was answered
			for _, at := range a.Holders[digest] {
				if at.Name != d.Self.Name && len(found[digest]) < DirectoryHosts*MaxHolders && !slices.Contains(found[digest], at) {
					found[digest] = append(found[digest], at)
				}
			}
		}
		return nil
	})
	return found
}

// each calls f for all hosts, 16 at a time, and counts how often it went well.
func (d *Directory) each(hosts []Host, f func(Host) error) (reached int, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	places := make(chan struct{}, 16)
	for _, h := range hosts {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			e := f(h)
			mu.Lock()
			defer mu.Unlock()
			if e != nil {
				err = e
			} else {
				reached++
			}
		})
	}
	wg.Wait()
	return reached, err
}
