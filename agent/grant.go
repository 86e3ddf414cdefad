package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
	"github.com/muster-hpc/muster/ztoc"
)

// Who may have bytes of this host's store. A certificate of the cluster is not enough: images may be private, and a store has those of many
// users. A blob goes to another host when one of these is true:
//
//  1. The origin gives it to anybody: it gave it, or the manifest it is of, to this host without credentials, less than openFor ago.
//  2. A host other than the asker has signed that the origin accepted the user of a job (the grant), and the grant names the asker and the
//     blob. The job's resolver signs it, and it stands in the JobSpec, so that one PlanID means one verdict.
//  3. This host stages the same job, and either it had nothing of the job's layers before, and no other job here has, so that nobody learns by this
//     job what its own hosts did not bring; or the origin accepts the job's credentials when this host itself shows them.
//
// Nobody vouches for himself: a resolver that asks a host outside its job for a private blob is refused, and takes it from the origin. Two hosts
// that lie together are believed, as would be a user's stolen credentials.
const (
	openFor    = 24 * time.Hour // a blob that anybody could have is open for so long
	grantFor   = 24 * time.Hour
	grantSlack = 10 * time.Minute // by which clocks may differ
)

// A grant is what a resolver signs: the origin accepted the user for whom this JobSpec was made.
//
//	0   version 1
//	1   expires, unix seconds  8 bytes
//	9   hash of the JobSpec without its grant  32 bytes
//	41  root of the hash tree over the names of its hosts  32 bytes
//	73  the first 12 bytes of the digest of each of its layers
//
// It is told from its signature by a length of 2 bytes before it. What a host shows to others (peer.Hello.Grant) is the length of all that in 2
// bytes, that, and the path from the host's name to the root.
type grant struct {
	expires time.Time
	spec    [sha256.Size]byte
	hosts   [sha256.Size]byte
	layers  []byte
}

const (
	grantVersion = 1
	grantHead    = 73
	shortDigest  = 12
	// maxGranted bounds a grant and its signature, so that the path of one of 65,536 hosts fits behind it.
	maxGranted = peer.MaxGrant - 2 - 17*(1+sha256.Size)
)

// vouch gives a JobSpec its grant: the host that signs has seen the origin accept the user.
func vouch(c *peer.Client, spec *planner.JobSpec) error {
	spec.Access = nil
	hash, hosts := spec.ID(), nameTree(spec)
	b := append([]byte{grantVersion}, binary.BigEndian.AppendUint64(nil, uint64(time.Now().Add(grantFor).Unix()))...)
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
	g := &grant{expires: time.Unix(int64(binary.BigEndian.Uint64(b[1:])), 0), layers: bytes.Clone(b[grantHead:])}
	copy(g.spec[:], b[9:])
	copy(g.hosts[:], b[41:])
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

// accept looks at the grant of the job's spec; the job is not known to others yet.
func (j *job) accept(fresh bool) {
	j.shown = shown(j.spec, j.me)
	name, g, err := j.a.voucher(j.spec.Access)
	bare := *j.spec
	bare.Access = nil
	if err == nil && g.spec == bare.ID() && time.Now().Before(g.expires.Add(grantSlack)) {
		j.voucher = name
	}
	// Of two jobs that share a layer neither knows whose bytes it passes on: a job that waits for nothing could reap what another brings.
	j.a.mu.Lock()
	defer j.a.mu.Unlock()
	for _, o := range j.a.plans {
		if o != j && o.shares(j) {
			o.fresh.Store(false)
			fresh = false
		}
	}
	j.fresh.Store(fresh)
}

// shares reports whether two jobs have a layer in common.
func (j *job) shares(o *job) bool {
	return slices.ContainsFunc(j.layers(), func(n int) bool { return o.number(j.spec.Blobs[n].Digest) >= 0 })
}

// mayTake decides whether another host may have a blob. j is the job of the plan that it named, nil when there is none here.
func (a *Agent) mayTake(ctx context.Context, from peer.Asker, j *job, d ztoc.Digest) error {
	if j != nil && j.knows(d) && (j.fresh.Load() || j.accepted.Load() || j.voucher != "" && j.voucher != from.Name) {
		return nil
	}
	if a.isOpen(d) {
		return nil
	}
	if j != nil && j.knows(d) && j.ownVerdict(ctx) {
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

// knows reports whether a blob is one of the job: of its plan, or a table made for it.
func (j *job) knows(d ztoc.Digest) bool {
	if j.number(d) >= 0 {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.extra, func(h *held) bool { return h.ref.Digest == d })
}

// errNotAccepted says that the origin does not give a job what its plan speaks of.
var errNotAccepted = errors.New("the origin does not accept the job's user")

// ownVerdict asks the origin, as the job's user, for the manifest that the job is about: once, and again when the origin could not say.
func (j *job) ownVerdict(ctx context.Context) bool {
	j.mu.Lock()
	v := j.verdict
	if v == nil || v.over() && v.again {
		v = &verdict{done: make(chan struct{})}
		j.verdict = v
		j.notes.Go(func() { v.reach(j) })
	}
	j.mu.Unlock()
	select {
	case <-v.done:
		return v.err == nil
	case <-ctx.Done():
		return false
	}
}

// A verdict is an answer of the origin about a job's user.
type verdict struct {
	done  chan struct{} // closed when the rest is set
	err   error         // nil: accepted
	again bool          // the origin could not be asked
}

func (v *verdict) over() bool {
	select {
	case <-v.done:
		return true
	default:
		return false
	}
}

func (v *verdict) reach(j *job) {
	defer close(v.done)
	ctx, cancel := context.WithTimeout(j.ctx, j.a.o.Ask)
	defer cancel()
	repo, err := j.repository()
	if err == nil {
		var m origin.Manifest
		if m, err = repo.Manifest(ctx, string(j.spec.Manifest)); err == nil {
			err = j.isOf(m)
		}
	}
	if v.err = err; err != nil {
		v.again = !errors.Is(err, origin.ErrUnauthorized) && !errors.Is(err, origin.ErrNotFound) && !errors.Is(err, errNotAccepted)
		j.a.log.Info("the origin does not say that the job's user may have the image", "job", j.id, "cause", err)
		return
	}
	if len(j.asked().Secret) == 0 {
		for _, n := range j.layers() {
			j.a.nowOpen(j.spec.Blobs[n].Digest)
		}
	}
}

// isOf reports whether the plan speaks of that manifest's layers and no others.
func (j *job) isOf(m origin.Manifest) error {
	var list struct {
		Layers []struct {
			Digest ztoc.Digest `json:"digest"`
		} `json:"layers"`
	}
	if err := json.Unmarshal(m.Body, &list); err != nil {
		return err
	}
	for _, n := range j.layers() {
		d := j.spec.Blobs[n].Digest
		if !slices.ContainsFunc(list.Layers, func(l struct {
			Digest ztoc.Digest `json:"digest"`
		},
		) bool {
			return l.Digest == d
		}) {
			return fmt.Errorf("%w: layer %s is not of manifest %s", errNotAccepted, d, j.spec.Manifest)
		}
	}
	return nil
}

// nowOpen notes that the origin gives a blob to anybody. It holds for openFor, a restart included.
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

// isOpen reports whether the origin gave a blob to anybody lately.
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
