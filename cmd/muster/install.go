package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/jobhooks/slurm"
)

// installFlags are the flags of muster install slurm.
type installFlags struct {
	conf   string // directory of slurm.conf
	site   slurm.Site
	built  string // directory of what is to be copied
	dryRun bool
	undo   bool
}

func (a *app) installCommand() *cobra.Command {
	c := &cobra.Command{Use: "install", Short: "put muster into a scheduler's configuration, and take it out again"}
	var f installFlags
	s := &cobra.Command{
		Use:   "slurm",
		Short: "hooks, plug-in and the lines of slurm.conf and plugstack.conf",
		Long: `Writes the hooks' scripts, installs the plug-in, and adds a block of lines to slurm.conf and plugstack.conf. Each file
that changes is copied first (slurm.conf.before-muster-…). A line that the site has set itself stays, and is named with what to
do about it. --dry-run shows it all and changes nothing; --undo takes everything out again.

Afterwards: the same scripts and the plug-in belong on every node (run it there, or share the directories), then
'scontrol reconfigure'. 'muster doctor' looks at the result.`,
		Args: arguments(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error { return a.installSlurm(f) },
	}
	fl := s.Flags()
	fl.StringVar(&f.conf, "conf", "/etc/slurm", "directory of slurm.conf")
	fl.StringVar(&f.site.Hooks, "hooks", "/usr/lib/muster/slurm", "directory for the hooks' scripts, the same on all nodes")
	fl.StringVar(&f.site.Plugin, "plugin", "/usr/lib/muster/spank_muster.so", "where the plug-in is to be, the same on all nodes")
	fl.StringVar(&f.built, "from", "", "directory with spank_muster.so and task-prolog as 'make' has built them; default that of this program")
	fl.BoolVar(&f.dryRun, "dry-run", false, "show what would be written, and write nothing")
	fl.BoolVar(&f.undo, "undo", false, "take it all out again")
	a.jsonFlag(s)
	c.AddCommand(s)
	return c
}

// An installed is what install did, or would do.
type installed struct {
	Files   []installedFile `json:"files"`
	Notes   []string        `json:"notes"`
	DryRun  bool            `json:"dryRun"`
	Removed bool            `json:"removed"`
}

type installedFile struct {
	Path   string `json:"path"`
	Does   string `json:"does"` // written, removed, unchanged
	Backup string `json:"backup,omitempty"`
	Text   string `json:"text,omitempty"` // of a dry run
}

func (a *app) installSlurm(f installFlags) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	f.site.Muster, f.site.Jobs = exe, a.cfg.Hooks.Jobs
	f.site.Config = a.configFile
	if f.built == "" {
		f.built = filepath.Dir(exe)
	}
	r := installed{DryRun: f.dryRun, Removed: f.undo, Notes: []string{}}
	// The scripts and the plug-in come before the lines that name them, and go after them: Slurm never looks for what is not there.
	steps := []func(installFlags, *installed) error{a.installPlugin, a.installScripts, a.installConf}
	if f.undo {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(f, &r); err != nil {
			return err
		}
	}
	if !f.undo {
		r.Notes = append(r.Notes, "on every node: the same scripts and plug-in; then, once: scontrol reconfigure")
	}
	return a.result(r, func(w io.Writer) {
		for _, x := range r.Files {
			fmt.Fprintf(w, "%-10s %s", x.Does, x.Path)
			if x.Backup != "" {
				fmt.Fprintf(w, " (before: %s)", x.Backup)
			}
			fmt.Fprintln(w)
			if x.Text != "" {
				fmt.Fprintln(w, x.Text)
			}
		}
		for _, n := range r.Notes {
			fmt.Fprintln(w, "note:", n)
		}
	})
}

func (a *app) installScripts(f installFlags, r *installed) error {
	scripts := f.site.Scripts()
	for _, name := range slices.Sorted(maps.Keys(scripts)) {
		path := filepath.Join(f.site.Hooks, name)
		if f.undo {
			if err := remove(path, f, r); err != nil {
				return err
			}
			continue
		}
		if err := replace(path, []byte(scripts[name]), 0o755, false, f, r); err != nil {
			return err
		}
	}
	return nil
}

