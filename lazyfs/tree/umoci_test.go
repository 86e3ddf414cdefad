package tree_test

import (
	"archive/tar"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/lazyfs/tree"
	"github.com/muster-hpc/muster/tests/e2e/compare"
)

// sameAsUmoci compares the tree of a stack with what umoci unpacks.
func sameAsUmoci(t *testing.T, s stack, p tree.Presentation) {
	t.Helper()
	ls, archives := layers(t, s)
	tab, _ := build(t, ls)
	want, start, err := unpack(t, archives, p.User)
	if err != nil {
		t.Errorf("%v\n%s", err, s)
		return
	}
	got := listing(t, tab, archives, p)
	if d := compare.Diff(got, want, compare.DiffOptions{UnpackedAt: start, Rootless: p.User}); len(d) > 0 {
		t.Errorf("%s\n%s", strings.Join(d, "\n"), s)
	}
}

var (
	asImage = tree.Presentation{}
	asUser  = tree.Presentation{User: true, UID: uint32(user.uid), GID: uint32(user.gid)}
)

var stacks = flag.Int("stacks", 25, "number of random images that are compared with umoci, for each presentation")

// TestRandomStacksAreAsUmociUnpacksThem makes small images in which names collide all the time. Entries that
// Build refuses are what umoci gives up at, and the rest is what umoci makes of the rest.
func TestRandomStacksAreAsUmociUnpacksThem(t *testing.T) {
	for seed := range *stacks {
		t.Run(fmt.Sprint("image/", seed), func(t *testing.T) {
			t.Parallel()
			s := accepted(t, randomStack(rand.New(rand.NewPCG(uint64(seed), 1))))
			sameAsUmoci(t, s, asImage)
		})
	}
	for seed := range *stacks {
		t.Run(fmt.Sprint("user/", seed), func(t *testing.T) {
			t.Parallel()
			s := accepted(t, randomStack(rand.New(rand.NewPCG(uint64(seed), 2))))
			for _, l := range s { // in a directory of its own that it cannot write, umoci gives up sooner or later
				for i := range l {
					if l[i].Typeflag == tar.TypeDir {
						l[i].Mode |= 0o700
					}
				}
			}
			sameAsUmoci(t, s, asUser)
		})
	}
}

// accepted is s without the entries that Build refuses, each of which is checked to be one that umoci
// cannot unpack either.
func accepted(t *testing.T, s stack) stack {
	t.Helper()
	ls, _ := layers(t, s)
	_, st := build(t, ls)
	good, refused := stack{}, 0
	for i, l := range s {
		var keep []member
		for k, m := range l {
			if slices.ContainsFunc(st.Notes, func(n tree.Note) bool {
				return n.Layer == i && n.Seq == k && !strings.HasPrefix(n.Reason, "xattr")
			}) {
				if refused++; refused <= 2 {
					umociRefuses(t, append(slices.Clone(good), append(slices.Clone(keep), m)))
				}
				continue
			}
			keep = append(keep, m)
		}
		good = append(good, keep)
	}
	if refused != st.Skipped {
		t.Errorf("%d entries skipped, %d noted", st.Skipped, refused)
	}
	return good
}

// umociRefuses checks that umoci cannot unpack s either, whose last entry Build refuses.
func umociRefuses(t *testing.T, s stack) {
	t.Helper()
	ls, archives := layers(t, s)
	_, st := build(t, ls)
	if st.Skipped != 1 {
		t.Errorf("%d entries skipped, want the last one\n%s", st.Skipped, s)
		return
	}
	if strings.Contains(st.Notes[0].Reason, "whiteout") {
		return // umoci removes what it should not
	}
	if _, _, err := unpack(t, archives, false); err == nil {
		t.Errorf("umoci unpacks what is refused as %q\n%s", st.Notes[0].Reason, s)
	}
}

