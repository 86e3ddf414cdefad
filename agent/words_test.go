package agent_test

import "github.com/muster-hpc/muster/ztoc"

func ztocDigest(s string) ztoc.Digest { return ztoc.Digest(s) }
