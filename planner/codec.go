package planner

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/muster-hpc/muster/ztoc"
)

// The encoding of a JobSpec. Numbers are unsigned varints (protobuf's), strings have their length before them, digests are 32 raw bytes.
//
//	magic "mjs1"
//	planner version
//	job, image, manifest
//	piece, trees, fan-out, seeds, run
//	number of blobs;  each: digest, size, kind, 1 or 0 for a ztoc, its digest
//	number of hosts;  each: name, address, group, flags (1 seed, 2 slow)
//	access
//
// There is one encoding of a JobSpec and nothing behind it: what decodes encodes to the same bytes.
const magic = "mjs1"

const (
	flagSeed = 1 << iota
	flagSlow
)

// Encode writes s so that DecodeJobSpec reads it, or says why s is invalid.
func (s *JobSpec) Encode() ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	b := s.append(make([]byte, 0, 256+80*len(s.Blobs)+64*len(s.Hosts)))
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("%w: %d bytes encoded", ErrInvalid, len(b))
	}
	return b, nil
}

func (s *JobSpec) append(b []byte) []byte {
	number := func(n int64) { b = binary.AppendUvarint(b, uint64(n)) }
	str := func(t string) {
		number(int64(len(t)))
		b = append(b, t...)
	}
	digest := func(d ztoc.Digest) {
		raw, _ := hex.DecodeString(d.Hex()) // Validate has seen it
		b = append(b, raw...)
	}
	b = append(b, magic...)
	number(int64(s.Planner))
	str(s.Job)
	str(s.Image)
	digest(s.Manifest)
	number(s.Params.Piece)
	number(int64(s.Params.Trees))
	number(int64(s.Params.Fanout))
	number(int64(s.Params.Seeds))
	number(s.Params.Run)
	number(int64(len(s.Blobs)))
	for _, x := range s.Blobs {
		digest(x.Digest)
		number(x.Size)
		number(int64(x.Kind))
		if x.Ztoc == "" {
			number(0)
			continue
		}
		number(1)
		digest(x.Ztoc)
	}
	number(int64(len(s.Hosts)))
	for _, h := range s.Hosts {
		str(h.Name)
		str(h.Addr)
		str(h.Group)
		var flags int64
		if h.Seed {
			flags |= flagSeed
		}
		if h.Slow {
			flags |= flagSlow
		}
		number(flags)
	}
	str(string(s.Access))
	return b
}

// DecodeJobSpec reads what Encode wrote, and nothing else: ErrInvalid. A spec for another Version is read all the
// same. Memory is bounded by a small multiple of len(b).
func DecodeJobSpec(b []byte) (*JobSpec, error) {
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("%w: %d bytes encoded", ErrInvalid, len(b))
	}
	r := reader{b: b}
	if string(r.bytes(len(magic))) != magic {
		return nil, fmt.Errorf("%w: not a job spec of format %q", ErrInvalid, magic)
	}
	s := &JobSpec{}
	s.Planner = uint32(r.number(1<<32 - 1))
	s.Job = r.str(MaxName)
	s.Image = r.str(MaxImage)
	s.Manifest = r.digest()
	s.Params.Piece = int64(r.number(MaxPiece))
	s.Params.Trees = int(r.number(MaxTrees))
	s.Params.Fanout = int(r.number(MaxFanout))
	s.Params.Seeds = int(r.number(MaxSeeds))
	s.Params.Run = int64(r.number(MaxRun))
	for n := r.count(MaxBlobs, 32+3); n > 0; n-- {
		x := Blob{BlobRef: ztoc.BlobRef{Digest: r.digest(), Size: int64(r.number(1<<62 - 1))}, Kind: Kind(r.number(uint64(kinds) - 1))}
		if r.number(1) == 1 {
			x.Ztoc = r.digest()
		}
		s.Blobs = append(s.Blobs, x)
	}
	for n := r.count(MaxHosts, 4); n > 0; n-- {
		h := Host{Name: r.str(MaxName), Addr: r.str(MaxName), Group: r.str(MaxName)}
		flags := r.number(flagSeed | flagSlow)
		h.Seed, h.Slow = flags&flagSeed != 0, flags&flagSlow != 0
		s.Hosts = append(s.Hosts, h)
	}
	if a := r.str(MaxAccess); a != "" {
		s.Access = []byte(a)
	}
	if r.bad || len(r.b) != 0 {
		return nil, fmt.Errorf("%w: malformed, or something behind it", ErrInvalid)
	}
	if err := s.Validate(); err != nil {
		return nil, err
	}
	if !bytes.Equal(s.append(make([]byte, 0, len(b))), b) { // numbers written with more bytes than needed
		return nil, fmt.Errorf("%w: not in the one form", ErrInvalid)
	}
	return s, nil
}

// A reader takes values from the front of b. After something did not fit, bad is set and all it gives is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) bytes(n int) []byte {
	if n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) number(most uint64) uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 || v > most {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

// count is the number of things that follow, each of at least size bytes: a short input cannot announce many.
func (r *reader) count(most uint64, size int) int {
	n := int(r.number(most))
	if n*size > len(r.b) {
		r.bad, r.b = true, nil
		return 0
	}
	return n
}

func (r *reader) str(most uint64) string { return string(r.bytes(int(r.number(most)))) }

func (r *reader) digest() ztoc.Digest {
	var sum [32]byte
	if copy(sum[:], r.bytes(len(sum))) < len(sum) {
		return ""
	}
	return ztoc.DigestFromSum(sum)
}
