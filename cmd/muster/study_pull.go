package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/report"
)

// A studyWay is how a host pulls an image into an empty directory. Its steps are commands in which {image}, {dir} and {muster} stand for what they
// say; the last but the clean ones are what is measured, all together.
type studyWay struct {
	needs []string // programs
	steps [][]string
	clean [][]string
}

// studyWays are the strategies that run on a host by themselves.
var studyWays = map[string]studyWay{
	"muster-lazy": {
		steps: [][]string{{"mkdir", "{dir}/mnt"}, {"{muster}", "--store-dir", "{dir}/store", "mount", "{image}", "{dir}/mnt"}},
		clean: [][]string{{"{muster}", "--store-dir", "{dir}/store", "umount", "{dir}/mnt"}},
	},
	"skopeo-umoci": {
		needs: []string{"skopeo", "umoci"},
		steps: [][]string{
			{"skopeo", "copy", "--quiet", "--src-tls-verify={tls}", "docker://{image}", "oci:{dir}/layout:i"},
			{"umoci", "unpack", "--rootless", "--image", "{dir}/layout:i", "{dir}/bundle"},
		},
	},
	"podman": {
		needs: []string{"podman"},
		steps: [][]string{{"podman", "--root", "{dir}/root", "--runroot", "{dir}/run", "pull", "--quiet", "--tls-verify={tls}", "{image}"}},
		clean: [][]string{{"podman", "--root", "{dir}/root", "--runroot", "{dir}/run", "rmi", "--all", "--force"}},
	},
	"apptainer": {
		needs: []string{"apptainer"},
		steps: [][]string{{"env", "APPTAINER_CACHEDIR={dir}/cache", "APPTAINER_TMPDIR={dir}", "apptainer", "--quiet", "pull", "{dir}/image.sif", "docker://{image}"}},
	},
}

// The strategies that the agents carry out, with the readiness that is waited for.
var stagedWays = map[string]control.Ready{"muster-mounted": control.Mounted, "muster-complete": control.Complete}

func staged(strategy string) bool { return stagedWays[strategy] != "" }

func strategyNames() []string {
	return append(slices.Sorted(maps.Keys(stagedWays)), slices.Sorted(maps.Keys(studyWays))...)
}

// studyWays are the strategies that are asked for, or those that there are here; left says which are not, and why.
func (a *app) studyWays(ctx context.Context, f *studyFlags, hosts []string) (ways, left []string, err error) {
	want := f.strategies
	if want == nil {
		want = strategyNames()
	}
	for _, name := range want {
		missing := ""
		switch way, ok := studyWays[name]; {
		case staged(name):
			missing = a.noAgent(ctx)
		case !ok:
			return nil, nil, badScenario("no strategy %.40q; there are %s", name, strings.Join(strategyNames(), ", "))
		default:
			for _, p := range way.needs {
				if _, err := exec.LookPath(p); err != nil {
					missing = p + " is not installed"
				}
			}
		}
		switch {
		case missing == "":
			ways = append(ways, name)
		case f.strategies != nil:
			return nil, nil, unsupported("strategy %s: %s", name, missing)
		default:
			left = append(left, fmt.Sprintf("strategy %s is left out: %s", name, missing))
		}
	}
	if len(ways) == 0 {
		return nil, nil, unsupported("no strategy is possible here: %s", strings.Join(left, "; "))
	}
	return ways, left, nil
}

// noAgent says why there is no agent to stage with, or nothing.
func (a *app) noAgent(ctx context.Context) string {
	c, err := a.agentClient()
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := c.Status(ctx, control.StatusRequest{}); err != nil {
		return "no agent answers at " + cmp.Or(a.cfg.Agent.Socket, control.DefaultSocket)
	}
	return ""
}

// A studyPulled is one host's pull.
type studyPulled struct {
	Host    string    `json:"host"`
	Began   time.Time `json:"began"` // by the host's own clock, but for stages
	Seconds float64   `json:"seconds"`
}

// studyPullLimit bounds one pull.
const studyPullLimit = 6 * time.Hour

