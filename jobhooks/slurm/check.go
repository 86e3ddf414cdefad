package slurm

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// A Finding is something about a Slurm's configuration that an administrator should know. Level is "fail" where jobs with images do not work,
// "warn" where they work worse than they could.
type Finding struct{ Level, Text, Remedy string }

// again is the remedy for most.
const again = "run 'muster install slurm' (--dry-run shows what it does)"

// Check looks at slurm.conf and plugstack.conf. runs says why a program cannot be executed, reads why a file cannot be read.
func Check(conf, plugstack string, runs, reads func(path string) error) (found []Finding) {
	say := func(level, remedy, format string, args ...any) {
		found = append(found, Finding{level, fmt.Sprintf(format, args...), remedy})
	}
	get := func(key string) string { return Setting([]byte(conf), key) }
	for _, k := range []struct{ name, without, broken string }{
		{"Prolog", "no image is mounted before a job's first step", "Slurm drains a node for that"},
		{"Epilog", "images stay mounted after their jobs", "Slurm drains a node for that"},
		{"TaskProlog", "on a node without the plug-in a task would run outside of its image", "no task can start"},
	} {
		path := get(k.name)
		if path == "" {
			say("fail", again, "slurm.conf has no %s: %s", k.name, k.without)
			continue
		}
		if strings.ContainsAny(path, "*?[") { // Slurm takes a pattern too
			continue
		}
		if err := runs(path); err != nil {
			say("fail", "copy the scripts to every node: "+again, "%s: %v: %s", k.name, err, k.broken)
		}
	}
	if get("PrologSlurmctld") == "" {
		say("warn", again, "slurm.conf has no PrologSlurmctld: a job with a wrong image name is held only when its nodes have been waiting for it")
	}
	if missing := lacks(get("PrologFlags"), "Alloc"); len(missing) > 0 && len(lacks(get("PrologFlags"), "Contain")) > 0 {
		say("fail", "add PrologFlags=Alloc,DeferBatch", "PrologFlags has no Alloc: the prologs of a job's other nodes run at its first step only, one after the other nodes have fetched")
	}
	if n, err := strconv.ParseUint(get("PrologEpilogTimeout"), 10, 16); err != nil || n == 65534 {
		say("warn", "set PrologEpilogTimeout=120", "PrologEpilogTimeout is not set: a hook that hangs holds its node for ever")
	} else if n < 5 {
		say("warn", "set PrologEpilogTimeout=120", "PrologEpilogTimeout is %d s: prologs have to give up so early that every first start waits in its step", n)
	}
	line := ""
	for l := range strings.Lines(plugstack) {
		if f := strings.Fields(l); len(f) > 1 && (f[0] == "optional" || f[0] == "required") && strings.Contains(filepath.Base(f[1]), "muster") {
			line = l
		}
	}
	f := strings.Fields(line)
	switch {
	case line == "":
		say("fail", again, "plugstack.conf does not name the plug-in: srun has no --image")
	case f[0] == "required":
		say("warn", "make it 'optional': steps with an image end on a node without the plug-in either way", "plugstack.conf has the plug-in as required: where its file is missing, slurmd and srun do not start at all")
	}
	if line != "" {
		if err := reads(f[1]); err != nil {
			say("fail", "copy the plug-in to every node, or take its line out of plugstack.conf", "the plug-in: %v", err)
		}
	}
	return found
}
