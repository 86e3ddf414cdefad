package peer

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/muster-hpc/muster/ztoc"
)

// A Question is something that one host asks another, with its kinds of question and answer. []byte travels as it is, everything
// else as JSON, so hosts of two versions understand each other as far as they can. A host that does not know a question answers
// ErrUnknown. The agent may define questions of its own.
type Question[Q, A any] struct {
	Name      string        // unique; letters
	MaxAsk    int           // bytes of a question, encoded. Default 64 KiB
	MaxAnswer int           // bytes of an answer, encoded. Default 64 KiB
	Timeout   time.Duration // after which the asker gives up. Default 5 s
}

const (
	defaultQuestion = 64 << 10
	defaultTimeout  = 5 * time.Second
	maxQuestion     = 16 << 20 // bytes, whatever a question says
)

func (q Question[Q, A]) limits() (ask, answer int, timeout time.Duration) {
	ask, answer, timeout = q.MaxAsk, q.MaxAnswer, q.Timeout
	if ask <= 0 {
		ask = defaultQuestion
	}
	if answer <= 0 {
		answer = defaultQuestion
	}
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	return min(ask, maxQuestion), min(answer, maxQuestion), timeout
}

// The questions that every agent answers.
var (
	// Spec asks the host that freezes a job's JobSpec for it. The question is the job as the asker knows it.
	Spec = Question[[]byte, []byte]{Name: "Spec", MaxAsk: 4 << 20, MaxAnswer: 16 << 20, Timeout: 30 * time.Second}
	// Begin hands over a JobSpec: the stage begins at that host before its own prolog has called.
	Begin = Question[[]byte, struct{}]{Name: "Begin", MaxAsk: 16 << 20}
	// Ztoc asks for the packed ztoc of a layer; it is fetched by its own digest like any blob (Client.Blob).
	Ztoc = Question[ZtocAsk, ZtocAnswer]{Name: "Ztoc"}
	// Holders asks a directory host who has blobs, and Announce tells one.
	Holders  = Question[HoldersAsk, HoldersAnswer]{Name: "Holders", MaxAsk: 1 << 20, MaxAnswer: 4 << 20}
	Announce = Question[Announcement, struct{}]{Name: "Announce", MaxAsk: 1 << 20}
	// Tell passes a note on.
	Tell = Question[Note, struct{}]{Name: "Tell"}
	// Status asks a host for its state, in the agent's words.
	Status = Question[[]byte, []byte]{Name: "Status", MaxAnswer: 4 << 20}
)

// ZtocAsk names a layer, and the plan for which its ztoc is wanted.
type ZtocAsk struct {
	Layer ztoc.Digest
	Plan  string `json:",omitempty"`
	Grant []byte `json:",omitempty"`
}

// ZtocAnswer is where a layer's packed ztoc is: a blob at the host that answers.
type ZtocAnswer struct {
	Ref         ztoc.BlobRef
	Provisional bool   `json:",omitempty"` // built by Builder, not yet by a second host
	Builder     string `json:",omitempty"`
}

// A Note tells other hosts something that they would find out the hard way.
type Note struct {
	Kind  NoteKind
	Plan  string        `json:",omitempty"` // the plan it is about
	Host  string        `json:",omitempty"` // the host it is about
	Layer ztoc.Digest   `json:",omitempty"` // the layer it is about
	Ztoc  *ZtocAnswer   `json:",omitempty"`
	For   time.Duration `json:",omitempty"` // how long it holds; not a time of day, since clocks differ
	Text  string        `json:",omitempty"` // for people
}

// A NoteKind is what a Note says.
type NoteKind string

// The kinds of Note. Hosts ignore those that they do not know.
const (
	NoteQuiet      NoteKind = "quiet"      // the origin has said 429: nobody asks it For so long
	NoteLate       NoteKind = "late"       // Host has missed a deadline in Plan: it moves to the leaves
	NoteZtoc       NoteKind = "ztoc"       // Layer has a ztoc now: Ztoc, at Host
	NoteConfirmed  NoteKind = "confirmed"  // a second host has built the same ztoc of Layer
	NoteQuarantine NoteKind = "quarantine" // the ztoc of Layer that Host has built is wrong
)

func encode(v any) ([]byte, error) {
	if b, ok := v.([]byte); ok {
		return b, nil
	}
	return json.Marshal(v)
}

func decode[T any](b []byte) (v T, err error) {
	if p, ok := any(&v).(*[]byte); ok {
		*p = b
		return v, nil
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return v, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return v, nil
}

// Ask puts a question to a host. The error is one of this package's where the handler's was one, else it has the handler's text.
func Ask[Q, A any](ctx context.Context, c *Client, to Host, q Question[Q, A], question Q) (answer A, err error) {
	maxAsk, maxAnswer, timeout := q.limits()
	b, err := encode(question)
	if err != nil {
		return answer, err
	}
	if len(b) > maxAsk {
		return answer, fmt.Errorf("peer: question %s of %d bytes, at most %d", q.Name, len(b), maxAsk)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if b, err = c.ask.ask(ctx, to, q.Name, b, maxAnswer); err != nil {
		return answer, fmt.Errorf("%s: %s: %w", to, q.Name, err)
	}
	return decode[A](b)
}

// Handle has a server answer a question with f; from is the asker's name. f runs many times at once, and its context has
// the asker's deadline. Call it before Listen.
func Handle[Q, A any](s *Server, q Question[Q, A], f func(ctx context.Context, from string, question Q) (A, error)) {
	maxAsk, maxAnswer, timeout := q.limits()
	s.ask.handle(q.Name, func(ctx context.Context, from string, b []byte) ([]byte, error) {
		if len(b) > maxAsk {
			return nil, fmt.Errorf("%w: question %s of %d bytes", ErrProtocol, q.Name, len(b))
		}
		question, err := decode[Q](b)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		answer, err := f(ctx, from, question)
		if err != nil {
			return nil, err
		}
		out, err := encode(answer)
		if err == nil && len(out) > maxAnswer {
			err = fmt.Errorf("answer to %s of %d bytes, at most %d", q.Name, len(out), maxAnswer)
		}
		return out, err
	})
}