// pull pulls an image on all hosts at once.
func (s *studying) pull(ctx context.Context, r studyRun) ([]studyPulled, error) {
	ctx, cancel := context.WithTimeout(ctx, studyPullLimit)
	defer cancel()
	if staged(r.strategy) {
		return s.stage(ctx, r)
	}
	if s.f.launch == "" {
		p, err := s.a.pullHere(ctx, r.strategy, r.image.ref)
		p.Host = s.hosts[0]
		return []studyPulled{p}, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	pulls, errs := make([]studyPulled, len(s.hosts)), make([]error, len(s.hosts))
	var wg sync.WaitGroup
	for i, h := range s.hosts {
		wg.Go(func() {
			words := strings.Fields(strings.ReplaceAll(s.f.launch, "{host}", h))
			cmd := exec.CommandContext(ctx, words[0], append(words[1:], self, "study", "pull", r.strategy, r.image.ref)...)
			var said bytes.Buffer
			cmd.Stderr = &said
			out, err := cmd.Output()
			if err == nil {
				err = json.Unmarshal(out, &pulls[i])
			}
			pulls[i].Host = h
			if err != nil {
				errs[i] = fmt.Errorf("host %s: %w: %.500s", h, err, bytes.TrimSpace(said.Bytes()))
			}
		})
	}
	wg.Wait()
	return pulls, errors.Join(errs...)
}

// stage has the agents bring an image, which no host has: it is made for this run.
func (s *studying) stage(ctx context.Context, r studyRun) ([]studyPulled, error) {
	c, err := s.a.agentClient()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	job := fmt.Sprintf("study-%d-%d", os.Getpid(), time.Now().UnixNano())
	q := control.StageRequest{Job: job, Image: r.image.ref, Ready: stagedWays[r.strategy], UID: -1, GID: -1, NoMount: r.strategy == "muster-complete"}
	if s.f.hosts != "" {
		q.Hosts = s.hosts
	}
	got, err := c.Stage(ctx, q, nil)
	if err == nil && got != nil && got.Failed > 0 {
		for _, h := range got.Hosts {
			if h.Error != "" {
				err = &control.Error{Text: h.Host + ": " + h.Error, Code: max(h.Code, 1)}
			}
		}
	}
	var pulls []studyPulled
	if err == nil {
		var stages []control.Record
		var answers []control.HostRecords
		if stages, answers, err = s.a.recall(ctx, c, control.RecordsRequest{Job: job}); err == nil {
			var rep *report.Report
			if rep, err = report.Of(stages[0], answers, 0); err == nil {
				for _, h := range rep.Hosts {
					pulls = append(pulls, studyPulled{h.Host, rep.Began.Add(time.Duration(h.Start * 1e9)), h.Took})
				}
			}
		}
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	_, gone := c.Unstage(end, control.UnstageRequest{Job: job})
	return pulls, errors.Join(err, gone)
}

// pullHere pulls an image into an empty directory, which it removes.
func (a *app) pullHere(ctx context.Context, strategy, image string) (p studyPulled, err error) {
	way, ok := studyWays[strategy]
	if !ok {
		return p, badScenario("no strategy %.40q that runs on a host alone; there are %s", strategy, strings.Join(slices.Sorted(maps.Keys(studyWays)), ", "))
	}
	dir, err := os.MkdirTemp(os.Getenv("MUSTER_STUDY_DIR"), "muster-study-")
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, removeAll(dir)) }()
	self, err := os.Executable()
	if err != nil {
		return p, err
	}
	host, _, _ := strings.Cut(image, "/")
	words := strings.NewReplacer("{image}", image, "{dir}", dir, "{muster}", self, "{tls}", fmt.Sprint(!a.plainHTTP(host)))
	run := func(ctx context.Context, steps [][]string) error {
		for _, step := range steps {
			args := make([]string, len(step))
			for i, w := range step {
				args[i] = words.Replace(w)
			}
			if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %.500s", filepath.Base(args[0]), err, bytes.TrimSpace(out))
			}
		}
		return nil
	}
	p.Began = time.Now()
	err = run(ctx, way.steps)
	p.Seconds = time.Since(p.Began).Seconds()
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	if clean := run(end, way.clean); err == nil {
		err = clean
	}
	return p, err
}

// plainHTTP reports whether a registry is one without TLS: on this host, or said to be in the configuration.
func (a *app) plainHTTP(host string) bool {
	name, _, _ := strings.Cut(host, ":")
	return name == "localhost" || strings.HasPrefix(name, "127.") || slices.Contains(a.cfg.Origin.PlainHTTP, host)
}

// removeAll removes a directory with what an image may have made in it: directories that nobody may write to.
func removeAll(dir string) error {
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.Chmod(path, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// studyPullCommand is what runs on the hosts of a study.
func (a *app) studyPullCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "pull STRATEGY IMAGE",
		Short:  "pull an image once into an empty directory, and say how long it took",
		Args:   arguments(cobra.ExactArgs(2)),
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), studyPullLimit)
			defer cancel()
			p, err := a.pullHere(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			a.json = true
			return a.result(p, func(io.Writer) {})
		},
	}
}
