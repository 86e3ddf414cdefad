// Package slurm reads the environments of Slurm's hooks, and says verdicts in Slurm's language.
//
//	PrologSlurmctld  once, on the controller: the reference is looked at before a node is touched
//	Prolog           on each node, as root: the image is mounted, or the scheduler is told why not
//	TaskProlog       for each task, as the user: MUSTER_… variables; a step whose node lacks the plug-in ends here. Slurm runs it after
//	                 the image was entered, so it is C too (spank/task-prolog.c), static, and shown in the image
//	Epilog           on each node, as root: what the job had is released
//
// What a failure costs is Slurm's own decision, seen on 22.05: a Prolog that fails drains its node and holds the job; one that calls
// `scontrol requeue` or `scontrol requeuehold` and returns 0 costs the node nothing. So Prolog here fails for Broken only.
//
// The plug-in (spank/muster.c) enters the image; it is C because Slurm loads it, and knows nothing but whom to ask.
package slurm
