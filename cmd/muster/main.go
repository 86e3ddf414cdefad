// Muster runs container images before they have been downloaded.
//
// One file per subcommand; what they share is in config.go (the configuration and its flags), open.go
// (store, registry and image), exit.go (exit codes), complain.go (how an error is told) and progress.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/agent/runtime"
	"github.com/muster-hpc/muster/lazyfs"
	"github.com/muster-hpc/muster/lazyfs/mountd"
)

func main() {
	// The process inside a run's namespaces is this same program; it never comes back from here.
	runtime.Inside(func(ctx context.Context, dir string, o runtime.Options) (*os.File, error) {
		m := mountOptions(o.Name, o.Context)
		m.AllowOther = true // everybody in the namespace, and nobody else is
		return lazyfs.Mount(ctx, dir, m)
	})
	probeOverlay()
	// So are the processes of a mount.
	mountd.Main(buildMount, exitCode)
	os.Exit(run(os.Args[1:]))
}

// run is main without the process: arguments in, exit code out.
func run(args []string) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	a := &app{out: os.Stdout, err: os.Stderr}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			if to := a.signalsTo.Load(); to != nil {
				*to <- s
			} else if n, ok := s.(syscall.Signal); ok {
				cancel(interrupted{n})
			}
		}
	}()
	root := a.command()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var by interrupted
	if err != nil && errors.As(context.Cause(ctx), &by) {
		fmt.Fprintln(a.err, "muster:", by)
		return 128 + int(by.signal)
	}
	if err != nil && !errors.Is(err, errSaid) {
		a.complain(err)
	}
	return exitCode(err)
}

// interrupted ends what is going on because of a signal.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return "interrupted by signal: " + i.signal.String() }

// handOver passes signals to the command that runs from now on. All that end muster come in by one channel, so that
// one that comes while they are handed over goes to one of the two, and not to none.
func (a *app) handOver(to chan<- os.Signal) { a.signalsTo.Store(&to) }

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "muster",
		Short: "run container images before they have been downloaded",
		Long: `muster runs a container image from any registry before it has been downloaded:
it mounts the image at once and fetches what the program reads while it runs.

Settings come from flags, MUSTER_… variables and /etc/muster/agent.yaml, in this order:
'muster help config' lists them. 'muster help exit-codes' lists the exit codes.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return a.configure(cmd)
		},
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.CompletionOptions.HiddenDefaultCmd = true
	a.flags(root)
	root.AddCommand(
		a.runCommand(),
		a.mountCommand(),
		a.umountCommand(),
		a.upgradeMountsCommand(),
		a.ztocCommand(),
		a.indexCommand(),
		a.agentCommand(),
		a.stageCommand(),
		a.planCommand(),
		a.unstageCommand(),
		a.prestageCommand(),
		a.statusCommand(),
		a.hookCommand(),
		a.installCommand(),
		a.doctorCommand(),
		a.cacheCommand(),
		a.preflightCommand(),
		a.reportCommand(),
		a.studyCommand(),
		a.estimateCommand(),
		a.similarityCommand(),
		a.demoCommand(),
		a.versionCommand(),
		exitCodesTopic(),
		configTopic(),
	)
	return root
}

// arguments makes a wrong number of arguments a usage error, with the usage line.
func arguments(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			err = usage(fmt.Errorf("%w; usage: %s", err, cmd.UseLine()))
			if cmd.Name() == "run" {
				err = failedRun(err)
			}
			return err
		}
		return nil
	}
}

// An app is what the commands share: where to write, and the configuration once it is read.
type app struct {
	out, err   *os.File
	cfg        Config
	configFile string // as given with --config, absolute
	quiet      bool
	json       bool
	level      slog.LevelVar                    // of the log; set by openLog
	signalsTo  atomic.Pointer[chan<- os.Signal] // set while signals belong to the command that runs
}