func randomStack(r *rand.Rand) stack {
	s := make(stack, 1+r.IntN(5))
	for i := range s {
		for range r.IntN(16) {
			s[i] = append(s[i], randomMember(r))
		}
	}
	return s
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func randomName(r *rand.Rand) string {
	parts := make([]string, 1+r.IntN(3))
	for i := range parts {
		parts[i] = pick(r, "a", "b", "c", "d", "e", "f")
	}
	n := strings.Join(parts, "/")
	switch r.IntN(16) {
	case 0:
		return "/" + n
	case 1:
		return "../../" + n
	case 2:
		return "x/../" + n
	case 3:
		return "./" + n
	case 4:
		return strings.Replace(n, "/", "//./", 1)
	}
	return n
}

func randomMember(r *rand.Rand) member {
	var m member
	m.Name = randomName(r)
	m.Mode = pick[int64](r, 0o644, 0o755, 0o600, 0o444, 0, 0o4755, 0o2755, 0o1777, 0o6711, 0o555)
	m.Uid, m.Gid = pick(r, 0, 0, 0, 1, 1000, 65534, 1<<31+5), pick(r, 0, 0, 0, 5, 100, 1<<31)
	m.ModTime = time.Unix(r.Int64N(2_000_000_000), 0)
	if r.IntN(2) == 0 {
		m.ModTime = m.ModTime.Add(time.Duration(r.IntN(1e9)))
	}
	if r.IntN(40) == 0 {
		m.ModTime = time.Unix(-r.Int64N(1_000_000_000), 0)
	}
	switch r.IntN(20) {
	case 0, 1, 2, 3, 4, 5:
		m.Typeflag = tar.TypeReg
		m.body = strings.Repeat(pick(r, "", "x", "some content\n"), r.IntN(100))
	case 6, 7, 8, 9, 10:
		m.Typeflag = tar.TypeDir
		m.Name = pick(r, m.Name, m.Name, m.Name, m.Name+"/", "./", "/", ".")
	case 11, 12, 13:
		m.Typeflag = tar.TypeSymlink
		m.Linkname = pick(r, randomName(r), "/"+randomName(r), "../"+randomName(r), "..", "/", "../../..", ".", "nowhere/"+randomName(r))
	case 14, 15:
		m.Typeflag = tar.TypeLink
		m.Linkname = randomName(r)
	case 16, 17:
		m.Typeflag = pick[byte](r, tar.TypeReg, tar.TypeReg, tar.TypeDir, tar.TypeChar)
		i := strings.LastIndexByte(m.Name, '/') + 1
		m.Name = m.Name[:i] + ".wh." + m.Name[i:]
	case 18:
		m.Typeflag = tar.TypeReg
		m.Name = pick(r, ".wh..wh..opq", m.Name+"/.wh..wh..opq", m.Name+"/.wh..wh..opq", m.Name+"/.wh..wh.plnk")
		if r.IntN(20) == 0 {
			m.Name = pick(r, m.Name+"/.wh.", m.Name+"/.wh..", m.Name+"/.wh...")
		}
	case 19:
		m.Typeflag = pick[byte](r, tar.TypeChar, tar.TypeBlock, tar.TypeFifo)
		if m.Typeflag != tar.TypeFifo {
			m.Devmajor, m.Devminor = r.Int64N(1<<12), r.Int64N(1<<20)
		}
	}
	if r.IntN(4) == 0 && (m.Typeflag == tar.TypeReg || m.Typeflag == tar.TypeDir) {
		m.PAXRecords = map[string]string{}
		for range 1 + r.IntN(3) {
			m.PAXRecords["SCHILY.xattr."+pick(r, "user.a", "user.b", "trusted.c", "user.rootlesscontainers", "security.other")] = pick(r, "1", "two", "\x00\xff")
		}
		if r.IntN(3) == 0 {
			m.PAXRecords["SCHILY.xattr.security.capability"] = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
		}
	}
	return m
}
