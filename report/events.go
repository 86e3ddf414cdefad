package report

import (
	"fmt"

	"github.com/muster-hpc/muster/costmodel"
)

// A Site is where events are from: what a report does not know.
type Site struct {
	Experiment string // what these jobs have in common: a cluster, a season
	Instance   string // type of the hosts
}

// Events are the hosts that got ready, in the columns of the study: pull_s is a host's time until it was as ready as asked, which the strategy
// names, and new_bytes what it did not have before.
func Events(r *Report, s Site) (events []costmodel.Event) {
	for _, h := range r.done() {
		fresh := max(0, r.Size-h.Bytes.Store)
		events = append(events, costmodel.Event{
			Run: fmt.Sprintf("%s@%s", r.Stage, r.Began.UTC().Format("20060102T150405.000")), Experiment: s.Experiment, Strategy: "muster-" + string(r.Asked), Image: r.Image,
			Content: costmodel.ContentApp, TotalBytes: float64(r.Size), NewBytes: float64(fresh), Layers: float64(r.Layers), ClusterNodes: r.Nodes,
			InstanceType: s.Instance, Node: h.Host, Start: h.Start, Pull: h.Took, Suspect: fresh == 0,
		})
	}
	return events
}
