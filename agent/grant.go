package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// Who may have bytes of this host's store. A certificate of the cluster is not enough: images may be private, and a store has those of many
// users. A blob goes to another host when one of these is true:
//
//  1. It is open: it was brought by a job whose resolver said that the origin gives it to anybody, to this host that had nothing of it before, so
//     that those who say so had the bytes themselves; or the origin has given some of it to this host without credentials, and the same bytes. That
//     holds for openFor.
//  2. A host other than the asker has signed that the origin accepted the user of a job (the grant), and the grant names the asker and the
//     blob. The job's resolver signs it, and it stands in the JobSpec, so that one PlanID means one verdict.
//  3. This host stages the same job, and either had nothing of the blob before, nor does another job here want it, so that what it passes on is what
//     the job's own hosts have brought; or the origin gives this host some of it for the job's credentials, and the same bytes.
//
// Nobody vouches for himself: a resolver that asks a host outside its job for a private blob is refused, and takes it from the origin. Two hosts
// that lie together are believed, as would be a user's stolen credentials. What the origin says is held against bytes that are here, because the
// origin is whom a job names.
const (
	openFor    = 24 * time.Hour // a blob that anybody could have is open for so long
	grantFor   = 24 * time.Hour
	grantSlack = 10 * time.Minute // by which clocks may differ
)

// A grant is what a resolver signs: the origin accepted the user for whom this JobSpec was made.
//
//	0   version 1
//	1   1: the origin gives it to anybody
//	2   expires, unix seconds  8 bytes
//	10  hash of the JobSpec without its grant  32 bytes
//	42  root of the hash tree over the names of its hosts  32 bytes
//	74  the first 12 bytes of the digest of each of its layers
//
// It is told from its signature by a length of 2 bytes before it. What a host shows to others (peer.Hello.Grant) is the length of all that in 2
// bytes, that, and the path from the host's name to the root.
type grant struct {
	public  bool
	expires time.Time
	spec    [sha256.Size]byte
	hosts   [sha256.Size]byte
	layers  []byte
}

const (
	grantVersion = 1
	grantHead    = 74
	shortDigest  = 12
	// maxGranted bounds a grant and its signature, so that the path of one of 65,536 hosts fits behind it.
	maxGranted = peer.MaxGrant - 2 - 17*(1+sha256.Size)
)

// vouch gives a JobSpec its grant: the host that signs has seen the origin accept the user.
func vouch(c *peer.Client, spec *planner.JobSpec, public bool) error {
	spec.Access = nil
	hash, hosts := spec.ID(), nameTree(spec)
	b := []byte{grantVersion, 0}
	if public {
		b[1] = 1
	}
	b = append(b, binary.BigEndian.AppendUint64(nil, uint64(time.Now().Add(grantFor).Unix()))...)
	b = append(append(b, hash[:]...), hosts[len(hosts)-1][0][:]...)
	for _, l := range spec.Blobs {
		if l.Kind == planner.Layer && len(b) < maxGranted-1024 { // the rest, of an image with 200 layers, comes from the job's hosts only
			b = append(b, short(l.Digest)...)
		}
	}
	signature, err := c.Sign(b)
	if err != nil {
		return err
	}
	if len(b)+len(signature) > maxGranted {
		return fmt.Errorf("a grant of %d bytes", len(b)+len(signature))
	}
	spec.Access = append(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...), signature...)
	return nil
}

func short(d ztoc.Digest) []byte {
	b, _ := ztoc.ParseDigest(string(d))
	sum := sha256.Sum256([]byte(b)) // of the name, so that any digest will do
	return sum[:shortDigest]
}

