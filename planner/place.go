package planner

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"slices"

	"github.com/muster-hpc/muster/ztoc"
)

// Rendezvous sorts members by a hash of each with key, the highest first, and gives the first n (all, if there are fewer). Hosts that agree
// about members agree about the result, and a member more or less moves nothing else.
func Rendezvous(key string, members []string, n int) []string {
	type weight struct {
		sum  [sha256.Size]byte
		name string
	}
	all := make([]weight, len(members))
	for i, m := range members {
		b := make([]byte, 0, 64)
		b = append(append(append(b, m...), 0), key...) // names have no NUL
		all[i] = weight{sha256.Sum256(b), m}
	}
	slices.SortFunc(all, func(a, b weight) int {
		return cmp.Or(bytes.Compare(b.sum[:], a.sum[:]), cmp.Compare(a.name, b.name))
	})
	list := make([]string, min(n, len(all)))
	for i := range list {
		list[i] = all[i].name
	}
	return list
}

// Resolver is the host that makes a job's JobSpec; the others ask it, and in its absence the next one. hosts are the job's.
func Resolver(job string, hosts []string) []string {
	return Rendezvous("resolver\x00"+job, hosts, 3)
}

// Directory are the n hosts that keep the list of who has a blob, among members of the cluster.
func Directory(blob ztoc.Digest, members []string, n int) []string {
	return Rendezvous("directory\x00"+string(blob), members, n)
}

// chooseIndexers gives the layers without a ztoc to hosts, the large ones first and to different hosts.
func (p *Plan) chooseIndexers() {
	var layers []int
	for i, b := range p.spec.Blobs {
		if b.Kind == Layer && b.Ztoc == "" {
			layers = append(layers, i)
		}
	}
	if layers == nil {
		return
	}
	slices.SortStableFunc(layers, func(a, b int) int { return cmp.Compare(p.spec.Blobs[b].Size, p.spec.Blobs[a].Size) })
	var names []string
	number := map[string]int{}
	for pass := 0; names == nil; pass++ { // slow hosts only where there is no other
		for i, h := range p.spec.Hosts {
			if pass > 0 || !h.Slow {
				names = append(names, h.Name)
				number[h.Name] = i
			}
		}
	}
	for _, name := range Rendezvous("indexer\x00"+p.spec.Job, names, len(names)) {
		p.index = append(p.index, number[name])
	}
	p.turn = map[int]int{}
	for k, b := range layers {
		p.turn[b] = k % len(p.index)
	}
}

// Indexers are n hosts (fewer, if there are fewer) that build the table of a layer that has none: the first does, the next ones in its place
// should it go, or as a second opinion. Empty for a blob that needs no table.
func (p *Plan) Indexers(blob, n int) []int {
	at, ok := p.turn[blob]
	if !ok {
		return nil
	}
	list := make([]int, min(n, len(p.index)))
	for i := range list {
		list[i] = p.index[(at+i)%len(p.index)]
	}
	return list
}

// Indexer is the host that builds the table of a layer that has none, or -1.
func (p *Plan) Indexer(blob int) int {
	if l := p.Indexers(blob, 1); len(l) == 1 {
		return l[0]
	}
	return -1
}
