package control_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-hpc/muster/agent/control"
	"github.com/muster-hpc/muster/ztoc"
)

// fake is an agent that knows one job.
type fake struct {
	data   []byte
	caller chan control.Caller
}

var errFull = errors.New("no space")

func (f *fake) Stage(_ context.Context, c control.Caller, q control.StageRequest, tell func(control.StageEvent) error) error {
	f.caller <- c
	if q.Image == "full" {
		return fmt.Errorf("image %s: %w", q.Image, errFull)
	}
	for _, h := range q.Hosts {
		if err := tell(control.StageEvent{Hosts: []control.HostState{{Host: h, Phase: control.PhaseDone}}}); err != nil {
			return err
		}
	}
	return tell(control.StageEvent{Report: &control.Report{Job: q.Job, Ready: q.Ready}})
}

func (f *fake) Unstage(context.Context, control.Caller, control.UnstageRequest) (control.UnstageReply, error) {
	return control.UnstageReply{}, fmt.Errorf("job x: %w", control.ErrRefused)
}

func (f *fake) Status(context.Context, control.Caller, control.StatusRequest) (control.Status, error) {
	return control.Status{Host: "n1", Up: time.Second}, nil
}

func (f *fake) Prestage(ctx context.Context, _ control.Caller, _ control.PrestageRequest, _ func(control.PrestageEvent) error) error {
	<-ctx.Done()
	return ctx.Err()
}

func (f *fake) Tasks(context.Context, control.Caller, control.TasksRequest) error { return nil }

func (f *fake) FirstRead(context.Context, control.Caller, control.FirstReadRequest) error { return nil }

func (f *fake) Records(_ context.Context, c control.Caller, q control.RecordsRequest, tell func(control.RecordsEvent) error) error {
	for i := range 3 {
		if err := tell(control.RecordsEvent{Hosts: []control.HostRecords{{Host: q.Job, Records: make([]control.Record, i)}}}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) Read(_ context.Context, _ control.Caller, q control.ReadRequest, send func([]byte) error) error {
	buf := make([]byte, 1000) // one for all, as the agent does
	for b := f.data[q.Range.Start:q.Range.End]; len(b) > 0; {
		n := copy(buf, b)
		if err := send(buf[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func start(t *testing.T) (*fake, *control.Client, string) {
	t.Helper()
	f := &fake{data: make([]byte, 4<<20), caller: make(chan control.Caller, 1)}
	rand.NewChaCha8([32]byte{}).Read(f.data) //nolint:errcheck // never fails
	socket := filepath.Join(t.TempDir(), "run", "agent.sock")
	l, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := control.New(f, func(err error) int {
		if errors.Is(err, errFull) {
			return 7
		}
		return 1
	})
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	c, err := control.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return f, c, socket
}

func TestStage(t *testing.T) {
	f, c, _ := start(t)
	var hosts []string
	r, err := c.Stage(t.Context(), control.StageRequest{Job: "j", Hosts: []string{"a", "b"}, Ready: control.Complete}, func(e control.StageEvent) {
		for _, h := range e.Hosts {
			hosts = append(hosts, h.Host)
		}
	})
	if err != nil || r == nil || r.Ready != control.Complete || fmt.Sprint(hosts) != "[a b]" {
		t.Errorf("%+v, %v, %v", r, hosts, err)
	}
	if who := <-f.caller; who.UID != uint32(os.Getuid()) || who.PID != int32(os.Getpid()) {
		t.Errorf("the caller is %v", who)
	}
}

func TestErrorsKeepTheirCode(t *testing.T) {
	_, c, _ := start(t)
	_, err := c.Stage(t.Context(), control.StageRequest{Image: "full"}, nil)
	var e *control.Error
	if !errors.As(err, &e) || e.Code != 7 || e.Text != "image full: no space" {
		t.Errorf("%v", err)
	}
	if _, err := c.Unstage(t.Context(), control.UnstageRequest{}); !errors.Is(err, control.ErrRefused) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Prestage(ctx, control.PrestageRequest{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	nobody, err := control.Dial(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	defer nobody.Close()
	if _, err := nobody.Status(t.Context(), control.StatusRequest{}); !errors.Is(err, control.ErrNoAgent) {
		t.Errorf("%v", err)
	}
}

func TestRead(t *testing.T) {
	f, c, _ := start(t)
	r := ztoc.Range{Start: 5, End: 4<<20 - 5}
	b, err := c.Read(t.Context(), control.ReadRequest{Range: r})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, f.data[r.Start:r.End]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestSocketOfADeadAgentIsReplaced(t *testing.T) {
	_, _, socket := start(t)
	if l, err := control.Listen(socket); err == nil {
		l.Close()
		t.Error("two agents on one socket")
	}
	dead := filepath.Join(t.TempDir(), "agent.sock")
	if err := os.WriteFile(dead, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := control.Listen(dead)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
