package runtime

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Notify sends to c every signal that Run passes on to the command.
func Notify(c chan<- os.Signal) {
	signal.Notify(c, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGALRM, unix.SIGCONT, unix.SIGWINCH, unix.SIGXCPU)
}
