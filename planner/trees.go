package planner

import (
	"cmp"
	"slices"
)

// A tree says how pieces get from one root to all hosts. All slices are by host but order, which is by rank.
type tree struct {
	bytes    int64
	order    []int32 // parents stand before their children, slow hosts at the end
	pos      []int32 // rank
	parent   []int32 // -1: the root
	child    []int32 // the first one, -1: none
	sibling  []int32 // the next child of the same parent, -1: none
	last     []int32 // the last child, while the tree grows
	deputies []int32 // who fetches from the origin when the root is gone
}

// wantTrees is how many trees there shall be, about.
func (p *Plan) wantTrees() int {
	n := p.spec.Params.Trees
	if n == 0 {
		n = treesFor(len(p.spec.Hosts))
	}
	return max(1, min(n, p.Pieces(), 256))
}

func (p *Plan) fanout() int {
	if f := p.spec.Params.Fanout; f > 0 {
		return f
	}
	return DefaultFanout
}

// A grower builds one tree after the other and remembers how much each host has to send so far, so that the next tree's work goes to
// those who have least.
type grower struct {
	hosts  []Host
	group  []int32 // by host; hosts of a group without a fast host are each their own
	groups int
	load   []int64 // bytes to send, by host
	due    []int64 // bytes that a root will have to send at least, to one child, in trees to come
	mean   int64   // of the bytes that each fast host sends in the end
	fanout int

	fastHosts int64
	turn      int // where the next tree begins to look among equals
}

func (p *Plan) grow(shares []int64) {
	g := newGrower(p.spec.Hosts, p.fanout())
	n := int64(len(p.spec.Hosts))
	for i, share := range shares {
		g.due[p.seeds[i%len(p.seeds)]] += share
		g.mean += share * (n - 1) / max(1, g.fastHosts)
	}
	p.trees = make([]tree, len(shares))
	for i, share := range shares {
		p.trees[i] = g.tree(p.seeds[i%len(p.seeds)], share)
		for _, h := range p.trees[i].order[1:] {
			if len(p.trees[i].deputies) == Deputies {
				break
			}
			if p.spec.Hosts[h].Seed {
				p.trees[i].deputies = append(p.trees[i].deputies, h)
			}
		}
	}
}

func newGrower(hosts []Host, fanout int) *grower {
	g := &grower{hosts: hosts, fanout: fanout, load: make([]int64, len(hosts)), due: make([]int64, len(hosts)), group: make([]int32, len(hosts))}
	fast := map[string]bool{}
	for _, h := range hosts {
		if !h.Slow {
			g.fastHosts++
		}
		fast[h.Group] = fast[h.Group] || !h.Slow
	}
	number := map[string]int32{}
	for i, h := range hosts {
		n, known := number[h.Group]
		if !known || !fast[h.Group] {
			n = int32(g.groups)
			g.groups++
			number[h.Group] = n
		}
		g.group[i] = n
	}
	return g
}

// tree grows one tree:
//
//  1. Hosts are sorted: fast before slow, then by how much they have to send already, then in turn.
//  2. The root heads its group if it is among those who are to pass on; else it gives each piece to one host that does.
//  3. The first host of each other group in that order heads its group. Heads form a heap of the fan-out, under the root's.
//  4. The others of a group form a heap of the fan-out under its head; under one of them that the head gives each piece to, where the head has
//     other groups to send to.
func (g *grower) tree(root int, share int64) tree {
	n := len(g.hosts)
	t := newTree(n)
	t.bytes = share
	g.due[root] -= share
	list := g.sorted(root)
	t.add(int32(root), -1)
	top := int32(root)
	if k := g.relay(root, share, list); k >= 0 {
		top = list[k]
		list = slices.Delete(list, k, k+1)
		t.add(top, int32(root))
	}

	members := make([][]int32, g.groups) // each with its head first
	heads := []int32{top}
	members[g.group[top]] = append(members[g.group[top]], top)
	for _, h := range list {
		m := &members[g.group[h]]
		if *m == nil {
			heads = append(heads, h)
		}
		*m = append(*m, h)
	}
	g.heap(&t, heads)
	for _, head := range heads {
		m := members[g.group[head]]
		if t.child[head] >= 0 && len(m) > 2 && !g.hosts[m[1]].Slow {
			t.add(m[1], head)
			m = m[1:]
		}
		g.heap(&t, m)
	}
	for h, c := range t.child {
		for ; c >= 0; c = t.sibling[c] {
			g.load[h] += max(share, 1)
		}
	}
	g.turn = (g.turn + (n-1+g.fanout-1)/g.fanout) % n
	t.last = nil
	return t
}

// fast is how many hosts of list are.
func (g *grower) fast(list []int32) (n int) {
	for _, h := range list {
		if !g.hosts[h].Slow {
			n++
		}
	}
	return n
}

// heap hangs list[1:] under list[0], which is in the tree already. Slow hosts stand behind the fast ones and get no children; list[0]
// may be a slow one where there is no other.
func (g *grower) heap(t *tree, list []int32) {
	n := len(list)
	fast := 1 + g.fast(list[1:])
	f := max(g.fanout, (n-1+fast-1)/fast)
	for i := 1; i < n; i++ {
		t.add(list[i], list[(i-1)/f])
	}
}

// relay is the place in list of the host that the root gives its pieces to, or -1 when the root is to pass on to many itself. It does if it
// has no more to send so far than others of those who are needed, and will not have more in the end.
func (g *grower) relay(root int, share int64, list []int32) int {
	if len(list) == 0 || g.hosts[list[0]].Slow {
		return -1
	}
	needed := (len(list) + g.fanout - 1) / g.fanout
	sends := share * int64(min(g.fanout, len(list)))
	if !g.hosts[root].Slow && g.load[root] <= g.load[list[min(needed, len(list))-1]] && g.load[root]+sends+g.due[root] <= g.mean {
		return -1
	}
	for k, h := range list {
		if g.group[h] == g.group[root] && !g.hosts[h].Slow {
			return k
		}
	}
	if g.hosts[root].Slow {
		return 0
	}
	return -1
}

func (g *grower) sorted(root int) []int32 {
	n := len(g.hosts)
	type key struct {
		load int64
		rank int32 // turn, slow hosts last
		host int32
	}
	keys := make([]key, 0, n)
	for i := range n {
		if i == root {
			continue
		}
		k := key{g.load[i], int32((i - g.turn + n) % n), int32(i)}
		if g.hosts[i].Slow {
			k.load = 1 << 62
		}
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int { return cmp.Or(cmp.Compare(a.load, b.load), cmp.Compare(a.rank, b.rank)) })
	list := make([]int32, len(keys))
	for i, k := range keys {
		list[i] = k.host
	}
	return list
}

func newTree(n int) tree {
	all := make([]int32, 6*n)
	for i := range all {
		all[i] = -1
	}
	return tree{
		order: all[:0:n], pos: all[n : 2*n], parent: all[2*n : 3*n],
		child: all[3*n : 4*n], sibling: all[4*n : 5*n], last: all[5*n:],
	}
}

// add puts host at the end of the order, as the last child of parent.
func (t *tree) add(host, parent int32) {
	t.pos[host] = int32(len(t.order))
	t.order = append(t.order, host)
	t.parent[host] = parent
	if parent < 0 {
		return
	}
	if l := t.last[parent]; l >= 0 {
		t.sibling[l] = host
	} else {
		t.child[parent] = host
	}
	t.last[parent] = host
}
