package store

import (
	"testing"

	"github.com/muster-hpc/muster/agent/fetch"
	"github.com/muster-hpc/muster/agent/fetch/fetchtest"
	"github.com/muster-hpc/muster/ztoc"
)

func TestConformance(t *testing.T) {
	fetchtest.Conformance(t, func(t *testing.T) fetch.Store {
		s := openStore(t, t.TempDir()+"/s", Options{})
		return fetch.StoreFunc(func(ref ztoc.BlobRef) (fetch.Blob, error) { return s.Blob(ref) })
	})
}