// voucher is who signed a grant, and what it says.
func (a *Agent) voucher(access []byte) (string, *grant, error) {
	bad := fmt.Errorf("%w: malformed grant", peer.ErrDenied)
	if len(access) < 2 {
		return "", nil, bad
	}
	n := int(binary.BigEndian.Uint16(access))
	if n < grantHead || len(access) < 2+n || access[2] != grantVersion || (n-grantHead)%shortDigest != 0 {
		return "", nil, bad
	}
	b := access[2 : 2+n]
	name, err := a.client.Signer(b, access[2+n:])
	if err != nil {
		return "", nil, err
	}
	g := &grant{public: b[1] == 1, expires: time.Unix(int64(binary.BigEndian.Uint64(b[2:])), 0), layers: bytes.Clone(b[grantHead:])}
	copy(g.spec[:], b[10:])
	copy(g.hosts[:], b[42:])
	return name, g, nil
}

func (g *grant) covers(d ztoc.Digest) bool {
	want := short(d)
	for l := g.layers; len(l) >= shortDigest; l = l[shortDigest:] {
		if bytes.Equal(l[:shortDigest], want) {
			return true
		}
	}
	return false
}

// nameTree is the hash tree over the names of a spec's hosts, leaves first.
func nameTree(spec *planner.JobSpec) (levels [][][sha256.Size]byte) {
	level := make([][sha256.Size]byte, len(spec.Hosts))
	for i, h := range spec.Hosts {
		level[i] = nameLeaf(h.Name)
	}
	for levels = append(levels, level); len(level) > 1; levels = append(levels, level) {
		up := make([][sha256.Size]byte, 0, (len(level)+1)/2)
		for i := 0; i < len(level); i += 2 {
			if i+1 == len(level) {
				up = append(up, level[i])
				continue
			}
			up = append(up, nameNode(level[i], level[i+1]))
		}
		level = up
	}
	return levels
}

func nameLeaf(name string) [sha256.Size]byte { return sha256.Sum256(append([]byte{0}, name...)) }

func nameNode(l, r [sha256.Size]byte) [sha256.Size]byte {
	return sha256.Sum256(append(append([]byte{1}, l[:]...), r[:]...))
}

// shown is a spec's grant as one of its hosts shows it to others.
func shown(spec *planner.JobSpec, host int) []byte {
	if len(spec.Access) == 0 {
		return nil
	}
	b := append(binary.BigEndian.AppendUint16(nil, uint16(len(spec.Access))), spec.Access...)
	for _, level := range nameTree(spec) {
		if other := host ^ 1; other < len(level) && len(level) > 1 {
			b = append(append(b, byte(host&1)), level[other][:]...)
		}
		host /= 2
	}
	return b
}

// names reports whether a path leads from a host's name to the grant's root.
func (g *grant) names(host string, path []byte) bool {
	at := nameLeaf(host)
	for ; len(path) >= 1+sha256.Size; path = path[1+sha256.Size:] {
		other := [sha256.Size]byte(path[1:])
		if path[0] == 1 {
			at = nameNode(other, at)
		} else {
			at = nameNode(at, other)
		}
	}
	return len(path) == 0 && at == g.hosts
}

// hello is how this host introduces itself for the job.
func (j *job) hello(pri ztoc.Priority) peer.Hello {
	return peer.Hello{Plan: j.plan.ID().String(), Rank: j.me, Priority: pri, Grant: j.shown}
}

// accept looks at the grant of the job's spec, and at what was here before it; the job is not known to others yet.
func (j *job) accept(content map[ztoc.Digest][]byte) {
	j.shown = shown(j.spec, j.me)
	name, g, err := j.a.voucher(j.spec.Access)
	bare := *j.spec
	bare.Access = nil
	if err == nil && g.spec == bare.ID() && time.Now().Before(g.expires.Add(grantSlack)) {
		j.voucher, j.public = name, g.public
	}
	j.fresh = make([]atomic.Bool, len(j.blobs))
	for n, h := range j.blobs {
		// What this host has made for the job it may pass on to the job's hosts.
		j.fresh[n].Store(content[h.ref.Digest] != nil || h.blob.Present() == 0)
	}
	// Of two jobs that want a blob neither knows whose bytes it passes on: a job that waits for nothing could reap what another brings.
	j.a.mu.Lock()
	defer j.a.mu.Unlock()
	for _, o := range j.a.plans {
		for n, b := range j.spec.Blobs {
			if m := o.number(b.Digest); o != j && m >= 0 {
				o.fresh[m].Store(false)
				j.fresh[n].Store(false)
			}
		}
	}
}

