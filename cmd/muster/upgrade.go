package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-hpc/muster/lazyfs/mountd"
)

// upgradeWait bounds the upgrade of one mount.
const upgradeWait = 90 * time.Second

func (a *app) upgradeMountsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "upgrade-mounts [DIR…]",
		Short: "have running mounts served by this program, while they are in use",
		Long: `Replaces the processes of the mounts on DIR, or of all mounts of this user (root: of
everybody), by processes of this very program: call it after a new version of muster
was installed. Who reads from a mount notices a pause of some milliseconds.

A mount that this version cannot read stays with the processes that it has; then the
exit code is 1 and the message says why.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = mountd.Mounts()
			}
			type upgraded struct {
				Dir     string  `json:"dir"`
				Seconds float64 `json:"seconds"`
			}
			done := []upgraded{}
			var failed error
			for _, dir := range args {
				began := time.Now()
				ctx, cancel := context.WithTimeout(cmd.Context(), upgradeWait)
				err := mountd.Upgrade(ctx, dir)
				cancel()
				if err != nil {
					failed = errors.Join(failed, fmt.Errorf("%w; the mount is served as before", err))
					continue
				}
				done = append(done, upgraded{dir, time.Since(began).Seconds()})
			}
			err := a.result(done, func(w io.Writer) {
				for _, d := range done {
					fmt.Fprintf(w, "%s is served by muster %s\n", d.Dir, version)
				}
			})
			return errors.Join(failed, err)
		},
	}
	a.jsonFlag(c)
	return c
}
