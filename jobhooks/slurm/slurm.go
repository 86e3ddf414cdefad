package slurm

import (
	"bufio"
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/jobhooks"
	"github.com/muster-hpc/muster/jobhooks/hostlist"
)

// What the plug-in passes on. A hook that root runs finds SPANK_ before the name.
const (
	VarImage = "MUSTER_IMAGE"
	VarReady = "MUSTER_READY"
	// NoImage is what a step says that wants to be on the host in a job that has an image.
	NoImage = "none"
)

// Prolog is the job of the environment of Prolog, PrologSlurmctld or Epilog. parse says whether a reference is one. It fails with ErrNoImage, with
// ErrImage, or with ErrEnvironment; with ErrImage the job is known otherwise.
func Prolog(env func(string) string, parse func(string) error) (jobhooks.Job, error) {
	j := jobhooks.Job{Scheduler: "slurm", ID: env("SLURM_JOB_ID"), User: env("SLURM_JOB_USER"), Here: env("SLURMD_NODENAME")}
	if n, err := strconv.ParseUint(j.ID, 10, 32); err != nil || n == 0 {
		return j, fmt.Errorf("%w: SLURM_JOB_ID is %.40q", jobhooks.ErrEnvironment, j.ID)
	}
	for name, to := range map[string]*uint32{"SLURM_JOB_UID": &j.UID, "SLURM_JOB_GID": &j.GID} {
		n, err := strconv.ParseUint(env(name), 10, 32)
		if err != nil {
			return j, fmt.Errorf("%w: %s is %.40q", jobhooks.ErrEnvironment, name, env(name))
		}
		*to = uint32(n)
	}
	if r := env("SLURM_JOB_RESTART_COUNT"); r != "" {
		n, err := strconv.ParseUint(r, 10, 31)
		if err != nil {
			return j, fmt.Errorf("%w: SLURM_JOB_RESTART_COUNT is %.40q", jobhooks.ErrEnvironment, r)
		}
		j.Restarts = int(n)
	}
	list := env("SLURM_NODELIST")
	if list == "" { // the controller's hooks have this name for it
		list = env("SLURM_JOB_NODELIST")
	}
	var err error
	if j.Hosts, err = hostlist.Expand(list); err != nil {
		return j, fmt.Errorf("%w: node list: %w", jobhooks.ErrEnvironment, err)
	}
	if j.Image = env("SPANK_" + VarImage); j.Image == "" {
		j.Image = jobhooks.CommentImage(env("SLURM_JOB_COMMENT"))
	}
	if j.Image == "" || j.Image == NoImage {
		return j, jobhooks.ErrNoImage
	}
	if j.Ready, err = control.ParseReady(env("SPANK_" + VarReady)); err != nil {
		return j, fmt.Errorf("%w: %w", jobhooks.ErrImage, err)
	}
	return j, jobhooks.CheckImage(j.Image, parse)
}

// A Command is what to run for a verdict: an argument list, never a shell's line.
type Command []string

// Tell says a verdict on a job. held tells the owner where he looks; fail is the exit code of a Prolog.
func Tell(j jobhooks.Job, v jobhooks.Verdict, message string) (run []Command, fail int) {
	note := Command{"scontrol", "update", "JobId=" + j.ID, "AdminComment=" + message}
	switch v {
	case jobhooks.Hold:
		return []Command{{"scontrol", "requeuehold", j.ID}, note}, 0
	case jobhooks.Retry:
		return []Command{{"scontrol", "requeue", j.ID}, note}, 0
	case jobhooks.Broken:
		return []Command{note}, 1
	}
	return nil, 0
}

// Deadline is how long a Prolog may take: as configured, and below PrologEpilogTimeout of slurm.conf, which would drain the node.
func Deadline(configured time.Duration, conf []byte) time.Duration {
	seconds, err := strconv.ParseUint(Setting(conf, "PrologEpilogTimeout"), 10, 16)
	if err != nil || seconds == 0 || seconds == 65534 { // 65534 is how Slurm writes "none"
		return configured
	}
	return min(configured, time.Duration(seconds)*time.Second*3/4)
}

// Setting is a key of slurm.conf, or empty. Keys have no case; the last line that has it counts. Files that it includes are not read.
func Setting(conf []byte, key string) (value string) {
	for s := bufio.NewScanner(bytes.NewReader(conf)); s.Scan(); {
		line, _, _ := strings.Cut(s.Text(), "#")
		k, v, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && strings.EqualFold(strings.TrimSpace(k), key) {
			value = strings.TrimSpace(v)
		}
	}
	return value
}
