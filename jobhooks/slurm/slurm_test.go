package slurm_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/jobhooks"
	"github.com/muster-hpc/muster/jobhooks/slurm"
)

// captured is an environment as a real Slurm 22.05 gave it to a hook, changed by more.
func captured(t *testing.T, hook string, more map[string]string) func(string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/env-" + hook + ".txt")
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			env[k] = v
		}
	}
	maps.Copy(env, more)
	return func(k string) string { return env[k] }
}

func any(string) error { return nil }

func TestProlog(t *testing.T) {
	image := map[string]string{"SPANK_MUSTER_IMAGE": "reg.example/app:v2"}
	for _, x := range []struct {
		name, hook, here string
		more             map[string]string
		image            string
		ready            control.Ready
		err              error
	}{
		{"the plug-in's option", "Prolog", "node2", image, "reg.example/app:v2", control.Mounted, nil},
		{"on the controller", "PrologSlurmctld", "", image, "reg.example/app:v2", control.Mounted, nil},
		{"in the epilog", "Epilog", "node1", image, "reg.example/app:v2", control.Mounted, nil},
		{"a comment", "Prolog", "node2", nil, "registry/app:v1", control.Mounted, nil},
		{"readiness", "Prolog", "node2", map[string]string{"SPANK_MUSTER_READY": "warm"}, "registry/app:v1", control.Warm, nil},
		{"a word of a comment", "Prolog", "node2", map[string]string{"SLURM_JOB_COMMENT": "urgent; image=a/b:1,x=y"}, "a/b:1", control.Mounted, nil},
		{"a comment without image", "Prolog", "node2", map[string]string{"SLURM_JOB_COMMENT": "myimage=a"}, "", "", jobhooks.ErrNoImage},
		{"on the host all the same", "Prolog", "node2", map[string]string{"SPANK_MUSTER_IMAGE": "none"}, "", "", jobhooks.ErrNoImage},
		{"a shell's words", "Prolog", "node2", map[string]string{"SPANK_MUSTER_IMAGE": "a$(reboot)"}, "", "", jobhooks.ErrImage},
		{"two lines", "Prolog", "node2", map[string]string{"SPANK_MUSTER_IMAGE": "a\nb"}, "", "", jobhooks.ErrImage},
		{"a layout of the host", "Prolog", "node2", map[string]string{"SPANK_MUSTER_IMAGE": "oci:/root/secret"}, "", "", jobhooks.ErrImage},
		{"too long", "Prolog", "node2", map[string]string{"SPANK_MUSTER_IMAGE": strings.Repeat("a", 2000)}, "", "", jobhooks.ErrImage},
		{"no such readiness", "Prolog", "node2", map[string]string{"SPANK_MUSTER_READY": "soon"}, "", "", jobhooks.ErrImage},
		{"an ID that is a path", "Prolog", "node2", map[string]string{"SLURM_JOB_ID": "../../etc"}, "", "", jobhooks.ErrEnvironment},
		{"no uid", "Prolog", "node2", map[string]string{"SLURM_JOB_UID": ""}, "", "", jobhooks.ErrEnvironment},
		{"a list that is none", "Prolog", "node2", map[string]string{"SLURM_NODELIST": "node[1-"}, "", "", jobhooks.ErrEnvironment},
	} {
		t.Run(x.name, func(t *testing.T) {
			j, err := slurm.Prolog(captured(t, x.hook, x.more), any)
			if !errors.Is(err, x.err) {
				t.Fatalf("%v, want %v", err, x.err)
			}
			if err != nil {
				return
			}
			want := jobhooks.Job{
				Scheduler: "slurm", ID: "3", User: "nobody", UID: 65534, GID: 65534, Image: x.image, Ready: x.ready,
				Hosts: []string{"node1", "node2", "node3"}, Here: x.here,
			}
			if fmt.Sprint(j) != fmt.Sprint(want) {
				t.Errorf("%+v, want %+v", j, want)
			}
			if j.Stage() != "slurm-3" || j.Speaks() != (x.here == "node1") {
				t.Errorf("stage %s, speaks %v", j.Stage(), j.Speaks())
			}
		})
	}
	parse := errors.New("no")
	if _, err := slurm.Prolog(captured(t, "Prolog", image), func(string) error { return parse }); !errors.Is(err, parse) || !errors.Is(err, jobhooks.ErrImage) {
		t.Errorf("%v", err)
	}
}

func TestTell(t *testing.T) {
	j := jobhooks.Job{ID: "7"}
	for v, want := range map[jobhooks.Verdict]string{
		jobhooks.Go:     "[] 0",
		jobhooks.Wait:   "[] 0",
		jobhooks.Leave:  "[] 0",
		jobhooks.Retry:  "[[scontrol requeue 7] [scontrol update JobId=7 AdminComment=m n]] 0",
		jobhooks.Hold:   "[[scontrol requeuehold 7] [scontrol update JobId=7 AdminComment=m n]] 0",
		jobhooks.Broken: "[[scontrol update JobId=7 AdminComment=m n]] 1",
	} {
		run, fail := slurm.Tell(j, v, "m n")
		if got := fmt.Sprint(run, fail); got != want {
			t.Errorf("%s: %s, want %s", v, got, want)
		}
	}
}

func TestDeadline(t *testing.T) {
	for conf, want := range map[string]time.Duration{
		"":                                        10 * time.Second,
		"PrologEpilogTimeout=1800\n":              10 * time.Second,
		"prologepilogtimeout = 4 # short\n":       3 * time.Second,
		"PrologEpilogTimeout=65534\n":             10 * time.Second,
		"#PrologEpilogTimeout=4\n":                10 * time.Second,
		"PrologEpilogTimeout=8\nProlog=/x=y\n#\n": 6 * time.Second,
	} {
		if got := slurm.Deadline(10*time.Second, []byte(conf)); got != want {
			t.Errorf("%q: %v, want %v", conf, got, want)
		}
	}
}