// ownBytes reports whether all layers were brought by this job.
func (j *job) ownBytes() bool {
	for _, n := range j.layers() {
		if !j.fresh[n].Load() && !j.accepted.Load() {
			return false
		}
	}
	return true
}

// opens notes which blobs are open now: the job has brought them, and they are proven.
func (j *job) opens() {
	for n, b := range j.spec.Blobs {
		if j.public && j.fresh[n].Load() {
			j.a.nowOpen(b.Digest)
		}
	}
}

// mayTake decides whether another host may have a blob. j is the job of the plan that it named, nil when there is none here.
func (a *Agent) mayTake(ctx context.Context, from peer.Asker, j *job, d ztoc.Digest) error {
	if j != nil {
		if n := j.subject(d); n >= 0 {
			vouched := j.accepted.Load() || j.voucher != "" && j.voucher != from.Name
			if vouched || j.fresh[n].Load() || a.isOpen(j.spec.Blobs[n].Digest) || j.proves(ctx, n) {
				return nil
			}
		}
	}
	if a.isOpen(d) {
		return nil
	}
	if err := a.granted(from, d); err != nil {
		a.refuse(from, d, err)
		return err
	}
	return nil
}

// granted reports whether the asker has shown a grant of another host for a blob.
func (a *Agent) granted(from peer.Asker, d ztoc.Digest) error {
	if len(from.Grant) < 2 {
		return fmt.Errorf("%w: no grant", peer.ErrDenied)
	}
	n := int(binary.BigEndian.Uint16(from.Grant))
	if len(from.Grant) < 2+n {
		return fmt.Errorf("%w: malformed grant", peer.ErrDenied)
	}
	name, g, err := a.voucher(from.Grant[2 : 2+n])
	switch {
	case err != nil:
		return err
	case name == from.Name:
		return fmt.Errorf("%w: %s vouches for itself", peer.ErrDenied, name)
	case time.Now().After(g.expires.Add(grantSlack)):
		return fmt.Errorf("%w: the grant expired at %v", peer.ErrDenied, g.expires)
	case !g.names(from.Name, from.Grant[2+n:]):
		return fmt.Errorf("%w: the grant is not for %s", peer.ErrDenied, from.Name)
	case !g.covers(d):
		return fmt.Errorf("%w: the grant is not for %s", peer.ErrDenied, d)
	}
	return nil
}

// refuse tells of a refusal, of each host once a minute.
func (a *Agent) refuse(from peer.Asker, d ztoc.Digest, why error) {
	a.metrics.denied.Inc()
	now := time.Now()
	if last, ok := a.refusals.Swap(from.Name, now); ok && now.Sub(last.(time.Time)) < time.Minute {
		return
	}
	a.audit("bytes-refused", "to", from.Name, "blob", d, "cause", why.Error())
}

// subject is the number of the plan's blob that a blob is, or that it is the table of; -1: it is none of this job's.
func (j *job) subject(d ztoc.Digest) int {
	if n := j.number(d); n >= 0 {
		return n
	}
	n := -1
	j.tables.Range(func(layer, t any) bool {
		j.mu.Lock()
		defer j.mu.Unlock()
		if t.(*tableState).ref.Digest == d {
			n = j.number(layer.(ztoc.Digest))
		}
		return n < 0
	})
	return n
}

// A proof is the origin's answer to a job's credentials about one blob.
type proof struct {
	done chan struct{} // closed when the rest is set
	ok   bool
	at   time.Time
}

