package fetchtest

import (
	"testing"

	"github.com/muster-hpc/muster/agent/fetch"
)

func TestMemoryStore(t *testing.T) {
	Conformance(t, func(*testing.T) fetch.Store { return NewStore() })
}