var site = slurm.Site{Muster: "/opt/it's/muster", Jobs: "/run/muster/jobs", Hooks: "/opt/hooks", Plugin: "/opt/spank_muster.so"}

func TestInstallLeavesWhatItFound(t *testing.T) {
	for _, conf := range []string{"", "ClusterName=x\n", "ClusterName=x", "Prolog=/site/prolog\nPrologFlags=Alloc\nPrologEpilogTimeout=7\n"} {
		with, notes := slurm.Add(conf, site.Keys())
		again, _ := slurm.Add(with, site.Keys())
		if again != with {
			t.Errorf("%q: the second time is another:\n%s\n%s", conf, with, again)
		}
		if slurm.Setting([]byte(with), "Epilog") != "/opt/hooks/epilog" {
			t.Errorf("no Epilog in %q", with)
		}
		if strings.HasPrefix(conf, "Prolog=") {
			if slurm.Setting([]byte(with), "Prolog") != "/site/prolog" || slurm.Setting([]byte(with), "PrologEpilogTimeout") != "7" || len(notes) != 2 {
				t.Errorf("%q, %q", with, notes)
			}
		} else if len(notes) != 0 {
			t.Errorf("%q: %q", conf, notes)
		}
		without, found := slurm.Remove(with)
		if !found || strings.TrimSuffix(without, "\n") != strings.TrimSuffix(conf, "\n") {
			t.Errorf("%q became %q", conf, without)
		}
	}
}

// TestScripts runs the scripts as Slurm does, with a muster that says how it was called.
func TestScripts(t *testing.T) {
	dir := t.TempDir()
	s := slurm.Site{Muster: filepath.Join(dir, "it's muster"), Config: filepath.Join(dir, "agent.yaml"), Jobs: filepath.Join(dir, "jobs")}
	names := slices.Sorted(maps.Keys(s.Scripts()))
	if got := fmt.Sprint(names); got != "[epilog prolog prolog-ctld]" {
		t.Fatal(got)
	}
	run := func(name string, env ...string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(s.Scripts()[name]), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(file)
		cmd.Env = append([]string{"SLURM_JOB_ID=3"}, env...)
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("%s %v: %v", name, env, err)
		}
		return strings.TrimSpace(string(out))
	}
	none := []string{"SLURM_JOB_COMMENT=`touch " + dir + "/bad` $(touch " + dir + "/bad); touch " + dir + "/bad"}
	image := append([]string{"SPANK_MUSTER_IMAGE=$(touch " + dir + "/bad)"}, none...)
	for _, n := range names { // without muster
		if got := run(n, image...); got != "" {
			t.Errorf("%s: %q", n, got)
		}
	}
	if err := os.WriteFile(s.Muster, []byte("#!/bin/sh\necho \"$*\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if got := run(n, none...); got != "" {
			t.Errorf("%s without an image: %q", n, got)
		}
	}
	if err := os.MkdirAll(filepath.Join(s.Jobs, "slurm-3"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if got, want := run(n, image...), "--config "+s.Config+" hook slurm "+n; got != want {
			t.Errorf("%s: %q, want %q", n, got, want)
		}
	}
	if got := run("prolog", "SLURM_JOB_COMMENT=image=a/b"); got == "" {
		t.Error("a comment's image is not seen")
	}
	if _, err := os.Stat(dir + "/bad"); err == nil {
		t.Error("what a user wrote was executed")
	}
}

func TestCheck(t *testing.T) {
	conf, _ := slurm.Add("", site.Keys())
	stack := slurm.AddLine("", site.PluginLine())
	fine := func(string) error { return nil }
	gone := func(p string) error { return fmt.Errorf("%s is not there", p) }
	for _, x := range []struct {
		name, conf, stack string
		runs, reads       func(string) error
		want              string // levels, and a word of each text
	}{
		{"as installed", conf, stack, fine, fine, ""},
		{"nothing", "", "", fine, fine, "fail Prolog:|fail Epilog:|fail TaskProlog:|warn PrologSlurmctld:|fail Alloc:|warn PrologEpilogTimeout|fail plugstack.conf"},
		{"no scripts on this node", conf, stack, gone, fine, "fail /opt/hooks/prolog|fail /opt/hooks/epilog|fail /opt/hooks/task-prolog"},
		{"no plug-in on this node", conf, stack, fine, gone, "fail spank_muster.so is not there"},
		{"required", conf, strings.ReplaceAll(stack, "optional", "required"), fine, fine, "warn required"},
		{"no time", strings.ReplaceAll(conf, "PrologEpilogTimeout=120", "PrologEpilogTimeout=2"), stack, fine, fine, "warn 2 s"},
		{"a site's own", strings.ReplaceAll(conf, "/opt/hooks/prolog\n", "/etc/slurm/prolog.d/*\n"), stack, fine, fine, ""},
	} {
		var want []string
		if x.want != "" {
			want = strings.Split(x.want, "|")
		}
		got := slurm.Check(x.conf, x.stack, x.runs, x.reads)
		if len(got) != len(want) {
			t.Errorf("%s: %+v, want %q", x.name, got, want)
			continue
		}
		for i, w := range want {
			level, word, _ := strings.Cut(w, " ")
			if got[i].Level != level || !strings.Contains(got[i].Text, word) || got[i].Remedy == "" {
				t.Errorf("%s: %+v, want %q", x.name, got[i], w)
			}
		}
	}
}
