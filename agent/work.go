package agent

import (
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
)

// A tally is what the host has done so far, of which a stage's Work is a difference.
type tally struct {
	write             time.Duration
	written           int64
	busy, iowait, all float64 // ticks of all processors since boot
}

func (a *Agent) tally() tally {
	t := tally{write: time.Duration(a.shelf.writing.Load()), written: a.shelf.written.Load()}
	t.busy, t.iowait, t.all = processors()
	return t
}

// processors are the ticks of all processors since boot: those that worked, those that waited for disks, all.
func processors() (busy, iowait, all float64) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line)
	// cpu user nice system idle iowait irq softirq steal; guests are in user and nice (proc(5)).
	if len(f) < 9 || f[0] != "cpu" {
		return 0, 0, 0
	}
	for i, s := range f[1:9] {
		n, _ := strconv.ParseFloat(s, 64)
		all += n
		switch i {
		case 3:
		case 4:
			iowait = n
		default:
			busy += n
		}
	}
	return busy, iowait, all
}

// work is what the job's time went into so far.
func (j *job) work() control.Work {
	now := j.a.tally()
	w := control.Work{
		Write: now.write - j.before.write, Written: now.written - j.before.written,
		Origin: time.Duration(j.originWait.Load()), Peer: time.Duration(j.peerWait.Load()), Paced: j.paced.Load(),
	}
	if all := now.all - j.before.all; all > 0 {
		w.Busy, w.IOWait = (now.busy-j.before.busy)/all, (now.iowait-j.before.iowait)/all
	}
	return w
}
