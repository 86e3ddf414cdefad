// Package costmodel says how long a set of images takes to be usable on the hosts of a job, and what the waiting costs.
// It is arithmetic over numbers that others bring: no network, no disk, no clock, and nothing of ours is imported.
//
// # Three questions
//
//  1. What will it cost? [Estimate] takes a [Scenario] (layers of images, hosts, price, rates) and returns one
//     [Outcome] per [Strategy]. Every number that enters is a [Parameter] that says where it comes from: given by the user,
//     measured here, fitted on a study, or assumed.
//  2. What is a site's own model? [Fit] takes the pulls of finished jobs ([Event], read by [ReadEvents]) and returns a [Model];
//     [Evaluate] says how far its predictions are from pulls that it has not seen.
//  3. What do images share? [Similar] compares sets of layers.
//
// # How a pull is predicted
//
//  1. The events of one pull of one image on one cluster are a run. Of a run only what is known before it starts is
//     looked at: image, sizes, layers, cluster, hosts. The bytes to fetch are the least that any host of the run had to: what a host
//     has been seen to pull before is a lower bound of what it has.
//  2. A formula of few terms with a meaning gives the median host's time: a constant, a cost per layer, per compressed byte, per
//     inflated byte, and per compressed byte times cluster size (where a registry slows down with the cluster). All
//     are zero or more and fitted by least absolute error of the logarithm, so that outliers and long pulls do not rule.
//  3. What the formula leaves is shared out among what runs have in common — the image, the cluster, the strategy, the kind of host —
//     by kriging: each is a deviation with a known spread, and is believed the more runs have shown it. An image
//     of many small files is slow everywhere; a cluster has a good or a bad day. Runs that no other resembles
//     are weighed down (Student's t), so one stalled pull teaches nothing wrong.
//  4. A host that is slower than its run's median again and again belongs to a slow class and stays there: its factor
//     is the shrunken mean of what was seen of it.
//  5. Starts are spread by a dispatch ramp. The makespan of a run is the slowest host's pull and a part of the
//     ramp, corrected by kriging as in 3.
//
// Nothing runs concurrently here, and all functions may be called from several goroutines at once. Fitting takes time with the
// cube of the number of runs; [Fit] takes the newest [MaxRuns] of them.
//
// # What is not promised
//
// The model knows what the events know: a strategy, an image or a cluster that was never seen gets the formula alone.
// It does not see causes outside the events, such as what else the registry had to do.
package costmodel
