package slurm

import (
	"fmt"
	"strings"
)

// A Site is where things are on a cluster's nodes; the same on all of them.
type Site struct {
	Muster string // the program
	Config string // its configuration; empty: where it looks by itself
	Jobs   string // hooks.jobs
	Hooks  string // directory of the scripts below, and of task-prolog
	Plugin string // the SPANK plug-in
}

// quote makes a path one word of sh.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Scripts are the programs that slurm.conf names, by file name. They are sh, because most jobs have no image and must not pay for the start
// of a larger program; of what users write they look at one pattern and no more. Without muster none of them fails.
func (s Site) Scripts() map[string]string {
	run := quote(s.Muster)
	if s.Config != "" {
		run += " --config " + quote(s.Config)
	}
	const head = "#!/bin/sh\n# Written by 'muster install slurm', which also takes it away. A job without an image ends in this file.\n"
	asked := `case "$SPANK_MUSTER_IMAGE,$SLURM_JOB_COMMENT" in
,) exit 0 ;;
,*image=*) ;;
,*) exit 0 ;;
esac
`
	there := "[ -x " + quote(s.Muster) + ` ] || { echo "muster: ` + "not installed on this node" + `" >&2; exit 0; }` + "\n"
	return map[string]string{
		"prolog":      head + asked + there + "exec " + run + " hook slurm prolog\n",
		"prolog-ctld": head + asked + there + "exec " + run + " hook slurm prolog-ctld\n",
		"epilog":      head + "[ -e " + quote(s.Jobs) + `/slurm-"$SLURM_JOB_ID" ] || exit 0` + "\n" + there + "exec " + run + " hook slurm epilog\n",
	}
}

// A Key is a line of slurm.conf.
type Key struct{ Name, Value, Why string }

// Keys are what slurm.conf needs.
func (s Site) Keys() []Key {
	return []Key{
		{"Prolog", s.Hooks + "/prolog", "mounts a job's image"},
		{"Epilog", s.Hooks + "/epilog", "releases it"},
		{"TaskProlog", s.Hooks + "/task-prolog", "keeps tasks from running outside of their image"},
		{"PrologSlurmctld", s.Hooks + "/prolog-ctld", "holds a job whose image is no image before its nodes are kept waiting"},
		{"PrologFlags", "Alloc,DeferBatch", "prologs run on all nodes at once, at allocation, and batch scripts after them"},
		{"PrologEpilogTimeout", "120", "without one, a hook that hangs holds its node for ever"},
		{"BatchStartTimeout", "60", "prologs of large jobs may take a while"},
	}
}

// PluginLine is plugstack.conf's line. "optional": a node where the file is missing goes on working; steps with an image end there.
func (s Site) PluginLine() string {
	l := "optional " + s.Plugin + " muster=" + s.Muster + " jobs=" + s.Jobs
	if s.Config != "" {
		l += " config=" + s.Config
	}
	return l
}

// The lines that part ours from a site's own.
const (
	begin = "# muster: begin (written by 'muster install slurm', removed by 'muster install slurm --undo')"
	end   = "# muster: end"
)

// Add is conf with our keys in a block at its end. Keys that the site has set itself stay as they are: notes say what to do about each.
func Add(conf string, keys []Key) (changed string, notes []string) {
	conf, _ = Remove(conf)
	var b strings.Builder
	b.WriteString(begin + "\n")
	for _, k := range keys {
		have := Setting([]byte(conf), k.Name)
		switch {
		case have == "":
			fmt.Fprintf(&b, "%s=%s\n", k.Name, k.Value)
		case strings.EqualFold(have, k.Value):
		case k.Name == "PrologFlags":
			if missing := lacks(have, k.Value); len(missing) > 0 {
				notes = append(notes, fmt.Sprintf("PrologFlags=%s is set already: add %s to it (%s)", have, strings.Join(missing, ","), k.Why))
			}
		case strings.HasSuffix(k.Name, "Timeout"): // a site's own bound is as good
		default:
			notes = append(notes, fmt.Sprintf("%s=%s is set already: call %s at its end (%s)", k.Name, have, k.Value, k.Why))
		}
	}
	b.WriteString(end + "\n")
	if conf != "" && !strings.HasSuffix(conf, "\n") {
		conf += "\n"
	}
	return conf + b.String(), notes
}

// AddLine is conf with one line of ours in a block at its end.
func AddLine(conf, line string) string {
	conf, _ = Remove(conf)
	if conf != "" && !strings.HasSuffix(conf, "\n") {
		conf += "\n"
	}
	return conf + begin + "\n" + line + "\n" + end + "\n"
}

// lacks are the words of want that a comma list has not.
func lacks(have, want string) (missing []string) {
	for w := range strings.SplitSeq(want, ",") {
		found := false
		for h := range strings.SplitSeq(have, ",") {
			found = found || strings.EqualFold(strings.TrimSpace(h), w)
		}
		if !found {
			missing = append(missing, w)
		}
	}
	return missing
}

// Remove is conf without our block, byte for byte what the site wrote, and whether there was one.
func Remove(conf string) (string, bool) {
	before, rest, found := strings.Cut(conf, begin+"\n")
	if !found {
		return conf, false
	}
	_, after, _ := strings.Cut(rest, end+"\n")
	return before + after, true
}
