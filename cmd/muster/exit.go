package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/agent/runtime"
	"github.com/muster-hpc/muster/agent/store"
	"github.com/muster-hpc/muster/costmodel"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// The exit codes are an interface: scripts decide on them. They are numbered here and nowhere else.
const (
	exitDone         = 0
	exitOther        = 1
	exitUsage        = 2
	exitNoImage      = 3
	exitUnauthorized = 4
	exitUnreachable  = 5
	exitIntegrity    = 6
	exitNoSpace      = 7
	exitNoAgent      = 8
	exitUnsupported  = 9

	// Of muster run alone, as docker has them; any other code there is the command's own.
	exitRunFailed     = 125
	exitNotExecutable = 126
	exitNoCommand     = 127
)

// exitCodes says what each code means and what usually helps.
var exitCodes = []struct {
	code    int
	meaning string
	next    string
}{
	{exitDone, "done", ""},
	{exitOther, "any other error", ""},
	{exitUsage, "wrong usage: a flag, an argument or a key of the configuration", "see 'muster help' and 'muster help config'"},
	{exitNoImage, "no such image, tag or platform", "check the name and the tag, and --platform"},
	{exitUnauthorized, "not authorised", "log in with 'docker login' or 'podman login' as this user, or ask who owns the image"},
	{exitUnreachable, "the origin cannot be reached, or did not answer in time", "check the network, proxies (HTTPS_PROXY) and mirrors in /etc/containerd/certs.d; --origin-patience sets how long to wait"},
	{exitIntegrity, "bytes do not match their digest", "remove the image from the store with 'muster cache rm' and try again; if it stays, the registry or a mirror serves damaged data"},
	{exitNoSpace, "no space left in the store", "free space, run 'muster cache gc', or choose another place with --store-dir"},
	{exitNoAgent, "no agent answers", "start the agent, or use a command that needs none"},
	{exitUnsupported, "not supported on this host", "'muster version --json' shows what this host can do"},
	{exitRunFailed, "'muster run' only: muster itself failed, for any of the reasons above", "the message says which"},
	{exitNotExecutable, "'muster run' only: the command cannot be executed", "check its mode and its interpreter"},
	{exitNoCommand, "'muster run' only: the command is not in the image", "check its name and the image's PATH"},
}

// errSaid is an error that was already told to the user: only its exit code is left.
var errSaid = errors.New("already said")

// A coded is an error whose exit code is known where it arises.
type coded struct {
	code int
	err  error
}

func (c *coded) Error() string { return c.err.Error() }
func (c *coded) Unwrap() error { return c.err }

func usage(err error) error { return &coded{exitUsage, err} }

func usagef(format string, args ...any) error { return usage(fmt.Errorf(format, args...)) }

// unsupported is an error for what this host cannot do.
func unsupported(format string, args ...any) error {
	return &coded{exitUnsupported, fmt.Errorf(format, args...)}
}

// finished is how muster run returns the command's own exit code: nothing is to be said.
func finished(code int) error {
	if code == 0 {
		return nil
	}
	return &coded{code, errSaid}
}

// sentinels maps what packages return to exit codes. The first that matches counts, so what is more
// particular comes first: an image whose layer is damaged is an integrity error although the reader
// saw an I/O error.
var sentinels = []struct {
	err  error
	code int
}{
	{ztoc.ErrMismatch, exitIntegrity},
	{origin.ErrDigest, exitIntegrity},
	{store.ErrCorrupt, exitIntegrity},
	{fetch.ErrWrong, exitIntegrity},
	{origin.ErrUsage, exitUsage},
	{costmodel.ErrEvents, exitUsage},
	{costmodel.ErrModel, exitUsage},
	{costmodel.ErrScenario, exitUsage},
	{origin.ErrNotFound, exitNoImage},
	{origin.ErrPlatform, exitNoImage},
	{origin.ErrUnauthorized, exitUnauthorized},
	{origin.ErrUnreachable, exitUnreachable},
	{origin.ErrTooMany, exitUnreachable},
	{origin.ErrProtocol, exitUnreachable},
	{origin.ErrUnsupported, exitUnsupported},
	{ztoc.ErrUnsupported, exitUnsupported},
	{store.ErrNoSpace, exitNoSpace},
	{runtime.ErrNoSpace, exitNoSpace},
	{unix.ENOSPC, exitNoSpace},
	{store.ErrNetwork, exitUnsupported},
	{store.ErrHost, exitUnsupported},
	{store.ErrVersion, exitUnsupported},
	{image.ErrNotLazy, exitUnsupported},
	{lazyfs.ErrNoFUSE, exitUnsupported},
	{runtime.ErrUnsupported, exitUnsupported},
	{control.ErrNoAgent, exitNoAgent},
	{control.ErrRefused, exitUnauthorized},
	{peer.ErrWrong, exitIntegrity},
	{context.DeadlineExceeded, exitUnreachable},
	{os.ErrDeadlineExceeded, exitUnreachable},
}

// exitCode is the one place where an error becomes an exit code.
func exitCode(err error) int {
	if err == nil {
		return exitDone
	}
	var c *coded
	if errors.As(err, &c) {
		return c.code
	}
	var told *control.Error // the agent knows what failed
	if errors.As(err, &told) {
		return told.Code
	}
	return meaning(err)
}

// meaning is the exit code of an error that does not carry one.
func meaning(err error) int {
	for _, s := range sentinels {
		if errors.Is(err, s.err) {
			return s.code
		}
	}
	// cobra has no sentinel for these two.
	if s := err.Error(); strings.HasPrefix(s, "unknown command") || strings.HasPrefix(s, "required flag") {
		return exitUsage
	}
	return exitOther
}

func exitCodesTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("Exit codes of muster:\n\n")
	for _, e := range exitCodes {
		fmt.Fprintf(&b, "  %3d  %s\n", e.code, e.meaning)
	}
	b.WriteString(`
'muster run' ends with the exit code of the command, or 128 + N when signal N
ended it. When muster itself fails there the code is 125 and the message says why.
`)
	return &cobra.Command{Use: "exit-codes", Short: "what the exit codes mean", Long: b.String()}
}
