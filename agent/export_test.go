package agent

import (
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/planner"
)

// Vouch gives a spec a grant that somebody signs.
func Vouch(c *peer.Client, spec *planner.JobSpec) error { return vouch(c, spec, false) }

// Shown is a spec's grant as one of its hosts shows it.
func Shown(spec *planner.JobSpec, host int) []byte { return shown(spec, host) }

// OrderID is the id of root's order for an image.
func OrderID(job, image string) string { return order{Job: job, Image: image}.id() }
