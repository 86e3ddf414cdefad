package agent

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/lazyfs"
)

// A record is what an agent that is started again has to know of a mount: who it is for. Credentials are not in it.
type record struct {
	ID    string `json:"id"`
	Order order  `json:"order"`
	Spec  []byte `json:"spec"`
	Mount string `json:"mount"`
	// Accepted says that the hosts of the job may have its bytes from here: the credentials that would show it are gone.
	Accepted bool `json:"accepted"`
}

func (a *Agent) recordsDir() string { return filepath.Join(a.o.Store.Dir(), "state", "jobs") }

func (a *Agent) recordPath(id string) string {
	return filepath.Join(a.recordsDir(), store.Key(id)[:16]+".json")
}

// remember writes a job's record. Without it the mount lives as well, but a restarted agent takes it for nobody's.
func (a *Agent) remember(j *job) {
	r := record{ID: j.id, Order: j.asked(), Spec: j.encoded, Mount: a.mountDir(j.id), Accepted: j.ownBytes()}
	r.Order.Secret = nil
	b, err := json.Marshal(r)
	if err == nil {
		err = os.MkdirAll(a.recordsDir(), 0o700)
	}
	if err == nil {
		tmp := a.recordPath(j.id) + ".new"
		if err = os.WriteFile(tmp, b, 0o600); err == nil {
			err = os.Rename(tmp, a.recordPath(j.id))
		}
	}
	if err != nil {
		a.log.Warn("a job's record is not kept: a restarted agent will not know its mount", "job", j.id, "cause", err)
	}
}

func (a *Agent) forgetRecord(id string) { _ = os.Remove(a.recordPath(id)) }

// restore finds the mounts of an agent before this one. Those that live are jobs again, and go on with what they lack; what is left of
// others is taken away.
func (a *Agent) restore() {
	names, err := filepath.Glob(filepath.Join(a.recordsDir(), "*.json"))
	if err != nil {
		return
	}
	for _, n := range names {
		var r record
		b, err := os.ReadFile(n)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil || r.ID == "" {
			a.log.Warn("a job's record that cannot be read is removed", "file", n, "cause", err)
			_ = os.Remove(n)
			continue
		}
		if _, err := lazyfs.Mounted(r.Mount); err != nil || r.Mount != a.mountDir(r.ID) {
			a.log.Info("a job's mount is gone", "job", r.ID, "mount", r.Mount)
			RemoveMountDir(a.mountDir(r.ID))
			_ = os.Remove(n)
			continue
		}
		a.keep(a.ctx, r.Mount)
		j := a.newJob(r.ID, r.Order)
		if known, err := a.history.find(r.ID); err == nil && known.State.Done() {
			j.restored = true
		}
		close(j.ordered)
		j.accepted.Store(r.Accepted)
		j.offered <- r.Spec
		j.change(func(s *control.HostState) { s.Mount = r.Mount })
		a.mu.Lock()
		a.start(j)
		a.mu.Unlock()
		a.log.Info("a job's mount was found again", "job", r.ID, "mount", r.Mount)
	}
}
