package main

import (
	"errors"
	"fmt"

	"github.com/muster-hpc/muster/agent/image"
	"github.com/muster-hpc/muster/agent/origin"
	"github.com/muster-hpc/muster/costmodel"
)

// complain tells an error to a person: image, host and cause, then the next thing to try. Never a stack
// trace.
func (a *app) complain(err error) {
	text, next := err.Error(), ""
	// What an origin says names image, host and cause by itself; what was wrapped around it on the way only
	// says that again.
	var o *origin.Error
	if errors.As(err, &o) {
		said := *o
		next, said.Next = o.Next, ""
		text = said.Error()
	}
	fmt.Fprintf(a.err, "muster: %s\n", text)
	if next == "" {
		next = nextStep(err)
	}
	if next != "" {
		fmt.Fprintf(a.err, "try: %s\n", next)
	}
}

// nextStep is what usually helps against errors of this kind.
func nextStep(err error) string {
	for _, said := range []error{image.ErrNotLazy, costmodel.ErrEvents, costmodel.ErrModel, costmodel.ErrScenario} {
		if errors.Is(err, said) {
			return "" // it says so itself
		}
	}
	code := exitCode(err)
	var c *coded
	if code == exitRunFailed && errors.As(err, &c) {
		code = exitCode(c.err) // the reason beneath says more than that muster failed
	}
	for _, e := range exitCodes {
		if e.code == code {
			return e.next
		}
	}
	return ""
}
