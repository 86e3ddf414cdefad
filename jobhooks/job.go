package jobhooks

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-hpc/muster/agent/control"
)

// A Job is what a hook on a node has to know of a job.
type Job struct {
	Scheduler string // slurm or flux
	ID        string // as the scheduler's commands take it
	User      string // name, empty where the scheduler does not say
	UID, GID  uint32
	Image     string        // a reference, checked
	Ready     control.Ready // how much of it to wait for
	Hosts     []string      // of the job, in the scheduler's order
	Here      string        // this node, empty where the hook runs on none
	Restarts  int           // how often the job was queued again
}

// Stage is the job's name at the agents: epilogs, which know the ID only, find it again.
func (j Job) Stage() string { return j.Scheduler + "-" + j.ID }

// Speaks reports whether this node is the one that tells the scheduler what all nodes of the job see alike.
func (j Job) Speaks() bool { return len(j.Hosts) == 0 || j.Hosts[0] == j.Here }

// What a scheduler's package says of an environment.
var (
	// ErrNoImage says that the job asked for no image: nothing is to be done.
	ErrNoImage = errors.New("the job asked for no image")
	// ErrImage says that what the user asked for is not an image's reference.
	ErrImage = errors.New("not an image")
	// ErrEnvironment says that the environment is not that of the hook: it is not the scheduler that calls.
	ErrEnvironment = errors.New("not the environment of this hook")
)

// MaxReference bounds what a user may ask for, bytes.
const MaxReference = 1024

// CheckImage makes sure of what a user asked for before anything else reads it: printable ASCII without blanks, quotes, and what shells
// know, bounded, no path of this host, and then a reference by parse.
func CheckImage(s string, parse func(string) error) error {
	if s == "" || len(s) > MaxReference {
		return fmt.Errorf("%w: %d bytes, which must be 1 to %d", ErrImage, len(s), MaxReference)
	}
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("./:@_-", c) >= 0 {
			continue
		}
		return fmt.Errorf("%w: %.80q: %q cannot stand in a name", ErrImage, s, c)
	}
	if s[0] == '-' { // somebody's flag
		return fmt.Errorf("%w: %.80q", ErrImage, s)
	}
	// The agent reads a layout with root's rights.
	if strings.HasPrefix(s, "oci:") {
		return fmt.Errorf("%w: %.80q: a job's image comes from a registry", ErrImage, s)
	}
	if err := parse(s); err != nil {
		return fmt.Errorf("%w: %w", ErrImage, err)
	}
	return nil
}

// CommentImage is the image that a comment asks for: the first word "image=REF", words being parted by blanks, commas and semicolons.
func CommentImage(comment string) string {
	for _, w := range strings.FieldsFunc(comment, func(r rune) bool { return strings.ContainsRune(" \t\r\n,;", r) }) {
		if ref, ok := strings.CutPrefix(w, "image="); ok {
			return ref
		}
	}
	return ""
}

// An Outcome is how staging went on this node.
type Outcome struct {
	Mount string        // where the tree answers; empty: it does not
	Ready control.Ready // how far it is
	Code  int           // muster's exit code of what failed; 0: nothing did
	Text  string        // what failed, as the agent says it
	Late  bool          // the deadline came first: it goes on
	Took  time.Duration
}

// A Verdict is what becomes of the job.
type Verdict string

// The verdicts.
const (
	Go     Verdict = "go"      // the tree answers
	Wait   Verdict = "wait"    // it does not answer yet: the job goes on, and its first step waits
	Retry  Verdict = "retry"   // something that goes away by itself: the job is queued again
	Hold   Verdict = "hold"    // the image, or what was asked, is wrong: the job is held until its owner has had a look
	Broken Verdict = "broken"  // this node cannot mount anything
	Leave  Verdict = "nothing" // what is wrong is told elsewhere: another node of the job says so
)

// A Policy bounds patience.
type Policy struct {
	// Retries is how often a job is queued again before it is held.
	Retries int
	// NodeCannot says whether this node can mount anything at all, when it is known that it cannot.
	NodeCannot bool
}

// Exit codes of muster that verdicts depend on; they are numbered in cmd/muster.
const (
	codeUsage        = 2
	codeNoImage      = 3
	codeUnauthorized = 4
	codeUnreachable  = 5
	codeIntegrity    = 6
	codeNoSpace      = 7
	codeNoAgent      = 8
	codeUnsupported  = 9
)

// next is what the owner of a job can do about a failure with an exit code.
var next = map[int]string{
	codeNoImage:      "check name and tag",
	codeUnauthorized: "log in with 'docker login' or 'podman login' and submit again, or ask who owns the image",
	codeUnreachable:  "try again later; when it stays, ask whether the node reaches the registry",
	codeIntegrity:    "try again; when it stays, the registry serves damaged data",
	codeNoSpace:      "ask for room in the node's store of images",
	codeNoAgent:      "ask for muster's agent to be started on the node ('muster doctor' there says more)",
}

// Judge makes a verdict of an outcome.
func Judge(j Job, o Outcome, p Policy) Verdict {
	switch {
	case o.Code == 0 && o.Mount != "":
		return Go
	case o.Code == 0 || o.Late:
		return Wait
	case o.Code == codeUnsupported && p.NodeCannot:
		return Broken
	case o.Code == codeUsage || o.Code == codeNoImage || o.Code == codeUnauthorized || o.Code == codeUnsupported:
		// All nodes hear the same from the same registry: one of them says so.
		if !j.Speaks() {
			return Leave
		}
		return Hold
	case j.Restarts >= p.Retries:
		return Hold
	}
	return Retry
}

// maxMessage bounds what is put into a scheduler's records, bytes.
const maxMessage = 600

// Message is what the job's owner reads: the image, the cause, the node, the next step. It is one line of printable ASCII.
func Message(j Job, o Outcome) string {
	text := o.Text
	if !strings.Contains(text, j.Image) {
		text = "image " + j.Image + ": " + text
	}
	s := "muster: " + text
	if j.Here != "" {
		s += " (node " + j.Here + ")"
	}
	if n := next[o.Code]; n != "" && !strings.Contains(text, n) {
		s += "; " + n
	}
	return Printable(s, maxMessage)
}

// Printable is text as one line of printable ASCII of at most limit bytes: what others have said is not to move anybody's cursor.
func Printable(text string, limit int) string {
	var b strings.Builder
	for _, r := range text {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			r = ' '
		case r < ' ' || r > '~':
			r = '?'
		}
		if b.Len() == limit {
			break
		}
		b.WriteRune(r)
	}
	return strings.TrimSpace(b.String())
}
