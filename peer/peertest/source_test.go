package peertest_test

import (
	"testing"

	"github.com/muster-hpc/muster/peer"
	"github.com/muster-hpc/muster/peer/peertest"
	"github.com/muster-hpc/muster/ztoc"
)

func TestShelf(t *testing.T) {
	peertest.TestSource(t, func(*testing.T) peertest.Fixture {
		s := &peertest.Shelf{}
		content := peertest.Content(1, 5*ztoc.PieceSize+77)
		d := ztoc.DigestOf(content)
		s.Promise(d, func(peer.Asker, ztoc.Range) bool { return true })
		return peertest.Fixture{
			Source: s, Content: content,
			Arrive: func(r ztoc.Range) { s.Write(d, r.Start, content[r.Start:r.End]) },
		}
	})
}
