package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/runtime"
)

// version is set by the Makefile.
var version = "unknown"

// features are what this host can do for muster, found out by trying, never from version numbers.
type features struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Kernel   string `json:"kernel"`
	Host     string `json:"host"`
	User     int    `json:"uid"`

	Fuse       bool            `json:"fuse"`            // /dev/fuse can be opened
	FuseHelper string          `json:"fusermount"`      // path, "" when not installed
	Overlay    bool            `json:"overlay"`         // the kernel has overlayfs
	UserNS     bool            `json:"user_namespaces"` // this user may make them
	Runtimes   []runtimeOnHost `json:"runtimes"`        // in the order in which muster run tries them
}

type runtimeOnHost struct {
	Name    string `json:"name"`
	Path    string `json:"path"` // "" when not installed, or when it needs no program
	Version string `json:"version"`
	Usable  bool   `json:"usable"`
}

func probe(ctx context.Context) features {
	f := features{Version: version, Go: goruntime.Version(), Platform: goruntime.GOOS + "/" + goruntime.GOARCH, User: os.Geteuid()}
	f.Host, _ = os.Hostname()
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		f.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err == nil {
		f.Fuse = true
		_ = dev.Close()
	}
	f.FuseHelper, _ = exec.LookPath("fusermount3")
	f.Overlay = hasOverlay()
	f.UserNS = mayUnshareUser(ctx)
	for _, name := range runtime.Names(f.User == 0) {
		r := runtimeOnHost{Name: name, Path: runtime.Installed(name)}
		r.Version = programVersion(ctx, r.Path)
		r.Usable = (r.Path != "" || name == "builtin") && (f.User == 0 || f.UserNS)
		f.Runtimes = append(f.Runtimes, r)
	}
	return f
}

// hasOverlay looks at what the kernel has loaded, and at the module otherwise: mounting loads it.
func hasOverlay() bool {
	b, _ := os.ReadFile("/proc/filesystems")
	if strings.Contains(string(b), "\toverlay\n") {
		return true
	}
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	_, err := os.Stat("/lib/modules/" + unix.ByteSliceToString(u.Release[:]) + "/kernel/fs/overlayfs")
	return err == nil
}

// mayUnshareUser tries with a program that does nothing.
func mayUnshareUser(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "version", "--nothing")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
	}
	return cmd.Run() == nil
}

var reVersion = regexp.MustCompile(`[0-9]+\.[0-9]+(\.[0-9]+)?[^\s,]*`)

func programVersion(ctx context.Context, path string) string {
	if path == "" {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if err != nil {
		return ""
	}
	return reVersion.FindString(string(out))
}

func (a *app) versionCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "version",
		Short: "version of muster, and what this host can do for it",
		Args:  arguments(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if nothing, _ := cmd.Flags().GetBool("nothing"); nothing {
				return nil
			}
			f := probe(cmd.Context())
			return a.result(f, func(w io.Writer) { f.print(w) })
		},
	}
	c.Flags().Bool("nothing", false, "")
	c.Flags().Lookup("nothing").Hidden = true
	a.jsonFlag(c)
	return c
}

func (f features) print(w io.Writer) {
	yes := func(b bool) string { return map[bool]string{true: "yes", false: "no"}[b] }
	tw := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	defer tw.Flush()
	fmt.Fprintf(tw, "muster\t%s (%s, %s)\n", f.Version, f.Go, f.Platform)
	fmt.Fprintf(tw, "host\t%s, Linux %s, uid %d\n", f.Host, f.Kernel, f.User)
	fmt.Fprintf(tw, "FUSE\t%s\n", yes(f.Fuse))
	fmt.Fprintf(tw, "fusermount3\t%s\n", orNone(f.FuseHelper))
	fmt.Fprintf(tw, "overlayfs\t%s\n", yes(f.Overlay))
	fmt.Fprintf(tw, "user namespaces\t%s\n", yes(f.UserNS))
	first := slices.IndexFunc(f.Runtimes, func(r runtimeOnHost) bool { return r.Usable })
	for i, r := range f.Runtimes {
		note := ""
		switch {
		case i == first:
			note = ", used by muster run"
		case !r.Usable && r.Path == "":
			note = "not installed"
		case !r.Usable:
			note = ", not usable by this user"
		}
		fmt.Fprintf(tw, "runtime %s\t%s\n", r.Name, strings.TrimPrefix(strings.TrimSpace(r.Path+" "+r.Version+note), ", "))
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// jsonFlag gives c --json.
func (a *app) jsonFlag(c *cobra.Command) {
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
}

// result prints v as JSON where that was asked for, else in the way for people.
func (a *app) result(v any, print func(io.Writer)) error {
	if !a.json {
		print(a.out)
		return nil
	}
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
