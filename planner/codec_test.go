package planner

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"
)

func TestEncoding(t *testing.T) {
	for seed := range uint64(200) {
		s := random(rand.New(rand.NewPCG(seed, 2)))
		s.Access = []byte("grant")[:seed%6]
		if len(s.Access) == 0 {
			s.Access = nil
		}
		b, err := s.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := DecodeJobSpec(b)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !reflect.DeepEqual(s, back) || s.ID() != back.ID() {
			t.Fatalf("seed %d: %+v came back as %+v", seed, s, back)
		}
		for _, bad := range [][]byte{b[:len(b)-1], append(bytes.Clone(b), 0), b[1:], nil} {
			if _, err := DecodeJobSpec(bad); !errors.Is(err, ErrInvalid) {
				t.Fatalf("seed %d: a damaged spec gives %v", seed, err)
			}
		}
	}
}

func FuzzDecodeJobSpec(f *testing.F) {
	for seed := range uint64(10) {
		s := random(rand.New(rand.NewPCG(seed, 3)))
		s.Hosts = s.Hosts[:min(len(s.Hosts), 8)]
		b, err := s.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeJobSpec(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := s.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x encodes to %x, %v", b, again, err)
		}
		if len(s.Hosts) > 100 || s.Params.Trees > 20 || s.size()/s.piece() > 1000 {
			return
		}
		if _, err := New(s); err != nil && !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
	})
}
