package main

import (
	"errors"
	"fmt"
)

// complain tells an error to a person: what failed (the packages below name image, host and cause),
// and the next thing to try. Never a stack trace.
func (a *app) complain(err error) {
	fmt.Fprintf(a.err, "muster: %v\n", err)
	code := exitCode(err)
	if code == exitRunFailed {
		// The reason beneath says more than "muster failed".
		var c *coded
		if errors.As(err, &c) {
			code = exitCode(c.err)
		}
	}
	for _, e := range exitCodes {
		if e.code == code && e.next != "" {
			fmt.Fprintf(a.err, "try: %s\n", e.next)
		}
	}
}