// installPlugin installs what is C: the plug-in, and the TaskProlog, which finds the jobs' notes through a link beside it.
func (a *app) installPlugin(f installFlags, r *installed) error {
	task, link := filepath.Join(f.site.Hooks, "task-prolog"), filepath.Join(f.site.Hooks, "jobs")
	if f.undo {
		err := errors.Join(remove(f.site.Plugin, f, r), remove(task, f, r), remove(link, f, r))
		if !f.dryRun {
			_ = os.Remove(f.site.Hooks) // only when nothing else is in it
		}
		return err
	}
	for _, x := range []struct {
		from, to string
		mode     fs.FileMode
	}{{"spank_muster.so", f.site.Plugin, 0o644}, {"task-prolog", task, 0o755}} {
		b, err := os.ReadFile(filepath.Join(f.built, x.from))
		if errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Stat(x.to); err != nil {
				return fmt.Errorf("%w: 'make plugin' builds it where gcc and libslurm-dev are installed, for one release of Slurm; --from says where it is", err)
			}
			continue
		}
		if err == nil {
			err = replace(x.to, b, x.mode, false, f, r)
		}
		if err != nil {
			return err
		}
	}
	if to, err := os.Readlink(link); f.dryRun || err == nil && to == f.site.Jobs {
		return nil
	}
	_ = os.Remove(link)
	r.Files = append(r.Files, installedFile{Path: link, Does: "written"})
	return os.Symlink(f.site.Jobs, link)
}

func (a *app) installConf(f installFlags, r *installed) error {
	for _, name := range []string{"slurm.conf", "plugstack.conf"} {
		path := filepath.Join(f.conf, name)
		if name == "plugstack.conf" {
			if own := slurm.Setting(readOr(filepath.Join(f.conf, "slurm.conf")), "PlugStackConfig"); own != "" {
				path = own
			}
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && (name == "plugstack.conf" || f.undo) {
			err = nil
		}
		if err != nil {
			return fmt.Errorf("%w; --conf names the directory of slurm.conf", err)
		}
		text := string(b)
		switch {
		case f.undo:
			text, _ = slurm.Remove(text)
		case name == "slurm.conf":
			var notes []string
			text, notes = slurm.Add(text, f.site.Keys())
			r.Notes = append(r.Notes, notes...)
		default:
			text = slurm.AddLine(text, f.site.PluginLine())
		}
		if f.undo && text == "" && len(b) > 0 { // it was ours alone
			if err := remove(path, f, r); err != nil {
				return err
			}
			continue
		}
		if err := replace(path, []byte(text), 0o644, true, f, r); err != nil {
			return err
		}
	}
	return nil
}

func readOr(path string) []byte {
	b, _ := os.ReadFile(path)
	return b
}

// replace writes a file in one step, after copying what was there when backup is wanted.
func replace(path string, b []byte, mode fs.FileMode, backup bool, f installFlags, r *installed) error {
	was, err := os.ReadFile(path)
	there := err == nil
	if there && string(was) == string(b) || !there && len(b) == 0 {
		r.Files = append(r.Files, installedFile{Path: path, Does: "unchanged"})
		return nil
	}
	done := installedFile{Path: path, Does: "written"}
	if f.dryRun {
		if backup || mode == 0o755 && len(b) < 4096 { // not programs
			done.Text = string(b)
		}
		r.Files = append(r.Files, done)
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if st, err := os.Stat(path); err == nil && backup {
		mode = st.Mode().Perm()
		done.Backup = path + ".before-muster-" + time.Now().UTC().Format("20060102T150405")
		if err := os.WriteFile(done.Backup, was, mode); err != nil {
			return err
		}
	}
	tmp := path + ".muster-new"
	if err := os.WriteFile(tmp, b, mode); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path)); err != nil {
		return err
	}
	r.Files = append(r.Files, done)
	return nil
}

func remove(path string, f installFlags, r *installed) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	r.Files = append(r.Files, installedFile{Path: path, Does: "removed"})
	if f.dryRun {
		return nil
	}
	return os.Remove(path)
}
