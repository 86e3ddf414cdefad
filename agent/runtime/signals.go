package runtime

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Notify sends to c every signal that Run passes on to the command, but for SIGTERM, SIGINT and SIGHUP: those mean
// the caller as long as there is no command, so that he has to receive them himself, and pass them to c from then
// on.
func Notify(c chan<- os.Signal) {
	signal.Notify(c, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGCONT, unix.SIGWINCH, unix.SIGXCPU)
}