// proofFor is how long the origin is not asked again after it has said no, or could not be asked.
const proofFor = 10 * time.Second

// proves reports whether the origin gives the job's user some bytes of a layer, and the same as are here.
func (j *job) proves(ctx context.Context, n int) bool {
	if j.spec.Blobs[n].Kind != planner.Layer {
		return false
	}
	j.mu.Lock()
	p := j.proofs[n]
	if p == nil || !p.ok && !p.at.IsZero() && time.Since(p.at) > proofFor {
		p = &proof{done: make(chan struct{})}
		if j.proofs == nil {
			j.proofs = map[int]*proof{}
		}
		j.proofs[n] = p
		j.notes.Go(func() {
			err := j.challenge(n)
			if err != nil {
				j.a.log.Info("the origin does not show that the job's user may have a layer", "job", j.id, "layer", j.spec.Blobs[n].Digest, "cause", err)
			}
			j.mu.Lock()
			p.ok, p.at = err == nil, time.Now()
			j.mu.Unlock()
			close(p.done)
		})
	}
	j.mu.Unlock()
	select {
	case <-p.done:
		return p.ok
	case <-ctx.Done():
		return false
	}
}

// proofBytes is how many bytes of a layer are compared.
const proofBytes = 256

// challenge asks the origin for some bytes of a layer that are here.
func (j *job) challenge(n int) error {
	ctx, cancel := context.WithTimeout(j.ctx, j.a.o.Ask)
	defer cancel()
	h := j.blobs[n]
	r := ztoc.Range{End: min(proofBytes, h.ref.Size)}
	for try := range 100 {
		if off := rand.Int64N(max(1, h.ref.Size-proofBytes+1)); try < 99 {
			r = ztoc.Range{Start: off, End: min(off+proofBytes, h.ref.Size)}
		}
		if h.has(r) {
			break
		}
	}
	ours, theirs := make([]byte, r.Len()), make([]byte, r.Len())
	if err := h.blob.ReadAt(ours, r.Start); err != nil {
		return err
	}
	repo, err := j.repository()
	if err != nil {
		return err
	}
	j.originRequests.Add(1)
	body, err := repo.Blob(ctx, h.ref.Digest, r)
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err := io.ReadFull(body, theirs); err != nil {
		return err
	}
	if !bytes.Equal(ours, theirs) {
		return fmt.Errorf("layer %s %v: %w", h.ref.Digest, r, ztoc.ErrMismatch)
	}
	if len(j.asked().Secret) == 0 {
		j.a.nowOpen(h.ref.Digest)
	}
	return nil
}

// nowOpen notes that anybody may have a blob. It holds for openFor, a restart included.
func (a *Agent) nowOpen(d ztoc.Digest) {
	now := time.Now()
	if last, ok := a.open.Load(d); ok && now.Sub(last.(time.Time)) < openFor/2 {
		return
	}
	a.open.Store(d, now)
	err := a.o.Store.Put(store.KindRef, openKey(d), func(w io.Writer) error {
		_, err := io.WriteString(w, strconv.FormatInt(now.Unix(), 10))
		return err
	})
	if err != nil {
		a.log.Debug("a verdict is not kept", "cause", err)
	}
}

// isOpen reports whether anybody may have a blob.
func (a *Agent) isOpen(d ztoc.Digest) bool {
	last, ok := a.open.Load(d)
	if !ok {
		last = time.Time{}
		if f, err := a.o.Store.Get(store.KindRef, openKey(d)); err == nil {
			b, err := io.ReadAll(io.LimitReader(f, 32))
			_ = f.Close()
			if s, e := strconv.ParseInt(string(b), 10, 64); err == nil && e == nil {
				last = time.Unix(s, 0)
				a.open.Store(d, last)
			}
		}
	}
	since := time.Since(last.(time.Time))
	return since < openFor && since > -grantSlack
}

func openKey(d ztoc.Digest) string { return store.Key("anybody may have " + string(d)) }
