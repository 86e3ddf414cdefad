package peertest

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/ztoc"
)

// A Fixture is a Source under test, with one blob that Arrive fills.
type Fixture struct {
	Source peer.Source
	// Asker may open the blob, and may wait for all of it. Nothing of it is there yet.
	Asker   peer.Asker
	Content []byte // of several pieces
	// Arrive makes r of the blob readable, as a fetch does.
	Arrive func(r ztoc.Range)
}

// TestSource is what every peer.Source must do.
func TestSource(t *testing.T, fixture func(t *testing.T) Fixture) {
	type opened struct {
		Fixture
		blob   peer.Blob
		pieces []ztoc.Range
	}
	open := func(t *testing.T, p ztoc.Priority) opened {
		t.Helper()
		f := fixture(t)
		f.Asker.Priority = p
		b, err := f.Source.Open(t.Context(), f.Asker, ztoc.DigestOf(f.Content))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
		o := opened{Fixture: f, blob: b}
		for at := int64(0); at < int64(len(f.Content)); at += ztoc.PieceSize {
			o.pieces = append(o.pieces, ztoc.Piece(at/ztoc.PieceSize).Range(int64(len(f.Content))))
		}
		return o
	}
	t.Run("another blob", func(t *testing.T) {
		f := fixture(t)
		f.Asker.Priority = ztoc.Demand
		if b, err := f.Source.Open(t.Context(), f.Asker, ztoc.DigestOf([]byte("another"))); !errors.Is(err, peer.ErrNotHere) {
			t.Errorf("%v, %v; want ErrNotHere", b, err)
		}
	})
	t.Run("arrives", func(t *testing.T) {
		o := open(t, ztoc.Prefetch)
		for _, r := range o.pieces {
			if o.blob.Have(r) || !o.blob.Promised(r) {
				t.Errorf("%v: had %v, promised %v", r, o.blob.Have(r), o.blob.Promised(r))
			}
			p := make([]byte, r.Len())
			if err := o.blob.ReadAt(p, r.Start); err == nil {
				t.Errorf("%v was read before it was there", r)
			}
			o.Arrive(r)
			if !o.blob.Have(r) {
				t.Errorf("%v is not had after it arrived", r)
			}
			if err := o.blob.ReadAt(p, r.Start); err != nil || !bytes.Equal(p, o.Content[r.Start:r.End]) {
				t.Errorf("%v has other bytes; %v", r, err)
			}
			inner := span(r.Start+r.Len()/3, r.End-r.Len()/3)
			if err := o.blob.ReadAt(p[:inner.Len()], inner.Start); !o.blob.Have(inner) || err != nil {
				t.Errorf("%v within a piece: %v", inner, err)
			}
		}
	})
	t.Run("watch", func(t *testing.T) {
		// Pieces arrive while somebody begins to watch: each is had, or told, or both.
		o := open(t, ztoc.Prefetch)
		var wg sync.WaitGroup
		wg.Go(func() {
			for _, r := range o.pieces {
				o.Arrive(r)
			}
		})
		var mu sync.Mutex
		var told []ztoc.Range
		stop := o.blob.Watch(func(r ztoc.Range) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, r)
		})
		defer stop()
		var missing []ztoc.Range
		for _, r := range o.pieces {
			if !o.blob.Have(r) {
				missing = append(missing, r)
			}
		}
		wg.Wait()
		for deadline := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
			mu.Lock()
			left := 0
			for _, r := range missing {
				found := false
				for _, x := range told {
					found = found || !x.Intersect(r).Empty()
				}
				if !found {
					left++
				}
			}
			mu.Unlock()
			if left == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d pieces were neither had nor told", left, len(o.pieces))
			}
		}
		for _, r := range missing {
			if !o.blob.Have(r) {
				t.Errorf("%v was told and is not had", r)
			}
		}
	})
	t.Run("demand", func(t *testing.T) {
		o := open(t, ztoc.Demand)
		o.Arrive(o.pieces[0])
		if !o.blob.Have(o.pieces[0]) || o.blob.Have(o.pieces[1]) {
			t.Error("had is not what arrived")
		}
	})
}
